//! The userspace engine's workers: what they do, and what somebody wants of them. That is kept with the desired state, so
//! that a restarted daemon has it too.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sluice_proto::v1;
use sluice_proto::v1::violation::Code;
use sluice_user::workers::{QueueId, QueueStatus, WorkerId, WorkerStatus};

use super::Core;
use crate::engine::WorkersPlan;
use crate::error::{Error, violation};
use crate::events::Severity;
use crate::store::{Pin, WorkersWanted};

/// Name under which violations speak of workers.
const WORKERS: &str = "workers";

/// Cores in words: none is the daemon's choice.
fn list(cores: impl IntoIterator<Item = u32>) -> String {
    cores.into_iter().map(|core| core.to_string()).collect::<Vec<_>>().join(", ")
}

fn missing(resource: &str, field: &str, message: String) -> Error {
    let mut found = violation(resource.to_owned(), message, Code::NotFound);
    found.field = field.to_owned();
    Error::NotFound(vec![found])
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Core {
    /// What the workers do.
    pub fn workers(&self) -> v1::WorkersStatus {
        let view = self.engine.workers();
        let names: BTreeMap<u32, &str> =
            self.state.ids.ports.by_name.iter().map(|(name, id)| (*id, name.as_str())).collect();
        let queue = |status: &QueueStatus| v1::WorkerQueue {
            port: names.get(&status.queue.port).copied().unwrap_or_default().to_owned(),
            queue: status.queue.queue.into(),
            load: status.lately.load,
            frames_per_second: status.lately.frames_per_second,
            frames: status.frames,
            batches: status.batches,
            busy_ns: nanoseconds(status.busy),
            pin: status.pin.map(|worker| worker.0 as u32),
        };
        let worker = |status: &WorkerStatus| {
            let mut queues: Vec<v1::WorkerQueue> = status.queues.iter().map(queue).collect();
            queues.sort_by(|a, b| (&a.port, a.queue).cmp(&(&b.port, b.queue)));
            let state =
                if status.is_asleep { v1::worker::State::Asleep } else { v1::worker::State::Spinning };
            v1::Worker {
                core: status.worker.0 as u32,
                state: state.into(),
                load: status.lately.load,
                frames_per_second: status.lately.frames_per_second,
                frames: status.frames,
                polls: status.polls,
                wakeups: status.wakeups,
                busy_ns: nanoseconds(status.busy),
                asleep_ns: nanoseconds(status.asleep),
                queues,
            }
        };
        v1::WorkersStatus {
            workers: view.workers.iter().map(worker).collect(),
            cores: self.state.workers.cores.iter().copied().collect(),
            allowed_cores: view.allowed.iter().map(|core| *core as u32).collect(),
            trouble: view.trouble.unwrap_or_default(),
        }
    }

    /// Has workers on other cores, and keeps that for the next daemon.
    ///
    /// # Errors
    /// If the daemon may not use one of them, or it cannot be done or stored; nothing has changed then.
    pub fn set_workers(
        &mut self,
        request: &v1::SetWorkersRequest,
        actor: &str,
    ) -> Result<v1::WorkersStatus, Error> {
        let cores: BTreeSet<u32> = request.cores.iter().copied().collect();
        let allowed = self.engine.workers().allowed;
        if let Some(core) = cores.iter().find(|core| !allowed.contains(&(**core as usize))) {
            let allowed = list(allowed.iter().map(|core| *core as u32));
            let message = format!("the daemon may not use core {core}: choose of {allowed}");
            return Err(missing(WORKERS, "cores", message));
        }
        let done = match cores.is_empty() {
            true => "workers run where the daemon chooses".to_owned(),
            false => format!("workers run on cores {}", list(cores.iter().copied())),
        };
        let wanted = WorkersWanted { cores, ..self.state.workers.clone() };
        self.want_workers(wanted, done, actor)
    }

    /// Pins queues to a worker, or lets loads decide, and keeps that for the next daemon.
    ///
    /// # Errors
    /// If there is no such port, queue or worker, or it cannot be done or stored; nothing has changed then.
    pub fn place_queue(
        &mut self,
        request: &v1::PlaceQueueRequest,
        actor: &str,
    ) -> Result<v1::WorkersStatus, Error> {
        let v1::PlaceQueueRequest { port, queue, core } = request;
        let Some(id) = self.state.ids.ports.get(port) else {
            let message = "there is no such port; see `sluice workers`".to_owned();
            return Err(missing(port, "", message));
        };
        let view = self.engine.workers();
        let queues = view.workers.iter().flat_map(|status| &status.queues).map(|status| status.queue);
        let served: BTreeSet<u32> =
            queues.filter(|known| known.port == id).map(|known| known.queue.into()).collect();
        if served.is_empty() {
            return Err(Error::Unavailable(format!(
                "{port} has no queue that a worker serves: the kernel engine serves it, or it is not open; see `sluice \
                 workers`"
            )));
        }
        let chosen: BTreeSet<u32> = match queue {
            Some(queue) if served.contains(queue) => [*queue].into(),
            Some(queue) => {
                let message = format!("it has no queue {queue}: choose of {}", list(served));
                return Err(missing(port, "queue", message));
            }
            None => served,
        };
        let mut wanted = self.state.workers.clone();
        let done = match core {
            Some(core) => {
                if !view.workers.iter().any(|status| status.worker.0 == *core as usize) {
                    let there = list(view.workers.iter().map(|status| status.worker.0 as u32));
                    let message =
                        format!("no worker runs on core {core}, only on {there}; see `sluice workers cores`");
                    return Err(missing(WORKERS, "core", message));
                }
                let pin = |queue: &u32| (Pin { port: port.clone(), queue: *queue }, *core);
                wanted.pins.extend(chosen.iter().map(pin));
                format!("queues of {port} pinned to core {core}: {}", list(chosen))
            }
            None => {
                // One without a queue, as of a port that had more, goes too.
                wanted
                    .pins
                    .retain(|pin, _| pin.port != *port || (queue.is_some() && !chosen.contains(&pin.queue)));
                format!("queues of {port} pinned no more: {}", list(chosen))
            }
        };
        self.want_workers(wanted, done, actor)
    }

    /// Lets the engine have it so, and keeps it.
    fn want_workers(
        &mut self,
        wanted: WorkersWanted,
        done: String,
        actor: &str,
    ) -> Result<v1::WorkersStatus, Error> {
        if self.untouched {
            let text =
                "tables of an earlier daemon are in force until the first apply; apply something first";
            return Err(Error::Unavailable(text.to_owned()));
        }
        if wanted != self.state.workers {
            self.engine.set_workers(&self.workers_plan(&wanted))?;
            let mut state = self.state.clone();
            state.workers = wanted;
            state.revision += 1;
            if let Err(error) = self.store_state(state, vec![done], actor) {
                self.tell_workers();
                return Err(error);
            }
            self.publish();
            self.tell_fleet(false);
        }
        Ok(self.workers())
    }

    /// What is wanted, by the engine's numbers.
    fn workers_plan(&self, wanted: &WorkersWanted) -> WorkersPlan {
        let pin = |(pin, core): (&Pin, &u32)| {
            let port = self.state.ids.ports.get(&pin.port)?;
            let queue = u16::try_from(pin.queue).ok()?;
            Some((QueueId { port, queue }, WorkerId(*core as usize)))
        };
        WorkersPlan {
            cores: wanted.cores.iter().map(|core| *core as usize).collect(),
            pins: wanted.pins.iter().filter_map(pin).collect(),
        }
    }

    /// Tells the engine what is wanted of workers, which is nothing new to it most times.
    pub(super) fn tell_workers(&mut self) {
        let plan = self.workers_plan(&self.state.workers);
        if let Err(error) = self.engine.set_workers(&plan) {
            self.events.note(Severity::Error, format!("workers: {error}"));
        }
    }

    /// Lets queues change workers, so that those are busy alike.
    pub fn balance_workers(&mut self) {
        let moves = match self.engine.balance_workers() {
            Ok(moves) => moves,
            Err(error) => return self.events.note(Severity::Error, format!("balancing workers: {error}")),
        };
        let ports = &self.state.ids.ports.by_name;
        let name = |id: u32| ports.iter().find(|(_, known)| **known == id).map_or("?", |(name, _)| name);
        let line = |step: sluice_user::workers::Move| {
            let (QueueId { port, queue }, from, to) = (step.queue, step.from.0, step.to.0);
            format!(
                "queue {queue} of {} moved from the worker on core {from} to that on core {to}",
                name(port)
            )
        };
        let lines = moves.into_iter().map(line).collect();
        self.note_many(Severity::Info, lines);
    }
}
