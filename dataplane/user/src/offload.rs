//! Offloads in software: what a way out does not take is done here, a checksum filled in, a super-frame cut.
//!
//! Frames come from guests, so nothing in their headers is believed: what does not add up is refused, and the frame dropped.
//! Called by workers, for the frames that need it.

use sluice_pipeline::{L3_WINDOW, ethertype, ip_proto};

use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool};
use crate::port::Accepts;

#[cfg(test)]
mod tests;

/// Most segments of one super-frame: 64 KiB in segments of 128 bytes. A guest that asks for more asks for work that
/// others pay for.
pub const SEGMENTS_MAX: usize = 512;

/// Why a frame could not be made fit for the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The headers are not those of what the sender said it was.
    #[error("the headers of a super-frame are not what its kind says")]
    Headers,
    /// More than [`SEGMENTS_MAX`] segments.
    #[error("a super-frame would become more than {SEGMENTS_MAX} segments")]
    Segments,
    /// No chunk is left to put a segment in.
    #[error("there is no memory for segments; give the engine more chunks")]
    Memory,
}

impl Accepts {
    /// Whether a frame may be sent as it is.
    #[inline]
    pub fn takes(&self, offload: &Offload) -> bool {
        match offload.gso {
            None => self.checksum || !matches!(offload.checksum, Checksum::Partial { .. }),
            Some(Gso { kind, ecn, .. }) => {
                let takes_kind = match kind {
                    GsoKind::TcpV4 => self.tcp_v4,
                    GsoKind::TcpV6 => self.tcp_v6,
                    GsoKind::Udp => self.udp,
                };
                self.checksum && takes_kind && (self.ecn || !ecn)
            }
        }
    }
}

/// The sum of 16-bit words (RFC 1071), not yet folded. Words are as they are in memory; so is what becomes of the sum.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_ne_bytes(last));
    sum
}

/// The checksum of a sum, as it is stored.
fn fold(sum: u64) -> [u8; 2] {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// The Internet checksum of bytes, as it is stored.
pub fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    fold(sum(bytes))
}

/// A transport checksum of zero is sent as ones: in UDP, zero means none (RFC 768).
fn never_zero(checksum: [u8; 2]) -> [u8; 2] {
    if checksum == [0, 0] { [0xff, 0xff] } else { checksum }
}

/// Fills in a partial checksum, if there is one.
pub fn fill_checksum(frame: &mut Frame) {
    let offload = frame.offload();
    let Checksum::Partial { start, offset } = offload.checksum else { return };
    let bytes = frame.bytes_mut();
    let Some(covered) = bytes.get(usize::from(start)..) else { return };
    let checksum = never_zero(internet_checksum(covered));
    let at = usize::from(start) + usize::from(offset);
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&checksum);
    }
    // A frame whose checksum is full always fits.
    let _ = frame.set_offload(Offload { checksum: Checksum::Valid, gso: None });
}

/// Where the headers of a super-frame are, in bytes from its start.
#[derive(Clone, Copy, Debug)]
struct Layout {
    is_ipv6: bool,
    is_tcp: bool,
    l3: usize,
    l4: usize,
    payload: usize,
}

impl Layout {
    fn of(frame: &Frame, kind: GsoKind) -> Option<Layout> {
        let bytes = frame.bytes();
        let Checksum::Partial { start, offset } = frame.offload().checksum else { return None };
        let l4 = usize::from(start);
        let mut at = 12;
        let mut found = be16(bytes, at)?;
        while matches!(found, ethertype::CTAG | ethertype::STAG) && at < 20 {
            at += 4;
            found = be16(bytes, at)?;
        }
        let l3 = at + 2;
        let is_ipv6 = found == ethertype::IPV6;
        let first = *bytes.get(l3)?;
        let protocol = if is_ipv6 {
            if first >> 4 != 6 || l4 < l3 + 40 {
                return None;
            }
            // Behind extension headers it is not in this field, and the sender's word is taken.
            if l4 == l3 + 40 { *bytes.get(l3 + 6)? } else { protocol(kind) }
        } else {
            if found != ethertype::IPV4
                || first >> 4 != 4
                || l4 != l3 + usize::from(first & 15) * 4
                || l4 < l3 + 20
            {
                return None;
            }
            *bytes.get(l3 + 9)?
        };
        let is_right = match kind {
            GsoKind::TcpV4 => !is_ipv6 && offset == 16,
            GsoKind::TcpV6 => is_ipv6 && offset == 16,
            GsoKind::Udp => offset == 6,
        };
        if !is_right || protocol != self::protocol(kind) {
            return None;
        }
        let is_tcp = kind != GsoKind::Udp;
        let header = if is_tcp { usize::from(*bytes.get(l4 + 12)? >> 4) * 4 } else { 8 };
        let shortest = if is_tcp { 20 } else { 8 };
        let payload = l4 + header;
        // Each segment gets a copy of the headers: they end where those of all frames have to.
        let is_near = payload <= l3 + L3_WINDOW as usize;
        (header >= shortest && is_near && payload < bytes.len()).then_some(Layout {
            is_ipv6,
            is_tcp,
            l3,
            l4,
            payload,
        })
    }
}

const fn protocol(kind: GsoKind) -> u8 {
    match kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => ip_proto::TCP,
        GsoKind::Udp => ip_proto::UDP,
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Cuts a super-frame into segments, with full checksums, and hands them to `send` in order. The frame is left as it was.
///
/// # Errors
/// Why it could not be cut; for want of memory, some segments may have been handed over before.
pub fn segment(pool: &mut Pool, frame: &Frame, send: &mut dyn FnMut(&mut Pool, Frame)) -> Result<(), Unfit> {
    let gso = frame.offload().gso.ok_or(Unfit::Headers)?;
    let layout = Layout::of(frame, gso.kind).ok_or(Unfit::Headers)?;
    let (headers, payload) = frame.bytes().split_at(layout.payload);
    let size = usize::from(gso.size.get());
    let count = payload.len().div_ceil(size);
    if count > SEGMENTS_MAX {
        return Err(Unfit::Segments);
    }
    for (index, part) in payload.chunks(size).enumerate() {
        let mut segment = pool.take(headers.len() + part.len()).ok_or(Unfit::Memory)?;
        let is_whole = segment.append(headers) && segment.append(part);
        debug_assert!(is_whole, "there is room for what was asked for");
        finish(segment.bytes_mut(), layout, index, index * size, index + 1 == count);
        send(pool, segment);
    }
    Ok(())
}

/// Makes headers copied from a super-frame those of one segment, whose payload begins `before` bytes into the whole.
fn finish(bytes: &mut [u8], layout: Layout, index: usize, before: usize, is_last: bool) {
    let Layout { is_ipv6, is_tcp, l3, l4, .. } = layout;
    let length = bytes.len();
    let l4_length = (length - l4) as u32;
    // [`Layout::of`] has seen that all of these are there.
    let addresses = if is_ipv6 {
        put16(bytes, l3 + 4, (length - l3 - 40) as u16);
        l3 + 8..l3 + 40
    } else {
        put16(bytes, l3 + 2, (length - l3) as u16);
        let identifier = u16::from_be_bytes([bytes[l3 + 4], bytes[l3 + 5]]);
        put16(bytes, l3 + 4, identifier.wrapping_add(index as u16));
        put16(bytes, l3 + 10, 0);
        let checksum = internet_checksum(&bytes[l3..l4]);
        bytes[l3 + 10..l3 + 12].copy_from_slice(&checksum);
        l3 + 12..l3 + 20
    };
    let (at, protocol) = if is_tcp {
        let sequence = u32::from_be_bytes([bytes[l4 + 4], bytes[l4 + 5], bytes[l4 + 6], bytes[l4 + 7]]);
        bytes[l4 + 4..l4 + 8].copy_from_slice(&sequence.wrapping_add(before as u32).to_be_bytes());
        const FIN_PSH: u8 = 0x09;
        const CWR: u8 = 0x80;
        if !is_last {
            bytes[l4 + 13] &= !FIN_PSH;
        }
        if index > 0 {
            bytes[l4 + 13] &= !CWR;
        }
        (l4 + 16, ip_proto::TCP)
    } else {
        put16(bytes, l4 + 4, l4_length as u16);
        (l4 + 6, ip_proto::UDP)
    };
    put16(bytes, at, 0);
    let pseudo = sum(&bytes[addresses]) + sum(&l4_length.to_be_bytes()) + sum(&[0, 0, 0, protocol]);
    let checksum = never_zero(fold(pseudo + sum(&bytes[l4..])));
    bytes[at..at + 2].copy_from_slice(&checksum);
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
