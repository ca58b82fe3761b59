//! The three areas of a packed virtqueue (VIRTIO 1.3, 2.8), as views of guest memory.
//!
//! A place outside the ring is taken for its first, so no index of the guest's leads outside. Every word is read and written
//! as an atomic: the guest may change it between two looks, and each look is taken once.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::vhost::error::SetupError;
use crate::vhost::memory::GuestMemory;
use crate::vhost::ring::{DESCRIPTOR, MAX_SIZE, NEXT, RingAddresses, WRITE};

/// `VIRTQ_DESC_F_AVAIL`
const AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED`
const USED: u16 = 1 << 15;

/// A place in the ring and the wrap counter there, as both are written in memory: fifteen bits and one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vhost) struct Spot(pub(in crate::vhost) u16);

impl Spot {
    /// Where both sides of a new ring begin.
    #[cfg(test)]
    pub(in crate::vhost) const FIRST: Spot = Spot(WRAP);

    pub(in crate::vhost) fn new(index: u16, wrap: bool) -> Self {
        Spot(index & !WRAP | if wrap { WRAP } else { 0 })
    }

    #[inline]
    pub(in crate::vhost) fn index(self) -> u16 {
        self.0 & !WRAP
    }

    #[inline]
    pub(in crate::vhost) fn wrap(self) -> bool {
        self.0 & WRAP != 0
    }

    /// So many slots further; `slots` is at most `size`.
    #[inline]
    pub(in crate::vhost) fn after(self, slots: u16, size: u16) -> Spot {
        let index = u32::from(self.index()) + u32::from(slots);
        if index < u32::from(size) {
            return Spot(self.0 + slots);
        }
        Spot::new((index - u32::from(size)) as u16, !self.wrap())
    }

    /// So many slots earlier; `slots` is at most `size`.
    pub(in crate::vhost) fn before(self, slots: u16, size: u16) -> Spot {
        match self.index().checked_sub(slots) {
            Some(index) => Spot::new(index, self.wrap()),
            None => Spot::new(self.index() + (size - slots), !self.wrap()),
        }
    }

    /// How many slots this is ahead of `other`, in two rounds: afterwards all looks as before.
    #[inline]
    pub(in crate::vhost) fn ahead_of(self, other: Spot, size: u16) -> u32 {
        let size = u32::from(size);
        let along = |spot: Spot| u32::from(spot.index()) + if spot.wrap() { 0 } else { size };
        (along(self) + 2 * size - along(other)) % (2 * size)
    }
}

const WRAP: u16 = 1 << 15;

/// A slot of the ring, read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vhost) struct Slot {
    pub(in crate::vhost) address: u64,
    pub(in crate::vhost) len: u32,
    pub(in crate::vhost) id: u16,
    flags: u16,
}

impl Slot {
    /// The flags of the descriptor, without those of the slot.
    #[inline]
    pub(in crate::vhost) fn flags(&self) -> u16 {
        Self::flags_of(self.flags)
    }

    /// The flags of a descriptor, without those of its slot.
    #[inline]
    pub(in crate::vhost) fn flags_of(flags: u16) -> u16 {
        flags & !(AVAIL | USED)
    }

    /// The wrap counter of whoever wrote it last.
    #[inline]
    pub(in crate::vhost) fn wrap(&self) -> bool {
        self.flags & AVAIL != 0
    }

    /// Whether it is the driver who wrote it last.
    #[inline]
    pub(in crate::vhost) fn is_drivers(&self) -> bool {
        (self.flags & AVAIL != 0) != (self.flags & USED != 0)
    }

    #[inline]
    pub(in crate::vhost) fn is_available(&self, wrap: bool) -> bool {
        self.flags & (AVAIL | USED) == if wrap { AVAIL } else { USED }
    }

    pub(in crate::vhost) fn has_next(&self) -> bool {
        self.flags & NEXT != 0
    }

    pub(in crate::vhost) fn is_written(&self) -> bool {
        self.flags & WRITE != 0
    }
}

/// What a side wants to be told: where, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vhost) enum Wish {
    /// `RING_EVENT_FLAGS_ENABLE`: everything.
    All,
    /// `RING_EVENT_FLAGS_DISABLE`
    Nothing,
    /// `RING_EVENT_FLAGS_DESC`: when the place is reached.
    At,
}

/// A packed ring in guest memory.
#[derive(Debug)]
pub(in crate::vhost) struct PackedRing {
    /// address; length, identifier, flags
    slots: NonNull<[AtomicU64; 2]>,
    /// place and wrap counter, flags
    driver: NonNull<AtomicU32>,
    device: NonNull<AtomicU32>,
    size: u16,
    /// Keeps the pointers good.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are into mappings that `_memory` keeps, and everything behind them is accessed atomically.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// The driver's area is where a split ring has its available ring, the device's where it has the used ring.
    pub(in crate::vhost) fn new(
        memory: &Arc<GuestMemory>,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<Self, SetupError> {
        if size == 0 || u32::from(size) > MAX_SIZE {
            return Err(SetupError::Size(size.into()));
        }
        let place = |part, address, len: usize, align: usize| {
            let guest = memory.guest_address(address, len as u64);
            let at = guest.and_then(|guest| memory.locate(guest, len));
            let at = at.ok_or(SetupError::Outside { part, address })?;
            let aligned = (at.as_ptr() as usize).is_multiple_of(align);
            aligned.then_some(at).ok_or(SetupError::Unaligned { part, address })
        };
        let slots = place("descriptor ring", addresses.descriptors, DESCRIPTOR * usize::from(size), 16)?;
        Ok(Self {
            slots: slots.cast(),
            driver: place("driver's area", addresses.available, 4, 4)?.cast(),
            device: place("device's area", addresses.used, 4, 4)?.cast(),
            size,
            _memory: Arc::clone(memory),
        })
    }

    #[inline]
    pub(in crate::vhost) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn words(&self, index: u16) -> &[AtomicU64; 2] {
        let index = if index < self.size { index } else { 0 };
        // SAFETY: the index is below the size, and `new` found so many slots in memory, aligned.
        unsafe { self.slots.add(usize::from(index)).as_ref() }
    }

    /// A slot. What the driver wrote before its flags is seen after.
    #[inline]
    pub(in crate::vhost) fn slot(&self, index: u16) -> Slot {
        let words = self.words(index);
        let rest = u64::from_le(words[1].load(Ordering::Acquire));
        let address = u64::from_le(words[0].load(Ordering::Relaxed));
        Slot { address, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    /// Marks the slot at `spot` as used, and with it the chain that began there; all that was written before is seen before.
    #[inline]
    pub(in crate::vhost) fn set_used(&self, spot: Spot, id: u16, len: u32, is_written: bool) {
        let marks = if spot.wrap() { AVAIL | USED } else { 0 };
        let flags = marks | if is_written { WRITE } else { 0 };
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.words(spot.index())[1].store(rest.to_le(), Ordering::Release);
    }

    /// Of what the driver wants to be told, and where.
    #[inline]
    pub(in crate::vhost) fn driver_wish(&self) -> (Wish, Spot) {
        // SAFETY: `new` found the four bytes in memory, aligned.
        wish(unsafe { self.driver.as_ref() }.load(Ordering::Relaxed))
    }

    /// What we wrote of ours, or somebody before us did.
    pub(in crate::vhost) fn device_wish(&self) -> (Wish, Spot) {
        // SAFETY: as above.
        wish(unsafe { self.device.as_ref() }.load(Ordering::Relaxed))
    }

    /// Says of what we want to be told. The driver looks at the place only if it is asked to.
    #[inline]
    pub(in crate::vhost) fn set_device_wish(&self, wish: Wish, spot: Spot) {
        let flags: u32 = match wish {
            Wish::All => 0,
            Wish::Nothing => 1,
            Wish::At => 2,
        };
        let word = u32::from(spot.0) | flags << 16;
        // SAFETY: as above.
        unsafe { self.device.as_ref() }.store(word.to_le(), Ordering::Release);
    }
}

#[inline]
fn wish(word: u32) -> (Wish, Spot) {
    let word = u32::from_le(word);
    let wish = match word >> 16 & 3 {
        1 => Wish::Nothing,
        2 => Wish::At,
        _ => Wish::All,
    };
    (wish, Spot(word as u16))
}
