//! The third pass: frames on their way out, grouped by port, made fit for what each port takes, and sent.

use std::sync::Arc;

use sluice_pipeline::DropReason;

use super::counters::{Counters, add};
use super::egress::Egress;
use super::tables::Tables;
use crate::frame::{Frame, Pool};
use crate::offload;
use crate::port::{BATCH, BATCH_SEGMENTS, Batch, Transmit};

/// Segments that are made for one batch, over all ports. A batch to single ports stays below; one that is flooded to many ports
/// that take no super-frames would keep the worker, and is cut for as many of them as this allows.
const SEGMENTS: usize = 4 * BATCH_SEGMENTS;

/// Frames of one batch by the port that they leave by.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The first `used` are.
    groups: Vec<Group>,
    used: usize,
    /// Frames that are made fit.
    fit: Batch,
    /// Ways out whose other ends have not been notified, with the lane.
    silent: Vec<(Arc<Egress>, usize)>,
}

#[derive(Debug)]
struct Group {
    port: u32,
    frames: Batch,
}

impl Outgoing {
    pub(super) fn new() -> Outgoing {
        Outgoing { groups: Vec::new(), used: 0, fit: Batch::new(), silent: Vec::new() }
    }

    /// Adds a frame that leaves by `port`.
    #[inline]
    pub(super) fn push(&mut self, port: u32, frame: Frame) {
        // Of most batches, all frames go to a few ports.
        let known = self.groups[..self.used].iter_mut().rev().find(|group| group.port == port);
        if let Some(group) = known {
            return group.frames.push(frame);
        }
        if self.used == self.groups.len() {
            self.groups.push(Group { port, frames: Batch::new() });
        }
        let group = &mut self.groups[self.used];
        self.used += 1;
        group.port = port;
        group.frames.push(frame);
    }

    /// Adds all frames of a batch, which leave by `port`.
    #[inline]
    pub(super) fn push_all(&mut self, port: u32, batch: &mut Batch) {
        if self.used == self.groups.len() {
            self.groups.push(Group { port, frames: Batch::new() });
        }
        let group = &mut self.groups[self.used];
        self.used += 1;
        group.port = port;
        // Its own is empty.
        std::mem::swap(&mut group.frames, batch);
    }

    /// Sends everything, and counts it; [`flush`](Self::flush) notifies. Of ports with several transmit queues, `lane` says which is
    /// used.
    pub(super) fn send(&mut self, lane: usize, tables: &Tables, pool: &mut Pool, counters: &Counters) {
        let Outgoing { groups, used, fit, silent } = self;
        let mut segments = SEGMENTS;
        for group in &mut groups[..*used] {
            let way = Way { port: group.port, counters };
            let Some(egress) = tables.port(group.port).and_then(|port| port.egress.as_ref()) else {
                // Only what is attached is delivered to.
                way.count_failed(group.frames.len());
                group.frames.give(pool);
                continue;
            };
            let mut queue = egress.queue(lane);
            let accepts = queue.accepts();
            if group.frames.frames().iter().all(|frame| accepts.takes(&frame.offload())) {
                way.send(&mut **queue, pool, &mut group.frames);
            } else {
                way.send_fit(&mut **queue, pool, &mut group.frames, fit, &mut segments);
            }
            let is_it = |(other, at): &(Arc<Egress>, usize)| *at == lane && Arc::ptr_eq(other, egress);
            if !silent.iter().any(is_it) {
                silent.push((Arc::clone(egress), lane));
            }
        }
        *used = 0;
    }

    /// Gives spare frames back.
    pub(super) fn release(&mut self, pool: &mut Pool) {
        self.groups.iter_mut().for_each(|group| group.frames.give(pool));
    }

    /// Notifies the other ends of all that was sent.
    pub(super) fn flush(&mut self) {
        for (egress, lane) in self.silent.drain(..) {
            egress.queue(lane).flush();
        }
    }
}

/// A way out, and where to count.
struct Way<'a> {
    port: u32,
    counters: &'a Counters,
}

impl Way<'_> {
    fn count_sent(&self, packets: u64, bytes: u64) {
        let counters = self.counters.port(self.port);
        add(&counters.tx_packets, packets);
        add(&counters.tx_bytes, bytes);
    }

    fn count_failed(&self, frames: usize) {
        if frames > 0 {
            self.counters.count_drops(self.port, DropReason::EgressFailed, frames as u64);
        }
    }

    /// Sends frames as they are.
    #[inline]
    fn send(&self, queue: &mut dyn Transmit, pool: &mut Pool, batch: &mut Batch) {
        let wanted = batch.len();
        let mut lengths = [0u32; BATCH];
        for (length, frame) in lengths.iter_mut().zip(batch.frames()) {
            *length = frame.len() as u32;
        }
        let sent = queue.transmit(pool, batch).min(wanted);
        self.count_sent(
            sent as u64,
            lengths[..sent.min(BATCH)].iter().map(|length| u64::from(*length)).sum(),
        );
        self.count_failed(wanted - sent);
    }

    /// Sends frames of which some need work first, in order. A super-frame counts as one frame, however many segments it
    /// becomes; `segments` is how many may still be made.
    #[cold]
    fn send_fit(
        &self,
        queue: &mut dyn Transmit,
        pool: &mut Pool,
        frames: &mut Batch,
        fit: &mut Batch,
        segments: &mut usize,
    ) {
        let accepts = queue.accepts();
        for mut frame in frames.drain() {
            if accepts.takes(&frame.offload()) {
                fit.push(frame);
            } else if frame.offload().gso.is_none() {
                offload::fill_checksum(&mut frame);
                fit.push(frame);
            } else if let Some(left) = segments.checked_sub(frame.offload().segments(frame.len())) {
                *segments = left;
                self.send(queue, pool, fit);
                self.send_segments(queue, pool, &frame, fit);
                pool.give(frame);
            } else {
                self.count_failed(1);
                pool.give(frame);
            }
        }
        self.send(queue, pool, fit);
    }

    fn send_segments(&self, queue: &mut dyn Transmit, pool: &mut Pool, frame: &Frame, fit: &mut Batch) {
        let (mut made, mut sent) = (0, 0);
        let cut = offload::segment(pool, frame, &mut |pool, segment| {
            fit.push(segment);
            if fit.room() == 0 {
                made += fit.len();
                sent += queue.transmit(pool, fit);
            }
        });
        made += fit.len();
        sent += queue.transmit(pool, fit);
        if sent > 0 {
            self.count_sent(1, frame.len() as u64);
        }
        self.count_failed(made.saturating_sub(sent) + usize::from(cut.is_err()));
    }
}
