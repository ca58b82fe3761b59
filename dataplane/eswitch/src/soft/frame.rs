//! As much of a frame as switches look at.

use sluice_policy::net::MacAddr;

/// The bytes of the two addresses.
const ADDRESSES: usize = 12;

/// The outermost tag.
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

/// 16 bits in network order.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn mac(bytes: &[u8], at: usize) -> Option<MacAddr> {
    bytes.get(at..at + 6)?.try_into().ok().map(MacAddr)
}

/// Destination, source and ethertype (outermost), if there are that many bytes.
pub(super) fn addresses(frame: &[u8]) -> Option<(MacAddr, MacAddr, u16)> {
    Some((mac(frame, 0)?, mac(frame, 6)?, be16(frame, ADDRESSES)?))
}

/// The outermost tag, if the frame begins with a whole one.
pub(super) fn tag(frame: &[u8]) -> Option<Tag> {
    let tpid = be16(frame, ADDRESSES).filter(|tpid| matches!(tpid, 0x8100 | 0x88a8))?;
    be16(frame, ADDRESSES + 4)?;
    Some(Tag { tpid, tci: be16(frame, ADDRESSES + 2)? })
}

/// The frame with another tag outside.
pub(super) fn push(frame: &[u8], tag: Tag) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(ADDRESSES);
    [addresses, &tag.tpid.to_be_bytes(), &tag.tci.to_be_bytes(), rest].concat()
}

/// The frame without its outermost tag, which it must have.
pub(super) fn pop(frame: &[u8]) -> Vec<u8> {
    [&frame[..ADDRESSES], &frame[ADDRESSES + 4..]].concat()
}
