//! Which queues should change places, given what each costs. Pure.

use std::time::Duration;

use super::{QueueId, WorkerId};

/// What a queue cost its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The queue.
    pub queue: QueueId,
    /// Where it is.
    pub worker: WorkerId,
    /// Time spent on its frames.
    pub busy: Duration,
}

/// A queue to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The queue.
    pub queue: QueueId,
    /// From where.
    pub from: WorkerId,
    /// To where.
    pub to: WorkerId,
}

/// Workers that differ by less than an eighth are alike: more is not worth cold caches.
const ALIKE: u32 = 8;

/// Moves one queue after the other from the busiest worker to the idlest, as long as they differ and it helps.
pub(super) fn plan(loads: &[Load], workers: usize) -> Vec<Move> {
    let mut loads = loads.to_vec();
    let mut moves = Vec::new();
    // Each queue moves at most once.
    for _ in 0..loads.len() {
        let sums: Vec<Duration> = (0..workers)
            .map(|worker| loads.iter().filter(|load| load.worker.0 == worker).map(|load| load.busy).sum())
            .collect();
        let busiest = (0..workers).max_by_key(|worker| sums[*worker]);
        let idlest = (0..workers).min_by_key(|worker| sums[*worker]);
        let Some((busiest, idlest)) = busiest.zip(idlest) else { break };
        if sums[busiest] - sums[idlest] <= sums[busiest] / ALIKE {
            break;
        }
        let after = |load: &Load| (sums[busiest] - load.busy).max(sums[idlest] + load.busy);
        let candidate = loads
            .iter_mut()
            .filter(|load| {
                load.worker.0 == busiest && moves.iter().all(|step: &Move| step.queue != load.queue)
            })
            .min_by_key(|load| (after(load), load.busy)); // of equals, the least to move
        let Some(load) = candidate else { break };
        if after(load) >= sums[busiest] {
            break;
        }
        moves.push(Move { queue: load.queue, from: load.worker, to: WorkerId(idlest) });
        load.worker = WorkerId(idlest);
    }
    moves
}
