//! The rings that user space and the kernel share (`Documentation/networking/af_xdp.rst`): of each, one side produces and
//! the other consumes, and each writes its own index only.
//!
//! [`Producer`] and [`Consumer`] are the two roles, over descriptors of a ring's kind: addresses in the fill and completion
//! rings, [`Descriptor`]s in the others. Indexes run on and wrap by type; entries are found by their low bits.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::{Pod, Zeroable};

use super::sys::{self, Offsets, RingKind, RingOffsets};

/// `struct xdp_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Descriptor {
    /// Bytes from the UMEM's start.
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) options: u32,
}

/// The packet goes on in the next descriptor (`XDP_PKT_CONTD`).
pub(super) const CONTINUED: u32 = 1;
/// The kernel sleeps until it is called (`XDP_RING_NEED_WAKEUP`).
const NEED_WAKEUP: u32 = 1;

/// A mapped ring.
#[derive(Debug)]
struct Ring<T> {
    start: NonNull<u8>,
    length: usize,
    offsets: RingOffsets,
    entries: u32,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value; entries are plain data.
unsafe impl<T: Pod + Send> Send for Ring<T> {}

impl<T: Pod> Ring<T> {
    /// Makes and maps a ring of `entries`, a power of two.
    fn new(fd: BorrowedFd<'_>, kind: RingKind, entries: u32, offsets: &Offsets) -> io::Result<Ring<T>> {
        let offsets = offsets.of(kind);
        let length = offsets.descriptors as usize + entries as usize * size_of::<T>();
        let start = sys::map_ring(fd, kind, length)?;
        Ok(Ring { start, length, offsets, entries, of: PhantomData })
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: the kernel's offsets of indexes and flags lie in the mapping, before the descriptors, and are aligned;
        // both sides only use atomics on them.
        unsafe { self.start.add(offset as usize).cast().as_ref() }
    }

    fn producer(&self) -> &AtomicU32 {
        self.word(self.offsets.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.word(self.offsets.consumer)
    }

    fn needs_wakeup(&self) -> bool {
        self.word(self.offsets.flags).load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }

    fn entry(&self, index: u32) -> NonNull<T> {
        let place = (index & (self.entries - 1)) as usize;
        // SAFETY: the place is below the number of entries, which the mapping was made long enough for.
        unsafe { self.start.add(self.offsets.descriptors as usize).cast::<T>().add(place) }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length; nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A ring that we fill and the kernel empties.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// Entries written, and of those published.
    written: u32,
    published: u32,
    /// Entries that the kernel had consumed when last looked.
    consumed: u32,
}

impl<T: Pod> Producer<T> {
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        kind: RingKind,
        entries: u32,
        offsets: &Offsets,
    ) -> io::Result<Self> {
        Ok(Producer { ring: Ring::new(fd, kind, entries, offsets)?, written: 0, published: 0, consumed: 0 })
    }

    /// How many entries can be written. The kernel is asked only when fewer than `wanted` are known to be free.
    #[inline]
    pub(super) fn room(&mut self, wanted: u32) -> u32 {
        let free = self.ring.entries.saturating_sub(self.written.wrapping_sub(self.consumed));
        if free >= wanted {
            return free;
        }
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.ring.entries.saturating_sub(self.written.wrapping_sub(self.consumed))
    }

    /// Writes an entry; `false` if there is no room. The kernel sees it when it is [published](Self::publish).
    #[inline]
    #[must_use]
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.room(1) == 0 {
            return false;
        }
        // SAFETY: the entry lies in the mapping, and is ours until it is published: there was room.
        unsafe { self.ring.entry(self.written).write(value) };
        self.written = self.written.wrapping_add(1);
        true
    }

    /// Shows the kernel what was written; `false` if there was nothing new.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.published == self.written {
            return false;
        }
        self.ring.producer().store(self.written, Ordering::Release);
        self.published = self.written;
        true
    }

    /// Entries that the kernel has not consumed yet.
    pub(super) fn pending(&mut self) -> u32 {
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.published.wrapping_sub(self.consumed)
    }

    /// Whether the kernel must be called to look.
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// A ring that the kernel fills and we empty.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// Entries read, and of those released.
    read: u32,
    released: u32,
    /// Entries that the kernel had produced when last looked.
    produced: u32,
}

impl<T: Pod> Consumer<T> {
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        kind: RingKind,
        entries: u32,
        offsets: &Offsets,
    ) -> io::Result<Self> {
        Ok(Consumer { ring: Ring::new(fd, kind, entries, offsets)?, read: 0, released: 0, produced: 0 })
    }

    /// Reads an entry, if there is one.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.read == self.produced {
            self.produced = self.ring.producer().load(Ordering::Acquire);
            if self.read == self.produced {
                return None;
            }
        }
        // SAFETY: the entry lies in the mapping, and the kernel has published it and not got it back.
        let value = unsafe { self.ring.entry(self.read).read() };
        self.read = self.read.wrapping_add(1);
        Some(value)
    }

    /// Gives what was read back to the kernel.
    #[inline]
    pub(super) fn release(&mut self) {
        if self.released != self.read {
            self.ring.consumer().store(self.read, Ordering::Release);
            self.released = self.read;
        }
    }

    /// Whether there is nothing to be read.
    pub(super) fn is_empty(&self) -> bool {
        self.ring.producer().load(Ordering::Acquire) == self.read
    }
}
