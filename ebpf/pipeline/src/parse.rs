//! Header parsing: from a frame's bytes to [`Headers`], or to the reason why it is malformed.
//!
//! Unknown ethertypes and protocols are not malformed; headers that are cut off, lie about lengths, or nest deeper
//! than any honest sender needs are. Nothing that could not be parsed passes as if it had been.

use crate::reason::DropReason;
use crate::tables::{AclKey, fact};

/// Headers must end within this many bytes of the network header's start; only IPv6 extension headers can exceed it.
pub const L3_WINDOW: u32 = 232;
/// Bytes from the start of a frame within which every header lies: two MAC addresses, two tags, an ethertype and
/// [`L3_WINDOW`]. A [`Frame`] need not be able to read past it.
pub const HEADER_WINDOW: u32 = 14 + 8 + L3_WINDOW;
/// Most IPv6 extension headers.
const EXTENSIONS_MAX: u32 = 8;

/// Ethertypes that the pipeline knows.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// Customer VLAN tag (802.1Q).
    pub const CTAG: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// Service VLAN tag (802.1ad).
    pub const STAG: u16 = 0x88a8;
}

/// IP protocols that the pipeline knows.
pub mod ip_proto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// A VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// [`ethertype::CTAG`] or [`ethertype::STAG`].
    pub tpid: u16,
    /// Priority (3 bits), drop eligible (1 bit), VLAN identifier (12 bits).
    pub tci: u16,
}

impl Tag {
    /// No tag. (An `Option` would leave its bytes undefined, which the BPF verifier does not forgive.)
    pub const NONE: Tag = Tag { tpid: 0, tci: 0 };

    /// Whether there is a tag at all.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.tpid != 0
    }

    /// The VLAN identifier; 0 in a priority tag.
    #[inline(always)]
    pub const fn vid(self) -> u16 {
        self.tci & 0x0fff
    }
}

/// A frame's bytes, however they are held.
pub trait Frame {
    /// Length in bytes from the destination MAC address to the end, without [`tag`](Self::tag).
    fn length(&self) -> u32;
    /// `N` bytes from `offset`, or `None` if they reach past the end or past [`HEADER_WINDOW`].
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// `N` times four bytes from `offset`, each four as they are in memory; as [`load`](Self::load) otherwise.
    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0; N];
        let mut i = 0;
        while i < N {
            words[i] = u32::from_ne_bytes(self.load::<4>(offset + 4 * i as u32)?);
            i += 1;
        }
        Some(words)
    }
    /// The outermost VLAN tag, if it is there and travels beside the bytes (the kernel takes it out of received frames).
    fn tag(&self) -> Tag;
}

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers {
    /// Matchable fields; all but [`AclKey::vlan`] are set.
    pub key: AclKey,
    /// How many VLAN tags, 0–2, including one beside the bytes.
    pub tag_count: u32,
    /// The outermost tag, if any.
    pub outer: Tag,
    /// Offset of the network header.
    pub l3: u32,
    /// Offset of the transport header, when [`fact::L4`].
    pub l4: u32,
    /// End of the IP packet as its header says (frames may be padded), when [`fact::IP`].
    pub end: u32,
}

/// Parses a frame into `out`, which must be as [`Headers::default`] makes it: fields that a packet lacks stay untouched.
///
/// # Errors
/// The `Malformed…`, `VlanDepth` or `TinyFragment` reason that applies first, from the outside in.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, out: &mut Headers) -> Result<(), DropReason> {
    // One after the other: of a pair, the second would be undefined where the first is missing, for the BPF verifier.
    let Some(addresses) = frame.load_words::<3>(0) else {
        return Err(DropReason::MalformedEthernet);
    };
    let Some(after) = frame.load::<2>(12) else {
        return Err(DropReason::MalformedEthernet);
    };
    let halves = out.key.halves_mut();
    halves[8] = addresses[0];
    halves[9] = addresses[1];
    halves[10] = addresses[2];
    let mut ethertype = be16(after[0], after[1]);
    let mut l3 = 14;
    let mut tag_count = 0;
    let beside = frame.tag();
    if beside.is_some() {
        out.outer = beside;
        tag_count = 1;
    }
    let mut round = 0;
    while round < 2 {
        if !is_tag(ethertype) {
            break;
        }
        if tag_count == 2 {
            return Err(DropReason::VlanDepth);
        }
        let Some(tag) = frame.load::<4>(l3) else {
            return Err(DropReason::MalformedVlan);
        };
        if tag_count == 0 {
            out.outer = Tag { tpid: ethertype, tci: be16(tag[0], tag[1]) };
        }
        tag_count += 1;
        ethertype = be16(tag[2], tag[3]);
        l3 += 4;
        round += 1;
    }
    if is_tag(ethertype) {
        return Err(DropReason::VlanDepth);
    }
    out.tag_count = tag_count;
    out.l3 = l3;
    out.key.ethertype = ethertype;
    match ethertype {
        ethertype::IPV4 => parse_ipv4(frame, out),
        ethertype::IPV6 => parse_ipv6(frame, out),
        ethertype::ARP => parse_arp(frame, out),
        _ => Ok(()),
    }
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    ethertype == ethertype::CTAG || ethertype == ethertype::STAG
}

#[inline(always)]
pub(crate) const fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// The third word of `::ffff:a.b.c.d`.
pub(crate) const MAPPED: u32 = 0xffff_0000;

/// `::ffff:a.b.c.d`
#[inline(always)]
pub(crate) const fn mapped(ip: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3]]
}

#[inline(always)]
fn parse_arp<F: Frame>(frame: &F, out: &mut Headers) -> Result<(), DropReason> {
    let Some(fixed) = frame.load::<8>(out.l3) else {
        return Err(DropReason::MalformedArp);
    };
    if be16(fixed[0], fixed[1]) != 1 || be16(fixed[2], fixed[3]) != ethertype::IPV4 {
        return Ok(()); // another hardware or protocol: unknown, not malformed
    }
    if fixed[4] != 6 || fixed[5] != 4 || frame.length() < out.l3 + 28 {
        return Err(DropReason::MalformedArp);
    }
    out.key.facts |= fact::ARP;
    Ok(())
}

#[inline(always)]
fn parse_ipv4<F: Frame>(frame: &F, out: &mut Headers) -> Result<(), DropReason> {
    let Some(words) = frame.load_words::<5>(out.l3) else {
        return Err(DropReason::MalformedIpv4);
    };
    // As big-endian numbers: version, length and total; identifier and fragment; time to live, protocol and checksum.
    let (first, second, third) = (u32::from_be(words[0]), u32::from_be(words[1]), u32::from_be(words[2]));
    let header_len = (first >> 22) & 0x3c;
    if first >> 28 != 4 || header_len < 20 {
        return Err(DropReason::MalformedIpv4);
    }
    let available = frame.length() - out.l3;
    let mut total = first & 0xffff;
    if total == 0 && available > 0xffff {
        total = available; // BIG TCP: a super-frame too long for the field
    }
    if total < header_len {
        return Err(DropReason::MalformedIpv4);
    }
    if total > available {
        return Err(DropReason::MalformedLength);
    }
    out.end = out.l3 + total;
    out.key.facts |= fact::IP;
    out.key.proto = (third >> 16) as u8;
    let halves = out.key.halves_mut();
    halves[2] = MAPPED;
    halves[3] = words[3];
    halves[6] = MAPPED;
    halves[7] = words[4];
    if second & 0x1fff != 0 {
        // At offset 8 it would overwrite the flags of the first fragment (RFC 1858 section 4.2).
        let overlaps = second & 0x1fff == 1 && out.key.proto == ip_proto::TCP;
        return if overlaps { Err(DropReason::TinyFragment) } else { Ok(()) };
    }
    out.l4 = out.l3 + header_len;
    parse_l4(frame, out, second & 0x2000 != 0)
}

#[inline(always)]
fn parse_ipv6<F: Frame>(frame: &F, out: &mut Headers) -> Result<(), DropReason> {
    let Some(words) = frame.load_words::<10>(out.l3) else {
        return Err(DropReason::MalformedIpv6);
    };
    let (first, second) = (u32::from_be(words[0]), u32::from_be(words[1]));
    if first >> 28 != 6 {
        return Err(DropReason::MalformedIpv6);
    }
    let available = frame.length() - out.l3 - 40;
    let mut payload = second >> 16;
    if payload == 0 && available > 0xffff {
        payload = available; // BIG TCP
    }
    if payload > available {
        return Err(DropReason::MalformedLength);
    }
    out.end = out.l3 + 40 + payload;
    out.key.facts |= fact::IP | fact::IPV6;
    let halves = out.key.halves_mut();
    let mut i = 0;
    while i < 8 {
        halves[i] = words[2 + i];
        i += 1;
    }
    let mut next = (second >> 8) as u8;
    let mut at = 40u32; // from the start of the network header
    let mut more_fragments = false;
    let mut count = 0;
    while count <= EXTENSIONS_MAX {
        if !is_extension(next) {
            out.key.proto = next;
            out.l4 = out.l3 + at;
            return parse_l4(frame, out, more_fragments);
        }
        if count == EXTENSIONS_MAX || at + 8 > L3_WINDOW || out.l3 + at + 8 > out.end {
            return Err(DropReason::MalformedIpv6Extension);
        }
        let Some(extension) = frame.load::<4>(out.l3 + at) else {
            return Err(DropReason::MalformedIpv6Extension);
        };
        let length = match next {
            44 => {
                let fragment = be16(extension[2], extension[3]);
                if fragment & 0xfff8 != 0 {
                    out.key.proto = extension[0];
                    return Ok(());
                }
                more_fragments = fragment & 1 != 0;
                8
            }
            51 => (extension[1] as u32 + 2) * 4,
            _ => (extension[1] as u32 + 1) * 8,
        };
        at += length;
        if out.l3 + at > out.end || at > L3_WINDOW {
            return Err(DropReason::MalformedIpv6Extension);
        }
        next = extension[0];
        count += 1;
    }
    Err(DropReason::MalformedIpv6Extension)
}

/// Hop-by-hop, routing, fragment, authentication, destination options, mobility, HIP, Shim6.
#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140)
}

#[inline(always)]
fn parse_l4<F: Frame>(frame: &F, out: &mut Headers, more_fragments: bool) -> Result<(), DropReason> {
    let length = out.end - out.l4;
    let ipv6 = out.key.facts & fact::IPV6 != 0;
    let (needed, malformed) = match (out.key.proto, ipv6) {
        (ip_proto::TCP, _) => (20, DropReason::MalformedTcp),
        (ip_proto::UDP, _) => (8, DropReason::MalformedUdp),
        (ip_proto::SCTP, _) => (12, DropReason::MalformedSctp),
        (ip_proto::ICMP, false) => (8, DropReason::MalformedIcmp),
        (ip_proto::ICMPV6, true) => (4, DropReason::MalformedIcmp),
        _ => return Ok(()),
    };
    let cut_off = if more_fragments { DropReason::TinyFragment } else { malformed };
    if length < needed {
        return Err(cut_off);
    }
    if ipv6 && out.l4 + needed > out.l3 + L3_WINDOW {
        return Err(DropReason::MalformedIpv6Extension);
    }
    match out.key.proto {
        ip_proto::TCP => {
            let Some(header) = frame.load::<4>(out.l4) else {
                return Err(malformed);
            };
            let Some(after) = frame.load::<2>(out.l4 + 12) else {
                return Err(malformed);
            };
            let header_len = ((after[0] >> 4) as u32) * 4;
            if header_len < 20 {
                return Err(malformed);
            }
            if header_len > length {
                return Err(cut_off);
            }
            out.key.src_port = be16(header[0], header[1]);
            out.key.dst_port = be16(header[2], header[3]);
            out.key.tcp_flags = after[1];
        }
        ip_proto::UDP => {
            let Some(header) = frame.load::<6>(out.l4) else {
                return Err(malformed);
            };
            let datagram = be16(header[4], header[5]) as u32;
            if datagram < 8 || (datagram > length && !more_fragments) {
                return Err(malformed);
            }
            out.key.src_port = be16(header[0], header[1]);
            out.key.dst_port = be16(header[2], header[3]);
        }
        ip_proto::SCTP => {
            let Some(header) = frame.load::<4>(out.l4) else {
                return Err(malformed);
            };
            out.key.src_port = be16(header[0], header[1]);
            out.key.dst_port = be16(header[2], header[3]);
        }
        _ => {
            let Some(header) = frame.load::<2>(out.l4) else {
                return Err(malformed);
            };
            out.key.icmp_type = header[0];
            out.key.icmp_code = header[1];
        }
    }
    out.key.facts |= fact::L4;
    Ok(())
}
