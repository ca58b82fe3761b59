//! The receiving half of a queue.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::ring::{CONTINUED, Consumer, Descriptor, Producer};
use super::{Kick, Socket, XdpMode, XdpMonitor, sys};
use crate::frame::{Frame, LARGE_CHUNK, Lent, Pool, SMALL_CHUNK};
use crate::port::{Batch, Receive};

/// The longest packet that is put together from several chunks.
const LONGEST: usize = LARGE_CHUNK - 1024;

/// What a queue of a device receives.
#[derive(Debug)]
pub struct XdpReceive {
    fill: Producer<u64>,
    received: Consumer<Descriptor>,
    lent: Lent,
    /// A packet of several chunks, as far as it has come; `None` of one that is being thrown away.
    partial: Option<Option<Frame>>,
    /// Packets of several chunks for which there was no memory.
    lost: u64,
    /// Last: rings are unmapped before the socket can be closed.
    socket: Arc<Socket>,
}

impl XdpReceive {
    pub(super) fn new(
        socket: Arc<Socket>,
        fill: Producer<u64>,
        received: Consumer<Descriptor>,
        lent: Lent,
    ) -> XdpReceive {
        XdpReceive { fill, received, lent, partial: None, lost: 0, socket }
    }

    /// How the driver serves the queue.
    pub fn mode(&self) -> XdpMode {
        self.socket.mode()
    }

    /// The socket, to be put into the XSKMAP of a steering program.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    /// A share in the socket.
    pub(super) fn shared(&self) -> Arc<Socket> {
        Arc::clone(&self.socket)
    }

    /// What can still be asked when it is placed.
    pub(super) fn monitor(&self) -> XdpMonitor {
        XdpMonitor(Arc::downgrade(&self.socket))
    }

    /// Packets of several chunks that were lost for want of memory to put them together.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Takes one descriptor's bytes; a packet that is complete goes into the batch.
    fn take(&mut self, descriptor: Descriptor, pool: &mut Pool, batch: &mut Batch) {
        // The kernel gives back what it was lent; anything else is dropped here.
        let Some(frame) = self.lent.redeem_frame(descriptor.address, descriptor.length) else { return };
        let continues = descriptor.options & CONTINUED != 0;
        let whole = match self.partial.take() {
            None if !continues => Some(frame),
            None => {
                let whole = pool.take(LONGEST);
                joined(whole, frame, pool)
            }
            Some(whole) => joined(whole, frame, pool),
        };
        if continues {
            self.partial = Some(whole);
        } else if let Some(whole) = whole {
            batch.push(whole);
        } else {
            self.lost += 1;
        }
    }
}

/// Hands idle chunks to the kernel, as many as its ring holds.
pub(super) fn refill(fill: &mut Producer<u64>, lent: &mut Lent, pool: &mut Pool) {
    while fill.room(1) > 0 {
        let Some(frame) = pool.take(0) else { break };
        match lent.lend_frame(frame) {
            // The kernel puts bytes behind a headroom of its own.
            Ok(address) => {
                let is_pushed = fill.push(address - address % SMALL_CHUNK as u64);
                debug_assert!(is_pushed, "there was room");
            }
            Err(frame) => {
                // The pool is of another region: the engine is put together wrongly.
                pool.give(frame);
                break;
            }
        }
    }
    fill.publish();
}

/// Appends a chunk's bytes to what has come of a packet; `None` if there is no room, or was none before.
fn joined(whole: Option<Frame>, part: Frame, pool: &mut Pool) -> Option<Frame> {
    let joined = whole.and_then(|mut whole| {
        if whole.append(part.bytes()) {
            return Some(whole);
        }
        pool.give(whole);
        None
    });
    pool.give(part);
    joined
}

impl Receive for XdpReceive {
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch) {
        while batch.room() > 0
            && let Some(descriptor) = self.received.pop()
        {
            self.take(descriptor, pool, batch);
        }
        self.received.release();
        refill(&mut self.fill, &mut self.lent, pool);
        if self.fill.needs_wakeup() {
            sys::kick_receive(self.socket.fd());
        }
        // The device was busy when these were sent, and nobody may come by to send more.
        if self.socket.unsent.load(Ordering::Relaxed)
            && self.socket.unsent.swap(false, Ordering::Acquire)
            && self.socket.kick() == Kick::More
        {
            self.socket.unsent.store(true, Ordering::Release);
        }
    }

    /// The socket itself: it is readable while the ring has anything.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.fd.as_fd())
    }

    /// It has one queue of waiters: each frame that was sent would have them look whether they wait for that.
    fn wakes_for_each(&self) -> bool {
        true
    }

    fn arm(&mut self) -> bool {
        self.received.is_empty() && !self.socket.unsent.load(Ordering::Relaxed)
    }

    fn disarm(&mut self) {}
}

impl Drop for XdpReceive {
    fn drop(&mut self) {
        let lent = Lent::new(self.lent.region());
        self.socket.left.lent.lock().push(std::mem::replace(&mut self.lent, lent));
    }
}
