//! The log of dirty pages, by which a live migration learns what was written into the guest.
//!
//! One bit per page of 4 KiB, in memory shared with the front-end, which clears bits while we set them.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use super::error::MemoryError;
use super::memory::Mapping;

/// `VHOST_LOG_PAGE`
const PAGE_SHIFT: u32 = 12;

/// A bit for every page of the guest.
#[derive(Debug)]
pub(super) struct DirtyLog {
    bits: Mapping,
}

impl DirtyLog {
    pub(super) fn new(file: &OwnedFd, offset: u64, len: u64) -> Result<Self, MemoryError> {
        Ok(Self { bits: Mapping::new(file, offset, len)? })
    }

    /// Marks the pages that `len` bytes at a guest address are on. Pages past the log's end are not the guest's.
    #[inline]
    pub(super) fn mark(&self, guest: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|last| guest.saturating_add(last)) else { return };
        for page in guest >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            let Some(byte) = self.bits.atomic_u8((page / 8) as usize) else { return };
            // Release: whoever sees the bit sees what was written.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}
