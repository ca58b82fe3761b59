//! The part of one queue with a packed ring.
//!
//! Slots of the ring are overwritten as chains are given back, so each chain that is taken is copied: its descriptors fill a list
//! of entries, whose first is marked while the chain is in flight. A batch is recorded before its first slot is marked in the
//! ring; by that slot the next process knows whether the driver has seen it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::ALIGN;
use crate::vhost::error::SetupError;
use crate::vhost::memory::Mapping;
use crate::vhost::packed::Left;
use crate::vhost::packed::ring::{PackedRing, Slot, Spot};
use crate::vhost::ring::Descriptor;

/// Of a queue's part: features (8 bytes), version, entries, free head, old free head, used index, old used index (2 bytes
/// each), used wrap counter, old used wrap counter (1 byte each), padding.
const HEADER: usize = 32;
/// Of an entry: in flight (1 byte), padding (1), next, last, number (2 each), counter (8), identifier, flags (2 each), length (4),
/// address (8).
const ENTRY: usize = 32;
/// Of the layout.
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const FREE_AT: usize = 12;
const OLD_FREE_AT: usize = 14;
/// Both used indices and both wrap counters, which are written at once.
const USED_AT: usize = 16;

const NEXT_AT: usize = 2;
const LAST_AT: usize = 4;
const NUMBER_AT: usize = 6;
const COUNTER_AT: usize = 8;
/// Identifier, flags and length, as one word.
const IDENTIFIER_AT: usize = 16;
const ADDRESS_AT: usize = 24;

/// The part of one queue with a packed ring. What is read of it may be anything, and is checked before it is used.
#[derive(Debug)]
pub(in crate::vhost) struct PackedInflight {
    mapping: Arc<Mapping>,
    start: usize,
    entries: u16,
    counter: u64,
    /// Where the next chain is given back, as written last.
    used: Spot,
    /// First entries of the chains that are given back and not shown yet.
    unshown: Vec<u16>,
}

impl PackedInflight {
    pub(super) fn stride(entries: u16) -> usize {
        (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
    }

    /// Bytes that so many queues with packed rings of so many entries need.
    pub(super) fn bytes(queues: u16, entries: u16) -> u64 {
        (Self::stride(entries) * usize::from(queues)) as u64
    }

    /// The caller has checked that the part is inside the mapping.
    pub(super) fn new(mapping: Arc<Mapping>, start: usize, entries: u16) -> Self {
        Self { mapping, start, entries, counter: 0, used: Spot(0), unshown: Vec::new() }
    }

    fn word(&self, at: usize) -> u16 {
        self.mapping.atomic_u16(self.start + at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set_word(&self, at: usize, value: u16) {
        if let Some(word) = self.mapping.atomic_u16(self.start + at) {
            word.store(value, Ordering::Release);
        }
    }

    fn long(&self, at: usize) -> u64 {
        self.mapping.atomic_u64(self.start + at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set_long(&self, at: usize, value: u64) {
        if let Some(word) = self.mapping.atomic_u64(self.start + at) {
            word.store(value, Ordering::Release);
        }
    }

    /// A field of an entry. An entry that there is not is the first.
    fn field(&self, entry: u16, at: usize) -> usize {
        let entry = if entry < self.entries { entry } else { 0 };
        HEADER + ENTRY * usize::from(entry) + at
    }

    fn next(&self, entry: u16) -> u16 {
        self.word(self.field(entry, NEXT_AT))
    }

    fn is_in_flight(&self, entry: u16) -> bool {
        let at = self.start + self.field(entry, 0);
        self.mapping.atomic_u8(at).is_some_and(|byte| byte.load(Ordering::Acquire) == 1)
    }

    fn set_in_flight(&self, entry: u16, is_in_flight: bool) {
        if let Some(byte) = self.mapping.atomic_u8(self.start + self.field(entry, 0)) {
            byte.store(is_in_flight.into(), Ordering::Release);
        }
    }

    /// The places that the next chain is given back at: now, and as of the batch before.
    fn used(&self) -> [Spot; 2] {
        let [a, b, c, d, now, old, ..] = self.long(USED_AT).to_le_bytes();
        let indices = [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])];
        [Spot::new(indices[0], now == 1), Spot::new(indices[1], old == 1)]
    }

    fn set_used(&self, [now, old]: [Spot; 2]) {
        let indices = u64::from(now.index()) | u64::from(old.index()) << 16;
        self.set_long(USED_AT, indices | u64::from(now.wrap()) << 32 | u64::from(old.wrap()) << 40);
    }

    /// Makes the area ours, with nothing in flight. Chains go on to be given back at `used`.
    pub(in crate::vhost) fn begin(&mut self, used: Spot) {
        // Without a version it is nobody's, should this process die here.
        self.set_word(VERSION_AT, 0);
        self.set_word(ENTRIES_AT, self.entries);
        for entry in 0..self.entries {
            self.set_in_flight(entry, false);
            self.set_word(self.field(entry, NEXT_AT), entry + 1);
        }
        self.set_word(FREE_AT, 0);
        self.set_word(OLD_FREE_AT, 0);
        self.set_used([used; 2]);
        self.used = used;
        self.set_word(VERSION_AT, VERSION);
    }

    /// Takes over what an earlier process left: where it would have given the next chain back, and the chains that it took and did
    /// not give back, oldest first. None if there is nothing in the area.
    pub(in crate::vhost) fn recover(
        &mut self,
        ring: &PackedRing,
    ) -> Result<Option<(Spot, Vec<Left>)>, SetupError> {
        match self.word(VERSION_AT) {
            0 => return Ok(None),
            VERSION if self.word(ENTRIES_AT) == self.entries => {}
            _ => return Err(SetupError::Inflight(self.entries)),
        }
        let [now, old] = self.used();
        if now.index() >= self.entries || old.index() >= self.entries {
            return Err(SetupError::Inflight(self.entries));
        }
        // The driver has seen the last batch if its first slot is marked.
        let is_seen = now != old && !ring.slot(old.index()).is_available(old.wrap());
        let (used, free) = if is_seen { (now, self.word(FREE_AT)) } else { (old, self.word(OLD_FREE_AT)) };
        self.set_word(FREE_AT, free);
        self.set_word(OLD_FREE_AT, free);
        self.set_used([used; 2]);
        self.used = used;
        let mut entry = free;
        for _ in 0..self.entries {
            if entry >= self.entries {
                break;
            }
            self.set_in_flight(entry, false);
            entry = self.next(entry);
        }
        let mut firsts: Vec<u16> = (0..self.entries).filter(|entry| self.is_in_flight(*entry)).collect();
        let counter = |entry: &u16| self.long(self.field(*entry, COUNTER_AT));
        firsts.sort_by_key(counter);
        let next = firsts.last().map_or(0, |entry| counter(entry).wrapping_add(1));
        let left = firsts.into_iter().map(|entry| self.left(entry)).collect::<Result<Vec<_>, _>>()?;
        let slots: usize = left.iter().map(|left| left.descriptors.len()).sum();
        if slots > self.entries.into() {
            return Err(SetupError::Inflight(self.entries));
        }
        self.counter = next;
        Ok(Some((used, left)))
    }

    /// The chain that is copied from an entry on.
    fn left(&self, first: u16) -> Result<Left, SetupError> {
        let slots = self.word(self.field(first, NUMBER_AT));
        if slots == 0 || slots > self.entries {
            return Err(SetupError::Inflight(self.entries));
        }
        let mut descriptors = Vec::new();
        let (mut entry, mut id) = (first, 0);
        for _ in 0..slots {
            if entry >= self.entries {
                return Err(SetupError::Inflight(self.entries));
            }
            let rest = self.long(self.field(entry, IDENTIFIER_AT));
            id = rest as u16;
            let address = self.long(self.field(entry, ADDRESS_AT));
            descriptors.push(Descriptor {
                address,
                len: (rest >> 32) as u32,
                flags: Slot::flags_of((rest >> 16) as u16),
                next: 0,
            });
            entry = self.next(entry);
        }
        if id >= self.entries {
            return Err(SetupError::Inflight(self.entries));
        }
        Ok(Left { entry: first, id, descriptors })
    }

    /// A chain was taken, and is given back with the next batch.
    pub(in crate::vhost) fn take(&mut self, id: u16, slots: impl ExactSizeIterator<Item = Slot>) {
        let first = self.word(FREE_AT);
        let count = slots.len();
        self.set_word(self.field(first, NUMBER_AT), count as u16);
        self.set_long(self.field(first, COUNTER_AT), self.counter);
        self.counter = self.counter.wrapping_add(1);
        let (mut entry, mut last) = (first, first);
        for slot in slots {
            last = entry;
            let rest = u64::from(id) | u64::from(slot.flags()) << 16 | u64::from(slot.len) << 32;
            self.set_long(self.field(entry, IDENTIFIER_AT), rest);
            self.set_long(self.field(entry, ADDRESS_AT), slot.address);
            entry = self.next(entry);
        }
        self.set_word(self.field(first, LAST_AT), last);
        self.set_in_flight(first, true);
        self.set_word(FREE_AT, entry);
        self.set_word(OLD_FREE_AT, entry);
        self.unshown.push(first);
    }

    /// A chain that was left is given back with the next batch.
    pub(in crate::vhost) fn give_back(&mut self, entry: u16) {
        self.unshown.push(entry);
    }

    /// The batch is about to be marked in the ring; the next chain goes to `used`.
    pub(in crate::vhost) fn before_publish(&mut self, used: Spot) {
        let mut free = self.word(FREE_AT);
        for first in &self.unshown {
            let last = self.word(self.field(*first, LAST_AT));
            self.set_word(self.field(last, NEXT_AT), free);
            free = *first;
        }
        self.set_word(FREE_AT, free);
        self.set_used([used, self.used]);
        self.used = used;
    }

    /// It is marked.
    pub(in crate::vhost) fn after_publish(&mut self) {
        for first in &self.unshown {
            self.set_in_flight(*first, false);
        }
        self.unshown.clear();
        self.set_word(OLD_FREE_AT, self.word(FREE_AT));
        self.set_used([self.used; 2]);
    }
}
