//! Which queues should change places, given what each costs. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{QueueId, WorkerId};

/// Workers that differ by less than an eighth are alike: more is not worth cold caches.
const ALIKE: u32 = 8;
/// What the busiest worker does in a second, at least, before anything is moved. One that has less to do sleeps most of the
/// time, and another could not do it any sooner.
const ENOUGH: Duration = Duration::from_millis(250);
/// For how many looks a queue stays where it was moved to: load that goes up and down takes no queue with it.
const REST: u32 = 6;

/// What a queue costs its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) queue: QueueId,
    /// Where it is.
    pub(super) worker: WorkerId,
    /// Time spent on its frames, in a second.
    pub(super) busy: Duration,
    /// It stays there.
    pub(super) is_fixed: bool,
}

/// A queue that was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The queue.
    pub queue: QueueId,
    /// From where.
    pub from: WorkerId,
    /// To where.
    pub to: WorkerId,
}

/// What is counted of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) queue: QueueId,
    /// Where it is.
    pub(super) worker: WorkerId,
    /// Time spent on its frames since it was placed.
    pub(super) busy: Duration,
    /// Somebody said where it is to be.
    pub(super) is_pinned: bool,
}

/// What is known of a queue.
#[derive(Debug, Default)]
struct Known {
    /// As it was read last.
    busy: Duration,
    /// What it costs in a second, over the last few looks: a quarter of it is of the last.
    load: Option<Duration>,
    /// Looks until it may move again.
    rest: u32,
}

/// Remembers what queues cost, and what it has moved.
#[derive(Debug)]
pub(super) struct Balancer {
    /// When it last looked, in nanoseconds.
    at: u64,
    queues: BTreeMap<QueueId, Known>,
}

impl Balancer {
    pub(super) fn new(now: u64) -> Balancer {
        Balancer { at: now, queues: BTreeMap::new() }
    }

    /// What a queue costs in a second, as far as is known.
    pub(super) fn load(&self, queue: QueueId) -> Duration {
        self.queues.get(&queue).and_then(|known| known.load).unwrap_or_default()
    }

    pub(super) fn forget(&mut self, queue: QueueId) {
        self.queues.remove(&queue);
    }

    /// Looks at all queues, and says which are to be moved.
    pub(super) fn look(&mut self, now: u64, readings: &[Reading], workers: &[WorkerId]) -> Vec<Move> {
        let time = Duration::from_nanos(now.saturating_sub(self.at));
        if time.is_zero() {
            return Vec::new();
        }
        self.at = now;
        let mut loads = Vec::new();
        for reading in readings {
            let known = self.queues.entry(reading.queue).or_default();
            let spent = reading.busy.saturating_sub(known.busy).div_duration_f64(time).min(1.0);
            let spent = Duration::from_secs_f64(spent);
            let load = known.load.map_or(spent, |before| (3 * before + spent) / 4);
            known.busy = reading.busy;
            known.load = Some(load);
            known.rest = known.rest.saturating_sub(1);
            let is_fixed = reading.is_pinned || known.rest > 0;
            loads.push(Load { queue: reading.queue, worker: reading.worker, busy: load, is_fixed });
        }
        if workers.iter().all(|worker| sum(&loads, *worker) < ENOUGH) {
            return Vec::new();
        }
        let moves = plan(loads, workers);
        for step in &moves {
            self.queues.entry(step.queue).or_default().rest = REST;
        }
        moves
    }
}

fn sum(loads: &[Load], worker: WorkerId) -> Duration {
    loads.iter().filter(|load| load.worker == worker).map(|load| load.busy).sum()
}

/// Moves one queue after the other from the busiest worker to the idlest, as long as they differ and it helps.
pub(super) fn plan(mut loads: Vec<Load>, workers: &[WorkerId]) -> Vec<Move> {
    let mut moves = Vec::new();
    // Each queue moves at most once.
    for _ in 0..loads.len() {
        let sums = || workers.iter().map(|worker| (sum(&loads, *worker), *worker));
        let Some(((most, busiest), (least, idlest))) = sums().max().zip(sums().min()) else { break };
        if most - least <= most / ALIKE {
            break;
        }
        let after = |load: &Load| (most - load.busy).max(least + load.busy);
        let candidate = loads
            .iter_mut()
            .filter(|load| load.worker == busiest && !load.is_fixed)
            .min_by_key(|load| (after(load), load.busy)); // of equals, the least to move
        let Some(load) = candidate else { break };
        if after(load) >= most {
            break;
        }
        moves.push(Move { queue: load.queue, from: busiest, to: idlest });
        load.worker = idlest;
        load.is_fixed = true;
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(queue: u16, worker: usize, milliseconds: u64) -> Load {
        Load {
            queue: QueueId { port: 1, queue },
            worker: WorkerId(worker),
            busy: Duration::from_millis(milliseconds),
            is_fixed: false,
        }
    }

    fn short(moves: &[Move]) -> Vec<(u16, usize)> {
        moves.iter().map(|step| (step.queue.queue, step.to.0)).collect()
    }

    const TWO: [WorkerId; 2] = [WorkerId(0), WorkerId(1)];

    #[test]
    fn load_is_spread_and_small_differences_stay() {
        let plan = |loads: &[Load]| short(&plan(loads.to_vec(), &TWO));
        assert_eq!(plan(&[]), []);
        assert_eq!(plan(&[load(0, 0, 50), load(1, 0, 50)]), [(0, 1)]);
        assert_eq!(plan(&[load(0, 0, 90), load(1, 0, 10)]), [(1, 1)]);
        assert_eq!(plan(&[load(0, 0, 50), load(1, 0, 4), load(2, 1, 48)]), [], "they are alike");
        assert_eq!(plan(&[load(0, 0, 60), load(1, 0, 40), load(2, 1, 10)]), [(1, 1)]);
        assert_eq!(plan(&[load(0, 0, 50), load(1, 1, 45), load(2, 1, 5)]), []);
        assert_eq!(plan(&[load(0, 0, 0), load(1, 0, 0)]), []);
        assert_eq!(plan(&[load(0, 0, 100)]), [], "one queue cannot be split");
        let many: Vec<Load> = (0..10).map(|queue| load(queue, 0, 10)).collect();
        assert_eq!(plan(&many).len(), 5);
        let fixed = Load { is_fixed: true, ..load(0, 0, 50) };
        assert_eq!(plan(&[fixed, load(1, 0, 40)]), [(1, 1)], "what is pinned counts and stays");
        assert_eq!(plan(&[fixed, Load { is_fixed: true, ..load(1, 0, 40) }]), []);
    }

    const SECOND: u64 = 1_000_000_000;

    /// A world in which queues cost what they are said to, and moves are carried out.
    struct World {
        balancer: Balancer,
        now: u64,
        readings: Vec<Reading>,
    }

    impl World {
        fn new(queues: u16) -> World {
            let reading = |queue| Reading {
                queue: QueueId { port: 1, queue },
                worker: WorkerId(0),
                busy: Duration::ZERO,
                is_pinned: false,
            };
            let readings = (0..queues).map(reading).collect();
            World { balancer: Balancer::new(0), now: 0, readings }
        }

        /// Five seconds, in each of which queues cost so many milliseconds.
        fn look(&mut self, costs: &[u64]) -> Vec<(u16, usize)> {
            self.now += 5 * SECOND;
            for (reading, cost) in self.readings.iter_mut().zip(costs) {
                reading.busy += Duration::from_millis(5 * cost);
            }
            let moves = self.balancer.look(self.now, &self.readings, &TWO);
            for step in &moves {
                let moved = self.readings.iter_mut().find(|reading| reading.queue == step.queue);
                moved.expect("it is one of them").worker = step.to;
            }
            short(&moves)
        }
    }

    #[test]
    fn who_has_little_to_do_keeps_it() {
        let mut world = World::new(2);
        for _ in 0..10 {
            assert_eq!(world.look(&[100, 100]), []);
        }
        assert_eq!(world.look(&[500, 400]), [(1, 1)]);
        assert_eq!(world.balancer.look(world.now, &world.readings, &TWO), [], "no time has passed");
    }

    #[test]
    fn load_that_comes_and_goes_moves_no_queue_back_and_forth() {
        let mut world = World::new(3);
        assert_eq!(world.look(&[300, 300, 300]), [(0, 1)]);
        let mut moves = Vec::new();
        for round in 0..60 {
            let costs = if round % 2 == 0 { [600, 100, 100] } else { [50, 400, 400] };
            moves.extend(world.look(&costs));
        }
        assert!(moves.len() <= 4, "{moves:?}");
        // What stays does lead somewhere.
        let moved: Vec<_> = (0..20).flat_map(|_| world.look(&[50, 400, 400])).collect();
        assert!(!moved.is_empty());
        let on = |worker| world.readings.iter().filter(|reading| reading.worker == WorkerId(worker)).count();
        assert_eq!(on(0).min(on(1)), 1);
        assert_ne!(world.readings[1].worker, world.readings[2].worker);
    }

    #[test]
    fn pins_hold_against_any_load() {
        let mut world = World::new(2);
        world.readings.iter_mut().for_each(|reading| reading.is_pinned = true);
        for _ in 0..10 {
            assert_eq!(world.look(&[450, 450]), []);
        }
        world.readings[1].is_pinned = false;
        assert_eq!(world.look(&[450, 450]), [(1, 1)]);
        world.balancer.forget(QueueId { port: 1, queue: 1 });
        assert_eq!(world.balancer.load(QueueId { port: 1, queue: 1 }), Duration::ZERO);
    }
}
