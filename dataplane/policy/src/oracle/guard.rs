//! Stages 3, 4 and 6: what a VM may say about who it is, and which services it may offer.

use std::net::{IpAddr, Ipv6Addr};

use sluice_pipeline::{DropReason, ethertype};

use super::packet::{Ip, Network, Packet, Transport};
use super::ports::Port;
use crate::config::Vnic;
use crate::net::MacAddr;

type Finding = Result<String, (DropReason, String)>;

/// Stage 3.
pub(super) fn mac(port: &Port<'_>, packet: &Packet<'_>) -> Finding {
    if packet.src.is_group() {
        return Err((DropReason::MulticastSource, format!("{} cannot be a source", packet.src)));
    }
    match port.vnic {
        None => Ok("not a vNIC".into()),
        Some(vnic) if vnic.policy.allow_spoofing => Ok("spoofing is allowed".into()),
        Some(_) if port.macs.contains(&packet.src) => Ok(format!("{} is its own", packet.src)),
        Some(_) => Err((DropReason::MacGuard, format!("{} is not its own", packet.src))),
    }
}

/// Stage 4.
pub(super) fn ip(port: &Port<'_>, packet: &Packet<'_>) -> Finding {
    let Some(vnic) = port.vnic.filter(|vnic| !vnic.policy.ip_guard.is_empty()) else {
        return Ok("no addresses to guard".into());
    };
    let allowed = allowed_addresses(vnic, &port.macs);
    let owns_mac = |mac: MacAddr| vnic.policy.allow_spoofing || port.macs.contains(&mac);
    match &packet.network {
        Network::Arp { sender_mac, sender_ip } => {
            if !owns_mac(*sender_mac) {
                return Err((DropReason::IpGuardArp, format!("ARP sender {sender_mac} is not its own")));
            }
            // 0.0.0.0 is a probe (RFC 5227).
            if !sender_ip.is_unspecified() && !allowed.contains(&IpAddr::V4(*sender_ip)) {
                return Err((DropReason::IpGuardArp, format!("ARP sender {sender_ip} is not its own")));
            }
            Ok(format!("ARP sender {sender_ip} is allowed"))
        }
        Network::ArpUnknown => Err((DropReason::IpGuardArp, "ARP that cannot be checked".into())),
        Network::Unknown => {
            debug_assert_ne!(packet.ethertype, ethertype::ARP);
            Ok("not IP".into())
        }
        Network::Ip(ip) => match ip.src {
            IpAddr::V4(_) => ipv4(ip, &allowed),
            IpAddr::V6(src) => ipv6(ip, src, &allowed, owns_mac),
        },
    }
}

fn allowed_addresses(vnic: &Vnic, macs: &[MacAddr]) -> Vec<IpAddr> {
    let mut allowed = vnic.policy.ip_guard.clone();
    if allowed.iter().any(IpAddr::is_ipv6) {
        for mac in macs {
            let [a, b, c, d, e, f] = mac.0.map(u16::from);
            let interface = [(a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f];
            let address =
                Ipv6Addr::new(0xfe80, 0, 0, 0, interface[0], interface[1], interface[2], interface[3]);
            allowed.push(address.into());
        }
    }
    allowed
}

fn ipv4(ip: &Ip<'_>, allowed: &[IpAddr]) -> Finding {
    if allowed.contains(&ip.src) {
        return Ok(format!("source {} is its own", ip.src));
    }
    match ip.transport {
        Some(Transport::Udp { src_port: 68, dst_port: 67 }) if ip.src.is_unspecified() => {
            Ok("a DHCP client without an address yet".into())
        }
        _ => Err((DropReason::IpGuardIpv4, format!("source {} is not its own", ip.src))),
    }
}

fn ipv6(ip: &Ip<'_>, src: Ipv6Addr, allowed: &[IpAddr], owns_mac: impl Fn(MacAddr) -> bool) -> Finding {
    let is_solicitation = matches!(ip.transport, Some(Transport::Icmp { kind: 135, .. }));
    if src.is_unspecified() && !is_solicitation {
        return Err((DropReason::IpGuardIpv6, ":: is for duplicate address detection only".into()));
    }
    if !src.is_unspecified() && !allowed.contains(&src.into()) {
        return Err((DropReason::IpGuardIpv6, format!("source {src} is not its own")));
    }
    let Some(Transport::Icmp { kind, message, readable, .. }) = &ip.transport else {
        return Ok(format!("source {src} is its own"));
    };
    neighbour_discovery(*kind, message, *readable, allowed, owns_mac)
        .map(|()| format!("source {src} and what it advertises are its own"))
        .map_err(|text| (DropReason::IpGuardNd, text))
}

/// Checks what a neighbour discovery message (RFC 4861) says about its sender.
fn neighbour_discovery(
    kind: u8,
    message: &[u8],
    readable: usize,
    allowed: &[IpAddr],
    owns_mac: impl Fn(MacAddr) -> bool,
) -> Result<(), String> {
    const SOURCE_LINK_LAYER: u8 = 1;
    const TARGET_LINK_LAYER: u8 = 2;
    // Length of the fixed part, and the option that names the sender's own address.
    let (fixed, own_option) = match kind {
        133 => (8, SOURCE_LINK_LAYER),
        134 => (16, SOURCE_LINK_LAYER),
        135 => (24, SOURCE_LINK_LAYER),
        136 => (24, TARGET_LINK_LAYER),
        137 => (40, TARGET_LINK_LAYER),
        _ => return Ok(()),
    };
    if message.len() < fixed {
        return Err("cut off".into());
    }
    if kind == 136 {
        if fixed > readable {
            return Err("its target is too far from the start of the packet".into());
        }
        let mut target = [0; 16];
        target.copy_from_slice(&message[8..24]);
        let target = IpAddr::from(target);
        if !allowed.contains(&target) {
            return Err(format!("advertises {target}, which is not its own"));
        }
    }
    let (mut at, mut count) = (fixed, 0);
    while at < message.len() {
        count += 1;
        if count > 8 {
            return Err("more than eight options".into());
        }
        let Some(option) = message[at..].get(..8).filter(|_| at + 8 <= readable) else {
            return Err("an option is cut off, or too far from the start of the packet".into());
        };
        let length = usize::from(option[1]) * 8;
        if length == 0 {
            return Err("an option of no length".into());
        }
        let mut mac = [0; 6];
        mac.copy_from_slice(&option[2..]);
        if option[0] == own_option && !owns_mac(MacAddr(mac)) {
            return Err(format!("claims the link-layer address {}, which is not its own", MacAddr(mac)));
        }
        at += length;
    }
    if at == message.len() { Ok(()) } else { Err("an option reaches past the end".into()) }
}

/// Stage 6.
pub(super) fn services(port: &Port<'_>, packet: &Packet<'_>) -> Finding {
    let (Some(vnic), Some(ip)) = (port.vnic, packet.ip()) else {
        return Ok("nothing to guard".into());
    };
    if vnic.policy.dhcp_guard
        && let Some(Transport::Udp { src_port, dst_port }) = ip.transport
    {
        let (server, client) = if ip.src.is_ipv6() { (547, 546) } else { (67, 68) };
        if src_port == server || dst_port == client {
            return Err((DropReason::DhcpGuard, "a DHCP server's message".into()));
        }
    }
    if vnic.policy.ra_guard
        && ip.src.is_ipv6()
        && let Some(Transport::Icmp { kind: 134, .. }) = ip.transport
    {
        return Err((DropReason::RaGuard, "a router advertisement".into()));
    }
    Ok("no service that it must not offer".into())
}
