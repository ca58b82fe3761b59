//! Frames: buffers that are owned by one holder at a time, and what is still to be done to the bytes in them.
//!
//! A [`Region`] is mapped memory cut into chunks. Each chunk has exactly one token, made with the region; a [`Frame`] owns
//! a token and can be moved but not copied, so a frame is never in two places. A frame that is dropped goes back to its
//! region, so none is lost; [`Region::outstanding`] says how many are in use.
//!
//! Workers take frames from a [`Pool`] each and give them back to it without locks; pools exchange chunks with the region
//! by the dozen. The small chunks of a region lie side by side, so that they can be registered as the UMEM of AF_XDP
//! sockets: a frame received from one port leaves by another without being copied.

use std::sync::Arc;

mod buffer;
mod offload;
mod pool;
#[cfg(test)]
mod tests;

use buffer::Chunk;
pub(crate) use buffer::Lent;
pub use buffer::{Region, RegionError, RegionLayout};
pub use offload::{Checksum, Gso, GsoKind, Offload, OffloadError};
pub use pool::Pool;

/// Bytes of a small chunk: a frame of an ordinary MTU, and the headroom that the kernel leaves in UMEM chunks.
pub const SMALL_CHUNK: usize = 2048;
/// Bytes of a large chunk: a GSO super-frame with its tags, and headroom.
pub const LARGE_CHUNK: usize = 68 * 1024;
/// Where a new frame begins in its chunk: room for tags to come in front, and a cache line's start.
pub const HEADROOM: usize = 64;

/// A frame: bytes on a wire from the destination MAC address on, all tags included, without FCS; and its [`Offload`].
#[derive(Debug)]
pub struct Frame {
    chunk: Chunk,
    start: u32,
    length: u32,
    offload: Offload,
}

impl Frame {
    /// Bytes in a chunk from `start` on; the callers have checked that they are in it.
    fn over(chunk: Chunk, start: usize, length: usize) -> Frame {
        Frame { chunk, start: start as u32, length: length as u32, offload: Offload::default() }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Whether it has no bytes yet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.chunk.bytes()[self.range()]
    }

    /// The bytes, to be changed.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        &mut self.chunk.bytes_mut()[range]
    }

    #[inline]
    fn range(&self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        start..start + self.length as usize
    }

    /// Makes it a frame of so many bytes, which its chunk has room for, at the place where a new one begins. What is in them is left
    /// from earlier frames, which may have been of other tenants.
    #[inline(always)]
    pub(crate) fn renew(&mut self, bytes: usize) {
        self.start = HEADROOM as u32;
        debug_assert!(bytes <= self.chunk.capacity() - HEADROOM, "it was taken for so many");
        self.length = bytes as u32;
        self.offload = Offload::default();
    }

    /// Whether its chunk is a small one.
    #[inline]
    pub(crate) fn is_small(&self) -> bool {
        self.chunk.capacity() == SMALL_CHUNK
    }

    /// How many bytes can still be appended.
    #[inline]
    pub fn room(&self) -> usize {
        self.chunk.capacity() - self.range().end
    }

    /// The memory behind the frame's end, to be written before [`advance`](Self::advance). What is in it is left from
    /// earlier frames, which may have been of other tenants.
    #[inline]
    pub fn spare_mut(&mut self) -> &mut [u8] {
        let end = self.range().end;
        &mut self.chunk.bytes_mut()[end..]
    }

    /// Counts `bytes` of the [spare memory](Self::spare_mut) as the frame's; no more than there are.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        self.length += bytes.min(self.room()) as u32;
    }

    /// Appends bytes; `false`, and nothing is done, if there is no room.
    #[inline]
    #[must_use]
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        let Some(spare) = self.spare_mut().get_mut(..bytes.len()) else {
            return false;
        };
        spare.copy_from_slice(bytes);
        self.length += bytes.len() as u32;
        true
    }

    /// Cuts the frame to its first `length` bytes, if it is longer.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length as u32);
    }

    /// Moves the first `moved` bytes of the frame `N` bytes forward and puts `inserted` behind them: how a tag is pushed.
    /// `false`, and nothing is done, without headroom or so many bytes.
    #[inline]
    #[must_use]
    pub fn insert<const N: usize>(&mut self, moved: usize, inserted: [u8; N]) -> bool {
        let start = self.start as usize;
        if start < N || moved > self.length as usize {
            return false;
        }
        let bytes = self.chunk.bytes_mut();
        bytes.copy_within(start..start + moved, start - N);
        bytes[start - N + moved..start + moved].copy_from_slice(&inserted);
        self.start -= N as u32;
        self.length += N as u32;
        self.offload.moved_by(N as i32);
        true
    }

    /// Takes `N` bytes behind the first `moved` ones out, the reverse of [`insert`](Self::insert); `false`, and nothing is
    /// done, if they are not there.
    #[inline]
    #[must_use]
    pub fn remove<const N: usize>(&mut self, moved: usize) -> bool {
        if moved + N > self.length as usize {
            return false;
        }
        let start = self.start as usize;
        self.chunk.bytes_mut().copy_within(start..start + moved, start + N);
        self.start += N as u32;
        self.length -= N as u32;
        self.offload.moved_by(-(N as i32));
        true
    }

    /// What is still to be done to the bytes.
    #[inline]
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Says what is still to be done to the bytes, which must all be there.
    ///
    /// # Errors
    /// If it does not fit them: a sender's lie, and the frame is to be dropped.
    #[inline]
    pub fn set_offload(&mut self, offload: Offload) -> Result<(), OffloadError> {
        offload.check(self.len())?;
        self.offload = offload;
        Ok(())
    }

    /// Brings the first cache line of the bytes near.
    #[inline]
    pub fn prefetch(&self) {
        self.chunk.prefetch(self.start as usize);
    }

    /// The region that it belongs to.
    #[inline]
    pub fn region(&self) -> &Arc<Region> {
        self.chunk.region()
    }
}

impl Lent {
    /// Lends a frame's chunk to the kernel; answers where its bytes are in the UMEM. A frame that is not of the UMEM is
    /// given back.
    #[inline]
    pub(crate) fn lend_frame(&mut self, frame: Frame) -> Result<u64, Frame> {
        let Frame { chunk, start, length, offload } = frame;
        match self.lend(chunk) {
            Ok(number) => Ok(u64::from(number) * SMALL_CHUNK as u64 + u64::from(start)),
            Err(chunk) => Err(Frame { chunk, start, length, offload }),
        }
    }

    /// Takes the chunk at a place in the UMEM back, as a frame of so many bytes from there; `None` if the kernel did not
    /// have it, or the bytes are not in it.
    #[inline]
    pub(crate) fn redeem_frame(&mut self, address: u64, length: u32) -> Option<Frame> {
        let start = (address % SMALL_CHUNK as u64) as usize;
        if start + length as usize > SMALL_CHUNK {
            return None;
        }
        let number = u32::try_from(address / SMALL_CHUNK as u64).ok()?;
        Some(Frame::over(self.redeem(number)?, start, length as usize))
    }
}
