//! The userspace engine as the daemon drives it: vhost-user ports, the taps to the kernel engine, and workers.
//!
//! Nothing is started before the first port is wanted. Threads that touch guests' memory hold no capabilities.

mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::thread;

use caps::{CapSet, CapsHashSet};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use sluice_kernel::{FdbRow, HooksInUse, PortState, PortStatus};
use sluice_pipeline::tables::{PortStats, RuleStats, port_flag};
use sluice_pipeline::{DropReason, tables::FdbEntry};
use sluice_policy::config::{VhostMode, VhostUser};
use sluice_policy::image::{Behind, Image};
use sluice_policy::lower::PortSpec;
use sluice_policy::net::MacAddr;
use sluice_policy::sim::Simulator;
use sluice_user::engine::Engine;
use sluice_user::frame::{Region, RegionError, RegionLayout};
use sluice_user::port::Transmit;
use sluice_user::tap::{Tap, TapError};
use sluice_user::vhost::features::{Features, bit};
use sluice_user::vhost::{
    FrameFault, FromGuest, LogLines, Mode, OpenError, Port, PortConfig, PortEvent, QueueState, Status,
    ToGuest,
};
use sluice_user::workers::{Move, Patience, QueueId, Workers, WorkersError};

use super::joint::{UserPlane, UserReport};
use super::wires::{Steer, Wire, WireReport, Wires};
use super::{FrameUse, Wake};
use crate::trace::{self, LiveTrace};

pub use workers::{WorkersPlan, WorkersView};

/// Memory for frames, touched as it is needed: 32 MiB of ordinary ones, 34 MiB of super-frames.
pub(super) const LAYOUT: RegionLayout = RegionLayout { small: 16_384, large: 512 };
/// The longest IP packet of a guest, super-frames apart. What is too long for an uplink is for the guests to find out.
const MTU: u16 = 9_000;

/// Why the userspace engine cannot serve a port, or do what is asked of its workers.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No memory for frames.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No worker, or it would not take a queue.
    #[error(transparent)]
    Workers(#[from] WorkersError),
    /// No port.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel refused a thread or what it needs.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What runs once there is something to serve.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) engine: Engine,
    pub(super) workers: Workers,
    pub(super) region: Arc<Region>,
}

/// A vhost-user port that is open.
#[derive(Debug)]
struct Open {
    id: u32,
    rings: VhostUser,
    port: Port,
}

/// A tap that is there.
#[derive(Debug)]
struct Trunk {
    tap: Tap,
    /// The port that serves it, while one does.
    id: Option<u32>,
}

/// The userspace engine. One thread owns it.
#[derive(Default)]
pub struct UserEngine {
    running: Option<Running>,
    image: Image,
    /// By name of the port.
    open: BTreeMap<String, Open>,
    failed: BTreeMap<String, String>,
    /// By name of the interface.
    taps: BTreeMap<String, Trunk>,
    troubles: BTreeMap<String, String>,
    wires: Wires,
    /// What is wanted of workers.
    plan: WorkersPlan,
    /// Why they are not as they should be.
    staffing: Option<String>,
    wake: Arc<Mutex<Option<Wake>>>,
}

impl UserEngine {
    /// Starts engine and workers, unless they run.
    fn start(&mut self) -> Result<(), UserError> {
        if self.running.is_some() {
            return Ok(());
        }
        let engine = Engine::new();
        engine.apply(self.image.clone());
        let region = Region::new(LAYOUT)?;
        let cores = self.cores(1)?;
        let workers =
            without_capabilities(|| Workers::start(&engine, &region, &cores, Patience::default()))??;
        workers.set_pins(self.plan.pins.clone())?;
        self.running = Some(Running { engine, workers, region });
        Ok(())
    }

    fn close(&mut self, name: &str) {
        let (Some(open), Some(running)) = (self.open.remove(name), &self.running) else { return };
        running.engine.detach(open.id);
        for queue in 0..open.rings.queues {
            // A worker that has died has no queue to give back.
            let _ = running.workers.remove(QueueId { port: open.id, queue });
        }
    }

    /// Parts a tap from the port that serves it; `false` if none does.
    fn part(running: Option<&Running>, trunk: &mut Trunk) -> bool {
        let Some(id) = trunk.id.take() else { return false };
        if let Some(running) = running {
            running.engine.detach(id);
            // As above.
            let _ = running.workers.remove(QueueId { port: id, queue: 0 });
        }
        true
    }

    /// Parts all trunks but those that `is_kept` keeps by interface and number; says which.
    fn part_others(&mut self, is_kept: impl Fn(&str, u32) -> bool) -> Vec<String> {
        let mut done = Vec::new();
        for (netdev, trunk) in &mut self.taps {
            let is_kept = trunk.id.is_none_or(|id| is_kept(netdev, id));
            if !is_kept && Self::part(self.running.as_ref(), trunk) {
                done.push(format!("{netdev} is not served any more"));
            }
        }
        done
    }

    fn open(&mut self, id: u32, name: &str, rings: &VhostUser) -> Result<(), UserError> {
        let config = PortConfig {
            path: rings.path.clone().into(),
            mode: match rings.mode {
                VhostMode::Server => Mode::Server,
                VhostMode::Client => Mode::Client,
            },
            queue_pairs: rings.queues,
            mtu: MTU,
            offloads: true,
            standby: false,
        };
        let wake = Arc::clone(&self.wake);
        // A front-end comes and goes as often as it likes.
        let lines = LogLines::new(name);
        let listener = move |event| {
            lines.write(|| tracing::info!(port = lines.who(), ?event, "vhost-user"));
            let wake = wake.lock().clone();
            if let Some(wake) = wake.filter(|_| !matches!(event, PortEvent::Announce(_))) {
                wake();
            }
        };
        self.start()?;
        let port = without_capabilities(|| Port::open(config, Box::new(listener)))??;
        let queues = port.queues();
        self.open.insert(name.to_owned(), Open { id, rings: rings.clone(), port });
        let placed = self.place(id, queues);
        if placed.is_err() {
            self.close(name);
        }
        placed
    }

    fn place(&self, id: u32, queues: Vec<(FromGuest, ToGuest)>) -> Result<(), UserError> {
        let Some(running) = &self.running else { return Ok(()) };
        let mut ways_out: Vec<Box<dyn Transmit>> = Vec::new();
        for (queue, (from, to)) in (0..).zip(queues) {
            running.workers.place_anywhere(QueueId { port: id, queue }, Box::new(from))?;
            ways_out.push(Box::new(to));
        }
        running.engine.attach(id, ways_out);
        Ok(())
    }

    /// Gives a trunk's tap to the port with this number.
    fn serve(&mut self, id: u32, netdev: &str) -> Result<bool, UserError> {
        self.start()?;
        let (Some(trunk), Some(running)) = (self.taps.get_mut(netdev), &self.running) else {
            return Ok(false);
        };
        if trunk.id == Some(id) {
            return Ok(false);
        }
        let (from, to) = trunk.tap.queue();
        running.workers.place_anywhere(QueueId { port: id, queue: 0 }, Box::new(from))?;
        running.engine.attach(id, vec![Box::new(to)]);
        trunk.id = Some(id);
        Ok(true)
    }

    fn status(&self, name: &str, rings: &VhostUser) -> PortStatus {
        let (state, notes) = match (self.open.get(name), self.failed.get(name)) {
            (Some(open), _) => state(rings, &open.port.status()),
            (None, Some(error)) => (PortState::Failed { error: error.clone() }, Vec::new()),
            (None, None) => {
                (PortState::Pending { reason: "it is about to be opened".to_owned() }, Vec::new())
            }
        };
        PortStatus { ifindex: None, state, hooks: HooksInUse::Userspace, notes }
    }
}

/// Whether a guest is there, and what is to be known of it.
fn state(rings: &VhostUser, status: &Status) -> (PortState, Vec<String>) {
    let path = &rings.path;
    let mut notes = refusals(status);
    if !status.is_connected {
        let mut reason = match rings.mode {
            VhostMode::Server => format!("waiting for a VMM to connect to {path}"),
            VhostMode::Client => format!("waiting for a VMM to listen on {path}"),
        };
        if let Some(error) = &status.last_error {
            reason.push_str(&format!("; the last attempt ended: {error}"));
        }
        return (PortState::Pending { reason }, notes);
    }
    let mut stopped = Vec::new();
    for (number, queue) in status.queues.iter().enumerate() {
        if let QueueState::Stopped(error) = queue.state {
            stopped.push(format!("queue {number} is stopped until the guest sets it up anew: {error}"));
        }
    }
    if !status.queues.iter().any(|queue| queue.state == QueueState::Running) {
        let reason = match stopped.pop() {
            Some(note) => note,
            None => format!("a VMM is connected to {path}; waiting for its guest's driver"),
        };
        notes.extend(stopped);
        return (PortState::Pending { reason }, notes);
    }
    notes.extend(stopped);
    let running = status.queues.iter().filter(|queue| queue.state == QueueState::Running).count();
    let names = features(Features(status.features)).join(", ");
    notes.push(format!("{running} queues run; the guest negotiated: {names}"));
    (PortState::Attached, notes)
}

/// What the port refused since it was opened, over all its queues. Frames that end here never reach the pipeline, and so are
/// in no port's drops.
fn refusals(status: &Status) -> Vec<String> {
    let mut notes = Vec::new();
    for fault in FrameFault::ALL {
        let count: u64 = status.queues.iter().map(|queue| queue.counters.faults(fault)).sum();
        if count > 0 {
            notes.push(format!("frames refused at the rings: {count}: {fault}"));
        }
    }
    let stops: u64 = status.queues.iter().map(|queue| queue.counters.stops).sum();
    if stops > 0 {
        notes.push(format!("queues stopped for what the guest's driver did: {stops}"));
    }
    if status.refused_requests > 0 {
        notes.push(format!("requests of the VMM refused: {}", status.refused_requests));
    }
    notes
}

/// What of a guest's features matters to people.
fn features(features: Features) -> Vec<&'static str> {
    let known = [
        (bit::CSUM, "checksum"),
        (bit::HOST_TSO4, "TSO4"),
        (bit::HOST_TSO6, "TSO6"),
        (bit::HOST_USO, "USO"),
        (bit::GUEST_CSUM, "receive checksum"),
        (bit::GUEST_TSO4, "receive TSO4"),
        (bit::GUEST_TSO6, "receive TSO6"),
        (bit::MRG_RXBUF, "mergeable buffers"),
        (bit::INDIRECT_DESC, "indirect descriptors"),
        (bit::EVENT_IDX, "event index"),
        (bit::RING_PACKED, "packed rings"),
        (bit::MQ, "multi-queue"),
    ];
    let names: Vec<_> = known.iter().filter(|(bit, _)| features.has(*bit)).map(|(_, name)| *name).collect();
    if names.is_empty() { vec!["no offloads"] } else { names }
}

/// Runs something in a thread that has given up all capabilities, for the threads that it starts to have none.
fn without_capabilities<T: Send>(run: impl FnOnce() -> T + Send) -> Result<T, UserError> {
    let refused = |source| UserError::System { operation: "starting a thread without capabilities", source };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("sluice-user".to_owned()).spawn_scoped(scope, || {
            for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
                caps::set(None, set, &CapsHashSet::new()).map_err(io::Error::other)?;
            }
            Ok(run())
        });
        let ended = || io::Error::other("the thread ended early");
        thread.map_err(refused)?.join().map_err(|_| refused(ended()))?.map_err(refused)
    })
}

/// Nanoseconds of the clock that workers count by; 0 if there is none, which does not happen.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

impl UserPlane for UserEngine {
    fn ensure_taps(&mut self, ports: &[&PortSpec]) -> Vec<String> {
        let mut done = Vec::new();
        let wanted: BTreeSet<&str> = ports.iter().map(|port| port.netdev.as_str()).collect();
        let is_over = |(name, trunk): (&String, &Trunk)| {
            (!wanted.contains(name.as_str()) || trunk.tap.is_gone()).then(|| name.clone())
        };
        let over: Vec<String> = self.taps.iter().filter_map(is_over).collect();
        for name in over {
            if let Some(mut trunk) = self.taps.remove(&name) {
                Self::part(self.running.as_ref(), &mut trunk);
                done.push(format!("removed the tap {name}"));
            }
        }
        self.troubles.retain(|name, _| wanted.contains(name.as_str()));
        for port in ports {
            if self.taps.contains_key(&port.netdev) {
                continue;
            }
            match Tap::open(&port.netdev) {
                Ok(tap) => {
                    self.taps.insert(port.netdev.clone(), Trunk { tap, id: None });
                    self.troubles.remove(&port.netdev);
                    done.push(format!("made the tap {} of {}", port.netdev, port.name));
                }
                Err(error) => drop(self.troubles.insert(port.netdev.clone(), error.to_string())),
            }
        }
        done
    }

    fn trouble(&self, netdev: &str) -> Option<String> {
        self.troubles.get(netdev).cloned()
    }

    fn refused(&self, netdev: &str) -> u64 {
        self.taps.get(netdev).map_or(0, |trunk| trunk.tap.refused())
    }

    fn is_open(&self, port: &str) -> bool {
        self.open.contains_key(port)
    }

    fn sync(&mut self, image: &Image) -> UserReport {
        let mut report = UserReport::default();
        let wanted: BTreeMap<&str, (u32, &VhostUser)> = image
            .ports
            .iter()
            .filter_map(|(id, port)| match &port.behind {
                Behind::VhostUser(rings) => Some((port.name.as_str(), (*id, rings))),
                Behind::Netdev | Behind::UserTap | Behind::Uplink => None,
            })
            .collect();
        let is_over = |(name, open): (&String, &Open)| {
            let kept =
                wanted.get(name.as_str()).is_some_and(|(id, rings)| *id == open.id && **rings == open.rings);
            (!kept).then(|| name.clone())
        };
        let over: Vec<String> = self.open.iter().filter_map(is_over).collect();
        for name in over {
            self.close(&name);
            report.changes.push(format!("closed {name}"));
        }
        let trunks = |netdev: &str, id| {
            image.ports.get(&id).is_some_and(|port| port.behind == Behind::UserTap && port.netdev == netdev)
        };
        report.changes.extend(self.part_others(trunks));
        let has_trunk = |wire: &Wire| image.ports.contains_key(&wire.trunk);
        if let Some(running) = &self.running {
            report.changes.extend(self.wires.close_others(running, has_trunk));
        }
        // Tables first: whoever connects finds its policy.
        if self.image != *image {
            self.image = image.clone();
            if let Some(running) = &self.running {
                running.engine.apply(image.clone());
            }
        }
        self.failed.clear();
        for (name, (id, rings)) in &wanted {
            if self.open.contains_key(*name) {
                continue;
            }
            match self.open(*id, name, rings) {
                Ok(()) => report.changes.push(format!("opened {name} on {}", rings.path)),
                Err(error) => drop(self.failed.insert((*name).to_owned(), error.to_string())),
            }
        }
        let statuses = wanted.iter().map(|(name, (_, rings))| ((*name).to_owned(), self.status(name, rings)));
        report.ports = statuses.collect();
        report
    }

    fn serve_trunks(&mut self, attached: &BTreeMap<&str, u32>) -> Vec<String> {
        let mut done = self.part_others(|netdev, id| attached.get(netdev) == Some(&id));
        for (&netdev, id) in attached {
            match self.serve(*id, netdev) {
                Ok(true) => {
                    self.troubles.remove(netdev);
                    done.push(format!("{netdev} is served by port {id}"));
                }
                Ok(false) => {}
                Err(error) => drop(self.troubles.insert(netdev.to_owned(), error.to_string())),
            }
        }
        done
    }

    fn serve_wires(&mut self, wires: &[Wire], steer: &mut Steer<'_>) -> WireReport {
        let report = match &self.running {
            Some(running) => self.wires.serve(running, wires, steer),
            None => WireReport::default(),
        };
        // The last step of a pass: now it is known how many queues there are.
        self.staff_or_tell();
        report
    }

    fn set_workers(&mut self, plan: &WorkersPlan) -> Result<(), UserError> {
        self.plan_workers(plan)
    }

    fn workers(&self) -> WorkersView {
        self.view_workers()
    }

    fn balance_workers(&mut self) -> Result<Vec<Move>, UserError> {
        self.balance()
    }

    fn age_fdb(&mut self) {
        if let Some(running) = &self.running {
            running.engine.forget_aged((now() / 1_000_000_000) as u32);
        }
    }

    fn fdb(&self) -> Vec<FdbRow> {
        let seconds = (now() / 1_000_000_000) as u32;
        let rows = self.running.iter().flat_map(|running| running.engine.fdb());
        let row = |(key, FdbEntry { port, seen }): (sluice_pipeline::tables::FdbKey, FdbEntry)| FdbRow {
            switch: key.switch,
            vlan: key.vlan,
            mac: MacAddr(key.mac),
            port,
            age_seconds: seconds.saturating_sub(seen),
        };
        rows.map(row).collect()
    }

    fn port_stats(&self, port: u32) -> PortStats {
        self.running.as_ref().map_or_else(PortStats::default, |running| running.engine.port_stats(port))
    }

    fn drops(&self, port: u32) -> Vec<(DropReason, u64)> {
        let Some(running) = &self.running else { return Vec::new() };
        let counted = DropReason::ALL.iter().map(|reason| (*reason, running.engine.drops(port, *reason)));
        counted.filter(|(_, count)| *count > 0).collect()
    }

    fn rule_stats(&self, counter: u32) -> RuleStats {
        self.running.as_ref().map_or_else(RuleStats::default, |running| running.engine.rule_stats(counter))
    }

    /// Over the same image that the workers' tables are made from, and their learnt addresses. Buckets count as full.
    fn trace(&self, ingress: u32, frame: &[u8]) -> LiveTrace {
        let mut image = self.image.clone();
        let trunks: BTreeSet<u32> = self.taps.values().filter_map(|trunk| trunk.id).collect();
        let mut open: BTreeSet<u32> = self.open.values().map(|open| open.id).collect();
        open.extend(self.wires.uplinks());
        for (id, port) in &mut image.ports {
            port.config.flags &= !port_flag::ATTACHED;
            if trunks.contains(id) || open.contains(id) {
                port.config.flags |= port_flag::ATTACHED;
            }
        }
        let mut tables = Simulator::new(image);
        let state = tables.state_mut();
        state.now = now();
        state.fdb = self.running.iter().flat_map(|running| running.engine.fdb()).collect();
        tables.with_view(|view| trace::live(view, ingress, frame))
    }

    fn frames(&self) -> Option<FrameUse> {
        let region = &self.running.as_ref()?.region;
        let RegionLayout { small, large } = region.layout();
        Some(FrameUse { total: u64::from(small) + u64::from(large), in_use: region.outstanding() as u64 })
    }

    fn watch(&mut self, wake: Wake) {
        *self.wake.lock() = Some(wake);
    }
}

#[cfg(test)]
mod tests;
