//! What a flower rule matches, as netlink attributes (`TCA_FLOWER_KEY_*` of linux/pkt_cls.h) and back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_policy::config::Masked;
use sluice_policy::net::{IpPrefix, MacAddr};
use sluice_policy::placement::{FlowerMatch, VlanMatch};

use crate::netlink::attr::{Attributes, Read, each};

use super::filter::{ACTIONS, FILTER_FLAGS, IN_HW_COUNT};

pub(super) const ETH_P_ALL: u16 = 3;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;
const IPPROTO_SCTP: u8 = 132;

/// Attributes of the fixed kind. The mask of those that are pairs is the number after.
const ETH_DST: u16 = 4;
const ETH_SRC: u16 = 6;
const ETH_TYPE: u16 = 8;
const IP_PROTO: u16 = 9;
const IPV4_SRC: u16 = 10;
const IPV4_DST: u16 = 12;
const IPV6_SRC: u16 = 14;
const IPV6_DST: u16 = 16;
const VLAN_ID: u16 = 23;
const VLAN_ETH_TYPE: u16 = 25;
const FLAGS: u16 = 47;
const TCP_FLAGS: u16 = 71;
/// `TCA_FLOWER_KEY_FLAGS_IS_FRAGMENT`.
const IS_FRAGMENT: u32 = 1;

/// Where the ports of a protocol are: source, its mask, destination, its mask.
struct PortKinds {
    src: u16,
    src_mask: u16,
    dst: u16,
    dst_mask: u16,
}

const fn port_kinds(ip_proto: Option<u8>) -> Option<PortKinds> {
    match ip_proto {
        Some(IPPROTO_TCP) => Some(PortKinds { src: 18, src_mask: 35, dst: 19, dst_mask: 36 }),
        Some(IPPROTO_UDP) => Some(PortKinds { src: 20, src_mask: 37, dst: 21, dst_mask: 38 }),
        Some(IPPROTO_SCTP) => Some(PortKinds { src: 41, src_mask: 39, dst: 42, dst_mask: 40 }),
        _ => None,
    }
}

/// Code and type of ICMP; their masks are the numbers after.
const fn icmp_kinds(ip_proto: Option<u8>) -> Option<(u16, u16)> {
    match ip_proto {
        Some(IPPROTO_ICMP) => Some((49, 51)),
        Some(IPPROTO_ICMPV6) => Some((53, 55)),
        _ => None,
    }
}

const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8)
}

/// What tc calls the protocol of a rule.
pub(super) const fn protocol(matches: &FlowerMatch) -> u16 {
    match matches.ethertype {
        Some(ethertype) => ethertype,
        None => ETH_P_ALL,
    }
}

/// The keys; or which field is without the one that it needs, and would be ignored by the kernel.
pub(super) fn encode(matches: &FlowerMatch) -> Result<Attributes, &'static str> {
    let FlowerMatch {
        ethertype,
        vlan,
        src_mac,
        dst_mac,
        src_ip,
        dst_ip,
        ip_proto,
        fragment,
        src_port,
        dst_port,
        tcp_flags,
        icmp_type,
        icmp_code,
    } = matches;
    let mut keys = Attributes::default();
    if let Some(ethertype) = ethertype {
        keys = keys.put(ETH_TYPE, &ethertype.to_be_bytes());
    }
    let network =
        if ethertype.is_some_and(is_tag) { vlan.and_then(|vlan| vlan.ethertype) } else { *ethertype };
    if let Some(vlan) = vlan {
        if !ethertype.is_some_and(is_tag) {
            return Err("a VLAN without the ethertype of a tag");
        }
        if let Some(vid) = vlan.vid {
            keys = keys.put(VLAN_ID, &vid.to_ne_bytes());
        }
        if let Some(ethertype) = vlan.ethertype {
            keys = keys.put(VLAN_ETH_TYPE, &ethertype.to_be_bytes());
        }
    }
    for (kind, mac) in [(ETH_DST, dst_mac), (ETH_SRC, src_mac)] {
        if let Some(mac) = mac {
            keys = keys.put(kind, &mac.value.0).put(kind + 1, &mac.mask.0);
        }
    }
    for (prefix, ipv4, ipv6) in [(src_ip, IPV4_SRC, IPV6_SRC), (dst_ip, IPV4_DST, IPV6_DST)] {
        let Some(prefix) = prefix else { continue };
        keys = match (prefix.address(), network) {
            (IpAddr::V4(ip), Some(ETH_P_IP)) => keys.put(ipv4, &ip.octets()).put(ipv4 + 1, &mask4(*prefix)),
            (IpAddr::V6(ip), Some(ETH_P_IPV6)) => keys.put(ipv6, &ip.octets()).put(ipv6 + 1, &mask6(*prefix)),
            _ => return Err("an IP prefix without the ethertype of its family"),
        };
    }
    if let Some(ip_proto) = ip_proto {
        if !matches!(network, Some(ETH_P_IP | ETH_P_IPV6)) {
            return Err("an IP protocol without the ethertype of IP");
        }
        keys = keys.put(IP_PROTO, &[*ip_proto]);
    }
    if let Some(fragment) = fragment {
        let value = if *fragment { IS_FRAGMENT } else { 0 };
        keys = keys.put(FLAGS, &value.to_be_bytes()).put(FLAGS + 1, &IS_FRAGMENT.to_be_bytes());
    }
    if src_port.is_some() || dst_port.is_some() {
        let kinds = port_kinds(*ip_proto).ok_or("a port without a protocol that has ports")?;
        let ports = [(src_port, kinds.src, kinds.src_mask), (dst_port, kinds.dst, kinds.dst_mask)];
        for (port, kind, mask_kind) in ports {
            if let Some(port) = port {
                keys = keys.put(kind, &port.value.to_be_bytes()).put(mask_kind, &port.mask.to_be_bytes());
            }
        }
    }
    if let Some(flags) = tcp_flags {
        if *ip_proto != Some(IPPROTO_TCP) {
            return Err("TCP flags without TCP");
        }
        let wide = |byte: u8| u16::from(byte).to_be_bytes();
        keys = keys.put(TCP_FLAGS, &wide(flags.value)).put(TCP_FLAGS + 1, &wide(flags.mask));
    }
    if icmp_type.is_some() || icmp_code.is_some() {
        let (code_kind, type_kind) = icmp_kinds(*ip_proto).ok_or("an ICMP type without ICMP")?;
        for (value, kind) in [(icmp_code, code_kind), (icmp_type, type_kind)] {
            if let Some(value) = value {
                keys = keys.put(kind, &[*value]).put(kind + 1, &[0xff]);
            }
        }
    }
    Ok(keys)
}

/// The match that the kernel holds, if we could have written it.
pub(super) fn decode(protocol: u16, options: &[u8]) -> Option<FlowerMatch> {
    let keys = &Read::new(options);
    let ethertype = (protocol != ETH_P_ALL).then_some(protocol);
    let vlan = VlanMatch { vid: keys.u16(VLAN_ID), ethertype: keys.be16(VLAN_ETH_TYPE) };
    let ip_proto = keys.u8(IP_PROTO);
    let ports = port_kinds(ip_proto);
    let port = |kind: u16, mask: u16| Some(Masked { value: keys.be16(kind)?, mask: keys.be16(mask)? });
    let icmp = icmp_kinds(ip_proto);
    let mac =
        |kind: u16| Some(Masked { value: MacAddr(keys.array(kind)?), mask: MacAddr(keys.array(kind + 1)?) });
    let matches = FlowerMatch {
        ethertype,
        vlan: (vlan != VlanMatch::default()).then_some(vlan),
        src_mac: mac(ETH_SRC),
        dst_mac: mac(ETH_DST),
        src_ip: prefix4(keys, IPV4_SRC).or_else(|| prefix6(keys, IPV6_SRC)),
        dst_ip: prefix4(keys, IPV4_DST).or_else(|| prefix6(keys, IPV6_DST)),
        ip_proto,
        fragment: keys.array(FLAGS).map(|flags| u32::from_be_bytes(flags) & IS_FRAGMENT != 0),
        src_port: ports.as_ref().and_then(|kinds| port(kinds.src, kinds.src_mask)),
        dst_port: ports.as_ref().and_then(|kinds| port(kinds.dst, kinds.dst_mask)),
        tcp_flags: keys
            .be16(TCP_FLAGS)
            .zip(keys.be16(TCP_FLAGS + 1))
            .map(|(value, mask)| Masked { value: value as u8, mask: mask as u8 }),
        icmp_type: icmp.and_then(|(_, kind)| keys.u8(kind)),
        icmp_code: icmp.and_then(|(kind, _)| keys.u8(kind)),
    };
    // What we know is not all that there may be: only if it comes to the same attributes, it is the same.
    (keys_of(&encode(&matches).ok()?.into_bytes()) == keys_of(options)).then_some(matches)
}

/// The attributes that are keys, but for the ethertype: the kernel names there what is behind the tag.
fn keys_of(options: &[u8]) -> BTreeMap<u16, &[u8]> {
    let is_key = |kind: u16| !matches!(kind, ACTIONS | FILTER_FLAGS | IN_HW_COUNT | ETH_TYPE);
    each(options).filter(|(kind, _)| is_key(*kind)).collect()
}

fn mask4(prefix: IpPrefix) -> [u8; 4] {
    u32::MAX.checked_shl(32 - u32::from(prefix.length())).unwrap_or(0).to_be_bytes()
}

fn mask6(prefix: IpPrefix) -> [u8; 16] {
    u128::MAX.checked_shl(128 - u32::from(prefix.length())).unwrap_or(0).to_be_bytes()
}

fn prefix4(keys: &Read<'_>, kind: u16) -> Option<IpPrefix> {
    let mask = u32::from_be_bytes(keys.array(kind + 1)?);
    IpPrefix::new(IpAddr::from(keys.array::<4>(kind)?), mask.leading_ones() as u8).ok()
}

fn prefix6(keys: &Read<'_>, kind: u16) -> Option<IpPrefix> {
    let mask = u128::from_be_bytes(keys.array(kind + 1)?);
    IpPrefix::new(IpAddr::from(keys.array::<16>(kind)?), mask.leading_ones() as u8).ok()
}
