//! How many workers there are, and on which cores.
//!
//! Unless somebody says which cores they run on, there are as many as there are queues, but no more than every fourth core
//! has one, since the others are for guests; and never more than eight, since a worker serves many guests.

use std::collections::{BTreeMap, BTreeSet};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use sluice_user::workers::{Move, QueueId, WorkerId, WorkerStatus};

use super::{UserEngine, UserError, without_capabilities};

/// Of so many cores, one has a worker.
const SHARE: usize = 4;
/// Most workers that nobody asked for.
const MOST: usize = 8;

/// What is wanted of workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkersPlan {
    /// Cores that they run on; none: as many as are thought good.
    pub cores: BTreeSet<usize>,
    /// Queues that are where they are by hand.
    pub pins: BTreeMap<QueueId, WorkerId>,
}

/// What workers do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkersView {
    /// Workers, by core.
    pub workers: Vec<WorkerStatus>,
    /// Cores that this process may use, in order.
    pub allowed: Vec<usize>,
    /// Why it is not as planned.
    pub trouble: Option<String>,
}

/// The cores that this process may use, in order.
fn allowed_cores() -> Result<Vec<usize>, UserError> {
    let operation = "asking which cores may be used";
    let set = sched_getaffinity(Pid::from_raw(0))
        .map_err(|error| UserError::System { operation, source: error.into() })?;
    Ok((0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false)).collect())
}

/// The cores for workers: those that are wanted, if there are any of them, or the last ones, as the first have most of the
/// interrupts.
fn cores(wanted: &BTreeSet<usize>, allowed: &[usize], queues: usize) -> Vec<usize> {
    let there: Vec<usize> = allowed.iter().copied().filter(|core| wanted.contains(core)).collect();
    if !there.is_empty() {
        return there;
    }
    let room = (allowed.len() / SHARE).clamp(1, MOST);
    let first = allowed.len().saturating_sub(queues.clamp(1, room));
    allowed[first..].to_vec()
}

impl UserEngine {
    /// The cores that workers are to run on, to serve so many queues.
    pub(super) fn cores(&self, queues: usize) -> Result<Vec<usize>, UserError> {
        Ok(cores(&self.plan.cores, &allowed_cores()?, queues))
    }

    /// Has as many workers as there should be, on the cores where they should be, if any run; and pins in force.
    pub(super) fn staff(&mut self) -> Result<(), UserError> {
        let Some(running) = &self.running else { return Ok(()) };
        let workers = &running.workers;
        let cores = self.cores(workers.queues())?;
        if workers.cores() != cores {
            // New ones have the capabilities of the thread that starts them.
            for Move { queue, from, to } in without_capabilities(|| workers.set_cores(&cores))?? {
                tracing::debug!("{queue} moved from core {} to core {}", from.0, to.0);
            }
        }
        workers.set_pins(self.plan.pins.clone())?;
        Ok(())
    }

    /// The same where nobody waits for an answer: a trouble is told once, and kept to be seen.
    pub(super) fn staff_or_tell(&mut self) {
        let trouble = self.staff().err().map(|error| error.to_string());
        if let Some(trouble) = trouble.as_ref().filter(|trouble| self.staffing.as_ref() != Some(trouble)) {
            tracing::warn!("workers: {trouble}");
        }
        self.staffing = trouble;
    }

    pub(super) fn plan_workers(&mut self, plan: &WorkersPlan) -> Result<(), UserError> {
        if self.plan == *plan {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.plan, plan.clone());
        let done = self.staff();
        match done {
            Ok(()) => self.staffing = None,
            Err(_) => {
                self.plan = before;
                self.staff_or_tell();
            }
        }
        done
    }

    pub(super) fn view_workers(&self) -> WorkersView {
        let allowed = allowed_cores().unwrap_or_default();
        let absent: Vec<String> = self
            .plan
            .cores
            .iter()
            .filter(|core| !allowed.contains(core))
            .map(|core| format!("core {core} is wanted, and the daemon may not use it"))
            .collect();
        let absent = (!absent.is_empty()).then(|| absent.join("; "));
        WorkersView {
            workers: self.running.as_ref().map(|running| running.workers.status()).unwrap_or_default(),
            allowed,
            trouble: self.staffing.clone().or(absent),
        }
    }

    pub(super) fn balance(&mut self) -> Result<Vec<Move>, UserError> {
        let Some(running) = &self.running else { return Ok(Vec::new()) };
        Ok(running.workers.balance()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_leave_most_cores_to_guests() {
        let all: Vec<usize> = (0..64).collect();
        let automatic = |allowed: &[usize], queues| cores(&BTreeSet::new(), allowed, queues);
        assert_eq!(automatic(&[0, 1], 9), [1]);
        assert_eq!(automatic(&[5], 9), [5]);
        assert_eq!(automatic(&all[..8], 9), [6, 7]);
        assert_eq!(automatic(&all[..8], 1), [7]);
        assert_eq!(automatic(&all[..8], 0), [7]);
        assert_eq!(automatic(&all, 100), (56..64).collect::<Vec<_>>());
        assert_eq!(automatic(&all, 3), [61, 62, 63]);
        let wanted = |some: &[usize], allowed: &[usize]| cores(&some.iter().copied().collect(), allowed, 1);
        assert_eq!(wanted(&[3, 1], &all), [1, 3]);
        assert_eq!(wanted(&[3, 99], &all), [3], "what is there of them");
        assert_eq!(wanted(&[99], &all), [63], "or the choice is ours");
    }
}
