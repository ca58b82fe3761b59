//! A worker's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::meter::Amount;
use super::{Pace, Patience, QueueId, QueueStatus, WorkerId, WorkerStatus};
use crate::engine::Processor;
use crate::port::{Batch, Receive};

/// Why a queue cannot be served; and the queue.
pub(super) type NotTaken = (io::Error, Box<dyn Receive>);

/// What a worker is asked to do between two rounds.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve a queue, or hand it back with the reason why not.
    Take {
        queue: QueueId,
        receive: Box<dyn Receive>,
        counters: Arc<QueueCounters>,
        answer: Sender<Result<(), NotTaken>>,
    },
    /// Serve it no more, and hand it back.
    Give { queue: QueueId, answer: Sender<Option<Box<dyn Receive>>> },
    /// End.
    Stop,
}

/// Where commands arrive.
#[derive(Debug)]
pub(super) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    has_any: AtomicBool,
    bell: EventFd,
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Mailbox { commands: Mutex::default(), has_any: AtomicBool::new(false), bell })
    }

    pub(super) fn send(&self, command: Command) {
        self.commands.lock().push(command);
        self.has_any.store(true, Ordering::Release);
        let _ = self.bell.write(1); // full means that it rings already
    }

    fn take(&self) -> Vec<Command> {
        let _ = self.bell.read(); // it may not have rung yet
        let mut commands = self.commands.lock();
        self.has_any.store(false, Ordering::Relaxed);
        std::mem::take(&mut commands)
    }

    /// Takes a queue back that the worker has not looked at.
    pub(super) fn withdraw(&self, wanted: QueueId) -> Option<Box<dyn Receive>> {
        let mut commands = self.commands.lock();
        let is_it = |command: &Command| matches!(command, Command::Take { queue, .. } if *queue == wanted);
        let place = commands.iter().position(is_it)?;
        match commands.remove(place) {
            Command::Take { receive, .. } => Some(receive),
            Command::Give { .. } | Command::Stop => None,
        }
    }
}

/// Written by the worker alone. Times are nanoseconds.
#[derive(Debug, Default)]
pub(super) struct ThreadCounters {
    frames: AtomicU64,
    polls: AtomicU64,
    busy: AtomicU64,
    /// Without the sleep of now.
    asleep: AtomicU64,
    /// When the sleep of now began; 0 if it is awake.
    asleep_since: AtomicU64,
    wakeups: AtomicU64,
}

/// Likewise, of one queue.
#[derive(Debug, Default)]
pub(super) struct QueueCounters {
    batches: AtomicU64,
    frames: AtomicU64,
    busy: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

fn time(counter: &AtomicU64) -> Duration {
    Duration::from_nanos(counter.load(Ordering::Relaxed))
}

impl ThreadCounters {
    /// All but its queues and its pace.
    pub(super) fn status(&self, worker: WorkerId, now: u64) -> WorkerStatus {
        let since = self.asleep_since.load(Ordering::Relaxed);
        let is_asleep = since != 0;
        let nap = if is_asleep { Duration::from_nanos(now.saturating_sub(since)) } else { Duration::ZERO };
        WorkerStatus {
            worker,
            is_asleep,
            lately: Pace::default(),
            frames: self.frames.load(Ordering::Relaxed),
            polls: self.polls.load(Ordering::Relaxed),
            wakeups: self.wakeups.load(Ordering::Relaxed),
            busy: time(&self.busy),
            asleep: time(&self.asleep) + nap,
            queues: Vec::new(),
        }
    }

    pub(super) fn amount(&self) -> Amount {
        Amount { busy: self.busy.load(Ordering::Relaxed), frames: self.frames.load(Ordering::Relaxed) }
    }
}

impl QueueCounters {
    /// All but its pin and its pace.
    pub(super) fn status(&self, queue: QueueId) -> QueueStatus {
        QueueStatus {
            queue,
            pin: None,
            lately: Pace::default(),
            batches: self.batches.load(Ordering::Relaxed),
            frames: self.frames.load(Ordering::Relaxed),
            busy: self.busy(),
        }
    }

    pub(super) fn busy(&self) -> Duration {
        time(&self.busy)
    }

    pub(super) fn amount(&self) -> Amount {
        Amount { busy: self.busy.load(Ordering::Relaxed), frames: self.frames.load(Ordering::Relaxed) }
    }
}

/// A worker's thread, from outside. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) counters: Arc<ThreadCounters>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts a thread on a core, and waits until it is there.
    pub(super) fn start(worker: WorkerId, patience: Patience, processor: Processor) -> io::Result<Thread> {
        let mailbox = Arc::new(Mailbox::new()?);
        let counters = Arc::new(ThreadCounters::default());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(mailbox.bell.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        let core = worker.0;
        let worker = Worker {
            patience,
            processor,
            mailbox: Arc::clone(&mailbox),
            counters: Arc::clone(&counters),
            epoll,
            queues: Vec::new(),
            batch: Batch::new(),
            silent_since: None,
            is_unsettled: false,
        };
        let (there, pinned) = std::sync::mpsc::channel();
        let handle = std::thread::Builder::new().name(format!("sluice-worker-{core}")).spawn(move || {
            let result = pin(core);
            let is_pinned = result.is_ok();
            let _ = there.send(result); // nobody waits for a worker that could not start
            if is_pinned {
                worker.run();
            }
        })?;
        let ended = || io::Error::other("the thread ended at once");
        pinned.recv().map_err(|_| ended())??;
        Ok(Thread { mailbox, counters, handle: Some(handle) })
    }

    /// Whether it has ended, which it does of itself only by a panic.
    pub(super) fn has_ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.mailbox.send(Command::Stop);
        if self.handle.take().is_some_and(|handle| handle.join().is_err()) {
            tracing::error!("a worker had died of a panic");
        }
    }
}

fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Nanoseconds of the monotonic clock; 0 if there is none, which does not happen.
pub(super) fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// How long the other ends are left without notice while there are more frames, in nanoseconds. To ask whether an end wants to be
/// notified means to wait until it can see what it is to be notified of: once for many batches costs a small part of once for each.
const SILENCE: u64 = 10_000;

/// A queue that the worker serves.
#[derive(Debug)]
struct Served {
    queue: QueueId,
    receive: Box<dyn Receive>,
    counters: Arc<QueueCounters>,
    /// Frames were taken, and nobody was notified.
    is_silent: bool,
}

impl Served {
    /// What is waited for only while the worker sleeps.
    fn dear_event(&self) -> Option<BorrowedFd<'_>> {
        self.receive.event().filter(|_| self.receive.wakes_for_each())
    }
}

struct Worker {
    patience: Patience,
    processor: Processor,
    mailbox: Arc<Mailbox>,
    counters: Arc<ThreadCounters>,
    epoll: Epoll,
    queues: Vec<Served>,
    batch: Batch,
    /// Since when others have been without notice.
    silent_since: Option<u64>,
    /// It has worked since it settled.
    is_unsettled: bool,
}

impl Worker {
    fn run(mut self) {
        let spin = self.patience.spin.as_nanos() as u64;
        let mut time = now();
        let mut last_busy = time;
        loop {
            if self.mailbox.has_any.load(Ordering::Acquire) {
                self.settle();
                if !self.obey() {
                    return;
                }
                last_busy = time;
            }
            let begin = time;
            let worked = self.round(&mut time);
            if worked {
                add(&self.counters.busy, time - begin);
                last_busy = time;
                continue;
            }
            self.settle();
            time = now();
            if time.saturating_sub(last_busy) >= spin {
                let is_nap = self.sleep(time);
                time = now();
                // After a nap one look is enough.
                last_busy = if is_nap { time.saturating_sub(spin) } else { time };
            } else {
                self.processor.idle();
                std::hint::spin_loop();
            }
        }
    }

    /// Looks at each queue once; whether any had frames. `time` is kept up to date.
    fn round(&mut self, time: &mut u64) -> bool {
        let mut worked = false;
        add(&self.counters.polls, 1);
        for place in 0..self.queues.len() {
            let served = &mut self.queues[place];
            served.receive.receive(self.processor.pool(), &mut self.batch);
            let frames = self.batch.len();
            if frames == 0 {
                continue;
            }
            let QueueId { port, queue } = served.queue;
            let begin = *time;
            self.processor.process_queue(port, queue, &mut self.batch, *time);
            let end = now();
            add(&served.counters.batches, 1);
            add(&served.counters.frames, frames as u64);
            add(&served.counters.busy, end.saturating_sub(*time));
            add(&self.counters.frames, frames as u64);
            *time = end;
            worked = true;
            served.is_silent = true;
            self.is_unsettled = true;
            let since = *self.silent_since.get_or_insert(begin);
            if end.saturating_sub(since) >= SILENCE {
                self.notify();
            }
        }
        worked
    }

    /// When there is nothing more to do: leaves nobody without notice, and keeps no frames.
    fn settle(&mut self) {
        if std::mem::take(&mut self.is_unsettled) {
            self.notify();
            self.batch.give(self.processor.pool());
            self.processor.release();
        }
    }

    /// Notifies the other ends of what was taken and sent.
    fn notify(&mut self) {
        if self.silent_since.take().is_none() {
            return;
        }
        self.processor.flush();
        for served in &mut self.queues {
            if std::mem::take(&mut served.is_silent) {
                served.receive.notify();
            }
        }
    }

    /// Sleeps until a queue or the mailbox rings, unless there is something already. `time` is now. Says whether it slept until it was
    /// time to look at queues that ring for nobody.
    fn sleep(&mut self, time: u64) -> bool {
        let (mut must_look, mut is_nap) = (false, false);
        let mut armed = 0;
        for served in &mut self.queues {
            if !served.receive.arm() {
                break;
            }
            must_look |= served.receive.is_polled();
            armed += 1;
        }
        if armed == self.queues.len() {
            self.processor.rest();
            must_look |= !self.watch();
            let nap = EpollTimeout::try_from(self.patience.nap).unwrap_or(EpollTimeout::ZERO);
            let timeout = if must_look { nap } else { EpollTimeout::NONE };
            self.counters.asleep_since.store(time, Ordering::Relaxed);
            // An interruption is as good as a ring.
            is_nap = self.epoll.wait(&mut [EpollEvent::empty()], timeout) == Ok(0);
            self.counters.asleep_since.store(0, Ordering::Relaxed);
            add(&self.counters.asleep, now().saturating_sub(time));
            add(&self.counters.wakeups, 1);
            self.unwatch();
        }
        for served in &mut self.queues[..armed] {
            served.receive.disarm();
        }
        is_nap
    }

    /// Waits for queues, too, whose other ends would pay for it while the worker is awake; `false` if that is not possible for some.
    fn watch(&self) -> bool {
        let mut are_watched = true;
        for event in self.queues.iter().filter_map(Served::dear_event) {
            are_watched &= self.epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).is_ok();
        }
        are_watched
    }

    /// Waits for them no more.
    fn unwatch(&self) {
        for event in self.queues.iter().filter_map(Served::dear_event) {
            let _ = self.epoll.delete(event); // some could not be waited for
        }
    }

    /// Carries commands out; `false` if one was to end.
    fn obey(&mut self) -> bool {
        for command in self.mailbox.take() {
            match command {
                Command::Stop => return false,
                Command::Take { queue, receive, counters, answer } => {
                    let watched = match receive.event() {
                        Some(event) => self.epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, 1)),
                        None => Ok(()),
                    };
                    if let Err(error) = watched {
                        let _ = answer.send(Err((error.into(), receive))); // who asked is gone, and the queue with it
                    } else if answer.send(Ok(())).is_ok() {
                        let served = Served { queue, receive, counters, is_silent: false };
                        if let Some(event) = served.dear_event() {
                            let _ = self.epoll.delete(event); // it was added
                        }
                        self.queues.push(served);
                    } else if let Some(event) = receive.event() {
                        // Who asked has given it up.
                        let _ = self.epoll.delete(event); // it was added
                    }
                }
                Command::Give { queue, answer } => {
                    let place = self.queues.iter().position(|served| served.queue == queue);
                    let receive = place.map(|place| {
                        let served = self.queues.remove(place);
                        if let Some(event) = served.receive.event() {
                            let _ = self.epoll.delete(event); // it may not be waited for now
                        }
                        served.receive
                    });
                    let _ = answer.send(receive); // who asked is gone, and the queue with it
                }
            }
        }
        true
    }
}
