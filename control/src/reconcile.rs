//! The thread that owns the [`Core`]: it serves requests one after the other, and between them reacts to interfaces
//! that come and go, ages the FDB, and looks at everything from time to time.
//!
//! Others hold a [`Handle`]. Answers come back through a oneshot channel, so that asynchronous callers never block.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sluice_kernel::LinkEvent;
use sluice_policy::image::Backings;
use tokio::sync::{oneshot, watch};

use crate::core::{Core, View};
use crate::error::Error;
use crate::vf::fleet::Equipment;
use crate::vf::manager::{Report, SoftwarePath};

/// Quiet time after an interface event before a pass: creating one interface makes several events.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Longest wait for quiet.
const DEBOUNCE_MAX: Duration = Duration::from_millis(200);
/// Pause after a pass that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// Pause between passes that look at everything.
const FULL_PASS: Duration = Duration::from_secs(10);
/// Time between sweeps of the FDB, and between looks at how busy workers are.
const AGEING: Duration = Duration::from_secs(5);
/// How long a NIC's thread waits for the engine to serve a path.
const BACKINGS_MAX: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce(&mut Core) + Send>;

enum Message {
    Job(Job),
    Links(Vec<LinkEvent>),
    /// The engine says that something has changed.
    Due,
    Stop,
}

/// Access to the reconciler from any thread.
#[derive(Clone)]
pub struct Handle {
    sender: Sender<Message>,
    view: watch::Receiver<Arc<View>>,
}

impl Handle {
    /// Runs `job` in the reconciler's thread and waits for its answer.
    ///
    /// # Errors
    /// [`Error::Stopping`] if the thread has ended, or the job's own.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Core) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |core| {
            // A caller that went away does not need its answer.
            let _ = answer.send(job(core));
        });
        self.sender.send(Message::Job(job)).map_err(|_| Error::Stopping)?;
        answered.await.map_err(|_| Error::Stopping)?
    }

    /// Tells the reconciler of interface events. `false` if it has ended.
    pub fn links(&self, events: Vec<LinkEvent>) -> bool {
        self.sender.send(Message::Links(events)).is_ok()
    }

    /// Resources and statuses as of the last pass, and notice of changes.
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Asks the thread to end. The data plane stays as it is.
    pub fn stop(&self) {
        // If it has ended already, that is what was wanted.
        let _ = self.sender.send(Message::Stop);
    }
}

/// Starts the thread, and waits for the first pass. `make` runs in it, so that the engine never changes threads; its
/// error is returned. With `vfs`, VFs are served too.
///
/// # Errors
/// `make`'s, or that of starting a thread.
pub fn start<E: Send + 'static>(
    make: impl FnOnce() -> Result<Core, E> + Send + 'static,
    vfs: Option<Equipment>,
) -> Result<(Handle, JoinHandle<()>), StartError<E>> {
    let (sender, receiver) = channel();
    let (ready, started) = channel();
    let (to_core, wake) = (sender.clone(), sender.clone());
    let thread = thread::Builder::new().name("reconciler".to_owned()).spawn(move || match make() {
        Ok(mut core) => {
            if let Some(equipment) = vfs {
                core.serve_vfs(equipment, move || Box::new(ToCore { sender: to_core.clone() }));
            }
            core.watch(Arc::new(move || {
                // A reconciler that has ended needs no pass.
                let _ = wake.send(Message::Due);
            }));
            // Whoever asks first shall hear what is, not that nobody has looked yet.
            core.full_pass();
            // The starter waits for exactly this.
            let _ = ready.send(Ok(core.view()));
            run(core, &receiver);
        }
        Err(error) => {
            let _ = ready.send(Err(error));
        }
    })?;
    match started.recv() {
        Ok(Ok(view)) => Ok((Handle { sender, view }, thread)),
        Ok(Err(error)) => Err(StartError::Make(error)),
        Err(_) => Err(StartError::Thread(std::io::Error::other("the reconciler panicked at start"))),
    }
}

/// How the NICs' threads reach the core.
struct ToCore {
    sender: Sender<Message>,
}

impl SoftwarePath for ToCore {
    fn set(&mut self, switch: &str, backings: Backings) -> Result<BTreeSet<String>, String> {
        let (answer, answered) = channel();
        let switch = switch.to_owned();
        let job: Job = Box::new(move |core| {
            // A thread that no longer waits has been told why.
            let _ = answer.send(core.set_backings(&switch, backings));
        });
        self.sender.send(Message::Job(job)).map_err(|_| Error::Stopping.to_string())?;
        answered
            .recv_timeout(BACKINGS_MAX)
            .map_err(|_| "the kernel engine is busy; tried again".to_owned())?
    }

    fn report(&mut self, report: Report) {
        // A core that has ended tells nobody.
        let _ = self.sender.send(Message::Job(Box::new(move |core| core.take_report(report))));
    }
}

/// Why the thread did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError<E> {
    /// No thread.
    #[error("starting the reconciler: {0}")]
    Thread(#[from] std::io::Error),
    /// Nothing to run in it.
    #[error("{0}")]
    Make(E),
}

/// When the next pass is due because of interface events.
#[derive(Debug, Default)]
struct Debounce {
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Debounce {
    fn hit(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        self.last = Some(now);
    }

    fn due(&self) -> Option<Instant> {
        Some((self.last? + DEBOUNCE).min(self.first? + DEBOUNCE_MAX))
    }
}

fn run(mut core: Core, receiver: &Receiver<Message>) {
    let mut links = Debounce::default();
    let mut full_pass = Instant::now() + FULL_PASS;
    let mut ageing = Instant::now() + AGEING;
    loop {
        if core.failed() {
            full_pass = full_pass.min(Instant::now() + AGAIN);
        }
        let wake = links.due().into_iter().fold(full_pass.min(ageing), Instant::min);
        match receiver.recv_timeout(wake.saturating_duration_since(Instant::now())) {
            Ok(Message::Job(job)) => job(&mut core),
            Ok(Message::Links(events)) => {
                core.hint_vfs();
                if concerns(&core, &events) {
                    links.hit(Instant::now());
                }
            }
            Ok(Message::Due) => links.hit(Instant::now()),
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = Instant::now();
        if links.due().is_some_and(|due| due <= now) {
            links = Debounce::default();
            core.pass();
        }
        if ageing <= now {
            core.age_fdb();
            core.balance_workers();
            ageing = Instant::now() + AGEING;
        }
        if full_pass <= now {
            core.full_pass();
            full_pass = Instant::now() + FULL_PASS;
        }
    }
}

/// Whether any of the events is about an interface that we have or want.
fn concerns(core: &Core, events: &[LinkEvent]) -> bool {
    let wanted: HashSet<&str> = core.netdevs().collect();
    events.iter().any(|event| match event {
        LinkEvent::Changed { ifindex, name } | LinkEvent::Gone { ifindex, name } => {
            wanted.contains(name.as_str()) || core.is_bound(*ifindex)
        }
        LinkEvent::Overrun => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_waits_for_quiet_but_not_for_ever() {
        let mut links = Debounce::default();
        assert_eq!(links.due(), None);
        let start = Instant::now();
        links.hit(start);
        assert_eq!(links.due(), Some(start + DEBOUNCE));
        for step in 1..100 {
            links.hit(start + step * DEBOUNCE / 2);
        }
        assert_eq!(links.due(), Some(start + DEBOUNCE_MAX));
    }
}
