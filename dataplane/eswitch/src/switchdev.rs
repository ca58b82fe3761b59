//! An eSwitch in switchdev mode: each VF has a representor, and tc flower rules on representors are the eSwitch.
//!
//! The kernel engine serves the representors as ports (attach it before a VF is enabled): what no rule decides comes
//! out of them in software. So nothing is lost while rules are written, and a program that traps is complete.
//!
//! Rules carry a cookie on their actions ([`contract`](crate::contract) calls them ours by it): the VF and the hash of
//! their program. A restarted process finds them by it and writes nothing if they are what it wants. All are
//! `skip_sw`, so the driver either takes a rule or refuses it and says why; and all are `verbose`, without which a
//! refusal is silent. A VF is open while its representor is up, as VFs take their carrier from there.
//!
//! devlink tells the mode and the ports; traffic control holds the rules; a clsact qdisc, once made, stays.

mod actions;
mod cookie;
pub(crate) mod devlink;
mod filter;
mod keys;
mod layout;
mod probe;
mod refusal;
mod representors;
mod rules;

use std::collections::BTreeSet;

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Capabilities, Evidence, FlowerSupport, Mode, Program, RulePort};

use crate::contract::{Eswitch, EswitchError, Observed, Vf, VfIndex, VfStats};
use crate::netlink::{Connection, Refusal};
use devlink::{Devlink, EswitchMode};
use representors::Device;

pub use representors::{Representor, Representors};
pub use rules::{Counters, Found, Rules};

/// `RTM_NEWLINK` of linux/rtnetlink.h, and `IFF_UP`.
const RTM_NEWLINK: u16 = 16;
const IFF_UP: u32 = 1;

/// The eSwitch of one NIC, in switchdev mode.
pub struct Switchdev {
    device: Device,
    devlink: Devlink,
    route: Connection,
    rules: Rules,
    support: Option<FlowerSupport>,
    writes: u64,
}

impl Switchdev {
    /// The eSwitch that an interface is the uplink of: a PF. It is found again by its device, whatever it is called.
    ///
    /// # Errors
    /// [`EswitchError::DeviceGone`] if there is no such interface or it has no device; of class broken without devlink.
    pub fn open(pf: &str) -> Result<Switchdev, EswitchError> {
        let device = Device::of(pf).ok_or_else(|| EswitchError::DeviceGone {
            detail: format!("{pf} is no interface of a device"),
        })?;
        let devlink = Devlink::open().map_err(|refused| refusal::general("opening devlink", &refused))?;
        let route = Connection::open(netlink_sys::protocols::NETLINK_ROUTE)
            .map_err(|error| refusal::general("opening a netlink socket", &error.into()))?;
        Ok(Switchdev { device, devlink, route, rules: Rules::in_hardware()?, support: None, writes: 0 })
    }

    /// The eSwitch's mode.
    ///
    /// # Errors
    /// [`EswitchError::Uncovered`] if the device has no eSwitch; of class gone or broken.
    pub fn mode(&mut self) -> Result<Mode, EswitchError> {
        self.devlink_mode().map(EswitchMode::mode)
    }

    fn devlink_mode(&mut self) -> Result<EswitchMode, EswitchError> {
        let device = &self.device;
        self.devlink.mode(&device.handle).map_err(|refused| {
            gone(device, &refused).unwrap_or_else(|| refusal::general("reading the eSwitch's mode", &refused))
        })
    }

    /// Puts the eSwitch into a mode; nothing is written if it is. Some drivers want no VFs to exist meanwhile, and all
    /// lose what was programmed.
    ///
    /// # Errors
    /// Of any class; [`EswitchError::Uncovered`] if the device has no such mode.
    pub fn set_mode(&mut self, mode: Mode) -> Result<(), EswitchError> {
        if self.devlink_mode()? == mode.into() {
            return Ok(());
        }
        self.writes += 1;
        self.support = None;
        self.devlink
            .set_mode(&self.device.handle, mode.into())
            .map_err(|refused| refusal::general("setting the eSwitch's mode", &refused))
    }

    /// The interfaces that stand for its ports; the kernel engine's ports.
    ///
    /// # Errors
    /// [`EswitchError::WrongMode`] in legacy mode; of class gone or broken.
    pub fn representors(&mut self) -> Result<Representors, EswitchError> {
        if self.mode()? != Mode::Switchdev {
            return Err(EswitchError::WrongMode);
        }
        let ports = self
            .devlink
            .ports(&self.device.handle)
            .map_err(|refused| refusal::general("listing the eSwitch's ports", &refused))?;
        representors::find(&ports).ok_or_else(|| EswitchError::DeviceGone {
            detail: "the uplink's representor is not in this network namespace".to_owned(),
        })
    }

    /// All representors, that of `vf` among them.
    fn representors_with(&mut self, vf: VfIndex) -> Result<Representors, EswitchError> {
        match self.representors() {
            Ok(ports) if ports.vfs.contains_key(&vf) => Ok(ports),
            // Some drivers leave the mode with the last VF.
            Err(EswitchError::WrongMode) if self.device.has_vf(vf) => Err(EswitchError::WrongMode),
            Ok(_) | Err(EswitchError::WrongMode) => Err(EswitchError::NoSuchVf(vf)),
            Err(error) => Err(error),
        }
    }

    fn representor(&mut self, vf: VfIndex) -> Result<Representor, EswitchError> {
        self.representors_with(vf)?.vfs.remove(&vf).ok_or(EswitchError::NoSuchVf(vf))
    }

    fn set_up(&mut self, vf: VfIndex, up: bool) -> Result<(), EswitchError> {
        let representor = self.representor(vf)?;
        if representor.is_up() == Some(up) {
            return Ok(());
        }
        self.writes += 1;
        let flags = if up { IFF_UP } else { 0 };
        // struct ifinfomsg: family, type, index, flags, mask of flags.
        let message: Vec<u8> =
            [0, representor.ifindex, flags, IFF_UP].into_iter().flat_map(u32::to_ne_bytes).collect();
        let what = format!("setting {} {}", representor.netdev, if up { "up" } else { "down" });
        match self.route.request(RTM_NEWLINK, &message, 0) {
            Ok(_) => Ok(()),
            Err(refused) => Err(refusal::general(&what, &refused)),
        }
    }
}

/// An error that only says that the device is not there any more.
fn gone(device: &Device, refused: &Refusal) -> Option<EswitchError> {
    (!device.exists()).then(|| EswitchError::DeviceGone {
        detail: format!("{}/{}: {refused}", device.handle.bus, device.handle.device),
    })
}

/// Of a VF or a device that is gone nothing is open or programmed. In another mode it may well be.
fn gone_is_fine(result: Result<(), EswitchError>) -> Result<(), EswitchError> {
    match result {
        Err(EswitchError::NoSuchVf(_) | EswitchError::DeviceGone { .. }) => Ok(()),
        Err(EswitchError::WrongMode) => Err(EswitchError::Broken {
            operation: "closing a VF by its representor".to_owned(),
            detail: "somebody has put the eSwitch into legacy mode, which has none".to_owned(),
        }),
        result => result,
    }
}

impl Eswitch for Switchdev {
    /// The first time it writes rules that no frame reaches, to see which the driver takes, and removes them; they are
    /// not counted as writes. It needs a VF for that: without one, nothing is known to be offloaded.
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError> {
        let mode = self.mode()?;
        let mut capabilities =
            Capabilities { mode, max_vfs: self.device.max_vfs(), ..Capabilities::default() };
        if mode == Mode::Legacy {
            return Ok(capabilities);
        }
        let ports = self.representors()?;
        if let Some(vf) = ports.vfs.keys().next().copied() {
            let support = match self.support.take() {
                Some(support) => support,
                None => probe::flower(&mut self.rules, &ports, vf)?,
            };
            capabilities.link_state = Evidence::ReadBack;
            capabilities.flower = self.support.insert(support).clone();
        }
        Ok(capabilities)
    }

    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError> {
        let ports = self.representors()?;
        Ok(ports
            .vfs
            .into_keys()
            .map(|index| {
                let (pci, netdev, driver) = self.device.vf(index);
                Vf { index, pci, netdev, driver }
            })
            .collect())
    }

    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
        let Program::Switchdev(program) = program else {
            return Err(EswitchError::WrongMode);
        };
        let ports = self.representors_with(vf)?;
        self.rules.program(&ports, vf, program)
    }

    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError> {
        let ports = self.representors_with(vf)?;
        let representor = ports.vfs.get(&vf).ok_or(EswitchError::NoSuchVf(vf))?;
        let enabled = representor.is_up().ok_or(EswitchError::NoSuchVf(vf))?;
        let Found { enforced, foreign } = self.rules.read_back(&ports, vf)?;
        Ok(Observed { enabled, enforced, foreign })
    }

    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError> {
        // A representor receives what the VF sends.
        let ports = self.representors_with(vf)?;
        let representor = ports.vfs.get(&vf).ok_or(EswitchError::NoSuchVf(vf))?;
        let from_vm = self.rules.counters(&ports, vf, RulePort::Own)?;
        Ok(VfStats {
            from_vm_frames: representor.counter("rx_packets"),
            from_vm_bytes: representor.counter("rx_bytes"),
            to_vm_frames: representor.counter("tx_packets"),
            to_vm_bytes: representor.counter("tx_bytes"),
            from_vm_dropped: Some(from_vm.dropped),
            // Rules to a VM only send; what they do not take, software decides.
            to_vm_dropped: None,
        })
    }

    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.disable(vf)?;
        // A VF that is gone may still have rules on the uplink.
        let removed = match self.representors() {
            Err(EswitchError::WrongMode) => self.representors_with(vf),
            result => result,
        };
        let removed = removed.and_then(|ports| self.rules.remove(&ports, vf));
        gone_is_fine(removed)
    }

    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.set_up(vf, true)
    }

    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        gone_is_fine(self.set_up(vf, false))
    }

    /// There is no filter to keep: what no rule takes comes to the uplink's representor, whatever its address.
    fn sync_unicast_filter(&mut self, _macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError> {
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes + self.rules.writes()
    }
}

#[cfg(test)]
mod tests;
