//! A NIC that is a model, or chaos over one: what tests give to whoever expects a [`Nic`].

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Capabilities, Mode, Program};

use super::{Change, Identity, Nic, Refresh};
use crate::contract::{Eswitch, EswitchError, Observed, Vf, VfIndex, VfStats};
use crate::soft::Soft;
use crate::switchdev::Representors;

/// A NIC over any eSwitch. Clones are handles of the same one, so that a test keeps hold of what it gives away; each
/// handle's [`refresh`](Nic::refresh) sees all that it has not seen.
#[derive(Clone, Debug)]
pub struct SoftNic<E = Soft> {
    world: Arc<Mutex<World<E>>>,
    identity: Identity,
    netdev: String,
    mode: Mode,
    /// Changes that this handle has seen.
    seen: usize,
    is_present: bool,
}

#[derive(Debug)]
struct World<E> {
    eswitch: E,
    mode: Mode,
    opens_by_binding: bool,
    vf_limit: Option<u16>,
    representors: Option<Representors>,
    filter: BTreeSet<MacAddr>,
    is_present: bool,
    changes: Vec<Change>,
}

impl<E: Eswitch> SoftNic<E> {
    /// A NIC that is plugged in, in this mode, whose VFs are opened by their link state.
    pub fn new(netdev: &str, eswitch: E, mode: Mode) -> Self {
        SoftNic {
            world: Arc::new(Mutex::new(World {
                eswitch,
                mode,
                opens_by_binding: false,
                vf_limit: None,
                representors: None,
                filter: BTreeSet::new(),
                is_present: true,
                changes: Vec::new(),
            })),
            identity: Identity {
                netdev: netdev.to_owned(),
                bus: "model".to_owned(),
                address: netdev.to_owned(),
                driver: "soft".to_owned(),
                firmware: String::new(),
                pci: None,
            },
            netdev: netdev.to_owned(),
            mode,
            seen: 0,
            is_present: true,
        }
    }

    /// Has it be of another kind.
    #[must_use]
    pub fn with_identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// Has [`opens_by_binding`](Nic::opens_by_binding) say this.
    #[must_use]
    pub fn opening_by_binding(self, opens_by_binding: bool) -> Self {
        self.world().opens_by_binding = opens_by_binding;
        self
    }

    /// Has [`vf_limit`](Nic::vf_limit) say this.
    #[must_use]
    pub fn with_vf_limit(self, limit: u16) -> Self {
        self.world().vf_limit = Some(limit);
        self
    }

    /// Does something to what is inside, while nobody else uses it: whatever `Soft` or `Chaos` can be told.
    pub fn with<T>(&self, act: impl FnOnce(&mut E) -> T) -> T {
        act(&mut self.world().eswitch)
    }

    /// The interfaces that stand for its ports, in switchdev mode.
    pub fn set_representors(&self, representors: Option<Representors>) {
        self.world().representors = representors;
    }

    /// Somebody else flips the mode; `become_it` makes the eSwitch so.
    pub fn flip(&self, mode: Mode, become_it: impl FnOnce(&mut E)) {
        let mut world = self.world();
        become_it(&mut world.eswitch);
        world.mode = mode;
        world.changes.push(Change::Mode { to: mode });
    }

    /// Something happens that [`refresh`](Nic::refresh) has to tell. `Gone` and `Back` unplug and plug the PF.
    pub fn happen(&self, change: Change) {
        let mut world = self.world();
        match change {
            Change::Gone => world.is_present = false,
            Change::Back => world.is_present = true,
            _ => {}
        }
        world.changes.push(change);
    }

    fn world(&self) -> MutexGuard<'_, World<E>> {
        // A test that panicked in `with` has failed anyway.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The eSwitch, unless the PF is unplugged.
    fn plugged<T>(
        &self,
        act: impl FnOnce(&mut World<E>) -> Result<T, EswitchError>,
    ) -> Result<T, EswitchError> {
        let mut world = self.world();
        if !world.is_present {
            return Err(EswitchError::DeviceGone { detail: format!("{} is unplugged", self.netdev) });
        }
        act(&mut world)
    }
}

impl<E: Eswitch + Send> Nic for SoftNic<E> {
    fn netdev(&self) -> &str {
        &self.netdev
    }

    fn is_present(&self) -> bool {
        self.is_present
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn eswitch(&mut self) -> &mut dyn Eswitch {
        self
    }

    fn refresh(&mut self) -> Result<Refresh, EswitchError> {
        let (mode, is_present, changes) = {
            let world = self.world();
            let changes = world.changes.get(self.seen..).unwrap_or_default().to_vec();
            (world.mode, world.is_present, changes)
        };
        self.seen += changes.len();
        (self.mode, self.is_present) = (mode, is_present);
        for change in &changes {
            if let Change::Renamed { to, .. } = change {
                self.netdev.clone_from(to);
            }
        }
        Ok(Refresh { changes })
    }

    fn opens_by_binding(&mut self, vf: VfIndex) -> Result<bool, EswitchError> {
        self.plugged(|world| world.eswitch.read_back(vf).map(|_| world.opens_by_binding))
    }

    fn vf_limit(&self) -> Option<u16> {
        self.world().vf_limit
    }

    /// A model's VFs are made through [`SoftNic::with`]; here only the number that there is is taken.
    fn set_vf_count(&mut self, count: u16) -> Result<(), EswitchError> {
        let found = self.vfs()?.len();
        if found == usize::from(count) {
            return Ok(());
        }
        Err(EswitchError::Busy { detail: format!("{} has {found} VFs, and is a model", self.netdev) })
    }

    /// A model's mode is changed by [`SoftNic::flip`]; here only the one that there is is taken.
    fn set_mode(&mut self, mode: Mode, vfs: u16) -> Result<(), EswitchError> {
        if self.world().mode != mode {
            return Err(EswitchError::WrongMode);
        }
        self.set_vf_count(vfs)
    }

    fn representors(&mut self) -> Result<Option<Representors>, EswitchError> {
        self.plugged(|world| {
            Ok(match world.mode {
                Mode::Legacy => None,
                Mode::Switchdev => world.representors.clone(),
            })
        })
    }

    fn unicast_filter(&self) -> BTreeSet<MacAddr> {
        self.world().filter.clone()
    }

    fn use_vf_driver(&mut self, _vf: VfIndex, _driver: Option<&str>) {}

    fn adopt_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) {
        self.world().filter.extend(macs);
    }

    fn writes(&self) -> u64 {
        Eswitch::writes(self)
    }
}

impl<E: Eswitch> Eswitch for SoftNic<E> {
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError> {
        self.plugged(|world| world.eswitch.capabilities())
    }

    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError> {
        self.plugged(|world| world.eswitch.vfs())
    }

    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
        self.plugged(|world| world.eswitch.program(vf, program))
    }

    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError> {
        self.plugged(|world| world.eswitch.read_back(vf))
    }

    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError> {
        self.plugged(|world| world.eswitch.stats(vf))
    }

    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        gone_is_fine(self.plugged(|world| world.eswitch.unprogram(vf)))
    }

    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.plugged(|world| world.eswitch.enable(vf))
    }

    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        gone_is_fine(self.plugged(|world| world.eswitch.disable(vf)))
    }

    fn sync_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError> {
        self.plugged(|world| {
            world.eswitch.sync_unicast_filter(macs)?;
            world.filter.clone_from(macs);
            Ok(())
        })
    }

    fn writes(&self) -> u64 {
        self.world().eswitch.writes()
    }
}

/// As the contract has it: what is gone is closed and unprogrammed.
fn gone_is_fine(result: Result<(), EswitchError>) -> Result<(), EswitchError> {
    match result {
        Err(EswitchError::DeviceGone { .. }) => Ok(()),
        result => result,
    }
}
