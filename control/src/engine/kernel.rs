//! The kernel engine as a [`DataPlane`].

use std::os::fd::BorrowedFd;

use sluice_kernel::{
    AdoptReport, Engine, EngineError, EngineOptions, FdbRow, FdbSweep, MapsOutcome, Observation,
    ProgramsOutcome, SyncReport, WireView,
};
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats};
use sluice_policy::image::Image;
use sluice_policy::lower::PortSpec;

use super::{Adoption, DataPlane, Wake};
use crate::trace::{self, LiveTrace};

/// The real engine, and what it found when it was opened.
#[derive(Debug)]
pub struct KernelEngine {
    engine: Engine,
    adopted: AdoptReport,
}

impl KernelEngine {
    /// Opens the engine.
    ///
    /// # Errors
    /// If programs cannot be loaded, or the pin directory cannot be used.
    pub fn open(options: &EngineOptions) -> Result<KernelEngine, EngineError> {
        let (engine, adopted) = Engine::open(options)?;
        Ok(KernelEngine { engine, adopted })
    }
}

/// A few names, and how many more there are.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        rest => format!("{shown} and {rest} more"),
    }
}

impl DataPlane for KernelEngine {
    fn adoption(&self) -> Adoption {
        let report = &self.adopted;
        let mut lines = vec![match &report.maps {
            MapsOutcome::Created => "tables: none were pinned, made new ones".to_owned(),
            MapsOutcome::Adopted => "tables: adopted the pinned ones".to_owned(),
            MapsOutcome::Replaced { reason } => format!("tables: the pinned ones are replaced: {reason}"),
        }];
        lines.push(match report.programs {
            ProgramsOutcome::Loaded => "programs: loaded".to_owned(),
            ProgramsOutcome::Adopted => "programs: adopted the pinned ones".to_owned(),
            ProgramsOutcome::Replaced => {
                "programs: the pinned ones are of another build and are replaced".to_owned()
            }
        });
        if !report.links.is_empty() {
            lines.push(format!("links: adopted {}", some(&report.links)));
        }
        if !report.dead_links.is_empty() {
            lines.push(format!("links: dead, their interfaces are gone: {}", some(&report.dead_links)));
        }
        Adoption { found_tables: report.maps != MapsOutcome::Created, lines }
    }

    fn observe(&self, ports: &[PortSpec]) -> Result<Observation, EngineError> {
        self.engine.observe(ports)
    }

    fn ensure_internal(&mut self, ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
        self.engine.ensure_internal(ports)
    }

    fn sync(&mut self, image: &Image) -> Result<SyncReport, EngineError> {
        self.engine.sync(image)
    }

    fn wire(&self, ifindex: u32) -> Result<WireView, EngineError> {
        self.engine.wire(ifindex)
    }

    fn steer(&mut self, port: u32, queue: u32, socket: BorrowedFd<'_>) -> Result<(), EngineError> {
        self.engine.steer(port, queue, socket)
    }

    fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        self.engine.repair()
    }

    fn age_fdb(&mut self) -> Result<FdbSweep, EngineError> {
        self.engine.age_fdb()
    }

    fn fdb(&self) -> Result<Vec<FdbRow>, EngineError> {
        self.engine.fdb()
    }

    fn port_stats(&self, port: u32) -> Result<PortStats, EngineError> {
        self.engine.port_stats(port)
    }

    fn drops(&self, port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
        self.engine.drops(port)
    }

    fn rule_stats(&self, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
        self.engine.rule_stats(counters)
    }

    fn trace(&self, ingress: u32, frame: &[u8]) -> LiveTrace {
        trace::live(&self.engine.live_tables(), ingress, frame)
    }

    /// Nothing but interfaces changes by itself.
    fn watch(&mut self, _wake: Wake) {}
}
