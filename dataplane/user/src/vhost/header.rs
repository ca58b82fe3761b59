//! The header in front of every frame of virtio-net (VIRTIO 1.3, 5.1.6): read with distrust, written with care.
//!
//! What a guest's header claims is checked against what was negotiated and against the frame's own bytes, after they were
//! copied and the guest can no longer change them.

use std::num::NonZeroU16;

use sluice_pipeline::L3_WINDOW;

use super::error::FrameFault;
use crate::frame::{Checksum, Gso, GsoKind, Offload};
use crate::port::Accepts;

/// The longest header, with a count of buffers.
pub(crate) const MAX_HEADER: usize = 12;

/// How long a queue's headers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderKind {
    /// Without a count of buffers: of drivers from before virtio 1.0.
    Short,
    /// With it.
    Long,
}

impl HeaderKind {
    /// Bytes.
    #[inline(always)]
    pub(crate) fn len(self) -> usize {
        match self {
            HeaderKind::Short => 10,
            HeaderKind::Long => MAX_HEADER,
        }
    }
}

const NEEDS_CSUM: u8 = 1;
/// The bytes hold a checksum that somebody has checked.
pub(crate) const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// The smallest segment that is cut: the smallest MSS of Linux (`tcp_min_snd_mss`). Less would turn one frame into thousands.
const SMALLEST_SEGMENT: u16 = 48;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A header as it lies in memory, in words: put together or taken apart byte by byte, it would have to be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawHeader {
    /// Flags, kind of segments, length of headers (two bytes), size of segments (two), where the checksum begins (two).
    words: u64,
    /// Where the checksum goes (two), and the count of buffers (two).
    rest: u32,
}

impl RawHeader {
    /// Of a frame in one buffer, of which nothing is to be said.
    const PLAIN: RawHeader = RawHeader { words: 0, rest: 1 << 16 };

    /// Of a frame of which nothing is asked.
    pub(super) const NOTHING: RawHeader = RawHeader { words: 0, rest: 0 };

    /// One that was read. Of the count of buffers drivers say nothing.
    #[inline(always)]
    pub(crate) fn new(first: [u8; 8], csum_offset: [u8; 2]) -> Self {
        Self { words: u64::from_le_bytes(first), rest: u16::from_le_bytes(csum_offset).into() }
    }

    /// The same, of a frame in so many buffers.
    pub(super) fn in_buffers(self, count: usize) -> Self {
        Self { rest: self.rest & 0xffff | (count as u32) << 16, ..self }
    }

    /// The first eight bytes, and the other four, of which [short](HeaderKind::Short) headers have two.
    #[inline(always)]
    pub(super) fn parts(self) -> ([u8; 8], [u8; 4]) {
        (self.words.to_le_bytes(), self.rest.to_le_bytes())
    }

    /// All bytes.
    pub(crate) fn to_bytes(self) -> [u8; MAX_HEADER] {
        let mut bytes = [0; MAX_HEADER];
        let (first, rest) = self.parts();
        bytes[..8].copy_from_slice(&first);
        bytes[8..].copy_from_slice(&rest);
        bytes
    }

    /// Whether nothing is to be done. DATA_VALID is not for drivers to set: what they claim of their own checksums is not believed.
    #[inline(always)]
    pub(crate) fn asks_nothing(self) -> bool {
        const ASKED: u64 = NEEDS_CSUM as u64 | 0xff << 8;
        self.words & ASKED == 0
    }
}

/// A header, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    flags: u8,
    gso_type: u8,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl From<RawHeader> for Header {
    fn from(RawHeader { words, rest }: RawHeader) -> Self {
        Self {
            flags: words as u8,
            gso_type: (words >> 8) as u8,
            gso_size: (words >> 32) as u16,
            csum_start: (words >> 48) as u16,
            csum_offset: rest as u16,
        }
    }
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; MAX_HEADER]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, ..] = *bytes;
        RawHeader::new([a, b, c, d, e, f, g, h], [i, j]).into()
    }

    /// What the header asks to be done to `frame`, if it may.
    #[inline]
    pub(crate) fn offload(&self, frame: &[u8], allowed: Accepts) -> Result<Offload, FrameFault> {
        if self.flags & NEEDS_CSUM == 0 && self.gso_type == GSO_NONE {
            return Ok(Offload::default());
        }
        self.asked(frame, allowed)
    }

    fn asked(&self, frame: &[u8], allowed: Accepts) -> Result<Offload, FrameFault> {
        if self.flags & NEEDS_CSUM == 0 || !allowed.checksum {
            return Err(FrameFault::NotNegotiated);
        }
        let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
        if start < ETHERNET || start + offset + 2 > frame.len() {
            return Err(FrameFault::ChecksumOutside);
        }
        let checksum = Checksum::Partial { start: self.csum_start, offset: self.csum_offset };
        let gso = if self.gso_type == GSO_NONE { None } else { self.segments(frame, allowed)? };
        Ok(Offload { checksum, gso })
    }

    fn segments(&self, frame: &[u8], allowed: Accepts) -> Result<Option<Gso>, FrameFault> {
        let ecn = self.gso_type & GSO_ECN != 0;
        let (kind, may) = match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => (GsoKind::TcpV4, allowed.tcp_v4),
            GSO_TCPV6 => (GsoKind::TcpV6, allowed.tcp_v6),
            GSO_UDP_L4 => (GsoKind::Udp, allowed.udp && !ecn),
            _ => return Err(FrameFault::NotNegotiated),
        };
        if !may || (ecn && !allowed.ecn) {
            return Err(FrameFault::NotNegotiated);
        }
        let size = NonZeroU16::new(self.gso_size).ok_or(FrameFault::SegmentSize)?;
        if size.get() < SMALLEST_SEGMENT {
            return Err(FrameFault::SegmentSize);
        }
        let headers = headers_len(frame, kind, usize::from(self.csum_start), usize::from(self.csum_offset));
        let headers = headers.ok_or(FrameFault::Mismatch)?;
        // One segment is an ordinary frame.
        let is_one = frame.len() - headers <= usize::from(size.get());
        Ok((!is_one).then_some(Gso { kind, size, ecn }))
    }
}

/// Bytes of all headers of a super-frame; None if it is not what `kind` says, with its transport header at `transport`.
fn headers_len(frame: &[u8], kind: GsoKind, transport: usize, offset: usize) -> Option<usize> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let mut network = ETHERNET;
    let mut ethertype = word(12)?;
    while VLAN_TAGS.contains(&ethertype) && network < ETHERNET + 8 {
        ethertype = word(network + 2)?;
        network += 4;
    }
    let protocol = match (kind, ethertype) {
        (GsoKind::TcpV4 | GsoKind::Udp, IPV4) => {
            let first = *frame.get(network)?;
            let ends = network + usize::from(first & 0xf) * 4;
            let is_whole = word(network + 6)? & 0x3fff == 0;
            let fits = first >> 4 == 4 && first & 0xf >= 5 && ends == transport && is_whole;
            fits.then_some(*frame.get(network + 9)?)?
        }
        (GsoKind::TcpV6 | GsoKind::Udp, IPV6) => {
            // Extension headers may stand between; only what is plainly wrong is refused here.
            let next = *frame.get(network + 6)?;
            let fits = *frame.get(network)? >> 4 == 6 && transport >= network + 40;
            let is_plain = transport == network + 40;
            fits.then_some(if is_plain { next } else { transport_of(kind) })?
        }
        _ => return None,
    };
    if protocol != transport_of(kind) {
        return None;
    }
    let (header, checksum_at) = match kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => (usize::from(*frame.get(transport + 12)? >> 4) * 4, 16),
        GsoKind::Udp => (8, 6),
    };
    let smallest = if protocol == TCP { 20 } else { 8 };
    let end = transport + header;
    // Each segment gets a copy of the headers: they end where those of all frames have to.
    let is_near = end <= network + L3_WINDOW as usize;
    (header >= smallest && is_near && offset == checksum_at && end < frame.len()).then_some(end)
}

fn transport_of(kind: GsoKind) -> u8 {
    match kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => TCP,
        GsoKind::Udp => UDP,
    }
}

/// The header of a frame for the guest, which takes `accepts`; the count of buffers is left at one.
#[inline]
pub(crate) fn header_for(frame: &[u8], offload: Offload, accepts: Accepts) -> Result<RawHeader, FrameFault> {
    if offload.checksum == Checksum::Unverified && offload.gso.is_none() {
        return Ok(RawHeader::PLAIN);
    }
    let mut header = RawHeader::PLAIN;
    match offload.checksum {
        Checksum::Unverified => {}
        Checksum::Valid if accepts.checksum => header.words = DATA_VALID.into(),
        Checksum::Valid => {}
        Checksum::Partial { start, offset } => {
            if !accepts.checksum {
                return Err(FrameFault::NotAccepted);
            }
            header.words = u64::from(start) << 48 | u64::from(NEEDS_CSUM);
            header.rest |= u32::from(offset);
        }
    }
    if let Some(gso) = offload.gso {
        header.words |= super_frame(frame, offload, gso, accepts)?;
    }
    Ok(header)
}

/// Kind and size of segments and length of headers, in their places.
fn super_frame(frame: &[u8], offload: Offload, gso: Gso, accepts: Accepts) -> Result<u64, FrameFault> {
    let (kind, may) = match gso.kind {
        GsoKind::TcpV4 => (GSO_TCPV4, accepts.tcp_v4),
        GsoKind::TcpV6 => (GSO_TCPV6, accepts.tcp_v6),
        GsoKind::Udp => (GSO_UDP_L4, accepts.udp),
    };
    let Checksum::Partial { start, offset } = offload.checksum else { return Err(FrameFault::NotAccepted) };
    if !may || (gso.ecn && !accepts.ecn) {
        return Err(FrameFault::NotAccepted);
    }
    let headers = headers_len(frame, gso.kind, usize::from(start), usize::from(offset));
    let headers = headers.ok_or(FrameFault::Mismatch)?;
    let kind = kind | if gso.ecn { GSO_ECN } else { 0 };
    Ok(u64::from(kind) << 8 | (headers as u64 & 0xffff) << 16 | u64::from(gso.size.get()) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of TCP over IPv4 with so much payload.
    fn tcp_v4(payload: usize) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 20 + payload];
        frame[12..14].copy_from_slice(&IPV4.to_be_bytes());
        frame[14] = 0x45;
        frame[14 + 9] = TCP;
        frame[34 + 12] = 0x50;
        frame
    }

    fn header(flags: u8, gso_type: u8, gso_size: u16, csum_start: u16, csum_offset: u16) -> Header {
        Header { flags, gso_type, gso_size, csum_start, csum_offset }
    }

    fn good() -> Header {
        header(NEEDS_CSUM, GSO_TCPV4, 1448, 34, 16)
    }

    #[test]
    fn an_honest_super_frame_passes_both_ways() {
        let frame = tcp_v4(9000);
        let offload = good().offload(&frame, Accepts::ALL).unwrap();
        assert_eq!(offload.gso.unwrap().size.get(), 1448);
        let bytes = header_for(&frame, offload, Accepts::ALL).unwrap().to_bytes();
        assert_eq!(Header::parse(&bytes), good());
        assert_eq!(bytes[2], 54, "length of all headers");
        assert_eq!(bytes[10], 1, "one buffer");
    }

    #[test]
    fn tags_move_the_headers() {
        let mut frame = tcp_v4(9000);
        frame.splice(12..12, [0x81, 0, 0, 5]);
        let moved = header(NEEDS_CSUM, GSO_TCPV4, 1448, 38, 16);
        assert!(moved.offload(&frame, Accepts::ALL).unwrap().gso.is_some());
        assert_eq!(good().offload(&frame, Accepts::ALL), Err(FrameFault::Mismatch));
    }

    #[test]
    fn a_super_frame_of_one_segment_is_an_ordinary_frame() {
        let offload = good().offload(&tcp_v4(1448), Accepts::ALL).unwrap();
        assert_eq!(offload.gso, None);
        assert!(matches!(offload.checksum, Checksum::Partial { start: 34, offset: 16 }));
    }

    #[test]
    fn each_lie_is_refused() {
        use FrameFault::*;
        let frame = tcp_v4(9000);
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        let mut udp = frame.clone();
        udp[23] = UDP;
        let mut short_header = frame.clone();
        short_header[46] = 0x40;
        let mut endless_header = tcp_v4(20);
        endless_header[46] = 0xf0;
        let cases: [(&str, Header, &[u8], FrameFault); 14] = [
            ("segments of nothing", header(1, GSO_TCPV4, 0, 34, 16), &frame, SegmentSize),
            ("segments of one byte", header(1, GSO_TCPV4, 1, 34, 16), &frame, SegmentSize),
            ("no checksum", header(0, GSO_TCPV4, 1448, 34, 16), &frame, NotNegotiated),
            ("UFO", header(1, 3, 1448, 34, 16), &frame, NotNegotiated),
            ("an unknown kind", header(1, 0x7f, 1448, 34, 16), &frame, NotNegotiated),
            ("IPv6 that is IPv4", header(1, GSO_TCPV6, 1448, 34, 16), &frame, Mismatch),
            ("UDP that is TCP", header(1, GSO_UDP_L4, 1448, 34, 6), &frame, Mismatch),
            ("TCP that is UDP", good(), &udp, Mismatch),
            ("a fragment", good(), &fragment, Mismatch),
            ("a TCP header too short", good(), &short_header, Mismatch),
            ("a TCP header past the end", good(), &endless_header, Mismatch),
            ("a transport header elsewhere", header(1, GSO_TCPV4, 1448, 36, 16), &frame, Mismatch),
            ("a checksum past the end", header(1, GSO_NONE, 0, 9053, 0), &frame, ChecksumOutside),
            ("a checksum among the addresses", header(1, GSO_NONE, 0, 0, 2), &frame, ChecksumOutside),
        ];
        for (what, header, frame, fault) in cases {
            assert_eq!(header.offload(frame, Accepts::ALL), Err(fault), "{what}");
        }
        for allowed in [Accepts::default(), Accepts { checksum: true, ..Accepts::default() }] {
            assert_eq!(good().offload(&frame, allowed), Err(NotNegotiated));
        }
    }

    #[test]
    fn a_guest_is_not_given_what_it_does_not_take() {
        let frame = tcp_v4(9000);
        let offload = good().offload(&frame, Accepts::ALL).unwrap();
        assert_eq!(header_for(&frame, offload, Accepts::default()), Err(FrameFault::NotAccepted));
        let checksum = Accepts { checksum: true, ..Accepts::default() };
        assert_eq!(header_for(&frame, offload, checksum), Err(FrameFault::NotAccepted));
        let valid = Offload { checksum: Checksum::Valid, gso: None };
        assert_eq!(header_for(&frame, valid, checksum).unwrap().to_bytes()[0], DATA_VALID);
        assert_eq!(header_for(&frame, valid, Accepts::default()).unwrap().to_bytes()[0], 0);
    }

    #[test]
    fn headers_end_where_those_of_all_frames_have_to() {
        for (extensions, is_taken) in [(0, true), (168, true), (176, false), (30_000, false)] {
            let mut frame = vec![0; 14 + 40 + extensions + 20 + 9000];
            frame[12..14].copy_from_slice(&IPV6.to_be_bytes());
            frame[14] = 0x60;
            frame[20] = if extensions == 0 { TCP } else { 60 };
            let transport = 54 + extensions;
            frame[transport + 12] = 0x50;
            let asked = header(NEEDS_CSUM, GSO_TCPV6, 1448, transport as u16, 16);
            assert_eq!(asked.offload(&frame, Accepts::ALL).is_ok(), is_taken, "{extensions} bytes between");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_header_makes_it_panic(
            bytes: [u8; 12],
            frame in proptest::collection::vec(proptest::num::u8::ANY, 14..200),
        ) {
            if let Ok(offload) = Header::parse(&bytes).offload(&frame, Accepts::ALL) {
                proptest::prop_assert!(offload.check(frame.len()).is_ok());
            }
        }
    }
}
