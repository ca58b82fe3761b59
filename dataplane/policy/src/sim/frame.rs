//! Frames as byte slices, and what VLAN rewriting does to them.

use sluice_pipeline::{Frame, HEADER_WINDOW, Tag, ethertype};

/// Where the pipeline finds a frame's outermost tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagPlace {
    /// In the bytes: XDP.
    Inline,
    /// Beside them: TCX, where the kernel takes it out of received frames. A cut-off tag stays where it is.
    Beside,
}

/// A frame in a slice.
#[derive(Clone, Copy, Debug)]
pub struct SliceFrame<'a> {
    bytes: &'a [u8],
    tag: Tag,
}

impl<'a> SliceFrame<'a> {
    /// A frame with all its tags in the bytes.
    pub const fn new(bytes: &'a [u8]) -> Self {
        SliceFrame { bytes, tag: Tag::NONE }
    }

    /// A frame whose outermost tag is not in the bytes.
    pub const fn with_tag(bytes: &'a [u8], tag: Tag) -> Self {
        SliceFrame { bytes, tag }
    }
}

impl Frame for SliceFrame<'_> {
    fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        let end = start.checked_add(N)?;
        if end > HEADER_WINDOW as usize {
            return None;
        }
        self.bytes.get(start..end)?.try_into().ok()
    }

    fn tag(&self) -> Tag {
        self.tag
    }
}

/// Takes the outermost tag out, as the kernel does; `None` if there is no complete one.
pub fn take_tag_out(bytes: &[u8]) -> Option<(Vec<u8>, Tag)> {
    let tag = bytes.get(12..18)?;
    let tag = Tag { tpid: u16::from_be_bytes([tag[0], tag[1]]), tci: u16::from_be_bytes([tag[2], tag[3]]) };
    if !matches!(tag.tpid, ethertype::CTAG | ethertype::STAG) {
        return None;
    }
    Some(([&bytes[..12], &bytes[16..]].concat(), tag))
}

/// The bytes that leave: without the outermost tag if `strip`, then with `tag` unless that is [`Tag::NONE`].
///
/// `bytes` holds every tag of the frame.
pub fn rewrite(bytes: &[u8], strip: bool, tag: Tag) -> Vec<u8> {
    let (addresses, rest) = bytes.split_at(12.min(bytes.len()));
    let rest = if strip { rest.get(4..).unwrap_or_default() } else { rest };
    let mut out = Vec::with_capacity(bytes.len() + 4);
    out.extend_from_slice(addresses);
    if tag.is_some() {
        out.extend_from_slice(&tag.tpid.to_be_bytes());
        out.extend_from_slice(&tag.tci.to_be_bytes());
    }
    out.extend_from_slice(rest);
    out
}
