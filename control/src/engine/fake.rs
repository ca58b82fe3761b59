//! An engine for tests: records images, knows interfaces by name, attaches whatever is there, and fails on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use sluice_kernel::{
    EngineError, FdbRow, FdbSweep, HooksInUse, Observation, PortState, PortStatus, SyncReport, WireView,
    Writes,
};
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats, port_flag};
use sluice_policy::image::{Binding, Image};
use sluice_policy::lower::PortSpec;
use sluice_user::workers::{Move, WorkerId, WorkersError};

use super::{Adoption, DataPlane, UserError, Wake, WorkersPlan, WorkersView};
use crate::trace::LiveTrace;

/// What the fake saw, and what it is to do.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Interfaces by name.
    pub(crate) netdevs: BTreeMap<String, u32>,
    /// The last image.
    pub(crate) image: Image,
    /// How many syncs changed something.
    pub(crate) changes: usize,
    /// How many syncs there were.
    pub(crate) syncs: usize,
    /// Syncs fail.
    pub(crate) broken: bool,
    /// Queues of ports whose frames are brought to a socket.
    pub(crate) steered: Vec<(u32, u32)>,
    /// Ports that XDP serves, by name.
    pub(crate) xdp: BTreeSet<String>,
    /// Tables were found at the start.
    pub(crate) found_tables: bool,
    /// What is wanted of workers.
    pub(crate) plan: WorkersPlan,
    /// What workers do.
    pub(crate) workers: WorkersView,
    /// Workers do not do as they are told.
    pub(crate) is_stubborn: bool,
    /// Moves that the next look at loads leads to.
    pub(crate) moves: Vec<Move>,
}

/// The fake. Clones share one world.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeEngine(Arc<Mutex<World>>);

impl FakeEngine {
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().expect("no test panics while it holds the world")
    }

    pub(crate) fn with_netdevs(names: &[&str]) -> FakeEngine {
        let fake = FakeEngine::default();
        fake.world().netdevs = (10..).zip(names).map(|(index, name)| ((*name).to_owned(), index)).collect();
        fake
    }
}

impl DataPlane for FakeEngine {
    fn adoption(&self) -> Adoption {
        Adoption { found_tables: self.world().found_tables, lines: Vec::new() }
    }

    fn observe(&self, ports: &[PortSpec]) -> Result<Observation, EngineError> {
        let world = self.world();
        let mut observation = Observation::default();
        for port in ports {
            match world.netdevs.get(&port.netdev) {
                Some(ifindex) => {
                    let binding = Binding { ifindex: *ifindex, ..Binding::default() };
                    observation.bindings.insert(port.name.clone(), binding);
                }
                None => {
                    let reason = format!("there is no interface {}", port.netdev);
                    observation.absent.insert(port.name.clone(), reason);
                }
            }
        }
        Ok(observation)
    }

    fn ensure_internal(&mut self, _ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
        Ok(Vec::new())
    }

    fn sync(&mut self, image: &Image) -> Result<SyncReport, EngineError> {
        let mut world = self.world();
        world.syncs += 1;
        if world.broken {
            return Err(EngineError::TableFull { table: "PORTS", max_entries: 1 });
        }
        let mut report = SyncReport::default();
        if world.image != *image {
            world.changes += 1;
            report.writes.tables.insert("PORTS", Writes { updates: 1, deletes: 0 });
        }
        world.image = image.clone();
        for port in image.ports.values() {
            let attached = port.config.flags & port_flag::ATTACHED != 0;
            let state = if attached {
                PortState::Attached
            } else {
                PortState::Pending { reason: format!("there is no interface {}", port.netdev) }
            };
            let ifindex = attached.then_some(port.config.ifindex);
            let is_xdp = world.xdp.contains(&port.name);
            let hooks = if is_xdp { HooksInUse::XdpAndTcx } else { HooksInUse::Tcx };
            let status = PortStatus { ifindex, state, hooks, notes: Vec::new() };
            report.ports.insert(port.name.clone(), status);
        }
        Ok(report)
    }

    fn wire(&self, _ifindex: u32) -> Result<WireView, EngineError> {
        Ok(WireView { queues: 2, mtu: 1500, from_any_cpu: true })
    }

    fn steer(&mut self, port: u32, queue: u32, _socket: BorrowedFd<'_>) -> Result<(), EngineError> {
        self.world().steered.push((port, queue));
        Ok(())
    }

    fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        Ok(Vec::new())
    }

    fn age_fdb(&mut self) -> Result<FdbSweep, EngineError> {
        Ok(FdbSweep::default())
    }

    fn fdb(&self) -> Result<Vec<FdbRow>, EngineError> {
        Ok(Vec::new())
    }

    fn port_stats(&self, _port: u32) -> Result<PortStats, EngineError> {
        Ok(PortStats::default())
    }

    fn drops(&self, _port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
        Ok(Vec::new())
    }

    fn rule_stats(&self, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
        let distinct: BTreeSet<&u32> = counters.iter().collect();
        assert_eq!(distinct.len(), counters.len(), "each rule has a counter of its own");
        Ok(vec![RuleStats::default(); counters.len()])
    }

    fn trace(&self, _ingress: u32, _frame: &[u8]) -> LiveTrace {
        LiveTrace::default()
    }

    fn set_workers(&mut self, plan: &WorkersPlan) -> Result<(), UserError> {
        let mut world = self.world();
        if world.is_stubborn && world.plan != *plan {
            return Err(WorkersError::Died(WorkerId(1)).into());
        }
        world.plan = plan.clone();
        Ok(())
    }

    fn workers(&self) -> WorkersView {
        self.world().workers.clone()
    }

    fn balance_workers(&mut self) -> Result<Vec<Move>, UserError> {
        Ok(std::mem::take(&mut self.world().moves))
    }

    fn watch(&mut self, _wake: Wake) {}
}
