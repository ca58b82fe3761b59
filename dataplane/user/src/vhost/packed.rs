//! A packed virtqueue being served: where both sides stand in it, and what is in flight.
//!
//! There is one ring, in which the driver makes chains available and the device gives them back, in the same slots. Chains go
//! back in the order in which they came, a batch at a time: the first slot of a batch is marked last, so that the driver sees
//! all of it or nothing.
//!
//! No index in memory says how far the device is. A process that goes on in a ring finds that out by the ring itself, and by the
//! place that the device's area names with each batch (see [`recovery`]).

pub(super) mod recovery;
pub(super) mod ring;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use self::ring::{PackedRing, Slot, Spot, Wish};
use super::chain::{Rules, Segment, Walker};
use super::error::QueueError;
use super::inflight::PackedInflight;
use super::log::DirtyLog;
use super::memory::GuestMemory;
use super::ring::{DESCRIPTOR, Descriptor, INDIRECT, NEXT};
use super::virtqueue::{Position, Virtqueue};

/// What is written of a packed ring is logged here.
#[derive(Debug)]
pub(super) struct PackedLog {
    pub(super) log: Arc<DirtyLog>,
    /// The guest address of the ring.
    pub(super) slots: u64,
    /// The guest address of the device's area.
    pub(super) device: u64,
}

/// A chain that an earlier process took and did not give back, as the in-flight area has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Left {
    /// Its entry in the area.
    pub(super) entry: u16,
    pub(super) id: u16,
    pub(super) descriptors: Vec<Descriptor>,
}

/// A chain, as it is given back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain {
    id: u16,
    slots: u16,
}

/// A place among the chains that wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    left: usize,
    spot: Spot,
    /// Slots behind it that chains before it take.
    slots: u16,
}

/// A chain that is given back, not shown yet.
#[derive(Debug, Clone, Copy)]
struct Done {
    spot: Spot,
    id: u16,
    written: u32,
}

/// A packed ring, and where both sides stand in it.
#[derive(Debug)]
pub(super) struct Packed {
    ring: PackedRing,
    event_index: bool,
    /// The next chain to be taken, and where the next is given back.
    available: Spot,
    used: Spot,
    /// How much the driver has been shown.
    shown: Spot,
    /// What it had been shown at the last decision on a notification; None before the first.
    decided: Option<Spot>,
    /// What the driver is told that we want to be told of.
    wish: Wish,
    /// Chains given back and not shown yet.
    done: Vec<Done>,
    /// Chains that an earlier process took and did not give back: they come first.
    left: VecDeque<Left>,
    inflight: Option<PackedInflight>,
    log: Option<PackedLog>,
}

impl Packed {
    /// Goes on from `position`, with chains first that are `left` from an earlier process.
    pub(super) fn new(
        ring: PackedRing,
        event_index: bool,
        position: Position,
        left: Vec<Left>,
        inflight: Option<PackedInflight>,
        log: Option<PackedLog>,
    ) -> Self {
        let used = Spot(position.used);
        let queue = Self {
            ring,
            event_index,
            available: Spot(position.available),
            used,
            shown: used,
            decided: None,
            wish: Wish::Nothing,
            done: Vec::with_capacity(64),
            left: left.into(),
            inflight,
            log,
        };
        if let Some(log) = &queue.log {
            // Recovery may have written.
            log.log.mark(log.slots, DESCRIPTOR as u64 * u64::from(queue.ring.size()));
        }
        queue.tell(used);
        queue
    }

    /// Says what we want to be told of, and where we are.
    #[inline]
    fn tell(&self, spot: Spot) {
        self.ring.set_device_wish(self.wish, spot);
        if let Some(log) = &self.log {
            log.log.mark(log.device, 4);
        }
    }

    /// The slot at a place, if it is available.
    #[inline(always)]
    fn available(&self, spot: Spot) -> Option<Slot> {
        Some(self.ring.slot(spot.index())).filter(|slot| slot.is_available(spot.wrap()))
    }

    #[inline(always)]
    fn checked(&self, id: u16) -> Result<u16, QueueError> {
        let size = self.ring.size();
        if id >= size {
            return Err(QueueError::NoSuchDescriptor { index: id, size: size.into() });
        }
        Ok(id)
    }

    /// Logs the slots from one place to another.
    fn log_slots(&self, from: Spot, to: Spot) {
        let Some(log) = &self.log else { return };
        let size = u64::from(self.ring.size());
        let [from, to] = [from, to].map(|spot| u64::from(spot.index()));
        let slot = DESCRIPTOR as u64;
        if from < to {
            log.log.mark(log.slots + slot * from, slot * (to - from));
        } else {
            log.log.mark(log.slots + slot * from, slot * (size - from));
            log.log.mark(log.slots, slot * to);
        }
    }

    /// The pieces of a chain that is left.
    fn walk_left(
        left: &Left,
        memory: &GuestMemory,
        rules: Rules,
        segments: &mut Vec<Segment>,
    ) -> Result<(Chain, u64), QueueError> {
        let mut walker = Walker::new(rules, segments);
        for descriptor in &left.descriptors {
            if descriptor.is(INDIRECT) {
                if left.descriptors.len() > 1 {
                    return Err(QueueError::BadIndirect);
                }
                walker.whole_table(memory, descriptor)?;
            } else {
                walker.visit(descriptor, left.descriptors.len() as u32)?;
            }
        }
        Ok((Chain { id: left.id, slots: left.descriptors.len() as u16 }, walker.bytes()))
    }
}

impl Slot {
    /// What it describes. Where the chain goes on is not written in it.
    #[inline]
    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor { address: self.address, len: self.len, flags: self.flags(), next: 0 }
    }
}

impl Virtqueue for Packed {
    type Chain = Chain;
    type Cursor = Cursor;

    /// Each slot says for itself.
    #[inline]
    fn look(&mut self, _wanted: usize) -> Result<(), QueueError> {
        Ok(())
    }

    #[inline]
    fn cursor(&self) -> Cursor {
        Cursor { left: 0, spot: self.available, slots: 0 }
    }

    #[inline(always)]
    fn first(&self) -> Result<Option<(Chain, Descriptor)>, QueueError> {
        if let Some(left) = self.left.front() {
            let chain = Chain { id: left.id, slots: left.descriptors.len() as u16 };
            return Ok(left.descriptors.first().map(|first| (chain, *first)));
        }
        let Some(slot) = self.available(self.available) else { return Ok(None) };
        let descriptor = slot.descriptor();
        // The identifier of a longer chain is in its last descriptor.
        let id = if descriptor.is(NEXT) { 0 } else { self.checked(slot.id)? };
        Ok(Some((Chain { id, slots: 1 }, descriptor)))
    }

    #[inline(always)]
    fn walk(
        &self,
        memory: &GuestMemory,
        cursor: &mut Cursor,
        rules: Rules,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<(Chain, u64)>, QueueError> {
        if let Some(left) = self.left.get(cursor.left) {
            cursor.left += 1;
            return Self::walk_left(left, memory, rules, segments).map(Some);
        }
        let size = self.ring.size();
        let Some(mut slot) = self.available(cursor.spot) else { return Ok(None) };
        let mut walker = Walker::new(rules, segments);
        let mut slots = 1;
        loop {
            // All chains that wait are in one ring: more slots have been seen before.
            if u32::from(cursor.slots) + u32::from(slots) > size.into() {
                return Err(QueueError::ChainTooLong(size.into()));
            }
            let descriptor = slot.descriptor();
            if descriptor.is(INDIRECT) {
                if slots > 1 {
                    return Err(QueueError::BadIndirect);
                }
                walker.whole_table(memory, &descriptor)?;
                break;
            }
            walker.visit(&descriptor, size.into())?;
            if !descriptor.is(NEXT) {
                break;
            }
            slot = self.ring.slot(cursor.spot.after(slots, size).index());
            slots += 1;
        }
        let chain = Chain { id: self.checked(slot.id)?, slots };
        cursor.spot = cursor.spot.after(slots, size);
        cursor.slots += slots;
        Ok(Some((chain, walker.bytes())))
    }

    /// Chains of one slot are easily found, up to the first of several. The processor finds out by itself that slots lie one
    /// behind the other, whichever side they come from.
    #[inline]
    fn peek(&self, wanted: usize, heads: &mut Vec<(Chain, Descriptor)>) {
        if !self.left.is_empty() {
            return;
        }
        let size = self.ring.size();
        let (known, wanted) = (heads.len(), wanted.min(size.into()));
        for ahead in known..wanted {
            let Some(slot) = self.available(self.available.after(ahead as u16, size)) else { return };
            let descriptor = slot.descriptor();
            if descriptor.is(NEXT) || slot.id >= size {
                return;
            }
            heads.push((Chain { id: slot.id, slots: 1 }, descriptor));
        }
    }

    #[inline(always)]
    fn heads_of(chain: Chain) -> Option<usize> {
        (chain.slots == 1).then_some(1)
    }

    #[inline(always)]
    fn complete(&mut self, chain: Chain, written: u32) {
        let size = self.ring.size();
        if let Some(left) = self.left.pop_front() {
            if let Some(inflight) = &mut self.inflight {
                inflight.give_back(left.entry);
            }
        } else {
            if let Some(inflight) = &mut self.inflight {
                let spots = (0..chain.slots).map(|slot| self.available.after(slot, size));
                inflight.take(chain.id, spots.map(|spot| self.ring.slot(spot.index())));
            }
            self.available = self.available.after(chain.slots, size);
        }
        self.done.push(Done { spot: self.used, id: chain.id, written });
        self.used = self.used.after(chain.slots, size);
    }

    fn show(&mut self) {
        if self.done.is_empty() {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.before_publish(self.used);
        }
        for done in self.done.iter().rev() {
            self.ring.set_used(done.spot, done.id, done.written, done.written > 0);
        }
        self.done.clear();
        self.tell(self.used);
        if let Some(inflight) = &mut self.inflight {
            inflight.after_publish();
        }
        self.log_slots(self.shown, self.used);
        self.shown = self.used;
    }

    fn wants_interrupt(&mut self) -> bool {
        if self.decided == Some(self.shown) {
            return false;
        }
        // What was shown must be seen before we look whether anyone waits for it.
        fence(Ordering::SeqCst);
        let size = self.ring.size();
        let wants = match self.ring.driver_wish() {
            (Wish::Nothing, _) => false,
            (Wish::At, event) if self.event_index && event.index() < size => self
                .decided
                .is_none_or(|decided| event.ahead_of(decided, size) < self.shown.ahead_of(decided, size)),
            _ => true,
        };
        self.decided = Some(self.shown);
        wants
    }

    fn arm(&mut self) -> bool {
        self.wish = if self.event_index { Wish::At } else { Wish::All };
        self.tell(self.available);
        // The wish must be seen before we look whether it came too late.
        fence(Ordering::SeqCst);
        self.left.is_empty() && self.available(self.available).is_none()
    }

    fn disarm(&mut self) {
        self.wish = Wish::Nothing;
        self.tell(self.used);
    }

    fn position(&self) -> Position {
        Position { available: self.available.0, used: self.used.0 }
    }
}
