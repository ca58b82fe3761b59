//! Workers: one thread per core, each of which takes frames from the queues placed on it, through the engine, to the ports
//! that they leave by, before it looks at the next.
//!
//! A worker spins while there is work, and for a moment after; then it asks its queues for notifications and sleeps in
//! epoll. Queues are placed on workers, and moved between them while frames pass: a queue is handed over between two
//! batches, and whatever waits in it waits for its new worker.
//!
//! [`Workers`] is the handle; any thread may use it. It never stops a worker for longer than it takes to hand a queue over, and
//! waits for none that has died.

mod balance;
#[cfg(test)]
mod tests;
mod thread;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::{Engine, Processor};
use crate::frame::Region;
use crate::port::Receive;
pub use balance::{Load, Move};
use thread::{Command, Mailbox, QueueCounters, ThreadCounters};

/// How long a worker may take to answer. It does between two batches, which take moments.
const ANSWER: Duration = Duration::from_secs(5);

/// A worker, counted from 0.
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
    #[error("there is no worker {}, only {workers}", .worker.0)]
    NoWorker {
        /// Asked for.
        worker: WorkerId,
        /// How many there are.
        workers: usize,
    },
    /// The queue is placed already.
    #[error("{0} is placed already; move it")]
    Placed(QueueId),
    /// The queue is on no worker.
    #[error("{0} is on no worker")]
    NotPlaced(QueueId),
    /// The worker could not watch the queue's event; the queue is gone.
    #[error("{queue} cannot be watched: {source}; the process may have too many open files")]
    Watch {
        /// The queue.
        queue: QueueId,
        /// The kernel's error.
        source: io::Error,
    },
    /// The worker's thread has ended or answers no more, which is a bug.
    #[error("worker {} has died; restart the engine", .0.0)]
    Died(WorkerId),
}

/// A worker as it is now. Times and counts are since it started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Which.
    pub worker: WorkerId,
    /// Its core.
    pub core: usize,
    /// Time spent on frames.
    pub busy: Duration,
    /// Time spent asleep. The rest was spent looking for frames.
    pub asleep: Duration,
    /// How often it went to sleep.
    pub sleeps: u64,
    /// Its queues.
    pub queues: Vec<QueueStatus>,
}

/// A placed queue as it is now. Counts are since it was placed on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStatus {
    /// Which.
    pub queue: QueueId,
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
    threads: Vec<Thread>,
    placed: Mutex<BTreeMap<QueueId, Placement>>,
    /// Busy time of queues when loads were last balanced.
    balanced: Mutex<BTreeMap<QueueId, Duration>>,
}

#[derive(Debug)]
struct Thread {
    core: usize,
    mailbox: Arc<Mailbox>,
    counters: Arc<ThreadCounters>,
    handle: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Placement {
    worker: WorkerId,
    counters: Arc<QueueCounters>,
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
        if cores.is_empty() {
            return Err(WorkersError::NoCores);
        }
        // Made first: whatever fails below, its drop ends the threads that run already.
        let mut workers =
            Workers { threads: Vec::new(), placed: Mutex::default(), balanced: Mutex::default() };
        for (number, &core) in cores.iter().enumerate() {
            let failed = |source| WorkersError::Start { core, source };
            let processor = Processor::new(engine, region, number);
            let mailbox = Arc::new(Mailbox::new().map_err(failed)?);
            let counters = Arc::new(ThreadCounters::default());
            let handle =
                thread::start(number, core, patience, processor, &mailbox, &counters).map_err(failed)?;
            workers.threads.push(Thread { core, mailbox, counters, handle: Some(handle) });
        }
        Ok(workers)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    fn thread(&self, worker: WorkerId) -> Result<&Thread, WorkersError> {
        self.threads.get(worker.0).ok_or(WorkersError::NoWorker { worker, workers: self.threads.len() })
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
        let mut placed = self.placed.lock();
        if placed.contains_key(&queue) {
            return Err(WorkersError::Placed(queue));
        }
        self.hand_over(&mut placed, queue, receive, worker)
    }

    /// Places a queue on the worker that has the fewest, and says which.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_anywhere(
        &self,
        queue: QueueId,
        receive: Box<dyn Receive>,
    ) -> Result<WorkerId, WorkersError> {
        let mut placed = self.placed.lock();
        if placed.contains_key(&queue) {
            return Err(WorkersError::Placed(queue));
        }
        let count =
            |worker: &usize| placed.values().filter(|placement| placement.worker.0 == *worker).count();
        let worker = WorkerId((0..self.threads.len()).min_by_key(count).unwrap_or(0));
        self.hand_over(&mut placed, queue, receive, worker)?;
        Ok(worker)
    }

    fn hand_over(
        &self,
        placed: &mut BTreeMap<QueueId, Placement>,
        queue: QueueId,
        receive: Box<dyn Receive>,
        worker: WorkerId,
    ) -> Result<(), WorkersError> {
        let counters = Arc::new(QueueCounters::default());
        let theirs = Arc::clone(&counters);
        let watched =
            self.ask(worker, |answer| Command::Take { queue, receive, counters: theirs, answer })?;
        watched.map_err(|source| WorkersError::Watch { queue, source })?;
        placed.insert(queue, Placement { worker, counters });
        Ok(())
    }

    /// Takes a queue off its worker. What waits in it stays in it.
    ///
    /// # Errors
    /// If it is on none.
    pub fn remove(&self, queue: QueueId) -> Result<Box<dyn Receive>, WorkersError> {
        let mut placed = self.placed.lock();
        let receive = self.take_back(&placed, queue)?;
        placed.remove(&queue);
        self.balanced.lock().remove(&queue);
        Ok(receive)
    }

    fn take_back(
        &self,
        placed: &BTreeMap<QueueId, Placement>,
        queue: QueueId,
    ) -> Result<Box<dyn Receive>, WorkersError> {
        let worker = placed.get(&queue).ok_or(WorkersError::NotPlaced(queue))?.worker;
        self.ask(worker, |answer| Command::Give { queue, answer })?.ok_or(WorkersError::NotPlaced(queue))
    }

    /// Has a worker carry a command out, and waits for its answer.
    fn ask<T>(
        &self,
        worker: WorkerId,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, WorkersError> {
        let thread = self.thread(worker)?;
        if thread.handle.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(WorkersError::Died(worker));
        }
        let (answer, done) = channel();
        thread.mailbox.send(command(answer));
        // The mailbox of a worker that died meanwhile keeps the other end: nobody would close it.
        done.recv_timeout(ANSWER).map_err(|_| WorkersError::Died(worker))
    }

    /// Moves a queue to another worker while frames pass; none is lost, and their order stays.
    ///
    /// # Errors
    /// If it is on no worker, or there is no such worker: then it stays where it is.
    pub fn move_to(&self, queue: QueueId, worker: WorkerId) -> Result<(), WorkersError> {
        self.thread(worker)?;
        let mut placed = self.placed.lock();
        if placed.get(&queue).is_some_and(|placement| placement.worker == worker) {
            return Ok(());
        }
        let receive = self.take_back(&placed, queue)?;
        placed.remove(&queue);
        self.balanced.lock().remove(&queue);
        self.hand_over(&mut placed, queue, receive, worker)
    }

    /// Moves queues so that workers are busy alike, by what each queue cost since this was last called; and says what
    /// was moved. Small differences stay as they are.
    ///
    /// # Errors
    /// As [`move_to`](Self::move_to).
    pub fn balance(&self) -> Result<Vec<Move>, WorkersError> {
        let mut loads = Vec::new();
        {
            let placed = self.placed.lock();
            let mut before = self.balanced.lock();
            for (&queue, placement) in placed.iter() {
                let busy = placement.counters.status(queue).busy;
                let earlier = before.insert(queue, busy).unwrap_or_default();
                loads.push(Load { queue, worker: placement.worker, busy: busy.saturating_sub(earlier) });
            }
        }
        let moves = balance::plan(&loads, self.threads.len());
        for step in &moves {
            self.move_to(step.queue, step.to)?;
        }
        Ok(moves)
    }

    /// What they do.
    pub fn status(&self) -> Vec<WorkerStatus> {
        let placed = self.placed.lock();
        let status = |(number, thread): (usize, &Thread)| {
            let worker = WorkerId(number);
            let own = placed.iter().filter(|(_, placement)| placement.worker == worker);
            let queues = own.map(|(&queue, placement)| placement.counters.status(queue)).collect();
            thread.counters.status(worker, thread.core, queues)
        };
        self.threads.iter().enumerate().map(status).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for thread in &self.threads {
            thread.mailbox.send(Command::Stop);
        }
        for handle in self.threads.iter_mut().filter_map(|thread| thread.handle.take()) {
            if handle.join().is_err() {
                tracing::error!("a worker had died of a panic");
            }
        }
    }
}
