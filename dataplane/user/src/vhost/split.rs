//! A split virtqueue being served: where both sides stand in it, and what is in flight.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::chain::{Rules, Segment, Walker};
use super::error::QueueError;
use super::inflight::InflightQueue;
use super::log::DirtyLog;
use super::memory::{CACHE_LINE, GuestMemory};
use super::ring::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, SplitRing};
use super::virtqueue::{Position, Virtqueue};
use crate::port::BATCH;

/// Bytes of an entry of the used ring.
const USED: usize = 8;

/// A split ring, and where both sides stand in it.
#[derive(Debug)]
pub(super) struct Split {
    ring: SplitRing,
    event_index: bool,
    /// The next position of the available ring, and how far the driver was at the last look.
    available: u16,
    limit: u16,
    /// The next position of the used ring, and how much of it the driver has been shown.
    used: u16,
    shown: u16,
    /// The used index at the last decision on a notification; None before the first.
    decided: Option<u16>,
    /// Chains that an earlier process took and did not give back: they come first.
    left: VecDeque<u16>,
    inflight: Option<InflightQueue>,
    /// Chains put into the used ring and not shown yet; kept only for the in-flight area.
    unshown: Vec<u16>,
    /// The log, and the guest address of the used ring.
    log: Option<(Arc<DirtyLog>, u64)>,
}

impl Split {
    /// Goes on from `position`, with chains first that are `left` from an earlier process.
    pub(super) fn new(
        ring: SplitRing,
        event_index: bool,
        position: Position,
        left: Vec<u16>,
        inflight: Option<InflightQueue>,
        log: Option<(Arc<DirtyLog>, u64)>,
    ) -> Self {
        if !event_index {
            ring.set_no_notify(true);
        }
        Self {
            ring,
            event_index,
            available: position.available,
            limit: position.available,
            used: position.used,
            shown: position.used,
            decided: None,
            left: left.into(),
            inflight,
            unshown: Vec::new(),
            log,
        }
    }

    /// The head of the `ahead`-th chain that waits.
    #[inline(always)]
    fn head(&self, ahead: usize) -> Result<Option<u16>, QueueError> {
        let index = match self.left.get(ahead) {
            Some(head) => *head,
            None => {
                let behind = (ahead - self.left.len()) as u16;
                if behind >= self.limit.wrapping_sub(self.available) {
                    return Ok(None);
                }
                self.ring.head(self.available.wrapping_add(behind))
            }
        };
        let size = self.ring.size();
        if index >= size {
            return Err(QueueError::NoSuchDescriptor { index, size: size.into() });
        }
        Ok(Some(index))
    }

    /// Logs the used ring, which was written.
    fn log_used(&self) {
        if let Some((log, used)) = &self.log {
            log.mark(*used, self.ring.used_len());
        }
    }
}

impl Virtqueue for Split {
    /// The head.
    type Chain = u16;
    /// How many chains are before it.
    type Cursor = usize;

    #[inline]
    fn look(&mut self, wanted: usize) -> Result<(), QueueError> {
        if usize::from(self.limit.wrapping_sub(self.available)) >= wanted {
            return Ok(());
        }
        let index = self.ring.available_index();
        let by = index.wrapping_sub(self.available);
        if by > self.ring.size() {
            return Err(QueueError::IndexJump { by, size: self.ring.size() });
        }
        self.limit = index;
        Ok(())
    }

    #[inline]
    fn cursor(&self) -> usize {
        0
    }

    #[inline(always)]
    fn first(&self) -> Result<Option<(u16, Descriptor)>, QueueError> {
        Ok(self.head(0)?.map(|head| (head, self.ring.descriptor(head))))
    }

    #[inline(always)]
    fn walk(
        &self,
        memory: &GuestMemory,
        cursor: &mut usize,
        rules: Rules,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<(u16, u64)>, QueueError> {
        let Some(head) = self.head(*cursor)? else { return Ok(None) };
        let size = u32::from(self.ring.size());
        let mut walker = Walker::new(rules, segments);
        let mut index = head;
        loop {
            if u32::from(index) >= size {
                return Err(QueueError::NoSuchDescriptor { index, size });
            }
            let descriptor = self.ring.descriptor(index);
            if descriptor.is(INDIRECT) {
                walker.chained_table(memory, &descriptor)?;
                break;
            }
            walker.visit(&descriptor, size)?;
            if !descriptor.is(NEXT) {
                break;
            }
            index = descriptor.next;
        }
        *cursor += 1;
        Ok(Some((head, walker.bytes())))
    }

    /// Where they are given back is brought near too, and the descriptors of those behind. Drivers use descriptors one behind
    /// the other for the most part: four of them come at once.
    #[inline]
    fn peek(&self, wanted: usize, heads: &mut Vec<(u16, Descriptor)>) {
        if !self.left.is_empty() {
            return;
        }
        let waiting = usize::from(self.limit.wrapping_sub(self.available));
        let (known, wanted) = (heads.len(), wanted.min(waiting));
        for ahead in (known..wanted).step_by(CACHE_LINE / USED) {
            self.ring.prefetch_used(self.used.wrapping_add(ahead as u16));
        }
        for ahead in known..wanted {
            let head = self.ring.head(self.available.wrapping_add(ahead as u16));
            if head >= self.ring.size() {
                return;
            }
            heads.push((head, self.ring.descriptor(head)));
        }
        let behind = waiting.min(wanted + BATCH);
        if known < wanted && wanted < behind {
            self.ring.prefetch_available(self.available.wrapping_add(behind as u16));
            for ahead in (wanted..behind).step_by(CACHE_LINE / DESCRIPTOR) {
                let head = self.ring.head(self.available.wrapping_add(ahead as u16));
                self.ring.prefetch_descriptor(head);
            }
        }
    }

    #[inline(always)]
    fn heads_of(_: u16) -> Option<usize> {
        Some(1)
    }

    #[inline(always)]
    fn complete(&mut self, head: u16, written: u32) {
        let is_left = self.left.pop_front().is_some();
        if !is_left {
            self.available = self.available.wrapping_add(1);
        }
        if let Some(inflight) = &mut self.inflight {
            // What is left is written down already, in its order.
            if !is_left {
                inflight.take(head);
            }
            self.unshown.push(head);
        }
        self.ring.put_used(self.used, head, written);
        self.used = self.used.wrapping_add(1);
    }

    fn show(&mut self) {
        if self.used == self.shown {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.before_publish(&self.unshown);
        }
        self.ring.set_used_index(self.used);
        self.shown = self.used;
        if let Some(inflight) = &mut self.inflight {
            inflight.after_publish(&self.unshown, self.used);
            self.unshown.clear();
        }
        self.log_used();
    }

    fn wants_interrupt(&mut self) -> bool {
        if self.decided == Some(self.shown) {
            return false;
        }
        // What was shown must be seen before we look whether anyone waits for it.
        fence(Ordering::SeqCst);
        let wants = if self.event_index {
            let event = self.ring.used_event();
            let past = self.shown.wrapping_sub(event).wrapping_sub(1);
            self.decided.is_none_or(|decided| past < self.shown.wrapping_sub(decided))
        } else {
            !self.ring.wants_no_interrupt()
        };
        self.decided = Some(self.shown);
        wants
    }

    fn arm(&mut self) -> bool {
        if self.event_index {
            self.ring.set_available_event(self.available);
        } else {
            self.ring.set_no_notify(false);
        }
        self.log_used();
        // The wish must be seen before we look whether it came too late.
        fence(Ordering::SeqCst);
        self.left.is_empty() && self.ring.available_index() == self.available
    }

    /// With event index, the event that has passed stays passed.
    fn disarm(&mut self) {
        if !self.event_index {
            self.ring.set_no_notify(true);
            self.log_used();
        }
    }

    fn position(&self) -> Position {
        Position { available: self.available, used: self.used }
    }
}
