//! Why there are VFs on an uplink's NIC, or why not: a survey of the host as findings with remedies.
//!
//! Only vNICs that ask for a VF make anything here worse than a note: people without VFs are left in peace. Reading is
//! done by [`Survey::of`]; the rest is a function of what it found, so that every machine can be tested on any.

mod code;
mod eswitch;
mod iommu;
mod nic;
#[cfg(test)]
mod tests;
mod vfs;

use std::collections::BTreeMap;

use caps::{CapSet, Capability};
use sluice_eswitch::survey::{Device, Nic, Reading, Role, Survey, Why};
use sluice_proto::v1;
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;
use sluice_proto::v1::vf_attachment::Kind as Plug;

use super::group;
use crate::core::View;

pub use code::Code;

/// What the vNICs of a switch ask of its uplink's NIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// How many ask for a VF.
    pub vnics: usize,
    /// How their VFs reach VMs, as far as that takes an IOMMU.
    pub vfio: Vfio,
}

/// Whether VFs are to be given to VMs through VFIO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vfio {
    /// None is: they move into network namespaces.
    #[default]
    None,
    /// An orchestrator gives them, as it likes.
    Maybe,
    /// QEMU gets them.
    Certain,
}

/// What this process may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Change VFs and eSwitches: CAP_NET_ADMIN.
    pub change: bool,
    /// Read all of a PCI configuration space: CAP_SYS_ADMIN.
    pub read_pci: bool,
}

/// All that findings are made of.
struct Scope<'a> {
    survey: &'a Survey,
    demand: Demand,
    rights: Rights,
}

/// One group for each switch with an uplink.
pub fn uplinks<'a>(view: &'a View) -> Vec<Finding> {
    let mut demands: BTreeMap<&str, Demand> = BTreeMap::new();
    let specs = || view.resources.values().filter_map(|resource| resource.spec.as_ref());
    for spec in specs() {
        if let v1::resource::Spec::Vnic(vnic) = spec
            && let Some(sriov) = &vnic.sriov
        {
            demands.entry(&vnic.switch).or_default().add(sriov);
        }
    }
    let uplink = |spec: &'a v1::resource::Spec| match spec {
        v1::resource::Spec::Switch(switch) => Some((switch, switch.uplink.as_ref()?)),
        _ => None,
    };
    let examine = |(switch, uplink): (&v1::Switch, &v1::Uplink)| {
        let demand = demands.get(switch.name.as_str()).copied().unwrap_or_default();
        findings(&Survey::of(&uplink.netdev), &switch.name, demand, Rights::own())
    };
    specs().filter_map(uplink).map(examine).collect()
}

impl Demand {
    fn add(&mut self, sriov: &v1::Sriov) {
        // A weight of 0 means never.
        if sriov.weight == Some(0) {
            return;
        }
        self.vnics += 1;
        let vfio = match sriov.attach.as_ref().and_then(|attach| attach.kind.as_ref()) {
            None | Some(Plug::Netns(_)) => Vfio::None,
            Some(Plug::External(_)) => Vfio::Maybe,
            Some(Plug::Qmp(_)) => Vfio::Certain,
        };
        self.vfio = self.vfio.max(vfio);
    }

    /// How bad it is when VFs cannot be given to VMs.
    const fn lacks_vfio(self) -> Level {
        match self.vfio {
            Vfio::None => Level::Note,
            Vfio::Maybe => Level::Warning,
            Vfio::Certain => Level::Problem,
        }
    }
}

impl Rights {
    fn own() -> Rights {
        let holds = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        Rights { change: holds(Capability::CAP_NET_ADMIN), read_pci: holds(Capability::CAP_SYS_ADMIN) }
    }
}

/// What a survey means for a switch.
pub fn findings(survey: &Survey, switch: &str, demand: Demand, rights: Rights) -> Finding {
    let scope = Scope { survey, demand, rights };
    let mut children = scope.examine();
    if demand.vnics == 0 {
        children.iter_mut().for_each(soften);
    }
    let asking = match demand.vnics {
        0 => "no vNIC asks for a VF".to_owned(),
        1 => "1 vNIC asks for a VF".to_owned(),
        many => format!("{many} vNICs ask for VFs"),
    };
    let mut all =
        group(&format!("uplink {} (SR-IOV)", survey.netdev), format!("switch {switch}: {asking}"), children);
    all.code = Code::Uplink.as_str().to_owned();
    all
}

impl Scope<'_> {
    fn examine(&self) -> Vec<Finding> {
        let Nic::Device { is_up, device } = &self.survey.nic else { return vec![nic::no_device(self)] };
        if device.role != Role::Pf {
            return vec![nic::no_pf(device)];
        }
        let mut found = vec![nic::driver(device)];
        found.extend(nic::link(self, *is_up));
        found.extend(vfs::all(self, device));
        if device.is_pci() {
            found.push(iommu::unit(self));
            found.extend(iommu::isolation(self, device));
            found.push(iommu::interrupts(self));
        }
        found.extend(eswitch::all(self, device));
        found.push(self.process());
        if device.changed {
            found.push(finding(
                Code::Changed,
                Level::Note,
                "moment",
                "the device changed while it was examined",
                "ask again",
            ));
        }
        found
    }

    fn process(&self) -> Finding {
        if !self.rights.change {
            return finding(
                Code::ProcessDenied,
                Level::Problem,
                "process",
                "sluiced lacks CAP_NET_ADMIN and cannot program VFs",
                "run it as root, or grant it (AmbientCapabilities=CAP_NET_ADMIN in its systemd unit)",
            );
        }
        let detail = if self.rights.read_pci {
            "it may program VFs, and read PCI configuration"
        } else {
            "it may program VFs; it may not read PCI configuration (CAP_SYS_ADMIN), so some of this is unknown"
        };
        finding(Code::Process, Level::Ok, "process", detail, "")
    }

    /// Where operators find the device of the interface.
    fn folder(&self, device: &Device) -> String {
        if device.is_pci() {
            format!("/sys/class/net/{}/device", self.survey.netdev)
        } else {
            format!("/sys/bus/{}/devices/{}", device.bus, device.name)
        }
    }
}

/// A finding with a code.
fn finding(
    code: Code,
    level: Level,
    title: impl Into<String>,
    detail: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding { code: code.as_str().to_owned(), ..super::finding(level, title, detail, remedy) }
}

/// Something that cannot be told is worth knowing, and no more.
fn unknown(code: Code, title: &str, why: &Why) -> Finding {
    finding(code, Level::Note, title, format!("unknown: {why}"), "")
}

/// Makes it a note at worst.
fn soften(finding: &mut Finding) {
    if finding.level() > Level::Note {
        finding.set_level(Level::Note);
    }
    finding.children.iter_mut().for_each(soften);
}

/// What is known, in words, or why not.
fn or_unknown(reading: &Reading<String>, absent: &str) -> String {
    match reading {
        Reading::Known(text) => text.clone(),
        Reading::Absent => absent.to_owned(),
        Reading::Unknown(why) => format!("unknown ({why})"),
    }
}
