//! What a queue has done, counted; read by anyone at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::FrameFault;

/// Counters of one queue. Only the holder of the queue's lock writes.
#[derive(Debug, Default)]
pub(super) struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    notifications: AtomicU64,
    stops: AtomicU64,
    faults: [AtomicU64; FrameFault::ALL.len()],
}

/// The counters of one queue at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, without virtio-net headers.
    pub bytes: u64,
    /// Interrupts that the guest was sent.
    pub notifications: u64,
    /// How often the queue was stopped for what the driver did.
    pub stops: u64,
    faults: [u64; FrameFault::ALL.len()],
}

impl QueueCounters {
    /// Frames that did not pass for this reason.
    #[must_use]
    pub fn faults(&self, fault: FrameFault) -> u64 {
        self.faults[fault.index()]
    }

    /// Frames that did not pass, with the reason, where there were any.
    pub fn all_faults(&self) -> impl Iterator<Item = (FrameFault, u64)> {
        FrameFault::ALL.into_iter().map(|fault| (fault, self.faults(fault))).filter(|(_, count)| *count > 0)
    }
}

/// With one writer, two plain accesses do; they cost less than an atomic addition.
#[inline]
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

impl Counters {
    #[inline]
    pub(super) fn passed(&self, frames: u64, bytes: u64) {
        add(&self.frames, frames);
        add(&self.bytes, bytes);
    }

    #[inline]
    pub(super) fn notified(&self) {
        add(&self.notifications, 1);
    }

    pub(super) fn stopped(&self) {
        add(&self.stops, 1);
    }

    #[inline]
    pub(super) fn fault(&self, fault: FrameFault, frames: u64) {
        add(&self.faults[fault.index()], frames);
    }

    pub(super) fn read(&self) -> QueueCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueCounters {
            frames: get(&self.frames),
            bytes: get(&self.bytes),
            notifications: get(&self.notifications),
            stops: get(&self.stops),
            faults: self.faults.each_ref().map(get),
        }
    }
}
