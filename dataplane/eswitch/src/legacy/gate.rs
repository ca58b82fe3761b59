//! Opening and closing VFs: by their link state, or where the driver has none, by binding a driver.

use sluice_policy::placement::Feature;

use super::codec::{LinkState, Setting, VfReport};
use super::{Legacy, errors};
use crate::contract::{EswitchError, VfIndex};

/// How often a VF is bound again that came up without the address that it was given: the PF's answer gets lost while the
/// PF is being reset.
const BINDS: usize = 5;

/// How VFs of a PF are closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Their links are forced down.
    LinkState,
    /// They have no driver.
    Driver,
}

impl Legacy {
    /// How VFs are closed here. It is found out once, by setting the link state that a VF has already.
    pub(super) fn gate(&mut self, vf: VfIndex, report: &VfReport) -> Result<Gate, EswitchError> {
        if let Some(gate) = self.gate {
            return Ok(gate);
        }
        let gate = if report.link == LinkState::Disable {
            Gate::LinkState
        } else {
            match self.write(vf, &Setting::Link(report.link)) {
                Ok(()) => Gate::LinkState,
                Err(EswitchError::Uncovered { .. }) if self.device.is_pci() => Gate::Driver,
                Err(error) => return Err(error),
            }
        };
        self.gate = Some(gate);
        Ok(gate)
    }

    /// Whether something may use the VF.
    pub(super) fn is_open(&mut self, vf: VfIndex, report: &VfReport) -> Result<bool, EswitchError> {
        Ok(match self.gate(vf, report)? {
            Gate::LinkState => report.link != LinkState::Disable,
            Gate::Driver => self.device.vf(vf).driver.is_some(),
        })
    }

    /// Closes a VF, and makes sure.
    pub(super) fn close(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        let (_, report) = self.report_of(vf)?;
        if !self.is_open(vf, &report)? {
            return Ok(());
        }
        if self.gate(vf, &report)? == Gate::LinkState {
            let refused = match self.write(vf, &Setting::Link(LinkState::Disable)) {
                Ok(()) => {
                    let (_, report) = self.report_of(vf)?;
                    if report.link == LinkState::Disable {
                        return Ok(());
                    }
                    let detail =
                        format!("{vf} state: it was set to disable, and reads back {:?}", report.link);
                    EswitchError::Uncovered { feature: Feature::PortState, detail }
                }
                Err(error @ EswitchError::Uncovered { .. }) => error,
                Err(error) => return Err(error),
            };
            if !self.device.is_pci() {
                return Err(refused);
            }
            // It took the state that the VF had, and this one it does not take.
            self.gate = Some(Gate::Driver);
        }
        self.take_driver(vf)
    }

    fn take_driver(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        let Some(driver) = self.device.vf(vf).driver else { return Ok(()) };
        // The kernel would wait for the VM to let go.
        if driver.starts_with("vfio")
            && let Err(error) = self.device.try_vfio_group(vf)
        {
            let detail = format!(
                "a VM holds {vf} through {driver} ({error}), and {} has no other way to close it; detach it first",
                self.netdev.name
            );
            return Err(EswitchError::Busy { detail });
        }
        self.writes += 1;
        let unbound = self.device.unbind(vf);
        match (unbound, self.device.vf(vf).driver) {
            (_, None) => {
                self.taken_drivers.insert(vf, driver);
                Ok(())
            }
            (Err(error), Some(_)) => {
                Err(errors::of_sysfs(&format!("taking driver {driver} from {vf}"), &error))
            }
            (Ok(()), Some(found)) => {
                let detail = format!("somebody bound {found} to {vf} at the same moment");
                Err(EswitchError::Busy { detail })
            }
        }
    }

    /// Opens a VF, and makes sure.
    pub(super) fn open_gate(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        let (pf, report) = self.report_of(vf)?;
        if self.gate(vf, &report)? == Gate::LinkState {
            if report.link != LinkState::Disable {
                return Ok(());
            }
            self.write(vf, &Setting::Link(LinkState::Auto))?;
            let (_, report) = self.report_of(vf)?;
            return match report.link {
                LinkState::Disable => Err(EswitchError::Broken {
                    operation: format!("opening {vf}"),
                    detail: "its link state was set to auto, and reads back disable".into(),
                }),
                _ => Ok(()),
            };
        }
        if self.device.vf(vf).driver.is_some() && self.has_its_address(vf, &report) {
            return Ok(());
        }
        if !pf.up {
            let detail = format!("{} is down, and its VFs get no address then; set it up", self.netdev.name);
            return Err(EswitchError::Busy { detail });
        }
        for _ in 0..BINDS {
            self.take_driver(vf)?;
            self.give_driver(vf)?;
            if self.has_its_address(vf, &report) {
                return Ok(());
            }
        }
        self.take_driver(vf)?;
        let detail = format!("{vf} came up {BINDS} times without its address {}", report.mac);
        Err(EswitchError::Busy { detail })
    }

    /// Whether the VF's interface has the address that was programmed, as far as there is one of either.
    fn has_its_address(&self, vf: VfIndex, report: &VfReport) -> bool {
        let address = self.device.vf_address(vf);
        report.mac.is_zero() || address.is_none_or(|address| address == report.mac.to_string())
    }

    fn give_driver(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        let taken = self.taken_drivers.get(&vf).cloned();
        let known = match self.vf_drivers.get(&vf) {
            Some(Some(wanted)) => Some(wanted.clone()),
            // What passed it to a VM once does not give it an interface.
            Some(None) => taken.filter(|driver| !driver.starts_with("vfio")),
            None => self.vf_driver.clone().or(taken),
        };
        let usual = self.quirk.map(|quirk| quirk.vf_driver().to_owned());
        // A device whose driver is not named is bound only where drivers are probed by themselves.
        let named = known.or(if self.device.autoprobe() { None } else { usual });
        self.writes += 1;
        let what = format!("binding {} to {vf}", named.as_deref().unwrap_or("a driver"));
        let bound = self.device.bind(vf, named.as_deref());
        match (self.device.vf(vf).driver, bound) {
            (Some(_), _) => Ok(()),
            (None, Err(error)) => Err(errors::of_sysfs(&what, &error)),
            (None, Ok(())) => Err(EswitchError::Broken {
                operation: what,
                detail: "no driver took it; load its module, or name it to sluiced".into(),
            }),
        }
    }
}
