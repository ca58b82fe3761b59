//! Stages 3, 4 and 6: MAC guard, IP guard, DHCP guard and RA guard.

use crate::parse::{Frame, Headers, L3_WINDOW, ethertype, ip_proto, mapped};
use crate::reason::DropReason;
use crate::tables::{IpGuardKey, PORT_MACS_MAX, PortConfig, Tables, fact, mac_word, port_flag};

/// ICMPv6 types of neighbour discovery (RFC 4861).
mod nd {
    pub(super) const ROUTER_SOLICITATION: u8 = 133;
    pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(super) const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub(super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub(super) const REDIRECT: u8 = 137;
}

/// Most ND options looked at; a message with more is dropped where the IP guard is on.
const ND_OPTIONS_MAX: u32 = 8;

/// Whether `mac`, a [`mac_word`], is one of the port's own.
#[inline(always)]
fn owns(port: &PortConfig, mac: u64) -> bool {
    let mut i = 0;
    while i < PORT_MACS_MAX {
        if i < port.mac_count as usize && port.macs[i] == mac {
            return true;
        }
        i += 1;
    }
    false
}

/// Stage 3.
#[inline(always)]
pub(crate) fn mac(port: &PortConfig, headers: &Headers) -> Result<(), DropReason> {
    let source = headers.key.src_mac_word();
    if source & 1 != 0 {
        return Err(DropReason::MulticastSource);
    }
    if port.flags & port_flag::MAC_GUARD != 0 && !owns(port, source) {
        return Err(DropReason::MacGuard);
    }
    Ok(())
}

/// Whether this is an IPv4 packet from one of the addresses in the port's configuration, so that [`ip_guard`] would let
/// it pass.
#[inline(always)]
pub(crate) fn has_first_ipv4(port: &PortConfig, headers: &Headers) -> bool {
    let source = (headers.key.words()[1] >> 32) as u32;
    headers.key.facts & (fact::IP | fact::IPV6) == fact::IP
        && source != 0
        && (source == port.guard_ipv4[0] || source == port.guard_ipv4[1])
}

/// Stage 4, for a port whose IP guard is on.
///
/// # Errors
/// `IpGuardIpv4`, `IpGuardArp`, `IpGuardIpv6` or `IpGuardNd`.
#[inline(always)]
pub fn ip_guard<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    id: u32,
    headers: &Headers,
) -> Result<(), DropReason> {
    let Some((port, _)) = tables.port(id) else {
        return Err(DropReason::PortUnknown);
    };
    let key = &headers.key;
    if key.facts & fact::IPV6 != 0 {
        return ipv6(frame, tables, id, port, headers);
    }
    if key.facts & fact::IP != 0 {
        let is_dhcp_client = key.proto == ip_proto::UDP
            && key.facts & fact::L4 != 0
            && key.src_port == 68
            && key.dst_port == 67;
        let unspecified = key.src_ip == mapped([0; 4]);
        if (unspecified && is_dhcp_client) || tables.ip_allowed(&IpGuardKey { port: id, ip: key.src_ip }) {
            return Ok(());
        }
        return Err(DropReason::IpGuardIpv4);
    }
    if key.ethertype == ethertype::ARP {
        if key.facts & fact::ARP == 0 {
            return Err(DropReason::IpGuardArp); // what cannot be checked is not let through
        }
        let Some(sender) = frame.load::<10>(headers.l3 + 8) else {
            return Err(DropReason::IpGuardArp);
        };
        let hardware = mac_word([sender[0], sender[1], sender[2], sender[3], sender[4], sender[5]]);
        if port.flags & port_flag::MAC_GUARD != 0 && !owns(port, hardware) {
            return Err(DropReason::IpGuardArp);
        }
        let address = [sender[6], sender[7], sender[8], sender[9]];
        // All zeros: the probe of RFC 5227.
        if address != [0; 4] && !tables.ip_allowed(&IpGuardKey { port: id, ip: mapped(address) }) {
            return Err(DropReason::IpGuardArp);
        }
    }
    Ok(())
}

/// Whether an IPv6 address is one of the port's. The table holds IPv4 addresses as `::ffff:a.b.c.d`: such an address in
/// an IPv6 packet is nobody's.
#[inline(always)]
fn ipv6_allowed<T: Tables>(tables: &T, id: u32, ip: [u8; 16]) -> bool {
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = ip;
    let is_mapped =
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) == 0 && u32::from_be_bytes([i, j, k, l]) == 0xffff;
    !is_mapped && tables.ip_allowed(&IpGuardKey { port: id, ip })
}

#[inline(always)]
fn ipv6<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    id: u32,
    port: &PortConfig,
    headers: &Headers,
) -> Result<(), DropReason> {
    let key = &headers.key;
    let is_icmp = key.proto == ip_proto::ICMPV6 && key.facts & fact::L4 != 0;
    if key.src_ip == [0; 16] {
        // Duplicate address detection (RFC 4862) and nothing else.
        if !(is_icmp && key.icmp_type == nd::NEIGHBOUR_SOLICITATION) {
            return Err(DropReason::IpGuardIpv6);
        }
    } else if !ipv6_allowed(tables, id, key.src_ip) {
        return Err(DropReason::IpGuardIpv6);
    }
    if !is_icmp {
        return Ok(());
    }
    // Where the options start, and which one names an address of the sender's: source (1) or target (2).
    let (fixed, own_option) = match key.icmp_type {
        nd::ROUTER_SOLICITATION => (8, 1),
        nd::ROUTER_ADVERTISEMENT => (16, 1),
        nd::NEIGHBOUR_SOLICITATION => (24, 1),
        nd::NEIGHBOUR_ADVERTISEMENT => (24, 2),
        nd::REDIRECT => (40, 2),
        _ => return Ok(()),
    };
    if key.icmp_type == nd::NEIGHBOUR_ADVERTISEMENT {
        let Some(target) = frame.load::<16>(headers.l4 + 8) else {
            return Err(DropReason::IpGuardNd);
        };
        let reach = headers.l4 + 24;
        if reach > headers.end || reach > headers.l3 + L3_WINDOW || !ipv6_allowed(tables, id, target) {
            return Err(DropReason::IpGuardNd);
        }
    }
    let mut at = headers.l4 + fixed;
    if at > headers.end {
        return Err(DropReason::IpGuardNd);
    }
    let mut count = 0;
    while count < ND_OPTIONS_MAX {
        if at == headers.end {
            return Ok(());
        }
        if at + 8 > headers.end || at + 8 > headers.l3 + L3_WINDOW {
            return Err(DropReason::IpGuardNd);
        }
        let Some(option) = frame.load::<8>(at) else {
            return Err(DropReason::IpGuardNd);
        };
        if option[1] == 0 {
            return Err(DropReason::IpGuardNd);
        }
        let address = mac_word([option[2], option[3], option[4], option[5], option[6], option[7]]);
        if option[0] == own_option && port.flags & port_flag::MAC_GUARD != 0 && !owns(port, address) {
            return Err(DropReason::IpGuardNd);
        }
        at += option[1] as u32 * 8;
        if at > headers.end {
            return Err(DropReason::IpGuardNd);
        }
        count += 1;
    }
    if at == headers.end { Ok(()) } else { Err(DropReason::IpGuardNd) }
}

/// Stage 6.
#[inline(always)]
pub(crate) fn services(port: &PortConfig, headers: &Headers) -> Result<(), DropReason> {
    let key = &headers.key;
    if key.facts & fact::L4 == 0 {
        return Ok(());
    }
    let ipv6 = key.facts & fact::IPV6 != 0;
    if port.flags & port_flag::DHCP_GUARD != 0 && key.proto == ip_proto::UDP {
        // Clients take an answer from any port.
        let (server, client) = if ipv6 { (547, 546) } else { (67, 68) };
        if key.src_port == server || key.dst_port == client {
            return Err(DropReason::DhcpGuard);
        }
    }
    if port.flags & port_flag::RA_GUARD != 0
        && ipv6
        && key.proto == ip_proto::ICMPV6
        && key.icmp_type == nd::ROUTER_ADVERTISEMENT
    {
        return Err(DropReason::RaGuard);
    }
    Ok(())
}
