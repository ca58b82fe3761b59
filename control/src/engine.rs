//! What the daemon needs of an engine: a small trait, so that tests can put a recording fake in its place.
//!
//! The types that cross are the kernel engine's own. One thread, the reconciler's, owns the engine.

#[cfg(test)]
pub(crate) mod fake;
mod joint;
mod kernel;
mod user;
mod wires;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use sluice_kernel::{EngineError, FdbRow, FdbSweep, Observation, SyncReport, WireView};
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats};
use sluice_policy::image::Image;
use sluice_policy::lower::PortSpec;
use sluice_user::workers::Move;

use crate::trace::LiveTrace;

pub use joint::{JointEngine, UserPlane};
pub use kernel::KernelEngine;
pub use user::{UserEngine, UserError, WorkersPlan, WorkersView};
pub use wires::{Steer, Wire, WireReport};

/// Tells the owner of an engine that something has changed by itself: a pass is due. Called from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Whether a note about a port says how it is served, and not what is amiss.
pub fn is_fine(note: &str) -> bool {
    note.starts_with(wires::SERVED)
}

/// What the engine found when it was opened, in words for the event log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Tables filled by an earlier daemon were found and are in use.
    pub found_tables: bool,
    /// What was found, one line each.
    pub lines: Vec<String>,
}

/// Memory of an engine's frames, in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameUse {
    /// All chunks.
    pub total: u64,
    /// Those that hold a frame: in hand, or waiting in a queue; or lent to the kernel, for an AF_XDP socket to receive into.
    pub in_use: u64,
}

/// An engine that keeps tables and attachments equal to an image. Calls block.
pub trait DataPlane {
    /// What was found when it was opened.
    fn adoption(&self) -> Adoption;
    /// Looks at the interfaces.
    ///
    /// # Errors
    /// If they cannot be read.
    fn observe(&self, ports: &[PortSpec]) -> Result<Observation, EngineError>;
    /// Makes the interfaces of internal ports, and removes those no longer wanted. Says what was done.
    ///
    /// # Errors
    /// If one cannot be made.
    fn ensure_internal(&mut self, ports: &[PortSpec]) -> Result<Vec<String>, EngineError>;
    /// Makes tables and attachments equal to the image; writes only differences.
    ///
    /// # Errors
    /// If tables cannot be written. What concerns one port is in the report.
    fn sync(&mut self, image: &Image) -> Result<SyncReport, EngineError>;
    /// Looks at an interface whose queues are to have AF_XDP sockets.
    ///
    /// # Errors
    /// If it is gone.
    fn wire(&self, ifindex: u32) -> Result<WireView, EngineError>;
    /// Brings what a queue of an uplink receives for the userspace engine to a socket, while that is open.
    ///
    /// # Errors
    /// If the table cannot be written.
    fn steer(&mut self, port: u32, queue: u32, socket: BorrowedFd<'_>) -> Result<(), EngineError>;
    /// Puts back pins and links that somebody removed. Says what was done.
    ///
    /// # Errors
    /// If something cannot be put back.
    fn repair(&mut self) -> Result<Vec<String>, EngineError>;
    /// Forgets learnt addresses that are too old.
    ///
    /// # Errors
    /// If the table cannot be read or written.
    fn age_fdb(&mut self) -> Result<FdbSweep, EngineError>;
    /// Learnt addresses.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn fdb(&self) -> Result<Vec<FdbRow>, EngineError>;
    /// Counters of a port, by its id.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn port_stats(&self, port: u32) -> Result<PortStats, EngineError>;
    /// Drops on a port that are not zero, by its id.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn drops(&self, port: u32) -> Result<Vec<(DropReason, u64)>, EngineError>;
    /// Counters of rules, by their ids, in the same order.
    ///
    /// # Errors
    /// If the table cannot be read.
    fn rule_stats(&self, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError>;
    /// Takes a frame from a port through the pipeline over the live tables, without any side effect.
    fn trace(&self, ingress: u32, frame: &[u8]) -> LiveTrace;
    /// Has workers on other cores, and queues on other workers, while frames pass. Before there are workers it is a wish.
    ///
    /// # Errors
    /// If that cannot be; it stays as it was then.
    fn set_workers(&mut self, _plan: &WorkersPlan) -> Result<(), UserError> {
        Ok(())
    }
    /// What workers do; an engine without any says nothing.
    fn workers(&self) -> WorkersView {
        WorkersView::default()
    }
    /// Moves queues between workers by what they have cost since the last call; says what was moved. To be called every
    /// few seconds.
    ///
    /// # Errors
    /// If a worker does not take a queue, which stays where it is.
    fn balance_workers(&mut self) -> Result<Vec<Move>, UserError> {
        Ok(Vec::new())
    }
    /// Memory of frames; `None` for an engine that has none of its own.
    fn frames(&self) -> Option<FrameUse> {
        None
    }
    /// From now on tells `wake` of what changes by itself. Interfaces are watched by others.
    fn watch(&mut self, wake: Wake);
}
