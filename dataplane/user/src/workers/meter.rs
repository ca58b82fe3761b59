//! How busy workers and queues have been of late: what was counted, a few seconds ago, and now. Pure.

use std::collections::BTreeMap;

use super::{Pace, QueueId, WorkerId};

/// The shortest time over which a pace means something, in nanoseconds.
const LATELY: u64 = 1_000_000_000;

/// What has been counted of a worker or a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// Nanoseconds spent on frames.
    pub(super) busy: u64,
    pub(super) frames: u64,
}

/// What was counted at a moment.
#[derive(Debug, Default)]
struct Mark {
    at: u64,
    workers: BTreeMap<WorkerId, Amount>,
    queues: BTreeMap<QueueId, Amount>,
}

/// The last two marks. Paces are since the last, or, if that was only just now, since the one before.
#[derive(Debug)]
pub(super) struct Meter {
    last: Mark,
    before: Mark,
}

impl Meter {
    pub(super) fn new(now: u64) -> Meter {
        let mark = || Mark { at: now, ..Mark::default() };
        Meter { last: mark(), before: mark() }
    }

    /// Sets a mark, unless the last one is too young to be done without.
    pub(super) fn mark(
        &mut self,
        now: u64,
        workers: BTreeMap<WorkerId, Amount>,
        queues: BTreeMap<QueueId, Amount>,
    ) {
        if now.saturating_sub(self.last.at) >= LATELY {
            self.before = std::mem::replace(&mut self.last, Mark { at: now, workers, queues });
        }
    }

    fn base(&self, now: u64) -> &Mark {
        if now.saturating_sub(self.last.at) >= LATELY { &self.last } else { &self.before }
    }

    pub(super) fn worker(&self, now: u64, worker: WorkerId, amount: Amount) -> Pace {
        let base = self.base(now);
        pace(now.saturating_sub(base.at), base.workers.get(&worker), amount)
    }

    pub(super) fn queue(&self, now: u64, queue: QueueId, amount: Amount) -> Pace {
        let base = self.base(now);
        pace(now.saturating_sub(base.at), base.queues.get(&queue), amount)
    }
}

fn pace(time: u64, base: Option<&Amount>, amount: Amount) -> Pace {
    let base = base.copied().unwrap_or_default();
    if time == 0 || amount.busy < base.busy || amount.frames < base.frames {
        // Nothing is known yet, or what it is called after was another.
        return Pace::default();
    }
    let seconds = time as f64 / 1e9;
    Pace {
        load: ((amount.busy - base.busy) as f64 / time as f64).min(1.0),
        frames_per_second: (amount.frames - base.frames) as f64 / seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_of_the_last_seconds() {
        const SECOND: u64 = 1_000_000_000;
        let worker = WorkerId(3);
        let amount = |busy, frames| Amount { busy, frames };
        let mut meter = Meter::new(SECOND);
        assert_eq!(meter.worker(SECOND, worker, amount(0, 0)), Pace::default(), "nothing is known");
        // A second at half load, then four at none.
        let pace = |load, frames_per_second| Pace { load, frames_per_second };
        assert_eq!(meter.worker(2 * SECOND, worker, amount(SECOND / 2, 100)), pace(0.5, 100.0));
        meter.mark(2 * SECOND, [(worker, amount(SECOND / 2, 100))].into(), BTreeMap::new());
        // Just after the mark, the time before it counts.
        assert_eq!(meter.worker(2 * SECOND, worker, amount(SECOND / 2, 100)), pace(0.5, 100.0));
        assert_eq!(meter.worker(6 * SECOND, worker, amount(SECOND / 2, 100)), pace(0.0, 0.0));
        // Marks in quick succession do not make the time too short to tell.
        for step in 1..10 {
            meter.mark(2 * SECOND + step, [(worker, amount(SECOND, 0))].into(), BTreeMap::new());
        }
        assert_eq!(meter.worker(4 * SECOND, worker, amount(SECOND, 300)), pace(0.25, 100.0));
    }
}
