//! Network-layer packets, well-formed and not.

use std::net::{IpAddr, Ipv6Addr};

use super::Rng;
use super::policies::{PORTS, ip4, ip6, station_mac, vnic_mac};
use crate::lower::link_local;
use crate::net::MacAddr;

/// Who sends, as far as packets tell.
pub(super) struct Sender {
    pub(super) mac: MacAddr,
    /// Its IPv4 address, by its guard if it has one.
    pub(super) ip4: IpAddr,
    /// Its IPv6 address, likewise.
    pub(super) ip6: IpAddr,
}

/// An ethertype and what follows it.
pub(super) fn packet(rng: &mut Rng, sender: &Sender) -> (u16, Vec<u8>) {
    match rng.below(100) {
        0..=9 => (0x0806, arp(rng, sender)),
        10..=44 => (0x0800, ipv4(rng, sender)),
        45..=84 => (0x86dd, ipv6(rng, sender)),
        85..=88 => (0x88cc, filler(rng, 60)),
        89..=92 => {
            let length = rng.below(100);
            (length as u16, filler(rng, length)) // 802.3: a length where the ethertype would be
        }
        93..=96 => (*rng.pick(&[0x0842, 0x8847, 0x9100, 0xffff]), filler(rng, 46)),
        _ => (*rng.pick(&[0x0800, 0x0806, 0x86dd]), filler(rng, 64)), // garbage
    }
}

fn filler(rng: &mut Rng, most: usize) -> Vec<u8> {
    (0..rng.below(most + 1)).map(|_| rng.byte()).collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn mac(rng: &mut Rng, sender: &Sender) -> MacAddr {
    if rng.chance(80) { sender.mac } else { station_mac(rng.below(4)) }
}

fn arp(rng: &mut Rng, sender: &Sender) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1 + rng.below(2) as u8];
    if rng.chance(12) {
        let at = rng.below(6);
        bytes[at] ^= 1 << rng.below(4);
    }
    bytes.extend(mac(rng, sender).0);
    let source = match rng.below(10) {
        0 => IpAddr::from([0, 0, 0, 0]),
        1 => ip4(rng.below(12)),
        _ => sender.ip4,
    };
    bytes.extend(octets(source));
    bytes.extend([0; 6]);
    bytes.extend(octets(ip4(rng.below(12))));
    bytes
}

fn ipv4(rng: &mut Rng, sender: &Sender) -> Vec<u8> {
    let proto = *rng.pick(&[6, 6, 6, 17, 17, 17, 1, 1, 132, 58, 47, 255]);
    let is_dhcp = proto == 17 && rng.chance(30);
    let body = if is_dhcp { dhcp(rng, 67, 68) } else { transport(rng, proto) };
    let options = if rng.chance(15) { 4 * (1 + rng.below(10)) } else { 0 };
    let header = 20 + options;
    let total = header + body.len();
    let mut bytes =
        vec![0x40 | (header / 4) as u8, 0, (total >> 8) as u8, total as u8, 0, 0, 0, 0, 64, proto, 0, 0];
    if rng.chance(18) {
        let fragment: u16 = *rng.pick(&[0x2000, 0x2000, 0x2001, 0x0001, 0x0002, 0x00b9, 0x20b9, 0x4000]);
        bytes[6..8].copy_from_slice(&fragment.to_be_bytes());
    }
    let source = match rng.below(24) {
        0 => ip4(rng.below(12)),
        1 => IpAddr::from([0, 0, 0, 0]),
        _ if is_dhcp && rng.chance(60) => IpAddr::from([0, 0, 0, 0]),
        _ => sender.ip4,
    };
    bytes.extend(octets(source));
    bytes.extend(if rng.chance(85) { octets(ip4(rng.below(12))) } else { vec![255; 4] });
    bytes.extend(std::iter::repeat_n(1, options));
    bytes.extend(body);
    lie(rng, &mut bytes, 2);
    bytes
}

/// Now and then, a length field that is wrong by a little or a lot.
fn lie(rng: &mut Rng, bytes: &mut [u8], at: usize) {
    if rng.chance(3) {
        let honest = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let lie = match rng.below(4) {
            0 => honest.wrapping_add(1 + rng.below(8) as u16),
            1 => honest.wrapping_sub(1 + rng.below(24) as u16),
            2 => 0,
            _ => rng.next() as u16,
        };
        bytes[at..at + 2].copy_from_slice(&lie.to_be_bytes());
    }
}

fn ipv6(rng: &mut Rng, sender: &Sender) -> Vec<u8> {
    let mut is_discovery = false;
    let (proto, body) = match rng.below(12) {
        0 => (17, dhcp(rng, 547, 546)),
        1..=4 => {
            is_discovery = true;
            (58, discovery(rng, sender))
        }
        _ => {
            let proto = *rng.pick(&[6, 6, 6, 17, 17, 58, 132, 1, 47, 59]);
            (proto, transport(rng, proto))
        }
    };
    let mut first = proto;
    let chain = match rng.below(100) {
        0..=9 if is_discovery => up_to_the_edge(rng, proto, &mut first),
        0..=1 => up_to_the_edge(rng, proto, &mut first),
        2..=29 => extensions(rng, proto, &mut first),
        _ => Vec::new(),
    };
    let length = chain.len() + body.len();
    let mut bytes = vec![0x60, 0, 0, 0, (length >> 8) as u8, length as u8, first, 255];
    let source = match rng.below(24) {
        0 => ip6(rng.below(12)),
        1 | 2 if is_discovery => Ipv6Addr::UNSPECIFIED.into(),
        1 => Ipv6Addr::UNSPECIFIED.into(),
        3 | 4 => link_local(sender.mac).into(),
        5 => match sender.ip4 {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().into(),
            other => other,
        },
        _ => sender.ip6,
    };
    bytes.extend(octets(source));
    bytes.extend(octets(if rng.chance(70) {
        ip6(rng.below(12))
    } else {
        IpAddr::from([0xff02, 0, 0, 0, 0, 0, 0, 1])
    }));
    bytes.extend(chain);
    bytes.extend(body);
    lie(rng, &mut bytes, 4);
    bytes
}

/// One extension header that ends at most 40 bytes before the edge of what is looked at, or one step past it.
fn up_to_the_edge(rng: &mut Rng, proto: u8, first: &mut u8) -> Vec<u8> {
    *first = 60;
    let units = 18 + rng.below(7);
    [&[proto, units as u8][..], &vec![0; (units + 1) * 8 - 2]].concat()
}

/// Extension headers that end in `proto`; the first one's number goes to `first`.
fn extensions(rng: &mut Rng, proto: u8, first: &mut u8) -> Vec<u8> {
    let count = *rng.pick(&[1, 1, 1, 2, 2, 3, 5, 7, 8, 9]);
    let kinds: Vec<u8> = (0..count).map(|_| *rng.pick(&[0, 43, 44, 51, 60, 60, 135, 139, 140])).collect();
    // Long ones bring what follows to the edge of what is looked at.
    let is_long = rng.chance(15);
    let mut bytes = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let next = kinds.get(index + 1).copied().unwrap_or(proto);
        let units = if is_long { rng.below(24) } else { rng.below(3) };
        let mut header = match kind {
            44 => {
                let fragment: u16 = *rng.pick(&[0, 1, 1, 0, 8, 9, 0x0100]);
                vec![next, 0, (fragment >> 8) as u8, fragment as u8, 0, 0, 0, 7]
            }
            51 => [&[next, units as u8][..], &vec![0; (units + 2) * 4 - 2]].concat(),
            _ => [&[next, units as u8][..], &vec![0; (units + 1) * 8 - 2]].concat(),
        };
        if rng.chance(2) {
            header[1] = rng.byte();
        }
        bytes.extend(header);
    }
    *first = kinds[0];
    bytes
}

fn transport(rng: &mut Rng, proto: u8) -> Vec<u8> {
    let (src, dst) = (rng.pick(&PORTS).to_be_bytes(), rng.pick(&PORTS).to_be_bytes());
    let payload = rng.below(40);
    let mut bytes = [src, dst].concat();
    match proto {
        6 => {
            let options = if rng.chance(30) { 4 * rng.below(11) } else { 0 };
            let flags = *rng.pick(&[0x02, 0x10, 0x12, 0x18, 0x11, 0x04, 0xff, 0]);
            let offset = if rng.chance(4) { rng.byte() } else { ((5 + options / 4) as u8) << 4 };
            bytes.extend([0; 8]);
            bytes.extend([offset, flags, 0xff, 0xff, 0, 0, 0, 0]);
            bytes.extend(vec![1; options]);
        }
        17 => {
            let length = if rng.chance(6) { rng.below(80) } else { 8 + payload } as u16;
            bytes.extend(length.to_be_bytes());
            bytes.extend([0; 2]);
        }
        132 => bytes.extend([0; 8]),
        1 => bytes = vec![*rng.pick(&[0, 3, 8, 11]), rng.below(3) as u8, 0, 0, 0, 1, 0, 1],
        58 => bytes = vec![*rng.pick(&[1, 128, 129, 143]), rng.below(3) as u8, 0, 0],
        _ => {}
    }
    bytes.extend(vec![0xa5; payload]);
    // A segment cut short inside a packet whose lengths agree.
    if rng.chance(5) {
        bytes.truncate(rng.below(24));
    }
    bytes
}

fn dhcp(rng: &mut Rng, server: u16, client: u16) -> Vec<u8> {
    let (src, dst) = match rng.below(8) {
        0..=3 => (client, server),
        4 | 5 => (server, client),
        6 => (server, server),
        _ => (1024, client),
    };
    let mut bytes = [src.to_be_bytes(), dst.to_be_bytes(), 48u16.to_be_bytes(), [0; 2]].concat();
    bytes.extend([0; 40]);
    bytes
}

/// Neighbour discovery (RFC 4861), mostly honest.
fn discovery(rng: &mut Rng, sender: &Sender) -> Vec<u8> {
    let kind = *rng.pick(&[133, 134, 134, 135, 135, 136, 136, 136, 137]);
    let fixed = match kind {
        133 => 8,
        134 => 16,
        137 => 40,
        _ => 24,
    };
    let mut bytes = vec![0; fixed];
    bytes[0] = kind;
    if fixed >= 24 {
        let target = match rng.below(10) {
            0 => ip6(rng.below(12)),
            1 | 2 => link_local(sender.mac).into(),
            _ => sender.ip6,
        };
        bytes[8..24].copy_from_slice(&octets(target));
    }
    let own = if kind >= 136 { 2 } else { 1 };
    let count = *rng.pick(&[0, 0, 0, 1, 1, 1, 1, 2, 3, 8, 9]);
    for _ in 0..count {
        let option = if rng.chance(70) { own } else { *rng.pick(&[1, 2, 3, 5, 25]) };
        let units = if rng.chance(90) { 1 } else { rng.below(4) };
        bytes.extend([option, units as u8]);
        bytes.extend(if rng.chance(90) { sender.mac.0 } else { vnic_mac(rng.below(9)).0 });
        bytes.extend(vec![0; 8 * units.saturating_sub(1)]);
    }
    if rng.chance(8) {
        bytes.truncate(rng.below(bytes.len() + 1));
    }
    bytes
}
