//! Who serves what: the threads, the queues placed on them, and how a queue goes from one to another.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use super::balance::{self, Balancer, Load, Move, Reading};
use super::meter::Meter;
use super::thread::{Command, QueueCounters, Thread};
use super::{QueueId, QueueStatus, WorkerId, WorkerStatus, WorkersError};
use crate::port::Receive;

/// How long a worker may take to answer. It does between two batches, which take moments.
const ANSWER: Duration = Duration::from_secs(5);

/// All of it. Whoever holds its lock may wait for a worker's answer.
#[derive(Debug)]
pub(super) struct Team {
    pub(super) threads: BTreeMap<WorkerId, Thread>,
    pub(super) placed: BTreeMap<QueueId, Placement>,
    pub(super) pins: BTreeMap<QueueId, WorkerId>,
    balancer: Balancer,
    meter: Meter,
}

#[derive(Debug)]
pub(super) struct Placement {
    worker: WorkerId,
    counters: Arc<QueueCounters>,
}

/// A worker did not take a queue. It comes back, unless the worker has it and is stuck.
struct Refusal {
    error: WorkersError,
    receive: Option<Box<dyn Receive>>,
}

impl Team {
    pub(super) fn new(now: u64) -> Team {
        Team {
            threads: BTreeMap::new(),
            placed: BTreeMap::new(),
            pins: BTreeMap::new(),
            balancer: Balancer::new(now),
            meter: Meter::new(now),
        }
    }

    fn thread(&self, worker: WorkerId) -> Result<&Thread, WorkersError> {
        let all = || self.threads.keys().copied().collect();
        self.threads.get(&worker).ok_or_else(|| WorkersError::NoWorker { worker, workers: all() })
    }

    fn count(&self, worker: WorkerId) -> usize {
        self.placed.values().filter(|placement| placement.worker == worker).count()
    }

    /// Where a queue belongs, if it may be on these workers, of which there is one.
    pub(super) fn home(&self, queue: QueueId, workers: &BTreeSet<WorkerId>) -> WorkerId {
        let pin = self.pins.get(&queue).filter(|worker| workers.contains(worker));
        let fewest = || workers.iter().min_by_key(|worker| self.count(**worker));
        pin.or_else(fewest).copied().unwrap_or(WorkerId(0))
    }

    pub(super) fn place(
        &mut self,
        queue: QueueId,
        receive: Box<dyn Receive>,
        worker: WorkerId,
    ) -> Result<(), WorkersError> {
        if self.placed.contains_key(&queue) {
            return Err(WorkersError::Placed(queue));
        }
        let counters = Arc::default();
        self.give(queue, receive, &counters, worker).map_err(|refusal| refusal.error)?;
        self.placed.insert(queue, Placement { worker, counters });
        Ok(())
    }

    /// Has a worker take a queue.
    fn give(
        &self,
        queue: QueueId,
        receive: Box<dyn Receive>,
        counters: &Arc<QueueCounters>,
        worker: WorkerId,
    ) -> Result<(), Refusal> {
        let thread = match self.thread(worker) {
            Ok(thread) if !thread.has_ended() => thread,
            Ok(_) => {
                let error = WorkersError::Died(worker);
                return Err(Refusal { error, receive: Some(receive) });
            }
            Err(error) => return Err(Refusal { error, receive: Some(receive) }),
        };
        let (answer, done) = channel();
        let counters = Arc::clone(counters);
        thread.mailbox.send(Command::Take { queue, receive, counters, answer });
        let mut answered = done.recv_timeout(ANSWER);
        if answered.is_err() {
            if let Some(receive) = thread.mailbox.withdraw(queue) {
                return Err(Refusal { error: WorkersError::Died(worker), receive: Some(receive) });
            }
            // It has just begun to obey, or died of it.
            answered = done.recv_timeout(ANSWER);
        }
        match answered {
            Ok(Ok(())) => Ok(()),
            Ok(Err((source, receive))) => {
                Err(Refusal { error: WorkersError::Watch { queue, source }, receive: Some(receive) })
            }
            Err(_) => Err(Refusal { error: WorkersError::Died(worker), receive: None }),
        }
    }

    /// Has a worker give a queue back.
    fn take_back(&self, queue: QueueId) -> Result<Box<dyn Receive>, WorkersError> {
        let worker = self.placed.get(&queue).ok_or(WorkersError::NotPlaced(queue))?.worker;
        let command = |answer: Sender<Option<Box<dyn Receive>>>| Command::Give { queue, answer };
        let thread = self.thread(worker)?;
        if thread.has_ended() {
            return Err(WorkersError::Died(worker));
        }
        let (answer, done) = channel();
        thread.mailbox.send(command(answer));
        // The mailbox of a worker that died meanwhile keeps the other end: nobody would close it.
        let receive = done.recv_timeout(ANSWER).map_err(|_| WorkersError::Died(worker))?;
        receive.ok_or(WorkersError::NotPlaced(queue))
    }

    pub(super) fn remove(&mut self, queue: QueueId) -> Result<Box<dyn Receive>, WorkersError> {
        let receive = self.take_back(queue)?;
        self.placed.remove(&queue);
        self.balancer.forget(queue);
        Ok(receive)
    }

    /// Moves a queue, or leaves it where it is.
    pub(super) fn transfer(&mut self, queue: QueueId, to: WorkerId) -> Result<(), WorkersError> {
        self.thread(to)?;
        let Some(placement) = self.placed.get(&queue) else { return Err(WorkersError::NotPlaced(queue)) };
        let (from, counters) = (placement.worker, Arc::clone(&placement.counters));
        if from == to {
            return Ok(());
        }
        let receive = self.take_back(queue)?;
        let Err(Refusal { error, receive }) = self.give(queue, receive, &counters, to) else {
            self.placed.insert(queue, Placement { worker: to, counters });
            return Ok(());
        };
        let is_back = receive.is_some_and(|receive| self.give(queue, receive, &counters, from).is_ok());
        if !is_back {
            self.placed.remove(&queue);
            self.balancer.forget(queue);
        }
        Err(error)
    }

    fn carry_out(&mut self, moves: Vec<Move>) -> Result<Vec<Move>, WorkersError> {
        for step in &moves {
            self.transfer(step.queue, step.to)?;
        }
        Ok(moves)
    }

    /// Moves everything to these workers, and ends the others.
    pub(super) fn empty_all_but(&mut self, wanted: &BTreeSet<WorkerId>) -> Result<Vec<Move>, WorkersError> {
        let mut moves = Vec::new();
        let stranded: Vec<(QueueId, WorkerId)> = self
            .placed
            .iter()
            .filter(|(_, placement)| !wanted.contains(&placement.worker))
            .map(|(queue, placement)| (*queue, placement.worker))
            .collect();
        for (queue, from) in stranded {
            let to = self.home(queue, wanted);
            self.transfer(queue, to)?;
            moves.push(Move { queue, from, to });
        }
        // Dropped, a thread ends.
        self.threads.retain(|worker, _| wanted.contains(worker));
        Ok(moves)
    }

    /// Moves pinned queues to where they are pinned to.
    pub(super) fn obey_pins(&mut self) -> Result<Vec<Move>, WorkersError> {
        let astray = |(queue, to): (&QueueId, &WorkerId)| {
            let from = self.placed.get(queue)?.worker;
            let is_astray = from != *to && self.threads.contains_key(to);
            is_astray.then_some(Move { queue: *queue, from, to: *to })
        };
        let moves = self.pins.iter().filter_map(astray).collect();
        self.carry_out(moves)
    }

    fn readings(&self) -> Vec<Reading> {
        let reading = |(&queue, placement): (&QueueId, &Placement)| Reading {
            queue,
            worker: placement.worker,
            busy: placement.counters.busy(),
            is_pinned: self.pins.contains_key(&queue),
        };
        self.placed.iter().map(reading).collect()
    }

    /// Gives everybody a part, as far as loads are known: idle queues count too.
    pub(super) fn spread(&mut self) -> Result<Vec<Move>, WorkersError> {
        let workers: Vec<WorkerId> = self.threads.keys().copied().collect();
        let load = |reading: &Reading| Load {
            queue: reading.queue,
            worker: reading.worker,
            busy: self.balancer.load(reading.queue).max(Duration::from_micros(1)),
            is_fixed: reading.is_pinned,
        };
        let loads: Vec<Load> = self.readings().iter().map(load).collect();
        self.carry_out(balance::plan(loads, &workers))
    }

    pub(super) fn balance(&mut self, now: u64) -> Result<Vec<Move>, WorkersError> {
        let queues = self.placed.iter().map(|(queue, placement)| (*queue, placement.counters.amount()));
        let workers = self.threads.iter().map(|(worker, thread)| (*worker, thread.counters.amount()));
        self.meter.mark(now, workers.collect(), queues.collect());
        let workers: Vec<WorkerId> = self.threads.keys().copied().collect();
        let readings = self.readings();
        let moves = self.balancer.look(now, &readings, &workers);
        self.carry_out(moves)
    }

    pub(super) fn status(&self, now: u64) -> Vec<WorkerStatus> {
        let queue = |(&queue, placement): (&QueueId, &Placement)| QueueStatus {
            pin: self.pins.get(&queue).copied(),
            lately: self.meter.queue(now, queue, placement.counters.amount()),
            ..placement.counters.status(queue)
        };
        let status = |(&worker, thread): (&WorkerId, &Thread)| {
            let own = self.placed.iter().filter(|(_, placement)| placement.worker == worker);
            WorkerStatus {
                lately: self.meter.worker(now, worker, thread.counters.amount()),
                queues: own.map(queue).collect(),
                ..thread.counters.status(worker, now)
            }
        };
        self.threads.iter().map(status).collect()
    }
}
