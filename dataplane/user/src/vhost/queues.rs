//! The ends of a queue pair, as the engine's ports see them.
//!
//! A worker takes the queue's lock for one batch. The session takes it to change something, for moments: a worker that finds it
//! taken looks again in its next round, or, with frames to deliver, waits a little: once, and not again before it had the lock. A
//! front-end that keeps its session busy costs its own guest frames, and other guests no time.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::counters::Counters;
use super::error::FrameFault;
use super::port::{Shared, Slot};
use super::queue::Queue;
use crate::frame::Pool;
use crate::port::{Accepts, Batch, Receive, Transmit};

/// How long a worker waits for a queue at most.
const PATIENCE: Duration = Duration::from_micros(200);

impl Slot {
    /// The queue, for frames that are lost without. Whoever waited in vain waits no more until somebody had it.
    #[inline]
    fn lock_soon(&self) -> Option<MutexGuard<'_, Queue>> {
        let was_held = self.is_held.load(Ordering::Relaxed);
        let queue = if was_held { self.queue.try_lock() } else { self.queue.try_lock_for(PATIENCE) };
        if was_held == queue.is_some() {
            self.is_held.store(queue.is_none(), Ordering::Relaxed);
        }
        queue
    }

    /// What the session does with a queue. The driver is notified at the end: a worker that was about to do so, and found the queue
    /// locked, does not come back for it.
    pub(super) fn change<R>(&self, act: impl FnOnce(&mut Queue, &Counters) -> R) -> R {
        let mut queue = self.queue.lock();
        let result = act(&mut queue, &self.counters);
        queue.notify(&self.counters);
        result
    }

    /// Notifies the driver of what it was shown. If somebody has the queue, that is their business: the session's [at the end of each
    /// change](Self::change), and another worker's, which has put something into it and will come here too.
    #[inline]
    fn notify(&self) {
        if let Some(mut queue) = self.queue.try_lock() {
            queue.notify(&self.counters);
        }
    }
}

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

    #[inline]
    fn notify(&mut self) {
        self.slot().notify();
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.slot().event.as_fd())
    }

    fn is_polled(&self) -> bool {
        // Whoever has it locked may be about to change that.
        self.slot().queue.try_lock().is_none_or(|queue| queue.is_polled())
    }

    fn arm(&mut self) -> bool {
        self.slot().queue.try_lock().is_some_and(|mut queue| queue.arm())
    }

    fn disarm(&mut self) {
        // What is not consumed now wakes the worker again, which does no harm.
        if let Some(mut queue) = self.slot().queue.try_lock() {
            queue.disarm();
        }
    }
}

/// The way out: what the guest receives.
///
/// A guest need not use all queues that it could have. Frames for one that is not served go to one that is.
#[derive(Debug)]
pub struct ToGuest {
    shared: Arc<Shared>,
    index: usize,
    /// The queue that frames were put into that the guest was not notified of.
    silent: Option<usize>,
}

impl ToGuest {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Self {
        Self { shared, index, silent: None }
    }

    /// The queue to be used now.
    #[inline]
    fn target(&self) -> usize {
        let is_live = |slot: &Slot| slot.sign.is_live();
        if is_live(&self.shared.slots[self.index]) {
            return self.index;
        }
        // Drivers use the first so many pairs.
        let used = self.shared.slots.iter().step_by(2).take_while(|slot| is_live(slot)).count();
        (self.index / 2).checked_rem(used).map_or(self.index, |pair| 2 * pair)
    }
}

impl Transmit for ToGuest {
    #[inline]
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let index = self.target();
        if self.silent.is_some_and(|silent| silent != index) {
            self.flush();
        }
        let slot = &self.shared.slots[index];
        let mut sent = 0;
        if let Some(mut queue) = slot.lock_soon() {
            match queue.deliver(batch.frames(), &slot.counters) {
                Some(delivered) => sent = delivered,
                None => slot.counters.fault(FrameFault::NotRunning, batch.len() as u64),
            }
        }
        if sent > 0 {
            self.silent = Some(index);
        }
        batch.recycle(pool);
        sent
    }

    #[inline]
    fn accepts(&self) -> Accepts {
        self.shared.features().guest_accepts()
    }

    #[inline]
    fn flush(&mut self) {
        let Some(index) = self.silent else { return };
        self.shared.slots[index].notify();
        self.silent = None;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;
    use crate::frame::{Region, RegionLayout};
    use crate::vhost::{Mode, Port, PortConfig};

    fn port(folder: &Path) -> Port {
        let config = PortConfig {
            path: folder.join("port"),
            mode: Mode::Server,
            queue_pairs: 1,
            mtu: 1500,
            offloads: true,
            standby: false,
        };
        Port::open(config, Box::new(|_| {})).unwrap()
    }

    /// Whoever asked for a lock could lose its CPU with it, and the guest what came meanwhile.
    #[test]
    fn asking_how_a_port_is_takes_no_lock_of_its_queues() {
        let folder = tempfile::tempdir().unwrap();
        let port = port(folder.path());
        let (from, to) = port.queues().remove(0);
        let held = (from.slot().queue.lock(), to.shared.slots[to.index].queue.lock());
        let asked = std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            scope.spawn(|| {
                let _ = tell.send(port.status().queues.len()); // nobody waits any longer for what came too late
                drop(tell);
            });
            let answer = told.recv_timeout(Duration::from_secs(10));
            drop(held);
            answer
        });
        assert_eq!(asked, Ok(2), "it waits for a queue");
    }

    #[test]
    fn a_queue_that_is_held_is_waited_for_once() {
        const ATTEMPTS: u32 = 2000;
        let folder = tempfile::tempdir().unwrap();
        let port = port(folder.path());
        let (mut from, mut to) = port.queues().remove(0);
        let mut pool = Pool::new(&Region::new(RegionLayout { small: 16, large: 4 }).unwrap());
        let mut batch = Batch::new();
        let mut attempt = |to: &mut ToGuest| {
            batch.add(&mut pool, 60).unwrap();
            assert_eq!(to.transmit(&mut pool, &mut batch), 0);
            to.silent = Some(0);
            to.flush();
        };
        let shared = Arc::clone(&to.shared);
        let held = (shared.slots[0].queue.lock(), shared.slots[1].queue.lock());
        let began = Instant::now();
        for _ in 0..ATTEMPTS {
            attempt(&mut to);
            from.disarm();
        }
        assert!(began.elapsed() < PATIENCE * ATTEMPTS, "the worker waited each time");
        assert!(shared.slots[0].is_held.load(Ordering::Relaxed));
        drop(held);
        attempt(&mut to);
        assert!(!shared.slots[0].is_held.load(Ordering::Relaxed), "it is worth waiting for again");
    }
}
