//! Descriptors in flight, kept where they outlive this process (vhost-user, "Inflight I/O tracking").
//!
//! The area is shared memory that the front-end keeps. A chain is marked when it is taken and unmarked once it is in the used
//! ring; after a crash the next process finds what was taken and not given back, and serves it again, in order.
//!
//! All accesses are atomics in bounds; a front-end that scribbles in it harms its own guest.

mod packed;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(super) use self::packed::PackedInflight;
use super::error::{MemoryError, SetupError};
use super::memory::Mapping;

/// Of a queue's part: features (8 bytes), version, entries, the last batch's head, used index (2 bytes each).
const HEADER: usize = 16;
/// Of an entry: in flight (1 byte), padding (5), next (2), counter (8).
const ENTRY: usize = 16;
/// Parts begin at cache lines.
const ALIGN: usize = 64;
/// Of the layout.
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;

const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// The area of all queues.
#[derive(Debug, Clone)]
pub(super) struct InflightArea {
    mapping: Arc<Mapping>,
    queues: u16,
    entries: u16,
}

impl InflightArea {
    /// Bytes that so many queues with split rings of so many entries need.
    pub(super) fn bytes(queues: u16, entries: u16) -> u64 {
        (Self::stride(entries) * usize::from(queues)) as u64
    }

    fn stride(entries: u16) -> usize {
        (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
    }

    pub(super) fn new(
        file: &OwnedFd,
        offset: u64,
        len: u64,
        queues: u16,
        entries: u16,
    ) -> Result<Self, MemoryError> {
        if len < Self::bytes(queues, entries) || !offset.is_multiple_of(ALIGN as u64) {
            return Err(MemoryError::Length { offset, len });
        }
        Ok(Self { mapping: Arc::new(Mapping::new(file, offset, len)?), queues, entries })
    }

    /// The part of one queue with a packed ring of `entries`; None if it has none.
    pub(super) fn packed_queue(
        &self,
        index: usize,
        entries: u16,
    ) -> Result<Option<PackedInflight>, SetupError> {
        if index >= usize::from(self.queues) {
            return Ok(None);
        }
        let is_long_enough = self.mapping.len() as u64 >= PackedInflight::bytes(self.queues, self.entries);
        if entries > self.entries || !is_long_enough {
            return Err(SetupError::Inflight(entries));
        }
        let start = PackedInflight::stride(self.entries) * index;
        Ok(Some(PackedInflight::new(Arc::clone(&self.mapping), start, entries)))
    }

    /// Bytes that so many queues with so many entries need, whichever kind the rings are of.
    pub(super) fn bytes_of_any(queues: u16, entries: u16) -> u64 {
        Self::bytes(queues, entries).max(PackedInflight::bytes(queues, entries))
    }

    /// The part of one queue with a split ring of `entries`; None if it has none.
    pub(super) fn queue(&self, index: usize, entries: u16) -> Result<Option<InflightQueue>, SetupError> {
        if index >= usize::from(self.queues) {
            return Ok(None);
        }
        if entries > self.entries {
            return Err(SetupError::Inflight(entries));
        }
        let start = Self::stride(self.entries) * index;
        Ok(Some(InflightQueue { mapping: Arc::clone(&self.mapping), start, entries, counter: 0 }))
    }
}

/// The part of one queue with a split ring. Heads are checked against the ring before they come here.
#[derive(Debug)]
pub(super) struct InflightQueue {
    mapping: Arc<Mapping>,
    start: usize,
    entries: u16,
    counter: u64,
}

impl InflightQueue {
    fn word(&self, at: usize) -> u16 {
        self.mapping.atomic_u16(self.start + at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set_word(&self, at: usize, value: u16) {
        if let Some(word) = self.mapping.atomic_u16(self.start + at) {
            word.store(value, Ordering::Release);
        }
    }

    fn entry(&self, head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn is_in_flight(&self, head: u16) -> bool {
        let at = self.start + self.entry(head);
        self.mapping.atomic_u8(at).is_some_and(|byte| byte.load(Ordering::Acquire) == 1)
    }

    fn set_in_flight(&self, head: u16, is_in_flight: bool) {
        if let Some(byte) = self.mapping.atomic_u8(self.start + self.entry(head)) {
            byte.store(is_in_flight.into(), Ordering::Release);
        }
    }

    fn counter_of(&self, head: u16) -> u64 {
        let at = self.start + self.entry(head) + COUNTER_AT;
        self.mapping.atomic_u64(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Takes over what an earlier process left: heads that it took and did not give back, oldest first. `used` is the used ring's
    /// index. A fresh area becomes ours.
    pub(super) fn recover(&mut self, used: u16) -> Result<Vec<u16>, SetupError> {
        match self.word(VERSION_AT) {
            0 => {
                self.set_word(ENTRIES_AT, self.entries);
                self.set_word(LAST_BATCH_AT, 0);
                self.set_word(USED_AT, used);
                self.set_word(VERSION_AT, VERSION);
                return Ok(Vec::new());
            }
            VERSION if self.word(ENTRIES_AT) == self.entries => {}
            _ => return Err(SetupError::Inflight(self.entries)),
        }
        self.finish_last_batch(used);
        let mut left: Vec<u16> = (0..self.entries).filter(|head| self.is_in_flight(*head)).collect();
        left.sort_by_key(|head| self.counter_of(*head));
        self.counter = left.last().map_or(0, |head| self.counter_of(*head).wrapping_add(1));
        Ok(left)
    }

    /// The driver has seen the last batch if the used index moved, though the process may have died before it unmarked the chains.
    fn finish_last_batch(&mut self, used: u16) {
        let mut head = self.word(LAST_BATCH_AT);
        let unfinished = used.wrapping_sub(self.word(USED_AT)).min(self.entries);
        for _ in 0..unfinished {
            if head >= self.entries {
                break;
            }
            self.set_in_flight(head, false);
            head = self.word(self.entry(head) + NEXT_AT);
        }
        self.set_word(USED_AT, used);
    }

    /// A chain was taken.
    #[inline]
    pub(super) fn take(&mut self, head: u16) {
        if let Some(counter) = self.mapping.atomic_u64(self.start + self.entry(head) + COUNTER_AT) {
            counter.store(self.counter, Ordering::Release);
        }
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// Chains are in the used ring, whose index has not moved yet: links them, the last one first.
    pub(super) fn before_publish(&mut self, heads: &[u16]) {
        let mut last = self.word(LAST_BATCH_AT);
        for head in heads {
            self.set_word(self.entry(*head) + NEXT_AT, last);
            last = *head;
        }
        self.set_word(LAST_BATCH_AT, last);
    }

    /// The used index has moved to `used`.
    pub(super) fn after_publish(&mut self, heads: &[u16], used: u16) {
        for head in heads {
            self.set_in_flight(*head, false);
        }
        self.set_word(USED_AT, used);
    }
}
