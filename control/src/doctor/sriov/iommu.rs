//! What VFs need to be given to VMs: an IOMMU, groups of their own, and interrupts that cannot be forged.

use sluice_eswitch::survey::{Acs, Cpu, Device, Group, Host, Port, Reading};
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use super::vfs::ranges;
use super::{Code, Scope, Vfio, finding, unknown};

/// What goes without.
const WITHOUT: &str = "VFs can move into network namespaces, but not into VMs";
/// So many group mates are named.
const NAMED: usize = 6;

/// The IOMMU itself.
pub(super) fn unit(scope: &Scope<'_>) -> Finding {
    let host = &scope.survey.host;
    let iommu = &host.iommu;
    let units = iommu.units.known().map(Vec::as_slice).unwrap_or_default();
    let parameters = iommu.parameters.known().map(|words| words.join(" ")).unwrap_or_default();
    if let Some(groups) = iommu.groups.known().filter(|groups| **groups > 0) {
        let named = if units.is_empty() { "on".to_owned() } else { units.join(", ") };
        let booted =
            if parameters.is_empty() { String::new() } else { format!(", booted with {parameters}") };
        let detail = format!("{named}, {groups} groups{booted}");
        return finding(Code::Iommu, Level::Ok, "IOMMU", detail, "");
    }
    if let Reading::Unknown(why) = &iommu.groups {
        return unknown(Code::Iommu, "IOMMU", why);
    }
    let level = scope.demand.lacks_vfio();
    let off: Vec<&str> = iommu.parameters.known().map_or(Vec::new(), |words| {
        words.iter().map(String::as_str).filter(|word| word.ends_with("=off")).collect()
    });
    match iommu.tables.known().map(Vec::as_slice) {
        Some([]) | None => finding(
            Code::IommuAbsent,
            level,
            "IOMMU",
            format!("the firmware offers none; {WITHOUT}"),
            format!(
                "enable {} in the machine's firmware (BIOS){}, and boot with {}; in a VM, give it a virtual IOMMU",
                technology(host),
                if iommu.tables.known().is_none() { ", if it has one" } else { "" },
                boot(host)
            ),
        ),
        Some(tables) => finding(
            Code::IommuOff,
            level,
            "IOMMU",
            format!(
                "the firmware offers one (ACPI {}), and the kernel does not use it; {WITHOUT}",
                tables.join(", ")
            ),
            if off.is_empty() {
                format!("boot with {}", boot(host))
            } else {
                format!("take {} from the kernel's command line, and boot with {}", off.join(" "), boot(host))
            },
        ),
    }
}

/// Whose IOMMU it is: as the firmware's tables say, which emulators mix with any CPU, else as the CPU's usually is.
fn maker(host: &Host) -> Option<&Cpu> {
    let has =
        |table: &str| host.iommu.tables.known().is_some_and(|tables| tables.iter().any(|name| name == table));
    match (has("DMAR"), has("IVRS")) {
        (true, _) => Some(&Cpu::Intel),
        (_, true) => Some(&Cpu::Amd),
        _ => host.cpu.known(),
    }
}

fn technology(host: &Host) -> &'static str {
    match maker(host) {
        Some(Cpu::Intel) => "VT-d",
        Some(Cpu::Amd) => "AMD-Vi (IOMMU)",
        Some(Cpu::Other(_)) | None => "the IOMMU (VT-d, AMD-Vi or SMMU)",
    }
}

fn boot(host: &Host) -> &'static str {
    match maker(host) {
        Some(Cpu::Intel) => "intel_iommu=on iommu=pt",
        Some(Cpu::Amd) => "amd_iommu=on iommu=pt",
        Some(Cpu::Other(_)) | None => "iommu=pt (on Intel, intel_iommu=on too)",
    }
}

/// Whether each VF can be given away alone; nothing without groups, since the IOMMU is then what is missing.
pub(super) fn isolation(scope: &Scope<'_>, device: &Device) -> Option<Finding> {
    let ports = || device.ports.iter().map(|port| access_control(scope, port)).collect::<Vec<Finding>>();
    if device.vfs.is_empty() {
        let group = device.group.known()?;
        let detail =
            format!("there is no VF yet to tell; the PF is in IOMMU group {}{}", group.id, mates(group));
        let mut found = finding(Code::GroupPending, Level::Ok, "isolation", detail, "");
        found.children = ports();
        return Some(found);
    }
    let shared: Vec<(u16, &Group)> = device
        .vfs
        .iter()
        .filter_map(|vf| Some((vf.index.0, vf.group.known().filter(|group| !group.others.is_empty())?)))
        .collect();
    let untold: Vec<u16> =
        device.vfs.iter().filter(|vf| matches!(vf.group, Reading::Unknown(_))).map(|vf| vf.index.0).collect();
    let mut found = if let Some((_, first)) = shared.first() {
        let numbers: Vec<u16> = shared.iter().map(|(number, _)| *number).collect();
        finding(
            Code::GroupShared,
            scope.demand.lacks_vfio().min(Level::Warning),
            "isolation",
            format!(
                "VFs {} are not alone in their IOMMU groups (group {}{}): a VM gets all of a group or nothing",
                ranges(&numbers),
                first.id,
                mates(first)
            ),
            apart(&device.ports),
        )
    } else if !untold.is_empty() {
        let detail = format!("the IOMMU groups of VFs {} cannot be read", ranges(&untold));
        finding(Code::GroupUnknown, Level::Note, "isolation", detail, "")
    } else if device.vfs.iter().all(|vf| vf.group.known().is_some()) {
        finding(Code::Isolated, Level::Ok, "isolation", "each VF is alone in its IOMMU group", "")
    } else {
        // No groups: there is no IOMMU, which is said elsewhere.
        return None;
    };
    found.children = ports();
    Some(found)
}

fn mates(group: &Group) -> String {
    match group.others.len() {
        0 => ", alone".to_owned(),
        count if count <= NAMED => format!(", with {}", group.others.join(", ")),
        count => format!(", with {} and {} more", group.others[..NAMED].join(", "), count - NAMED),
    }
}

/// What to do about groups that are too large.
fn apart(ports: &[Port]) -> String {
    let off = |port: &&Port| port.acs.known().is_some_and(|acs| !acs.isolates());
    if let Some(port) = ports.iter().find(|port| port.acs.is_absent()) {
        return format!(
            "move the NIC to a slot behind a port with access control (ACS), which {} has not",
            port.name
        );
    }
    match ports.iter().find(off) {
        Some(port) => format!("enable ACS in the machine's firmware (BIOS); it is off in port {}", port.name),
        None => "enable ACS in the machine's firmware (BIOS), or move the NIC to another slot; if the groups stay, \
                 the NIC itself does not keep its VFs apart"
            .to_owned(),
    }
}

/// Access control of one port. It matters only through the groups, which are judged by themselves.
fn access_control(scope: &Scope<'_>, port: &Port) -> Finding {
    let title = format!("ACS of port {}", port.name);
    match &port.acs {
        Reading::Known(acs) if acs.isolates() => finding(Code::Acs, Level::Ok, title, registers(*acs), ""),
        Reading::Known(acs) => finding(
            Code::AcsOff,
            Level::Note,
            title,
            format!("not all that it can is on: {}", registers(*acs)),
            "",
        ),
        Reading::Absent => finding(Code::AcsAbsent, Level::Note, title, "it has none", ""),
        Reading::Unknown(why) => {
            let remedy = if scope.rights.read_pci {
                String::new()
            } else {
                format!("as root: lspci -vvs {} | grep -A2 'Access Control Services'", port.name)
            };
            // The groups tell what comes of it.
            finding(Code::AcsUnknown, Level::Ok, title, format!("unknown: {why}"), remedy)
        }
    }
}

fn registers(acs: Acs) -> String {
    format!("capabilities {:#06x}, enabled {:#06x}", acs.capable, acs.enabled)
}

/// Interrupt remapping, without which a VM that drives a VF can forge interrupts.
pub(super) fn interrupts(scope: &Scope<'_>) -> Finding {
    const TITLE: &str = "interrupt remapping";
    let host = &scope.survey.host;
    match (&host.interrupt_remapping, &host.unsafe_interrupts) {
        (Reading::Known(true), _) => finding(Code::Remapping, Level::Ok, TITLE, "on", ""),
        (Reading::Known(false), Reading::Known(true)) => finding(
            Code::RemappingOff,
            Level::Warning.min(scope.demand.lacks_vfio()),
            TITLE,
            "off, and VFIO is told to do without (allow_unsafe_interrupts): a VM with a VF can forge interrupts of the host",
            format!("enable {} with interrupt remapping in the machine's firmware (BIOS)", technology(host)),
        ),
        (Reading::Known(false), _) => finding(
            Code::RemappingOff,
            scope.demand.lacks_vfio(),
            TITLE,
            "off: VFIO gives no VF to a VM then",
            format!(
                "enable {} with interrupt remapping in the machine's firmware (BIOS), and take intremap=off from the \
                 kernel's command line if it is there",
                technology(host)
            ),
        ),
        (Reading::Absent, _) => {
            finding(Code::RemappingUnknown, Level::Note, TITLE, "unknown: there is no /proc/interrupts", "")
        }
        (Reading::Unknown(why), _) => {
            let mut found = unknown(Code::RemappingUnknown, TITLE, why);
            if scope.demand.vfio == Vfio::None {
                found.set_level(Level::Ok);
            }
            found
        }
    }
}
