//! The transmitting half of a queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::redirect::Written;
use super::ring::{CONTINUED, Consumer, Descriptor, Producer};
use super::{Kick, Socket};
use crate::frame::{Frame, HEADROOM, Lent, Pool, Region, SMALL_CHUNK};
use crate::port::{Accepts, Batch, Transmit};

/// What a queue of a device sends.
#[derive(Debug)]
pub struct XdpTransmit {
    sending: Producer<Descriptor>,
    completion: Consumer<u64>,
    lent: Lent,
    region: Arc<Region>,
    longest: usize,
    /// Last: rings are unmapped before the socket can be closed.
    socket: Arc<Socket>,
}

impl XdpTransmit {
    pub(super) fn new(
        socket: Arc<Socket>,
        sending: Producer<Descriptor>,
        completion: Consumer<u64>,
        region: &Arc<Region>,
        longest: usize,
    ) -> XdpTransmit {
        let lent = Lent::new(region);
        let region = Arc::clone(region);
        XdpTransmit { sending, completion, lent, region, longest, socket }
    }

    /// Takes back what the device has sent.
    fn complete(&mut self, pool: &mut Pool) {
        while let Some(address) = self.completion.pop() {
            if let Some(frame) = self.lent.redeem_frame(address, 0) {
                pool.give(frame);
            }
        }
        self.completion.release();
    }

    /// Puts a frame into the ring; gives it back if it cannot be sent.
    fn put(&mut self, frame: Frame, pool: &mut Pool) -> Result<(), Frame> {
        if frame.len() > self.longest || self.sending.room(1) == 0 {
            return Err(frame);
        }
        let length = frame.len() as u32;
        match self.lent.lend_frame(frame) {
            Ok(address) => {
                let is_pushed = self.sending.push(Descriptor { address, length, options: 0 });
                debug_assert!(is_pushed, "there was room");
                Ok(())
            }
            Err(frame) => self.put_copy(frame, pool),
        }
    }

    /// Puts a frame that the kernel cannot reach, or that is longer than a chunk, into the ring: copied, in as many chunks as it
    /// takes.
    fn put_copy(&mut self, frame: Frame, pool: &mut Pool) -> Result<(), Frame> {
        const PART: usize = SMALL_CHUNK - HEADROOM;
        let parts = frame.len().div_ceil(PART);
        let is_own_pool = Arc::ptr_eq(pool.region(), &self.region);
        if !is_own_pool
            || (parts > 1 && !self.socket.mode.multi_buffer)
            || self.sending.room(parts as u32) < parts as u32
        {
            return Err(frame);
        }
        let copies: Vec<Frame> = frame.bytes().chunks(PART).map_while(|part| pool.copy(part)).collect();
        if copies.len() < parts {
            copies.into_iter().for_each(|copy| pool.give(copy));
            return Err(frame);
        }
        for (number, copy) in copies.into_iter().enumerate() {
            let length = copy.len() as u32;
            let options = if number + 1 < parts { CONTINUED } else { 0 };
            match self.lent.lend_frame(copy) {
                Ok(address) => {
                    let is_pushed = self.sending.push(Descriptor { address, length, options });
                    debug_assert!(is_pushed, "there was room");
                }
                Err(copy) => pool.give(copy), // it is of the UMEM: it was taken from its pool
            }
        }
        pool.give(frame);
        Ok(())
    }
}

/// Bytes of the second tag of a frame: XDP redirects no frame that is longer than the device's MTU, an Ethernet header and one tag.
const SECOND_TAG: usize = 4;

impl XdpTransmit {
    /// Has a batch redirected; answers how many frames were. `None`, and nothing is done, if that is not for all of them.
    #[inline]
    fn redirect(&mut self, batch: &Batch) -> Option<usize> {
        self.socket.redirector()?;
        // What went by the socket before must not be overtaken.
        if self.sending.pending() > 0 {
            self.flush();
            if self.sending.pending() > 0 {
                return None;
            }
        }
        let redirector = self.socket.redirector()?;
        if batch.frames().iter().any(|frame| frame.len() + SECOND_TAG > self.longest) {
            return None;
        }
        let mut sent = 0;
        for frame in batch.frames() {
            match redirector.send(frame.bytes()) {
                Written::Redirected => sent += 1,
                Written::Refused => {}
                Written::Gone => {
                    self.socket.is_cut_off.store(true, Ordering::Relaxed);
                    break;
                }
            }
        }
        Some(sent)
    }
}

impl Transmit for XdpTransmit {
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        self.complete(pool);
        if let Some(sent) = self.redirect(batch) {
            batch.recycle(pool);
            return sent;
        }
        let mut sent = 0;
        for frame in batch.drain() {
            match self.put(frame, pool) {
                Ok(()) => sent += 1,
                Err(frame) => pool.give(frame),
            }
        }
        self.sending.publish();
        sent
    }

    fn accepts(&self) -> Accepts {
        Accepts::default()
    }

    fn flush(&mut self) {
        // In copy mode a call sends some dozens; each that gets on is followed by another.
        let mut pending = self.sending.pending();
        while pending > 0 && self.sending.needs_wakeup() {
            match self.socket.kick() {
                Kick::Done => return,
                Kick::More => {}
            }
            let left = self.sending.pending();
            if left == pending {
                return self.socket.unsent.store(true, Ordering::Release);
            }
            pending = left;
        }
    }
}

impl Drop for XdpTransmit {
    fn drop(&mut self) {
        let lent = Lent::new(&self.region);
        self.socket.left.lent.lock().push(std::mem::replace(&mut self.lent, lent));
    }
}
