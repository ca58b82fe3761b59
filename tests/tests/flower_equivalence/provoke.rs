//! Frames that a rule of an ACL is about, or is just not about. Those of the generator meet such rules now and then; these do each time, so that
//! every field that a rule names decides about some frame.

use std::net::IpAddr;

use sluice_policy::config::{AclMatch, AclRule, Config, Direction, Vnic};
use sluice_policy::generate::Rng;
use sluice_policy::net::PortRange;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Fields in which a packet is just beside what the rule wants.
const MISSED_PERCENT: usize = 25;
/// Behind the ports, as much as the header of any protocol needs.
const BODY: usize = 40;

/// Replaces what is behind the tags of a frame by a packet that one of the sender's rules is about, if it has any.
pub(crate) fn provoke(rng: &mut Rng, config: &Config, sender: &Vnic, frame: &mut Vec<u8>) {
    let acl = &sender.policy.acl;
    let groups = config.acl_groups.iter().filter(|group| acl.groups.contains(&group.name));
    let rules = groups.flat_map(|group| &group.rules).chain(&acl.rules);
    let rules: Vec<&AclRule> = rules.filter(|rule| rule.direction == Direction::FromVm).collect();
    if rules.is_empty() {
        return;
    }
    let matches = &rng.pick(&rules).matches;
    let mut at = 12;
    while matches!(frame.get(at..at + 2), Some([0x81, 0x00] | [0x88, 0xa8])) {
        at += 4;
    }
    frame.resize(at, 0);
    for (place, mac) in [(0, matches.dst_mac), (6, matches.src_mac)] {
        if let Some(mac) = mac {
            for (byte, (value, mask)) in frame[place..].iter_mut().zip(mac.value.0.iter().zip(mac.mask.0)) {
                *byte = *byte & !mask | value;
            }
        }
    }
    let (ethertype, packet) = packet(rng, sender, matches);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
}

fn packet(rng: &mut Rng, sender: &Vnic, matches: &AclMatch) -> (u16, Vec<u8>) {
    let prefixes = [matches.src_ip, matches.dst_ip];
    let family = prefixes.iter().flatten().map(|prefix| prefix.address().is_ipv4()).next();
    let is_ipv4 = family.unwrap_or(match (matches.ethertype, matches.ip_proto) {
        (Some(ethertype), _) => ethertype == IPV4,
        (_, Some(ICMP)) => true,
        (_, Some(ICMPV6)) => false,
        _ => rng.chance(50),
    });
    if let Some(other) = matches.ethertype.filter(|ethertype| !matches!(*ethertype, IPV4 | IPV6)) {
        return (other, vec![0; BODY]);
    }
    let own = sender.policy.ip_guard.iter().copied().find(|ip| ip.is_ipv4() == is_ipv4);
    let any =
        if is_ipv4 { IpAddr::from([10, 0, 0, 1]) } else { IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]) };
    let src = matches.src_ip.map(|prefix| prefix.address()).or(own).unwrap_or(any);
    let dst = matches.dst_ip.map_or(any, |prefix| prefix.address());
    let proto = matches.ip_proto.unwrap_or(UDP);
    let body = transport(rng, proto, matches);
    let length = body.len() as u16;
    let mut packet = Vec::new();
    if is_ipv4 {
        packet.extend([0x45, 0]);
        packet.extend((20 + length).to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, proto, 0, 0]);
    } else {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend(length.to_be_bytes());
        packet.extend([proto, 255]);
    }
    for address in [src, dst] {
        match address {
            IpAddr::V4(ip) => packet.extend(ip.octets()),
            IpAddr::V6(ip) => packet.extend(ip.octets()),
        }
    }
    packet.extend(body);
    (if is_ipv4 { IPV4 } else { IPV6 }, packet)
}

fn transport(rng: &mut Rng, proto: u8, matches: &AclMatch) -> Vec<u8> {
    let mut body = vec![0; BODY];
    for (place, ranges) in [(0, &matches.src_ports), (2, &matches.dst_ports)] {
        body[place..place + 2].copy_from_slice(&port(rng, ranges).to_be_bytes());
    }
    match proto {
        TCP => {
            body[12] = 5 << 4;
            let flags = rng.byte();
            let wanted = matches.tcp_flags.filter(|_| !rng.chance(MISSED_PERCENT));
            body[13] = wanted.map_or(flags, |wanted| flags & !wanted.mask | wanted.value);
        }
        UDP => body[4..6].copy_from_slice(&(BODY as u16).to_be_bytes()),
        ICMP | ICMPV6 => {
            body[0] = matches.icmp_type.unwrap_or(8).wrapping_add(rng.chance(MISSED_PERCENT).into());
            body[1] = matches.icmp_code.unwrap_or(0).wrapping_add(rng.chance(MISSED_PERCENT).into());
        }
        _ => {}
    }
    body
}

fn port(rng: &mut Rng, ranges: &[PortRange]) -> u16 {
    if ranges.is_empty() {
        return 1024;
    }
    let range = rng.pick(ranges);
    let beyond = u16::from(rng.chance(MISSED_PERCENT));
    if rng.chance(50) { range.first().wrapping_sub(beyond) } else { range.last().wrapping_add(beyond) }
}
