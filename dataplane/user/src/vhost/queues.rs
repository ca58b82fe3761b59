//! The ends of a queue pair, as the engine's ports see them.
//!
//! A worker takes the queue's lock for one batch. The session takes it to change something, for moments: a worker that finds it
//! taken looks again in its next round, or, with frames to deliver, waits a little, and never longer than that.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::error::FrameFault;
use super::port::{Shared, Slot};
use crate::frame::Pool;
use crate::port::{Accepts, Batch, Receive, Transmit};

/// How long a worker waits for a queue at most.
const PATIENCE: Duration = Duration::from_micros(200);

/// The way in: what the guest transmits.
#[derive(Debug)]
pub struct FromGuest {
    shared: Arc<Shared>,
    index: usize,
}

impl FromGuest {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Self {
        Self { shared, index }
    }

    #[inline]
    fn slot(&self) -> &Slot {
        &self.shared.slots[self.index]
    }
}

impl Receive for FromGuest {
    #[inline]
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch) {
        let slot = self.slot();
        if let Some(mut queue) = slot.queue.try_lock() {
            queue.receive(pool, batch, &slot.counters);
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.slot().event.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.slot().queue.try_lock().is_some_and(|mut queue| queue.arm())
    }

    fn disarm(&mut self) {
        if let Some(mut queue) = self.slot().queue.try_lock_for(PATIENCE) {
            queue.disarm();
        }
    }
}

/// The way out: what the guest receives.
#[derive(Debug)]
pub struct ToGuest {
    shared: Arc<Shared>,
    index: usize,
    /// Frames were delivered that the guest was not notified of.
    is_silent: bool,
}

impl ToGuest {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Self {
        Self { shared, index, is_silent: false }
    }
}

impl Transmit for ToGuest {
    #[inline]
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let slot = &self.shared.slots[self.index];
        let mut sent = 0;
        if let Some(mut queue) = slot.queue.try_lock_for(PATIENCE) {
            match queue.deliver(batch.frames(), &slot.counters) {
                Some(delivered) => sent = delivered,
                None => slot.counters.fault(FrameFault::NotRunning, batch.len() as u64),
            }
        }
        self.is_silent |= sent > 0;
        batch.give(pool);
        sent
    }

    fn accepts(&self) -> Accepts {
        let queue = self.shared.slots[self.index].queue.try_lock_for(PATIENCE);
        queue.and_then(|queue| queue.accepts()).unwrap_or_default()
    }

    #[inline]
    fn flush(&mut self) {
        if !self.is_silent {
            return;
        }
        let slot = &self.shared.slots[self.index];
        if let Some(mut queue) = slot.queue.try_lock_for(PATIENCE) {
            queue.notify(&slot.counters);
            self.is_silent = false;
        }
    }
}
