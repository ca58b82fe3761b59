//! The engine: the one owner of the maps, programs and links of a host.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats};
use sluice_policy::image::Image;
use sluice_policy::lower::PortSpec;

use crate::{AdoptReport, EngineError, FdbRow, FdbSweep, LiveTables, Observation, SyncReport};

/// How to open an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// A directory on a bpffs (such as `/sys/fs/bpf/sluice`); mounted and made if needed.
    pub pin_dir: PathBuf,
}

/// The kernel engine. Calls block; one thread owns it. Dropping it leaves everything attached.
#[derive(Debug)]
pub struct Engine {
    options: EngineOptions,
}

impl Engine {
    /// Loads the programs, and adopts the maps and links pinned under the pin directory, or starts anew.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn open(options: &EngineOptions) -> Result<(Engine, AdoptReport), EngineError> {
        let _engine = Engine { options: options.clone() };
        Err(EngineError::ObjectMissing)
    }

    /// Looks for the ports' interfaces.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn observe(&self, _ports: &[PortSpec]) -> Result<Observation, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Makes the veth pairs of internal ports, and removes those made before that are no longer wanted. Says what was
    /// made or removed.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn ensure_internal(&mut self, _ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Makes maps and links equal to the image. Only differences are written; failures of single ports are in the
    /// report.
    ///
    /// # Errors
    /// [`EngineError::TableFull`], [`EngineError::Map`].
    pub fn sync(&mut self, _image: &Image) -> Result<SyncReport, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Puts missing pins back and looks for links that were detached behind our back. Says what was wrong.
    ///
    /// # Errors
    /// [`EngineError::Io`].
    pub fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        Err(EngineError::Locked(self.options.pin_dir.clone()))
    }

    /// Deletes learnt addresses that are too old, and corrects the ports' counts of learnt addresses.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn age_fdb(&mut self) -> Result<FdbSweep, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// The learnt addresses.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn fdb(&self) -> Result<Vec<FdbRow>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Counters of one port, summed over CPUs.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn port_stats(&self, _port: u32) -> Result<PortStats, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Counters of all ports that the maps hold, by id.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn all_port_stats(&self) -> Result<BTreeMap<u32, PortStats>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Drops of one port by reason; reasons without drops are left out. Port 0 has the frames of unknown origin.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn drops(&self, _port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Drops of all ports, by port id; ports without drops are left out.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn all_drops(&self) -> Result<BTreeMap<u32, Vec<(DropReason, u64)>>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Counters of rules, by counter index, in the order asked for.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn rule_stats(&self, _counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// The live maps, read-only, as tables for [`sluice_pipeline::decide`]: what `sluice trace` asks.
    pub fn live_tables(&self) -> LiveTables<'_> {
        LiveTables::new(self)
    }

    /// Detaches everything and removes the pins: for uninstalling.
    ///
    /// # Errors
    /// [`EngineError::Io`].
    pub fn detach_all(self) -> Result<(), EngineError> {
        Err(EngineError::ObjectMissing)
    }
}
