//! Seeded faults: frames lost, doubled, swapped, spoilt and held up on their way into the engine.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use sluice_policy::generate::Rng;

use crate::frame::{Frame, Offload, Pool};
use crate::port::{Batch, Receive};

/// How often what happens, in frames of a thousand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Gone.
    pub loss: usize,
    /// Comes twice.
    pub duplication: usize,
    /// Changes places with the one before it in its batch.
    pub reordering: usize,
    /// One bit is the other way round.
    pub corruption: usize,
    /// Comes some receptions later.
    pub delay: usize,
    /// How many receptions later, at most.
    pub longest_delay: usize,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spoilt {
    /// Frames lost.
    pub lost: u64,
    /// Frames doubled.
    pub duplicated: u64,
    /// Pairs swapped.
    pub reordered: u64,
    /// Bits flipped.
    pub corrupted: u64,
    /// Frames held up.
    pub delayed: u64,
}

/// A receive queue whose frames suffer. The same seed and the same frames give the same faults.
#[derive(Debug)]
pub struct FaultyReceive<R> {
    inner: R,
    faults: Faults,
    rng: Rng,
    /// Frames held up, and the reception that they come with.
    held: VecDeque<(u64, Frame)>,
    reception: u64,
    fresh: Batch,
    spoilt: Spoilt,
}

impl<R: Receive> FaultyReceive<R> {
    /// Spoils what `inner` receives.
    pub fn new(inner: R, faults: Faults, seed: u64) -> Self {
        FaultyReceive {
            inner,
            faults,
            rng: Rng::new(seed),
            held: VecDeque::new(),
            reception: 0,
            fresh: Batch::new(),
            spoilt: Spoilt::default(),
        }
    }

    /// What was done so far.
    pub fn spoilt(&self) -> Spoilt {
        self.spoilt
    }

    fn happens(&mut self, per_mille: usize) -> bool {
        self.rng.below(1000) < per_mille
    }

    fn release(&mut self, batch: &mut Batch) {
        for _ in 0..self.held.len() {
            let Some((due, frame)) = self.held.pop_front() else { return };
            if due <= self.reception && batch.room() > 0 {
                batch.push(frame);
            } else {
                self.held.push_back((due, frame));
            }
        }
    }

    fn spoil(&mut self, mut frame: Frame, pool: &mut Pool, batch: &mut Batch) {
        if self.happens(self.faults.loss) {
            self.spoilt.lost += 1;
            return pool.give(frame);
        }
        if self.happens(self.faults.corruption) && !frame.is_empty() {
            let at = self.rng.below(frame.len());
            frame.bytes_mut()[at] ^= 1 << self.rng.below(8);
            // Checksums that somebody vouched for are not any more; nor is there anything to be cut.
            let _ = frame.set_offload(Offload::default());
            self.spoilt.corrupted += 1;
        }
        if self.happens(self.faults.duplication)
            && batch.room() > 1
            && let Some(copy) = pool.duplicate(&frame)
        {
            batch.push(copy);
            self.spoilt.duplicated += 1;
        }
        if self.happens(self.faults.delay) && self.faults.longest_delay > 0 {
            let due = self.reception + 1 + self.rng.below(self.faults.longest_delay) as u64;
            self.held.push_back((due, frame));
            self.spoilt.delayed += 1;
            return;
        }
        batch.push(frame);
        let last = batch.len() - 1;
        if last > 0 && self.happens(self.faults.reordering) {
            batch.frames_mut().swap(last - 1, last);
            self.spoilt.reordered += 1;
        }
    }
}

impl<R: Receive> Receive for FaultyReceive<R> {
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch) {
        self.reception += 1;
        self.release(batch);
        let mut fresh = std::mem::take(&mut self.fresh);
        // Doubled, all of them still fit.
        if batch.room() > crate::port::BATCH / 2 {
            self.inner.receive(pool, &mut fresh);
        }
        for frame in fresh.drain() {
            self.spoil(frame, pool, batch);
        }
        self.fresh = fresh;
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event()
    }

    fn arm(&mut self) -> bool {
        self.held.is_empty() && self.inner.arm()
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}
