//! The engine: the one owner of the maps, programs and links of a host.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats, STEERED_QUEUES, socket_index};
use sluice_policy::image::Image;
use sluice_policy::lower::PortSpec;

use crate::attach::Attachments;
use crate::links::Links;
use crate::loader::{self, Loaded};
use crate::pins::Pins;
use crate::promisc::Reception;
use crate::report::{
    AdoptReport, FdbRow, FdbSweep, MapWrites, MapsOutcome, Observation, SyncReport, WireView,
};
use crate::sync::{Expedited, Mirror, Pass};
use crate::{EngineError, LiveTables, ethtool, internal, observe, promisc, stats, vlan_offload};

/// How to open an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// A directory on a bpffs (such as `/sys/fs/bpf/sluice`); mounted and made if needed.
    pub pin_dir: PathBuf,
}

/// The kernel engine. Calls block; one thread owns it. Dropping it leaves everything attached.
///
/// Interfaces are those of the network namespace of the calling thread.
#[derive(Debug)]
pub struct Engine {
    pins: Pins,
    loaded: Loaded,
    attachments: Attachments,
    mirror: Mirror,
    /// A sync failed half-way, so the mirror is to be read again.
    is_mirror_stale: bool,
}

impl Engine {
    /// Loads the programs, and adopts the maps and links pinned under the pin directory, or starts anew.
    ///
    /// # Errors
    /// [`EngineError::ObjectMissing`], [`EngineError::NotBpffs`], [`EngineError::Locked`] if another process uses the
    /// directory, and whatever the kernel refuses.
    pub fn open(options: &EngineOptions) -> Result<(Engine, AdoptReport), EngineError> {
        let pins = Pins::open(&options.pin_dir)?;
        let loaded = loader::load(&pins)?;
        let (attachments, dead_links) = Attachments::adopt(&pins)?;
        let mirror = match loaded.maps_outcome {
            MapsOutcome::Adopted => Mirror::read(&loaded.maps, &attachments)?,
            MapsOutcome::Created | MapsOutcome::Replaced { .. } => Mirror::empty(),
        };
        let report = AdoptReport {
            maps: loaded.maps_outcome.clone(),
            programs: loaded.programs_outcome,
            links: attachments.ports(),
            dead_links,
        };
        Ok((Engine { pins, loaded, attachments, mirror, is_mirror_stale: false }, report))
    }

    /// Looks for the ports' interfaces.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn observe(&self, ports: &[PortSpec]) -> Result<Observation, EngineError> {
        Ok(observe::observe(ports, &Links::read()?))
    }

    /// Makes the veth pairs of internal ports, and removes those made before that are no longer wanted. Says what was
    /// made or removed.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn ensure_internal(&mut self, ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
        internal::ensure(ports)
    }

    /// Makes maps and links equal to the image. Only differences are written; failures of single ports are in the
    /// report.
    ///
    /// # Errors
    /// [`EngineError::TableFull`], [`EngineError::Map`], [`EngineError::Io`]. The next call reads the maps again and goes
    /// on from wherever this one stopped.
    pub fn sync(&mut self, image: &Image) -> Result<SyncReport, EngineError> {
        if self.is_mirror_stale {
            self.mirror = Mirror::read(&self.loaded.maps, &self.attachments)?;
        }
        self.is_mirror_stale = true;
        let report = Pass {
            loaded: &mut self.loaded,
            attachments: &mut self.attachments,
            pins: &self.pins,
            mirror: &mut self.mirror,
            image,
            writes: MapWrites::default(),
        }
        .run()?;
        self.is_mirror_stale = false;
        Ok(report)
    }

    /// Looks at an interface whose queues are to have AF_XDP sockets.
    ///
    /// # Errors
    /// [`EngineError::Io`], if it is gone.
    pub fn wire(&self, ifindex: u32) -> Result<WireView, EngineError> {
        let failed = || EngineError::io(format!("looking at the queues of interface {ifindex}"));
        let queues = ethtool::receive_queues(ifindex).map_err(failed())?;
        let mtu = ethtool::mtu(ifindex).map_err(failed())?;
        let from_any_cpu = ethtool::takes_from_any_cpu(ifindex).map_err(failed())?;
        Ok(WireView { queues, mtu, from_any_cpu })
    }

    /// From now on sends what a queue of an uplink receives for the userspace engine to an AF_XDP socket that is bound to
    /// that queue, for as long as it is open.
    ///
    /// # Errors
    /// [`EngineError::Map`], and if the queue is beyond [`STEERED_QUEUES`].
    pub fn steer(&self, port: u32, queue: u32, socket: BorrowedFd<'_>) -> Result<(), EngineError> {
        let table = &self.loaded.maps.sockets;
        let index = socket_index(port, queue)
            .ok_or(EngineError::TableFull { table: table.name, max_entries: STEERED_QUEUES })?;
        table.set(&index, &(socket.as_raw_fd() as u32))
    }

    /// Puts missing pins back and looks for links that were detached behind our back. Says what was wrong.
    ///
    /// # Errors
    /// [`EngineError::Io`].
    pub fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        let mut done = self.pins.repair()?;
        done.extend(self.loaded.repair(&self.pins)?);
        done.extend(self.attachments.repair(&self.pins)?);
        Ok(done)
    }

    /// Deletes learnt addresses that are too old, and corrects the ports' counts of learnt addresses.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn age_fdb(&mut self) -> Result<FdbSweep, EngineError> {
        stats::age_fdb(&self.loaded.maps, &self.mirror)
    }

    /// The learnt addresses, sorted by switch, VLAN and address.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn fdb(&self) -> Result<Vec<FdbRow>, EngineError> {
        stats::fdb(&self.loaded.maps)
    }

    /// Counters of one port, summed over CPUs.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn port_stats(&self, port: u32) -> Result<PortStats, EngineError> {
        self.loaded.maps.port_stats.get(port)
    }

    /// Counters of all ports that the maps hold, by id.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn all_port_stats(&self) -> Result<BTreeMap<u32, PortStats>, EngineError> {
        stats::all_port_stats(&self.loaded.maps, self.mirror.ports.keys().copied())
    }

    /// Drops of one port by reason; reasons without drops are left out. Port 0 has the frames of unknown origin.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn drops(&self, port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
        stats::drops(&self.loaded.maps, port)
    }

    /// Drops of all ports, by port id; ports without drops are left out.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn all_drops(&self) -> Result<BTreeMap<u32, Vec<(DropReason, u64)>>, EngineError> {
        stats::all_drops(&self.loaded.maps)
    }

    /// Counters of rules, by counter index, in the order asked for.
    ///
    /// # Errors
    /// [`EngineError::Map`].
    pub fn rule_stats(&self, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
        stats::rule_stats(&self.loaded.maps, counters)
    }

    /// The live maps, read-only, as tables for [`sluice_pipeline::decide`]: what `sluice trace` asks.
    pub fn live_tables(&self) -> LiveTables<'_> {
        LiveTables::new(&self.loaded.maps)
    }

    /// Detaches everything and removes the pins and the internal ports: for uninstalling.
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Netlink`].
    pub fn detach_all(mut self) -> Result<(), EngineError> {
        let ports = self.attachments.ports();
        let _expedited = Expedited::for_changes(ports.len());
        for port in ports {
            self.attachments.detach_port(&port, &self.pins)?;
        }
        internal::ensure(&[])?;
        let links = Links::read()?;
        for reception in [Reception::All, Reception::Groups] {
            promisc::reconcile(reception, &BTreeSet::new(), &links, &self.pins)?;
        }
        vlan_offload::restore(&BTreeSet::new(), &links, &self.pins)?;
        self.pins.remove_all()
    }
}
