//! Ports in memory: two ends joined by bounded queues, for tests, simulation and parts of this process.
//!
//! What one end transmits the other receives, the very same frames. Each end is a pair of halves, to be placed apart.
//! [`Faults`] spoils what passes, by seed; [`Guest`] is a machine with an IP stack at an end.

mod faults;
mod guest;
mod probe;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rtrb::{Consumer, Producer, RingBuffer};

use crate::frame::{Frame, Pool};
use crate::port::{Accepts, Batch, Receive, Transmit};

pub use faults::{Faults, FaultyReceive, Spoilt};
pub use guest::Guest;
pub use probe::{Probe, ProbeError};

/// One end.
#[derive(Debug)]
pub struct MemoryPort {
    /// What the other end sends.
    pub receive: MemoryReceive,
    /// What the other end gets.
    pub transmit: MemoryTransmit,
}

/// Wakes a receiver that sleeps.
#[derive(Debug)]
struct Bell {
    event: EventFd,
    is_armed: AtomicBool,
}

/// The receiving half.
#[derive(Debug)]
pub struct MemoryReceive {
    frames: Consumer<Frame>,
    bell: Arc<Bell>,
}

/// The transmitting half.
#[derive(Debug)]
pub struct MemoryTransmit {
    frames: Producer<Frame>,
    bell: Arc<Bell>,
    accepts: Accepts,
}

/// Joins two ends by queues of `capacity` frames. The first end's receiver takes what the first of `accepts` says, the
/// second's what the second says.
///
/// # Errors
/// The kernel's, if there is no eventfd to be had.
pub fn link(capacity: usize, accepts: [Accepts; 2]) -> nix::Result<(MemoryPort, MemoryPort)> {
    let (to_two, from_one) = one_way(capacity, accepts[1])?;
    let (to_one, from_two) = one_way(capacity, accepts[0])?;
    let one = MemoryPort { receive: from_two, transmit: to_two };
    Ok((one, MemoryPort { receive: from_one, transmit: to_one }))
}

fn one_way(capacity: usize, accepts: Accepts) -> nix::Result<(MemoryTransmit, MemoryReceive)> {
    let (producer, consumer) = RingBuffer::new(capacity);
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let bell = Arc::new(Bell { event, is_armed: AtomicBool::new(false) });
    let transmit = MemoryTransmit { frames: producer, bell: Arc::clone(&bell), accepts };
    Ok((transmit, MemoryReceive { frames: consumer, bell }))
}

impl MemoryReceive {
    /// Whether the transmitting half is gone. What it has sent can still be received.
    pub fn is_abandoned(&self) -> bool {
        self.frames.is_abandoned()
    }
}

impl Receive for MemoryReceive {
    fn receive(&mut self, _pool: &mut Pool, batch: &mut Batch) {
        let count = self.frames.slots().min(batch.room());
        if let Ok(chunk) = self.frames.read_chunk(count) {
            chunk.into_iter().for_each(|frame| batch.push(frame));
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.event.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.bell.is_armed.store(true, Ordering::Relaxed);
        // Either we see the frame, or its sender sees that the bell is armed.
        fence(Ordering::SeqCst);
        let is_empty = self.frames.is_empty();
        if !is_empty {
            self.disarm();
        }
        is_empty
    }

    fn disarm(&mut self) {
        self.bell.is_armed.store(false, Ordering::Relaxed);
        let _ = self.bell.event.read(); // nothing was rung
    }
}

impl Transmit for MemoryTransmit {
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let mut sent = 0;
        for frame in batch.drain() {
            match self.frames.push(frame) {
                Ok(()) => sent += 1,
                Err(rtrb::PushError::Full(frame)) => pool.give(frame),
            }
        }
        sent
    }

    fn accepts(&self) -> Accepts {
        self.accepts
    }

    fn flush(&mut self) {
        fence(Ordering::SeqCst);
        if self.bell.is_armed.load(Ordering::Relaxed) && self.bell.is_armed.swap(false, Ordering::Relaxed) {
            let _ = self.bell.event.write(1); // full means that it rings already
        }
    }
}
