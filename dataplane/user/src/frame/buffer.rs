//! The memory of frames, and the tokens that give the right to it. The only place where frames' bytes are reached by
//! pointer; everything above is safe code over slices.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use parking_lot::Mutex;

use super::{LARGE_CHUNK, SMALL_CHUNK};
use crate::hint::{Access, prefetch};

/// How many chunks a region has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// Chunks of [`SMALL_CHUNK`] bytes.
    pub small: u32,
    /// Chunks of [`LARGE_CHUNK`] bytes.
    pub large: u32,
}

/// Why there is no region.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The kernel refused.
    #[error("mapping {bytes} bytes for frames: {source}; free memory, or ask for fewer chunks")]
    Map {
        /// What was asked for.
        bytes: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// No memory at all was asked for, or more than there are addresses.
    #[error("{small} small and {large} large chunks are none, or too many: ask for some")]
    Layout {
        /// Asked for.
        small: u32,
        /// Asked for.
        large: u32,
    },
}

/// Mapped memory, cut into chunks. It lives as long as any of its frames or pools.
pub struct Region {
    memory: NonNull<u8>,
    bytes: usize,
    layout: RegionLayout,
    /// Numbers of chunks that no pool and no frame has, by [`Class`].
    depot: [Mutex<Vec<u32>>; 2],
    /// How many chunks lie in each pool; written by its owner alone.
    pools: Mutex<Vec<Weak<AtomicUsize>>>,
}

// SAFETY: the memory is plain bytes, reached only through chunks, each of which has one owner; the rest is Send.
unsafe impl Send for Region {}
// SAFETY: a shared region gives out no reference to the memory; numbers of chunks are behind locks.
unsafe impl Sync for Region {}

/// The two sizes of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Small = 0,
    Large = 1,
}

impl Class {
    pub(super) const fn bytes(self) -> usize {
        match self {
            Class::Small => SMALL_CHUNK,
            Class::Large => LARGE_CHUNK,
        }
    }
}

impl Region {
    /// Maps memory for so many chunks. Pages are touched when they are first used.
    ///
    /// # Errors
    /// If there is not so much memory.
    pub fn new(layout: RegionLayout) -> Result<Arc<Region>, RegionError> {
        let refused = RegionError::Layout { small: layout.small, large: layout.large };
        let small = (layout.small as usize).checked_mul(SMALL_CHUNK);
        let large = (layout.large as usize).checked_mul(LARGE_CHUNK);
        let bytes = small.zip(large).and_then(|(small, large)| small.checked_add(large));
        let Some(length) = bytes.and_then(NonZeroUsize::new) else {
            return Err(refused);
        };
        // SAFETY: a new private mapping, which overlaps nothing.
        let memory = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .map_err(|error| RegionError::Map { bytes: length.get(), source: error.into() })?;
        // SAFETY: our own mapping; the advice changes no byte. Without huge pages it is only slower.
        let _ = unsafe { madvise(memory, length.get(), MmapAdvise::MADV_HUGEPAGE) };
        // Lowest numbers are taken first, so that little memory is touched.
        let depot = [layout.small, layout.large].map(|count| Mutex::new((0..count).rev().collect()));
        Ok(Arc::new(Region {
            memory: memory.cast(),
            bytes: length.get(),
            layout,
            depot,
            pools: Mutex::default(),
        }))
    }

    /// How many chunks there are.
    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    /// How many frames there are now, in rings and in hand. Exact while no frame comes or goes.
    pub fn outstanding(&self) -> usize {
        let all = self.layout.small as usize + self.layout.large as usize;
        let idle: usize = self.depot.iter().map(|depot| depot.lock().len()).sum();
        let mut pools = self.pools.lock();
        pools.retain(|pool| pool.strong_count() > 0);
        let pooled: usize =
            pools.iter().filter_map(Weak::upgrade).map(|count| count.load(Ordering::Relaxed)).sum();
        all.saturating_sub(idle + pooled)
    }

    /// Address and length of the small chunks, to be registered with the kernel as UMEM.
    pub(crate) fn umem(&self) -> (NonNull<u8>, usize) {
        (self.memory, self.layout.small as usize * SMALL_CHUNK)
    }

    /// A count for a new pool, which keeps it up to date.
    pub(super) fn add_pool(&self) -> Arc<AtomicUsize> {
        let count = Arc::new(AtomicUsize::new(0));
        self.pools.lock().push(Arc::downgrade(&count));
        count
    }

    /// Takes chunks of one class back, all of this region.
    pub(super) fn put_back(&self, class: Class, chunks: impl Iterator<Item = Chunk>) {
        let mut depot = self.depot[class as usize].lock();
        for chunk in chunks {
            let mut chunk = ManuallyDrop::new(chunk);
            depot.push(chunk.number);
            // SAFETY: the token ends here, its number being in the depot; nothing reads the field again. It is not the last
            // reference to the region, as the pool that calls has another.
            unsafe { std::ptr::drop_in_place(&raw mut chunk.region) };
        }
    }

    /// Moves up to `count` idle chunks into `taken`.
    pub(super) fn take(self: &Arc<Self>, class: Class, count: usize, taken: &mut Vec<Chunk>) {
        let mut depot = self.depot[class as usize].lock();
        let left = depot.len().saturating_sub(count);
        for number in depot.drain(left..) {
            let offset = match class {
                Class::Small => number as usize * SMALL_CHUNK,
                Class::Large => self.layout.small as usize * SMALL_CHUNK + number as usize * LARGE_CHUNK,
            };
            // SAFETY: the number is below its class's count, so the chunk lies in the mapping.
            let start = unsafe { self.memory.add(offset) };
            taken.push(Chunk { region: Arc::clone(self), start, number, class });
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no chunk is left, since each holds the region.
        let _ = unsafe { munmap(self.memory.cast(), self.bytes) };
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:?}, {} in use)", self.layout, self.outstanding())
    }
}

/// The right to one chunk: there is never more than one token of it. Dropped, it goes back to the region.
pub(super) struct Chunk {
    region: Arc<Region>,
    start: NonNull<u8>,
    number: u32,
    class: Class,
}

// SAFETY: a chunk owns its bytes, as a box does.
unsafe impl Send for Chunk {}
// SAFETY: a shared chunk gives shared access only.
unsafe impl Sync for Chunk {}

impl Chunk {
    #[inline]
    pub(super) fn capacity(&self) -> usize {
        self.class.bytes()
    }

    #[inline]
    pub(super) fn class(&self) -> Class {
        self.class
    }

    #[inline]
    pub(super) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `start` and the class's length lie in the mapping, which the region keeps; it began as zeros, so every
        // byte is initialised; this is the chunk's only token.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.class.bytes()) }
    }

    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the token is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.class.bytes()) }
    }

    #[inline]
    pub(super) fn prefetch(&self, offset: usize) {
        prefetch(self.start.as_ptr().wrapping_add(offset), Access::Read);
    }
}

/// Small chunks that are lent to the kernel: their tokens are kept here until it gives them back. What it does not have it
/// cannot give back, nor anything twice.
pub(crate) struct Lent {
    region: Arc<Region>,
    /// A bit for each small chunk.
    bits: Box<[u64]>,
    count: usize,
}

impl Lent {
    pub(crate) fn new(region: &Arc<Region>) -> Lent {
        let words = (region.layout.small as usize).div_ceil(64);
        Lent { region: Arc::clone(region), bits: vec![0; words].into(), count: 0 }
    }

    /// The region that its chunks are of.
    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// How many are lent.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Lends a chunk, and answers its number; or gives it back if the kernel does not know it.
    #[inline]
    pub(super) fn lend(&mut self, chunk: Chunk) -> Result<u32, Chunk> {
        if chunk.class != Class::Small || !Arc::ptr_eq(&chunk.region, &self.region) {
            return Err(chunk);
        }
        // Its share in the region is kept with it, and comes back with it.
        let chunk = ManuallyDrop::new(chunk);
        self.bits[chunk.number as usize / 64] |= 1 << (chunk.number % 64);
        self.count += 1;
        Ok(chunk.number)
    }

    /// Takes a chunk back; `None` if it is not lent.
    #[inline]
    pub(super) fn redeem(&mut self, number: u32) -> Option<Chunk> {
        let bit = 1 << (number % 64);
        let word = self.bits.get_mut(number as usize / 64)?;
        if *word & bit == 0 {
            return None;
        }
        *word &= !bit;
        self.count -= 1;
        // SAFETY: the number is that of a small chunk, which lies in the mapping.
        let start = unsafe { self.region.memory.add(number as usize * SMALL_CHUNK) };
        // SAFETY: a share in this same region was kept when the chunk was lent, and is taken over here, once.
        let region = unsafe { std::ptr::read(&raw const self.region) };
        Some(Chunk { region, start, number, class: Class::Small })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        for number in 0..self.region.layout.small {
            drop(self.redeem(number));
        }
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({})", self.count)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.region.depot[self.class as usize].lock().push(self.number);
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({:?} {})", self.class, self.number)
    }
}
