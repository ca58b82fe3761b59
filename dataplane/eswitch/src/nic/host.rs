//! A PF of this machine.

mod mode;

use std::collections::BTreeSet;
use std::path::Path;

use nix::errno::Errno;
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Capabilities, Mode};

use super::{Change, Identity, Nic, Refresh, firmware};
use crate::contract::{Eswitch, EswitchError, VfIndex};
use crate::legacy::sysfs::{Device, Netdev, SYSFS};
use crate::legacy::{Legacy, errors};
use crate::switchdev::devlink::{Devlink, EswitchMode, Handle};
use crate::switchdev::{Representors, Switchdev};

/// A PF of this machine, in the network namespace in which it was opened.
pub struct HostNic {
    device: Device,
    identity: Identity,
    devlink: Option<Devlink>,
    seen: Seen,
    is_present: bool,
    backend: Backend,
    /// Ours in the PF's unicast filter, while no legacy back-end knows them.
    filter: BTreeSet<MacAddr>,
    /// Writes through back-ends that are closed by now, and our own.
    writes: u64,
}

/// The eSwitch in its mode.
enum Backend {
    Legacy(Box<Legacy>),
    Switchdev(Box<Switchdev>),
}

/// What was found at the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// Tells the device from another in its place.
    node: Option<u64>,
    netdev: Netdev,
    mode: EswitchMode,
    vf_count: u16,
    /// Tells VFs from others in their place.
    vf_node: Option<u64>,
}

impl HostNic {
    /// Opens the PF that has this interface.
    ///
    /// # Errors
    /// [`EswitchError::DeviceGone`] when there is no such interface, or no device behind it; of class broken when netlink
    /// fails.
    pub fn open(netdev: &str) -> Result<HostNic, EswitchError> {
        let device = Device::of(Path::new(SYSFS), netdev).map_err(|error| EswitchError::DeviceGone {
            detail: format!("there is no interface {netdev} with a device behind it: {error}"),
        })?;
        // A kernel without devlink has no eSwitch in another mode.
        let mut devlink = Devlink::open().ok();
        let named = |found: &Netdev| found.name == netdev;
        let found = device.netdevs().into_iter().find(named).ok_or_else(|| EswitchError::DeviceGone {
            detail: format!("{netdev} went while it was opened"),
        })?;
        let seen = look(&device, found, &mut devlink)?;
        let backend = Backend::open(seen.mode.mode(), netdev)?;
        let identity = identity(&device, netdev);
        Ok(HostNic {
            device,
            identity,
            devlink,
            seen,
            is_present: true,
            backend,
            filter: BTreeSet::new(),
            writes: 0,
        })
    }

    /// The device and its interface now, if it is there.
    fn find(&self) -> Option<(Device, Netdev)> {
        let device = match self.device.node() {
            Some(_) => self.device.clone(),
            // It may have been plugged into another slot.
            None => Device::of(Path::new(SYSFS), &self.seen.netdev.name).ok()?,
        };
        let netdevs = device.netdevs();
        let same = netdevs.iter().find(|one| one.ifindex == self.seen.netdev.ifindex);
        let same = same.or_else(|| netdevs.iter().find(|one| one.name == self.seen.netdev.name));
        let same = same.or_else(|| netdevs.iter().find(|one| !device.is_representor(one)));
        let netdev = same?.clone();
        Some((device, netdev))
    }

    /// Takes down a look, and opens the back-end anew if it is for something else.
    fn note(&mut self, device: Device, now: Seen, is_new: bool) -> Result<(), EswitchError> {
        if is_new || now.mode.mode() != self.seen.mode.mode() {
            self.reopen(device, &now)?;
        }
        self.is_present = true;
        self.seen = now;
        Ok(())
    }

    /// Opens the back-end for what was found, and keeps what is known of the old one.
    fn reopen(&mut self, device: Device, now: &Seen) -> Result<(), EswitchError> {
        let backend = Backend::open(now.mode.mode(), &now.netdev.name)?;
        self.writes += self.backend.eswitch().writes();
        self.filter = self.unicast_filter();
        self.backend = backend;
        if let Backend::Legacy(legacy) = &mut self.backend {
            legacy.adopt_unicast_filter(&self.filter);
        }
        self.device = device;
        Ok(())
    }
}

impl Backend {
    fn open(mode: Mode, netdev: &str) -> Result<Backend, EswitchError> {
        Ok(match mode {
            Mode::Legacy => Backend::Legacy(Box::new(Legacy::open(netdev)?)),
            Mode::Switchdev => Backend::Switchdev(Box::new(Switchdev::open(netdev)?)),
        })
    }

    fn eswitch(&mut self) -> &mut dyn Eswitch {
        match self {
            Backend::Legacy(legacy) => legacy.as_mut(),
            Backend::Switchdev(switchdev) => switchdev.as_mut(),
        }
    }
}

fn identity(device: &Device, netdev: &str) -> Identity {
    Identity {
        netdev: netdev.to_owned(),
        bus: device.bus(),
        address: device.name(),
        driver: device.driver().unwrap_or_default(),
        firmware: firmware::version(netdev),
        pci: device.pci_id(),
    }
}

fn look(device: &Device, netdev: Netdev, devlink: &mut Option<Devlink>) -> Result<Seen, EswitchError> {
    Ok(Seen {
        node: device.node(),
        netdev,
        mode: mode(device, devlink)?,
        // A device without SR-IOV has no such file.
        vf_count: device.vf_count().unwrap_or(0),
        vf_node: device.vf_node(),
    })
}

/// The mode; legacy for devices that devlink does not know, or that have no eSwitch there.
fn mode(device: &Device, devlink: &mut Option<Devlink>) -> Result<EswitchMode, EswitchError> {
    let Some(devlink) = devlink else { return Ok(EswitchMode::Legacy) };
    match devlink.mode(&handle(device)) {
        Ok(mode) => Ok(mode),
        Err(refusal) => match Errno::from_raw(refusal.errno()) {
            Errno::ENODEV | Errno::EOPNOTSUPP => Ok(EswitchMode::Legacy),
            _ => Err(errors::of_request("reading the eSwitch's mode", &refusal)),
        },
    }
}

fn handle(device: &Device) -> Handle {
    Handle { bus: device.bus(), device: device.name() }
}

impl Nic for HostNic {
    fn netdev(&self) -> &str {
        &self.seen.netdev.name
    }

    fn is_present(&self) -> bool {
        self.is_present
    }

    fn mode(&self) -> Mode {
        self.seen.mode.mode()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn eswitch(&mut self) -> &mut dyn Eswitch {
        self.backend.eswitch()
    }

    fn refresh(&mut self) -> Result<Refresh, EswitchError> {
        let Some((device, netdev)) = self.find() else {
            let was_present = std::mem::replace(&mut self.is_present, false);
            let changes = if was_present { vec![Change::Gone] } else { Vec::new() };
            return Ok(Refresh { changes });
        };
        let now = look(&device, netdev, &mut self.devlink)?;
        let is_new =
            !self.is_present || now.node != self.seen.node || now.netdev.ifindex != self.seen.netdev.ifindex;
        let mut changes = changes(&self.seen, &now, is_new);
        self.note(device, now, is_new)?;
        if is_new {
            let identity = identity(&self.device, &self.seen.netdev.name);
            if !identity.is_same_kind(&self.identity) {
                changes.push(Change::Identity);
            }
            self.identity = identity;
        }
        Ok(Refresh { changes })
    }

    fn opens_by_binding(&mut self, vf: VfIndex) -> Result<bool, EswitchError> {
        match &mut self.backend {
            Backend::Legacy(legacy) => legacy.opens_by_binding(vf),
            Backend::Switchdev(_) => Ok(false),
        }
    }

    fn vf_limit(&self) -> Option<u16> {
        self.device.vf_limit()
    }

    fn representors(&mut self) -> Result<Option<Representors>, EswitchError> {
        match &mut self.backend {
            Backend::Legacy(_) => Ok(None),
            Backend::Switchdev(switchdev) => switchdev.representors().map(Some),
        }
    }

    fn unicast_filter(&self) -> BTreeSet<MacAddr> {
        match &self.backend {
            Backend::Legacy(legacy) => legacy.unicast_filter().clone(),
            Backend::Switchdev(_) => self.filter.clone(),
        }
    }

    fn use_vf_driver(&mut self, vf: VfIndex, driver: Option<&str>) {
        // In switchdev mode a VF has a link state, and keeps its driver.
        if let Backend::Legacy(legacy) = &mut self.backend {
            legacy.use_vf_driver(vf, driver);
        }
    }

    fn adopt_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) {
        match &mut self.backend {
            Backend::Legacy(legacy) => legacy.adopt_unicast_filter(macs),
            Backend::Switchdev(_) => self.filter.extend(macs),
        }
    }

    fn adopt_capabilities(&mut self, capabilities: &Capabilities) {
        if let Backend::Legacy(legacy) = &mut self.backend {
            legacy.adopt_capabilities(capabilities);
        }
    }

    fn set_vf_count(&mut self, count: u16) -> Result<(), EswitchError> {
        let mode = self.mode();
        self.change_to(mode, count)
    }

    fn set_mode(&mut self, mode: Mode, vfs: u16) -> Result<(), EswitchError> {
        self.change_to(mode, vfs)
    }

    fn writes(&self) -> u64 {
        let open = match &self.backend {
            Backend::Legacy(legacy) => legacy.writes(),
            Backend::Switchdev(switchdev) => switchdev.writes(),
        };
        self.writes + open
    }
}

/// What is otherwise. Of a device that is new, nothing of the old one is told but what differs.
fn changes(before: &Seen, now: &Seen, is_new: bool) -> Vec<Change> {
    let mut changes = Vec::new();
    if is_new {
        changes.push(Change::Back);
    }
    if before.netdev.name != now.netdev.name {
        changes.push(Change::Renamed { from: before.netdev.name.clone(), to: now.netdev.name.clone() });
    }
    if before.mode.mode() != now.mode.mode() {
        changes.push(Change::Mode { to: now.mode.mode() });
    }
    if before.vf_count != now.vf_count {
        changes.push(Change::VfCount { from: before.vf_count, to: now.vf_count });
    } else if before.vf_node != now.vf_node && !is_new {
        changes.push(Change::VfsRemade);
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Seen {
        Seen {
            node: Some(1),
            netdev: Netdev { name: "pf0".into(), ifindex: 4 },
            mode: EswitchMode::Legacy,
            vf_count: 2,
            vf_node: Some(2),
        }
    }

    #[test]
    fn each_change_is_told_once() {
        assert_eq!(changes(&seen(), &seen(), false), []);
        let held = Seen { mode: EswitchMode::Held, ..seen() };
        assert_eq!(changes(&seen(), &held, false), [Change::Mode { to: Mode::Switchdev }]);
        assert_eq!(changes(&held, &Seen { mode: EswitchMode::Switchdev, ..seen() }, false), []);
        let fewer = Seen { vf_count: 0, vf_node: None, ..seen() };
        assert_eq!(changes(&seen(), &fewer, false), [Change::VfCount { from: 2, to: 0 }]);
        let remade = Seen { vf_node: Some(3), ..seen() };
        assert_eq!(changes(&seen(), &remade, false), [Change::VfsRemade]);
        let replugged = Seen { node: Some(7), vf_node: Some(8), ..seen() };
        assert_eq!(changes(&seen(), &replugged, true), [Change::Back]);
        let renamed = Seen { netdev: Netdev { name: "wan".into(), ifindex: 4 }, ..seen() };
        let renaming = Change::Renamed { from: "pf0".into(), to: "wan".into() };
        assert_eq!(changes(&seen(), &renamed, false), [renaming]);
    }

    #[test]
    fn what_is_no_pf_is_not_opened() {
        for name in ["lo", "no-such-interface"] {
            assert!(matches!(HostNic::open(name), Err(EswitchError::DeviceGone { .. })), "{name}");
        }
    }
}
