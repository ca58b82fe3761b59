//! The eSwitch's mode, whether it takes rules, and what kernel and modules add to that.

use sluice_eswitch::survey::{Device, EswitchMode, Module, Reading, Release};
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use super::{Code, Scope, Vfio, finding, unknown};

/// First kernel whose eSwitches can be programmed while they hold all traffic.
const HOLDS_TRAFFIC: Release = Release { major: 6, minor: 19 };

pub(super) fn all(scope: &Scope<'_>, device: &Device) -> Vec<Finding> {
    let mut found = vec![mode(device)];
    found.extend(tc_offload(scope, device));
    found.push(kernel(scope));
    found.extend(modules(scope, device));
    found
}

fn mode(device: &Device) -> Finding {
    const TITLE: &str = "eSwitch";
    let name = format!("{}/{}", device.bus, device.name);
    match &device.eswitch {
        Reading::Known(EswitchMode::Legacy) => finding(
            Code::EswitchLegacy,
            Level::Ok,
            TITLE,
            "legacy: addresses, one VLAN and rates per VF; policies with more stay in software",
            format!(
                "if ACLs, trunks or guards are to be in the NIC: devlink dev eswitch set {name} mode switchdev"
            ),
        ),
        Reading::Known(EswitchMode::Switchdev) => {
            finding(Code::EswitchSwitchdev, Level::Ok, TITLE, "switchdev: rules per VF", "")
        }
        Reading::Known(EswitchMode::SwitchdevInactive) => finding(
            Code::EswitchInactive,
            Level::Warning,
            TITLE,
            "switchdev_inactive: it takes rules, and lets nothing pass",
            format!("devlink dev eswitch set {name} mode switchdev"),
        ),
        Reading::Known(EswitchMode::Other(number)) => finding(
            Code::EswitchUnknown,
            Level::Warning,
            TITLE,
            format!("it is in mode {number}, which this version does not know"),
            format!("devlink dev eswitch set {name} mode legacy (or switchdev)"),
        ),
        Reading::Absent => finding(
            Code::EswitchAbsent,
            Level::Ok,
            TITLE,
            "the driver has no modes to choose from (no devlink eSwitch): addresses, one VLAN and rates per VF; policies \
             with more stay in software",
            "",
        ),
        Reading::Unknown(why) => unknown(Code::EswitchUnknown, TITLE, why),
    }
}

fn in_switchdev(device: &Device) -> bool {
    matches!(device.eswitch, Reading::Known(EswitchMode::Switchdev | EswitchMode::SwitchdevInactive))
}

/// Whether the PF takes rules, which matters in switchdev mode only.
fn tc_offload(scope: &Scope<'_>, device: &Device) -> Option<Finding> {
    const TITLE: &str = "hw-tc-offload";
    let netdev = &scope.survey.netdev;
    let needed = in_switchdev(device);
    let found = match &device.tc_offload {
        Reading::Known(offload) if offload.on => finding(Code::TcOffload, Level::Ok, TITLE, "on", ""),
        _ if !needed => return None,
        Reading::Known(offload) if offload.changeable => finding(
            Code::TcOffloadOff,
            Level::Warning,
            TITLE,
            "off: no rule gets into the NIC, and all VFs stay uncovered",
            format!("ethtool -K {netdev} hw-tc-offload on"),
        ),
        Reading::Known(_) | Reading::Absent => finding(
            Code::TcOffloadAbsent,
            Level::Warning,
            TITLE,
            "the driver takes no rules on this interface",
            "see whether the PF's driver is the NIC maker's for switchdev mode, and its firmware recent",
        ),
        Reading::Unknown(why) => unknown(Code::TcOffloadUnknown, TITLE, why),
    };
    Some(found)
}

fn kernel(scope: &Scope<'_>) -> Finding {
    const TITLE: &str = "kernel";
    match &scope.survey.host.kernel {
        Reading::Known(release) => {
            let Release { major, minor } = release;
            let detail = if *release >= HOLDS_TRAFFIC {
                format!(
                    "{major}.{minor}: eSwitches can be programmed while they hold all traffic, if drivers can"
                )
            } else {
                format!(
                    "{major}.{minor}: a change of mode lets traffic pass before rules are in place (from 6.19 on it need \
                     not); Sluice keeps VFs closed meanwhile"
                )
            };
            finding(Code::Kernel, Level::Ok, TITLE, detail, "")
        }
        Reading::Absent => {
            finding(Code::Kernel, Level::Note, TITLE, "its version is not to be found in /proc", "")
        }
        Reading::Unknown(why) => unknown(Code::Kernel, TITLE, why),
    }
}

/// The modules without which VFs cannot be given away or rules not be written.
fn modules(scope: &Scope<'_>, device: &Device) -> Vec<Finding> {
    let host = &scope.survey.host;
    let vfio_level = scope.demand.lacks_vfio();
    let flower_level = if in_switchdev(device) { Level::Problem } else { Level::Note };
    let mut found = Vec::new();
    if device.is_pci() {
        found.push(module(
            "vfio-pci",
            host.vfio_pci,
            vfio_level,
            scope.demand.vfio > Vfio::None,
            "gives VFs to VMs",
        ));
    }
    if !device.eswitch.is_absent() {
        found.push(module("cls_flower", host.cls_flower, flower_level, in_switchdev(device), "takes rules"));
    }
    found
}

fn module(name: &str, module: Module, missing: Level, needed: bool, use_: &str) -> Finding {
    let title = format!("module {name}");
    match module {
        Module::Loaded => finding(Code::Modules, Level::Ok, title, "loaded", ""),
        Module::BuiltIn => finding(Code::Modules, Level::Ok, title, "part of the kernel", ""),
        Module::Available => finding(
            Code::Modules,
            Level::Ok,
            title,
            "not loaded, and on disk",
            if needed { format!("modprobe {name}") } else { String::new() },
        ),
        Module::Missing => finding(
            Code::ModulesMissing,
            missing,
            title,
            format!("neither loaded nor on disk; it {use_}"),
            "install the kernel's package of modules, or use a kernel that has it",
        ),
        Module::Unknown => finding(
            Code::Modules,
            if needed { Level::Note } else { Level::Ok },
            title,
            format!("not loaded; no list in /lib/modules says whether it is part of this kernel; it {use_}"),
            if needed { format!("modprobe {name}") } else { String::new() },
        ),
    }
}
