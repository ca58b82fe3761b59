//! What is still to be done to a frame's bytes: the checksum to be filled in, the super-frame to be cut.
//!
//! The words are those of virtio-net (VIRTIO 1.3, 5.1.6), which are those of Linux.

use std::num::NonZeroU16;

/// State of the transport checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing is known: the bytes hold what the sender put there.
    #[default]
    Unverified,
    /// Somebody has checked it (`VIRTIO_NET_HDR_F_DATA_VALID`).
    Valid,
    /// To be filled in (`VIRTIO_NET_HDR_F_NEEDS_CSUM`): the Internet checksum from `start` to the frame's end, to be put
    /// at `start + offset`, where the pseudo header's sum is now.
    Partial {
        /// Bytes from the frame's start.
        start: u16,
        /// Bytes from `start`.
        offset: u16,
    },
}

/// How a super-frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over IPv4 or IPv6: each segment a datagram of its own (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
}

/// A super-frame: one frame in place of many, whose segments differ only in what a NIC can work out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// What it holds.
    pub kind: GsoKind,
    /// Payload bytes of each segment but the last.
    pub size: NonZeroU16,
    /// The first segment alone keeps CWR (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
}

/// What is still to be done to a frame's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Its checksum.
    pub checksum: Checksum,
    /// Present in a super-frame.
    pub gso: Option<Gso>,
}

/// Why a frame's offload is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// The checksum's place is not in the frame.
    #[error(
        "the checksum would be at byte {at} of a frame of {length}: the sender's offload header is wrong"
    )]
    ChecksumOutside {
        /// Where it would end, in bytes from the frame's start.
        at: u32,
        /// Length of the frame in bytes.
        length: usize,
    },
    /// A super-frame whose checksum is not partial: its segments' could not be worked out.
    #[error("a super-frame without a partial checksum: the sender must set NEEDS_CSUM with GSO")]
    GsoWithoutChecksum,
}

impl Offload {
    /// Whether the bytes are as they should be on a wire.
    #[inline]
    pub fn is_complete(&self) -> bool {
        self.gso.is_none() && !matches!(self.checksum, Checksum::Partial { .. })
    }

    /// How many segments a frame of `length` bytes becomes, at most; 0 if it is no super-frame. It is a measure of the work that
    /// may come of the frame.
    #[inline]
    pub fn segments(&self, length: usize) -> usize {
        self.gso.map_or(0, |gso| length.div_ceil(usize::from(gso.size.get())))
    }

    /// Whether it fits a frame of `length` bytes.
    ///
    /// # Errors
    /// How it does not.
    #[inline]
    pub fn check(&self, length: usize) -> Result<(), OffloadError> {
        match self.checksum {
            Checksum::Partial { start, offset } => {
                let at = u32::from(start) + u32::from(offset) + 2;
                if at as usize > length {
                    return Err(OffloadError::ChecksumOutside { at, length });
                }
            }
            Checksum::Unverified | Checksum::Valid if self.gso.is_some() => {
                return Err(OffloadError::GsoWithoutChecksum);
            }
            Checksum::Unverified | Checksum::Valid => {}
        }
        Ok(())
    }

    /// The bytes behind the Ethernet addresses have moved by so many, as tags came or went.
    #[inline]
    pub(super) fn moved_by(&mut self, bytes: i32) {
        if let Checksum::Partial { start, .. } = &mut self.checksum {
            *start = start.saturating_add_signed(bytes as i16);
        }
    }
}
