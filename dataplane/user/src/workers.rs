//! Workers: one thread per core, each of which takes frames from the queues placed on it, through the engine, to the ports
//! that they leave by, before it looks at the next.
//!
//! A worker spins while there is work, and for a moment after; then it asks its queues for notifications and sleeps in
//! epoll. Queues are placed on workers, and moved between them while frames pass: a queue is handed over between two
//! batches, and whatever waits in it waits for its new worker. Where it goes is decided by who has the fewest, then by
//! load ([`Workers::balance`]), or by hand ([`Workers::set_pins`]). Workers come and go in the same way
//! ([`Workers::set_cores`]).
//!
//! [`Workers`] is the handle; any thread may use it. It never stops a worker for longer than it takes to hand a queue over, and
//! waits for none that has died.

mod balance;
mod meter;
mod team;
#[cfg(test)]
mod tests;
mod thread;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::{Engine, Processor};
use crate::frame::Region;
use crate::port::Receive;
pub use balance::Move;
use team::Team;
use thread::Thread;

/// A worker, named by the core that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub usize);

/// A receive queue of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId {
    /// The port's id.
    pub port: u32,
    /// Counts from 0.
    pub queue: u16,
}

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queue {} of port {}", self.queue, self.port)
    }
}

/// How workers wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How long a worker spins without work before it sleeps.
    pub spin: Duration,
    /// How often a sleeping worker looks at queues that cannot wake it. Others have no need of it.
    pub nap: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { spin: Duration::from_micros(50), nap: Duration::from_millis(1) }
    }
}

/// Why workers do not do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkersError {
    /// No cores were given.
    #[error("workers need cores: name at least one")]
    NoCores,
    /// The kernel refused a thread or what it needs.
    #[error(
        "starting the worker of core {core}: {source}; the core must be online and allowed for this process"
    )]
    Start {
        /// The core.
        core: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// No such worker.
    #[error("there is no worker on core {}; they are on {}", .worker.0, list(.workers))]
    NoWorker {
        /// Asked for.
        worker: WorkerId,
        /// Those that there are.
        workers: Vec<WorkerId>,
    },
    /// The queue is placed already.
    #[error("{0} is placed already; move it")]
    Placed(QueueId),
    /// The queue is on no worker.
    #[error("{0} is on no worker")]
    NotPlaced(QueueId),
    /// The worker could not watch the queue's event.
    #[error("{queue} cannot be watched: {source}; the process may have too many open files")]
    Watch {
        /// The queue.
        queue: QueueId,
        /// The kernel's error.
        source: io::Error,
    },
    /// The worker's thread has ended or answers no more, which is a bug.
    #[error("the worker of core {} has died; restart the engine", .0.0)]
    Died(WorkerId),
}

fn list(workers: &[WorkerId]) -> String {
    workers.iter().map(|worker| worker.0.to_string()).collect::<Vec<_>>().join(", ")
}

/// How busy something has been over the last few seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Share of the time that was spent on frames: 0 to 1.
    pub load: f64,
    /// Frames received.
    pub frames_per_second: f64,
}

/// A worker as it is now. Times and counts are since it started.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Which.
    pub worker: WorkerId,
    /// Whether it sleeps until a queue rings. If not, it works or spins.
    pub is_asleep: bool,
    /// How it has been of late.
    pub lately: Pace,
    /// Frames received.
    pub frames: u64,
    /// How often it looked at its queues, each once.
    pub polls: u64,
    /// How often it was woken.
    pub wakeups: u64,
    /// Time spent on frames.
    pub busy: Duration,
    /// Time spent asleep. The rest was spent looking for frames.
    pub asleep: Duration,
    /// Its queues.
    pub queues: Vec<QueueStatus>,
}

/// A placed queue as it is now. Counts are since it was placed first, on whatever worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueueStatus {
    /// Which.
    pub queue: QueueId,
    /// Where it is pinned to, if it is. If no worker is there, it is on another.
    pub pin: Option<WorkerId>,
    /// How it has been of late.
    pub lately: Pace,
    /// Batches received.
    pub batches: u64,
    /// Frames received.
    pub frames: u64,
    /// Time spent on them.
    pub busy: Duration,
}

/// All workers of an engine. Dropped, they end.
#[derive(Debug)]
pub struct Workers {
    engine: Engine,
    region: Arc<Region>,
    patience: Patience,
    team: Mutex<Team>,
}

impl Workers {
    /// Starts a worker on each of these cores, with frames from `region`.
    ///
    /// # Errors
    /// Without cores, or if the kernel refuses one.
    pub fn start(
        engine: &Engine,
        region: &Arc<Region>,
        cores: &[usize],
        patience: Patience,
    ) -> Result<Workers, WorkersError> {
        let workers = Workers {
            engine: engine.clone(),
            region: Arc::clone(region),
            patience,
            team: Mutex::new(Team::new(thread::now())),
        };
        workers.set_cores(cores)?;
        Ok(workers)
    }

    /// The cores that there are workers on, in order.
    pub fn cores(&self) -> Vec<usize> {
        self.team.lock().threads.keys().map(|worker| worker.0).collect()
    }

    /// How many queues are placed on them.
    pub fn queues(&self) -> usize {
        self.team.lock().placed.len()
    }

    /// Has workers on these cores and no others, while frames pass. Queues of those that end move to others, and new ones
    /// are given their part. Says what was moved.
    ///
    /// The calling thread is the parent of those that are started: they have its capabilities.
    ///
    /// # Errors
    /// Without cores, or if the kernel refuses one: then nothing has changed. If a worker has died, those that are wanted
    /// no more and still have queues stay.
    pub fn set_cores(&self, cores: &[usize]) -> Result<Vec<Move>, WorkersError> {
        let wanted: BTreeSet<WorkerId> = cores.iter().map(|core| WorkerId(*core)).collect();
        if wanted.is_empty() {
            return Err(WorkersError::NoCores);
        }
        let mut team = self.team.lock();
        let mut fresh = BTreeMap::new();
        for &worker in wanted.iter().filter(|worker| !team.threads.contains_key(worker)) {
            let processor = Processor::new(&self.engine, &self.region);
            let thread = Thread::start(worker, self.patience, processor)
                .map_err(|source| WorkersError::Start { core: worker.0, source })?;
            fresh.insert(worker, thread);
        }
        let has_grown = !fresh.is_empty();
        team.threads.append(&mut fresh);
        let mut moves = team.empty_all_but(&wanted)?;
        if has_grown {
            moves.extend(team.obey_pins()?);
            moves.extend(team.spread()?);
        }
        Ok(moves)
    }

    /// Pins these queues to workers, and no others. Queues that are placed move there at once; others go there when they
    /// are placed. Where no worker is, a pin waits for one.
    ///
    /// # Errors
    /// If a worker does not take its queue, which stays where it is; the pins stand.
    pub fn set_pins(&self, pins: BTreeMap<QueueId, WorkerId>) -> Result<Vec<Move>, WorkersError> {
        let mut team = self.team.lock();
        team.pins = pins;
        team.obey_pins()
    }

    /// Places a queue on a worker, which serves it from now on.
    ///
    /// # Errors
    /// If the queue is placed, or the worker cannot take it; the queue is dropped then.
    pub fn place(
        &self,
        queue: QueueId,
        receive: Box<dyn Receive>,
        worker: WorkerId,
    ) -> Result<(), WorkersError> {
        self.team.lock().place(queue, receive, worker)
    }

    /// Places a queue on the worker that it is pinned to, or else on that with the fewest, and says which.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_anywhere(
        &self,
        queue: QueueId,
        receive: Box<dyn Receive>,
    ) -> Result<WorkerId, WorkersError> {
        let mut team = self.team.lock();
        let all: BTreeSet<WorkerId> = team.threads.keys().copied().collect();
        let worker = team.home(queue, &all);
        team.place(queue, receive, worker)?;
        Ok(worker)
    }

    /// Takes a queue off its worker. What waits in it stays in it.
    ///
    /// # Errors
    /// If it is on none.
    pub fn remove(&self, queue: QueueId) -> Result<Box<dyn Receive>, WorkersError> {
        self.team.lock().remove(queue)
    }

    /// Moves a queue to another worker while frames pass; none is lost, and their order stays.
    ///
    /// # Errors
    /// If it is on no worker, or there is no such worker, or that cannot take it: then it stays where it is.
    pub fn move_to(&self, queue: QueueId, worker: WorkerId) -> Result<(), WorkersError> {
        self.team.lock().transfer(queue, worker)
    }

    /// Moves queues so that workers are busy alike, by what each queue has cost of late; and says what was moved. Pinned ones
    /// stay. To be called every few seconds: the time since the last call is what is measured.
    ///
    /// Nothing is moved while no worker has much to do, or for small differences; and what was moved rests for some calls.
    ///
    /// # Errors
    /// As [`move_to`](Self::move_to).
    pub fn balance(&self) -> Result<Vec<Move>, WorkersError> {
        self.team.lock().balance(thread::now())
    }

    /// What they do, by core.
    pub fn status(&self) -> Vec<WorkerStatus> {
        self.team.lock().status(thread::now())
    }
}
