//! The three tables of a split virtqueue (VIRTIO 1.3, 2.7), as views of guest memory.
//!
//! Positions are masked with the ring's size, so no index of the guest's leads outside. Every word is read and written as an
//! atomic: the guest may change it between two looks, and each look is taken once.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::error::SetupError;
use super::memory::{Access, GuestMemory, prefetch};

/// The largest split ring.
pub(super) const MAX_SIZE: u32 = 32768;

/// `VIRTQ_DESC_F_NEXT`
pub(super) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`
pub(super) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`
pub(super) const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;

/// `VIRTQ_USED_F_NO_NOTIFY`
const NO_NOTIFY: u16 = 1;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`
const NO_INTERRUPT: u16 = 1;

/// Where the tables are, in the front-end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct RingAddresses {
    /// The descriptor table.
    pub(super) descriptors: u64,
    /// The available ring.
    pub(super) available: u64,
    /// The used ring.
    pub(super) used: u64,
    /// The guest address under which writes to the used ring are logged; None if they are not.
    pub(super) log: Option<u64>,
}

/// One descriptor, read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    /// Where the chain goes on.
    pub(super) next: u16,
}

impl Descriptor {
    #[inline]
    fn from_words(words: [u64; 2]) -> Self {
        let [address, rest] = words.map(u64::from_le);
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    #[inline]
    pub(super) fn from_bytes(bytes: [u8; DESCRIPTOR]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self::from_words([u64::from_ne_bytes(words[0]), u64::from_ne_bytes(words[1])])
    }

    /// The same of a packed ring: its flags come last, and it does not say where the chain goes on.
    #[inline]
    pub(super) fn from_packed(bytes: [u8; DESCRIPTOR]) -> Self {
        let Self { address, len, next: flags, .. } = Self::from_bytes(bytes);
        Self { address, len, flags, next: 0 }
    }

    #[inline]
    pub(super) fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A split ring in guest memory.
#[derive(Debug)]
pub(super) struct SplitRing {
    descriptors: NonNull<[AtomicU64; 2]>,
    /// flags, index, entries…, used_event
    available: NonNull<AtomicU16>,
    /// flags, index, entries (identifier, length)…, avail_event
    used: NonNull<AtomicU16>,
    mask: u16,
    /// Keeps the pointers good.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are into mappings that `_memory` keeps, and everything behind them is accessed atomically.
unsafe impl Send for SplitRing {}

impl SplitRing {
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<Self, SetupError> {
        if !size.is_power_of_two() || u32::from(size) > MAX_SIZE {
            return Err(SetupError::Size(size.into()));
        }
        let entries = usize::from(size);
        let place = |part, address, len: usize, align: usize| {
            let guest = memory.guest_address(address, len as u64);
            let at = guest.and_then(|guest| memory.locate(guest, len));
            let at = at.ok_or(SetupError::Outside { part, address })?;
            let aligned = (at.as_ptr() as usize).is_multiple_of(align);
            aligned.then_some(at).ok_or(SetupError::Unaligned { part, address })
        };
        Ok(Self {
            descriptors: place("descriptor table", addresses.descriptors, DESCRIPTOR * entries, 16)?.cast(),
            available: place("available ring", addresses.available, 6 + 2 * entries, 2)?.cast(),
            used: place("used ring", addresses.used, 6 + 8 * entries, 4)?.cast(),
            mask: size - 1,
            _memory: Arc::clone(memory),
        })
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.mask.wrapping_add(1)
    }

    /// A descriptor; the index is masked, and so callers check it first.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        // SAFETY: masked, the index is inside the table, whose whole length `new` found in memory, aligned.
        let words = unsafe { self.descriptors.add(usize::from(index & self.mask)).as_ref() };
        Descriptor::from_words([words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)])
    }

    /// Brings the descriptor near, and the three behind it with it.
    #[inline]
    pub(super) fn prefetch_descriptor(&self, index: u16) {
        prefetch(self.descriptors.as_ptr().wrapping_add(usize::from(index & self.mask)), Access::Read);
    }

    /// Brings the entry of the available ring near, and those that share its cache line.
    #[inline]
    pub(super) fn prefetch_available(&self, position: u16) {
        let at = self.available.as_ptr().wrapping_add(2 + usize::from(position & self.mask));
        prefetch(at, Access::Read);
    }

    /// Brings the entry of the used ring near, and those that share its cache line.
    #[inline]
    pub(super) fn prefetch_used(&self, position: u16) {
        let at = self.used.as_ptr().wrapping_add(2 + 4 * usize::from(position & self.mask));
        prefetch(at, Access::Write);
    }

    /// How far the driver has made buffers available. What it wrote before is seen after.
    #[inline]
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available_word(1).load(Ordering::Acquire))
    }

    /// The head of the chain at a position.
    #[inline]
    pub(super) fn head(&self, position: u16) -> u16 {
        u16::from_le(self.available_word(2 + usize::from(position & self.mask)).load(Ordering::Relaxed))
    }

    /// Whether the driver asked for no interrupts (without event index).
    #[inline]
    pub(super) fn wants_no_interrupt(&self) -> bool {
        u16::from_le(self.available_word(0).load(Ordering::Relaxed)) & NO_INTERRUPT != 0
    }

    /// The used index after which the driver wants an interrupt (with event index).
    #[inline]
    pub(super) fn used_event(&self) -> u16 {
        u16::from_le(self.available_word(2 + usize::from(self.mask) + 1).load(Ordering::Relaxed))
    }

    /// What the used index is now. Only we write it, but the guest can.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Relaxed))
    }

    /// Puts a chain into the used ring, not to be seen before [`set_used_index`](Self::set_used_index).
    #[inline]
    pub(super) fn put_used(&self, position: u16, head: u16, written: u32) {
        // SAFETY: masked, the position is inside the table; `new` checked its whole length, and that it is aligned to 4.
        unsafe {
            let entry =
                self.used.cast::<u8>().add(4 + 8 * usize::from(position & self.mask)).cast::<AtomicU32>();
            entry.as_ref().store(u32::from(head).to_le(), Ordering::Relaxed);
            entry.add(1).as_ref().store(written.to_le(), Ordering::Relaxed);
        }
    }

    /// Shows the driver what was put, and what was written into its buffers.
    #[inline]
    pub(super) fn set_used_index(&self, index: u16) {
        self.used_word(1).store(index.to_le(), Ordering::Release);
    }

    /// Asks the driver for no kicks, or for kicks (without event index).
    #[inline]
    pub(super) fn set_no_notify(&self, is_set: bool) {
        self.used_word(0).store(if is_set { NO_NOTIFY } else { 0 }.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver for a kick after this available index (with event index).
    #[inline]
    pub(super) fn set_available_event(&self, index: u16) {
        self.used_word(2 + 4 * (usize::from(self.mask) + 1)).store(index.to_le(), Ordering::Relaxed);
    }

    /// Bytes of the used ring, for the log.
    #[inline]
    pub(super) fn used_len(&self) -> u64 {
        6 + 8 * u64::from(self.size())
    }

    /// A word of the available ring: 0 to 2 + size.
    #[inline]
    fn available_word(&self, word: usize) -> &AtomicU16 {
        // SAFETY: all callers pass at most 2 + size, the last word of what `new` checked, aligned to 2.
        unsafe { self.available.add(word).as_ref() }
    }

    /// A word of the used ring: 0 to 2 + 4 · size.
    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        // SAFETY: all callers pass at most 2 + 4 · size, the last word of what `new` checked, aligned to 4.
        unsafe { self.used.add(word).as_ref() }
    }
}
