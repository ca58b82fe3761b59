//! What the engine asks of a port: a way in and a way out, each served by one thread at a time.
//!
//! A port has one or more queues. Each [`Receive`] is owned by the worker that it is placed on. Each [`Transmit`] is
//! behind a lock of its own, taken once per batch, since frames for a port may come from any worker.
//!
//! Who implements it: [`memory`](crate::memory), `vhost`, `xdp`. A port never panics on what its other end does, and
//! never blocks.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::frame::{Frame, HEADROOM, Pool, SMALL_CHUNK};

/// Most frames of a batch.
pub const BATCH: usize = 32;

/// The longest frame that fits into a small chunk.
const LONGEST_SMALL: usize = SMALL_CHUNK - HEADROOM;

/// Segments of super-frames after which a batch from a guest is over, however few frames it has. It bounds how long a
/// guest can keep a worker with cutting; batches of super-frames for ordinary links stay below.
pub const BATCH_SEGMENTS: usize = 4096;

/// Frames on their way together, in order; and behind them, spare ones: what was sent by copying it serves for what is received next,
/// without a way through the pool. They are small, and count as in use: whoever has nothing more to do [gives](Self::give) them back.
#[derive(Debug)]
pub struct Batch {
    frames: Vec<Frame>,
    count: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch { frames: Vec::with_capacity(BATCH), count: 0 }
    }

    /// How many frames still fit.
    #[inline]
    pub fn room(&self) -> usize {
        BATCH.saturating_sub(self.count)
    }

    /// How many there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Appends a frame. A full batch grows: callers look at [`room`](Self::room) first.
    #[inline]
    pub fn push(&mut self, frame: Frame) {
        self.frames.push(frame);
        let last = self.frames.len() - 1;
        // The first spare one, if there is any, becomes the last.
        self.frames.swap(self.count, last);
        self.count += 1;
    }

    /// Appends a frame of so many bytes, which are to be written: what is in them is left from earlier frames. `None`, and nothing
    /// is done, if there is no chunk left, or none so long.
    #[inline(always)]
    pub fn add(&mut self, pool: &mut Pool, bytes: usize) -> Option<&mut Frame> {
        if self.count == self.frames.len() || bytes > LONGEST_SMALL {
            self.push(pool.take(bytes)?);
        } else {
            self.count += 1;
        }
        let frame = self.frames.get_mut(self.count - 1)?;
        frame.renew(bytes);
        Some(frame)
    }

    /// The frames.
    #[inline]
    pub fn frames(&self) -> &[Frame] {
        &self.frames[..self.count]
    }

    /// The frames, to be changed.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        &mut self.frames[..self.count]
    }

    /// Takes the last frame out.
    #[inline]
    pub fn pop(&mut self) -> Option<Frame> {
        self.count = self.count.checked_sub(1)?;
        Some(self.frames.swap_remove(self.count))
    }

    /// Takes all frames out, in order.
    #[inline]
    pub fn drain(&mut self) -> std::vec::Drain<'_, Frame> {
        self.frames.drain(..std::mem::take(&mut self.count))
    }

    /// Gives all frames but the first `kept` back to a pool.
    pub fn truncate(&mut self, kept: usize, pool: &mut Pool) {
        let kept = kept.min(self.count);
        pool.give_all(self.frames.drain(kept..self.count));
        self.count = kept;
    }

    /// Gives all frames back to a pool, spare ones too.
    pub fn give(&mut self, pool: &mut Pool) {
        self.count = 0;
        pool.give_all(self.frames.drain(..));
    }

    /// Makes all frames spare ones, as many as a batch has. With large ones among them, or some of another region, all are given back.
    pub fn recycle(&mut self, pool: &mut Pool) {
        let is_spare = |frame: &Frame| frame.is_small() && Arc::ptr_eq(frame.region(), pool.region());
        if self.frames().iter().all(is_spare) {
            self.count = 0;
            pool.give_all(self.frames.drain(self.frames.len().min(BATCH)..));
        } else {
            self.give(pool);
        }
    }
}

impl Default for Batch {
    fn default() -> Self {
        Batch::new()
    }
}

/// What a port takes beyond plain frames. The engine does in software what it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Frames with a partial checksum.
    pub checksum: bool,
    /// Super-frames of TCP over IPv4.
    pub tcp_v4: bool,
    /// Super-frames of TCP over IPv6.
    pub tcp_v6: bool,
    /// Super-frames of UDP.
    pub udp: bool,
    /// Super-frames whose ECN bits need care.
    pub ecn: bool,
}

impl Accepts {
    /// Everything.
    pub const ALL: Accepts = Accepts { checksum: true, tcp_v4: true, tcp_v6: true, udp: true, ecn: true };
}

/// The way in: a queue that one worker reads.
pub trait Receive: Send + fmt::Debug {
    /// Appends what has arrived, as much as there is [room](Batch::room) for, in order; with offloads
    /// [checked](Frame::set_offload). Without chunks in the pool, frames stay where they are.
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch);

    /// After some batches with frames, and before the worker sleeps: notifies the other end that they were taken, if it wants to know.
    fn notify(&mut self) {}

    /// What becomes readable when something arrives, once [armed](Self::arm); `None` if it must be polled. It does not
    /// change while the queue is placed on a worker.
    fn event(&self) -> Option<BorrowedFd<'_>>;

    /// Whether each frame that comes or goes wakes who waits for [`event`](Self::event), as sockets do. The worker then waits for it
    /// only while it sleeps.
    fn wakes_for_each(&self) -> bool {
        false
    }

    /// Whether the worker has to look for what arrives, now: nothing will become readable. It may change while the queue is
    /// placed.
    fn is_polled(&self) -> bool {
        self.event().is_none()
    }

    /// Before the worker sleeps: asks to be notified. `false` if something has arrived already, and the worker goes on.
    fn arm(&mut self) -> bool;

    /// After the worker has slept: no notifications, please. Consumes those that came.
    fn disarm(&mut self);
}

/// The way out: a queue that workers write, one at a time.
pub trait Transmit: Send + fmt::Debug {
    /// Takes all frames of the batch, in order, and leaves it empty. Answers how many were sent, best the first ones; the others
    /// are given back to the pool, as are those whose bytes were copied, unless they are kept as [spare ones](Batch::recycle). Every frame is as [`accepts`](Self::accepts) said.
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize;

    /// What it takes beyond plain frames, now: it may change while running, as guests negotiate.
    fn accepts(&self) -> Accepts;

    /// After some batches, and before the worker sleeps: notifies the other end of all that has been sent, if it wants to know.
    fn flush(&mut self) {}
}
