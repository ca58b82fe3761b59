//! Parsing with plain slices: RFC 791, 8200, 826, 9293, 768, 9260, 792 and 4443, and nothing clever.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_pipeline::{DropReason, ethertype};

use crate::net::MacAddr;

/// Headers must end within so many bytes of the IPv6 header's start: a limit of the pipeline's, part of its contract.
const IPV6_HEADERS_MAX: usize = 232;
/// Most IPv6 extension headers.
const EXTENSIONS_MAX: usize = 8;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) tpid: u16,
    pub(super) tci: u16,
}

impl Tag {
    pub(super) const fn vid(self) -> u16 {
        self.tci & 0x0fff
    }
}

/// A frame taken apart.
#[derive(Clone, Debug)]
pub(super) struct Packet<'a> {
    pub(super) dst: MacAddr,
    pub(super) src: MacAddr,
    /// Outermost first.
    pub(super) tags: Vec<Tag>,
    /// After all tags.
    pub(super) ethertype: u16,
    /// After the ethertype, padding included.
    payload: &'a [u8],
    pub(super) network: Network<'a>,
}

/// The network layer.
#[derive(Clone, Debug)]
pub(super) enum Network<'a> {
    /// Not ours to understand.
    Unknown,
    /// ARP for other than Ethernet and IPv4.
    ArpUnknown,
    Arp {
        sender_mac: MacAddr,
        sender_ip: Ipv4Addr,
    },
    Ip(Ip<'a>),
}

/// An IP packet.
#[derive(Clone, Debug)]
pub(super) struct Ip<'a> {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    /// After extension headers.
    pub(super) proto: u8,
    /// `None` if the protocol is unknown or the packet is a later fragment.
    pub(super) transport: Option<Transport<'a>>,
}

/// The transport layer.
#[derive(Clone, Debug)]
pub(super) enum Transport<'a> {
    Tcp {
        src_port: u16,
        dst_port: u16,
        flags: u8,
    },
    Udp {
        src_port: u16,
        dst_port: u16,
    },
    Sctp {
        src_port: u16,
        dst_port: u16,
    },
    /// ICMP, or ICMPv6: then with the whole message, and how much of it may be looked at.
    Icmp {
        kind: u8,
        code: u8,
        message: &'a [u8],
        readable: usize,
    },
}

impl Packet<'_> {
    /// The frame with these tags instead of its own.
    pub(super) fn with_tags<'t>(&self, tags: impl Iterator<Item = &'t Tag>) -> Vec<u8> {
        let mut bytes = [self.dst.0, self.src.0].concat();
        for tag in tags {
            bytes.extend(tag.tpid.to_be_bytes());
            bytes.extend(tag.tci.to_be_bytes());
        }
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend(self.payload);
        bytes
    }

    pub(super) fn ip(&self) -> Option<&Ip<'_>> {
        match &self.network {
            Network::Ip(ip) => Some(ip),
            _ => None,
        }
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn mac(bytes: &[u8]) -> MacAddr {
    let mut mac = [0; 6];
    mac.copy_from_slice(&bytes[..6]);
    MacAddr(mac)
}

fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

fn ipv6(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    Ipv6Addr::from(octets)
}

/// Takes a frame apart, or says why that cannot be done.
pub(super) fn parse(frame: &[u8]) -> Result<Packet<'_>, DropReason> {
    if frame.len() < 14 {
        return Err(DropReason::MalformedEthernet);
    }
    let (dst, src) = (mac(frame), mac(&frame[6..]));
    let mut ethertype = be16(frame, 12);
    let mut rest = &frame[14..];
    let mut tags = Vec::new();
    while matches!(ethertype, ethertype::CTAG | ethertype::STAG) {
        if tags.len() == 2 {
            return Err(DropReason::VlanDepth);
        }
        if rest.len() < 4 {
            return Err(DropReason::MalformedVlan);
        }
        tags.push(Tag { tpid: ethertype, tci: be16(rest, 0) });
        ethertype = be16(rest, 2);
        rest = &rest[4..];
    }
    let network = match ethertype {
        ethertype::ARP => parse_arp(rest)?,
        ethertype::IPV4 => Network::Ip(parse_ipv4(rest)?),
        ethertype::IPV6 => Network::Ip(parse_ipv6(rest)?),
        _ => Network::Unknown,
    };
    Ok(Packet { dst, src, tags, ethertype, payload: rest, network })
}

fn parse_arp(bytes: &[u8]) -> Result<Network<'_>, DropReason> {
    if bytes.len() < 8 {
        return Err(DropReason::MalformedArp);
    }
    let (hardware, protocol) = (be16(bytes, 0), be16(bytes, 2));
    if hardware != 1 || protocol != ethertype::IPV4 {
        return Ok(Network::ArpUnknown);
    }
    if bytes[4] != 6 || bytes[5] != 4 || bytes.len() < 28 {
        return Err(DropReason::MalformedArp);
    }
    Ok(Network::Arp { sender_mac: mac(&bytes[8..]), sender_ip: ipv4(&bytes[14..]) })
}

fn parse_ipv4(bytes: &[u8]) -> Result<Ip<'_>, DropReason> {
    if bytes.len() < 20 {
        return Err(DropReason::MalformedIpv4);
    }
    let (version, header) = (bytes[0] >> 4, usize::from(bytes[0] & 15) * 4);
    // A super-frame of more than 64 KiB has no room for its length and says 0.
    let total = match usize::from(be16(bytes, 2)) {
        0 if bytes.len() > 65_535 => bytes.len(),
        total => total,
    };
    if version != 4 || header < 20 || total < header {
        return Err(DropReason::MalformedIpv4);
    }
    if total > bytes.len() {
        return Err(DropReason::MalformedLength);
    }
    let (fragment, proto) = (be16(bytes, 6), bytes[9]);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    let transport = if offset == 0 {
        let segment = &bytes[header..total];
        parse_transport(segment, proto, false, more, segment.len())?
    } else if offset == 1 && proto == TCP {
        return Err(DropReason::TinyFragment); // it would overwrite the first fragment's flags (RFC 1858)
    } else {
        None
    };
    Ok(Ip { src: ipv4(&bytes[12..]).into(), dst: ipv4(&bytes[16..]).into(), proto, transport })
}

fn parse_ipv6(bytes: &[u8]) -> Result<Ip<'_>, DropReason> {
    if bytes.len() < 40 || bytes[0] >> 4 != 6 {
        return Err(DropReason::MalformedIpv6);
    }
    let available = bytes.len() - 40;
    let length = match usize::from(be16(bytes, 4)) {
        0 if available > 65_535 => available,
        length => length,
    };
    if length > available {
        return Err(DropReason::MalformedLength);
    }
    let packet = &bytes[..40 + length];
    let (src, dst) = (ipv6(&packet[8..]).into(), ipv6(&packet[24..]).into());
    let (mut next, mut at, mut extensions, mut more) = (packet[6], 40, 0, false);
    // Hop-by-hop, routing, fragment, authentication, destination options, mobility, HIP, Shim6.
    while matches!(next, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
        extensions += 1;
        if extensions > EXTENSIONS_MAX || at + 8 > packet.len() {
            return Err(DropReason::MalformedIpv6Extension);
        }
        let header = &packet[at..];
        let length = match next {
            44 => 8,
            51 => (usize::from(header[1]) + 2) * 4,
            _ => (usize::from(header[1]) + 1) * 8,
        };
        // A later fragment has no transport header to lead to.
        if next == 44 && be16(header, 2) >> 3 != 0 && at + 8 <= IPV6_HEADERS_MAX {
            return Ok(Ip { src, dst, proto: header[0], transport: None });
        }
        if at + length > packet.len() || at + length > IPV6_HEADERS_MAX {
            return Err(DropReason::MalformedIpv6Extension);
        }
        more = if next == 44 { be16(header, 2) & 1 != 0 } else { more };
        next = header[0];
        at += length;
    }
    let readable = IPV6_HEADERS_MAX - at;
    let transport = parse_transport(&packet[at..], next, true, more, readable)?;
    Ok(Ip { src, dst, proto: next, transport })
}

/// `more` says that the segment goes on in another fragment; `readable` how far into it headers may reach.
fn parse_transport(
    segment: &[u8],
    proto: u8,
    is_ipv6: bool,
    more: bool,
    readable: usize,
) -> Result<Option<Transport<'_>>, DropReason> {
    let (needed, malformed) = match proto {
        TCP => (20, DropReason::MalformedTcp),
        UDP => (8, DropReason::MalformedUdp),
        SCTP => (12, DropReason::MalformedSctp),
        ICMP if !is_ipv6 => (8, DropReason::MalformedIcmp),
        ICMPV6 if is_ipv6 => (4, DropReason::MalformedIcmp),
        _ => return Ok(None),
    };
    let cut_off = if more { DropReason::TinyFragment } else { malformed };
    if segment.len() < needed {
        return Err(cut_off);
    }
    if needed > readable {
        return Err(DropReason::MalformedIpv6Extension);
    }
    let transport = match proto {
        TCP => {
            let header = usize::from(segment[12] >> 4) * 4;
            if header < 20 {
                return Err(malformed);
            }
            if header > segment.len() {
                return Err(cut_off);
            }
            Transport::Tcp { src_port: be16(segment, 0), dst_port: be16(segment, 2), flags: segment[13] }
        }
        UDP => {
            let length = usize::from(be16(segment, 4));
            if length < 8 || (length > segment.len() && !more) {
                return Err(malformed);
            }
            Transport::Udp { src_port: be16(segment, 0), dst_port: be16(segment, 2) }
        }
        SCTP => Transport::Sctp { src_port: be16(segment, 0), dst_port: be16(segment, 2) },
        _ => Transport::Icmp { kind: segment[0], code: segment[1], message: segment, readable },
    };
    Ok(Some(transport))
}

impl fmt::Display for Packet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", self.src, self.dst)?;
        for tag in &self.tags {
            write!(f, ", tag {:#06x} VLAN {}", tag.tpid, tag.vid())?;
        }
        match &self.network {
            Network::Unknown => write!(f, ", ethertype {:#06x}", self.ethertype),
            Network::ArpUnknown => f.write_str(", ARP for other than Ethernet and IPv4"),
            Network::Arp { sender_mac, sender_ip } => write!(f, ", ARP from {sender_ip} at {sender_mac}"),
            Network::Ip(ip) => write!(f, ", {ip}"),
        }
    }
}

impl fmt::Display for Ip<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", self.src, self.dst)?;
        match &self.transport {
            None => write!(f, ", protocol {}", self.proto),
            Some(Transport::Tcp { src_port, dst_port, flags }) => {
                write!(f, ", TCP {src_port} > {dst_port} flags {flags:#04x}")
            }
            Some(Transport::Udp { src_port, dst_port }) => write!(f, ", UDP {src_port} > {dst_port}"),
            Some(Transport::Sctp { src_port, dst_port }) => write!(f, ", SCTP {src_port} > {dst_port}"),
            Some(Transport::Icmp { kind, code, .. }) => write!(f, ", ICMP type {kind} code {code}"),
        }
    }
}
