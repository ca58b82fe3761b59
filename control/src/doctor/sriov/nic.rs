//! What is behind the uplink, and why that has no VFs if it has none.

use sluice_eswitch::survey::{Device, Nic, Reading, Role};
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use super::{Code, Scope, finding, or_unknown, unknown};

/// What to do when the uplink is nothing that has VFs.
const ANOTHER: &str =
    "for VFs, give the switch an uplink that is a port of an SR-IOV NIC; or take `sriov` from its vNICs";

/// The uplink is no device.
pub(super) fn no_device(scope: &Scope<'_>) -> Finding {
    let netdev = &scope.survey.netdev;
    match &scope.survey.nic {
        Nic::BadName => finding(
            Code::BadName,
            Level::Problem,
            "NIC",
            format!("no interface can be called `{}`", netdev.escape_debug()),
            "give the uplink one of the names that `ip link` lists",
        ),
        Nic::Missing => finding(
            Code::Missing,
            Level::Warning,
            "NIC",
            format!("there is no interface {netdev} in the daemon's network namespace"),
            "plug it in, load its driver or rename it; it is used as soon as it is there",
        ),
        Nic::Unknown(why) => unknown(Code::Unknown, "NIC", why),
        Nic::Virtual { kind, members } => {
            let kind = kind.as_deref().unwrap_or("an interface without a device");
            let detail = match members.as_slice() {
                [] => format!("{netdev} ({kind}) is made of software: it has no VFs"),
                members => {
                    format!("{netdev} is a {kind} of {}: VFs of those are not used", members.join(", "))
                }
            };
            finding(Code::Virtual, Level::Problem, "NIC", detail, ANOTHER)
        }
        Nic::Gone(parent) => finding(
            Code::Gone,
            Level::Warning,
            "NIC",
            format!("{} on {} went away while it was examined", parent.device, parent.bus),
            "ask again; if it stays away, see the kernel's log (dmesg)",
        ),
        Nic::Device { .. } => finding(Code::Driver, Level::Ok, "NIC", netdev, ""),
    }
}

/// The device has no VFs for the kernel.
pub(super) fn no_pf(device: &Device) -> Finding {
    let (bus, name) = (&device.bus, &device.name);
    if let Role::Vf(pf) = &device.role {
        return finding(
            Code::IsVf,
            Level::Problem,
            "NIC",
            format!("{name} is itself a VF, of {pf}; only a PF has VFs"),
            format!("make the interface of {pf} the uplink; or take `sriov` from the switch's vNICs"),
        );
    }
    if !device.is_pci() {
        let detail = format!("{name} is a device on bus {bus}, which has no VFs");
        return finding(Code::OtherBus, Level::Problem, "NIC", detail, ANOTHER);
    }
    let said = |detail: &str| format!("{}: {detail}", title(device));
    match &device.sriov.hardware_total {
        Reading::Known(0) => finding(
            Code::CapabilityEmpty,
            Level::Problem,
            "NIC",
            said("it has the SR-IOV capability, with 0 VFs: they are switched off in its firmware"),
            in_firmware(device),
        ),
        Reading::Known(total) => finding(
            Code::CapabilityHidden,
            Level::Problem,
            "NIC",
            said(&format!("the hardware has {total} VFs, and the kernel does not offer them")),
            "use a kernel with CONFIG_PCI_IOV; if it has that, there was no room for the VFs' memory: enable SR-IOV \
             and Above 4G Decoding in the machine's firmware, or boot with pci=realloc",
        ),
        Reading::Absent => finding(
            Code::CapabilityAbsent,
            Level::Problem,
            "NIC",
            said("it has no SR-IOV capability: it cannot have VFs, or they are switched off in its firmware"),
            in_firmware(device),
        ),
        Reading::Unknown(why) => finding(
            Code::CapabilityUnknown,
            Level::Problem,
            "NIC",
            said(&format!("it has no VFs for the kernel; what the hardware says is unknown: {why}")),
            format!(
                "as root, see whether `lspci -vvs {name}` shows `Single Root I/O Virtualization`; if not: {}",
                in_firmware(device)
            ),
        ),
    }
}

/// The PF's driver.
pub(super) fn driver(device: &Device) -> Finding {
    match &device.driver {
        Reading::Known(driver) => {
            let version =
                device.driver_version.known().map_or(String::new(), |version| format!(" {version}"));
            let firmware = match &device.firmware {
                Reading::Known(versions) => {
                    let versions: Vec<String> = versions
                        .iter()
                        .map(|version| format!("{} {}", version.name, version.value))
                        .collect();
                    versions.join(", ")
                }
                Reading::Absent => "version not told".to_owned(),
                Reading::Unknown(why) => format!("version unknown ({why})"),
            };
            let detail = format!("{}, driver {driver}{version}, firmware: {firmware}", title(device));
            finding(Code::Driver, Level::Ok, "NIC", detail, "")
        }
        other => finding(
            Code::DriverAbsent,
            Level::Problem,
            "NIC",
            format!("{}: {}", title(device), or_unknown(other, "no driver is bound to it")),
            format!("bind it: echo {} > /sys/bus/{}/drivers_probe", device.name, device.bus),
        ),
    }
}

/// VFs have no carrier while their PF is down.
pub(super) fn link(scope: &Scope<'_>, is_up: bool) -> Option<Finding> {
    let netdev = &scope.survey.netdev;
    (!is_up).then(|| {
        finding(
            Code::LinkDown,
            Level::Warning,
            "link",
            format!("{netdev} is down, and its VFs have no carrier then"),
            format!("ip link set {netdev} up"),
        )
    })
}

/// Where VFs are switched on, for NICs of which we know it.
pub(super) fn in_firmware(device: &Device) -> String {
    let (bus, name) = (&device.bus, &device.name);
    let machine = "enable SR-IOV in the machine's firmware set-up (BIOS), too";
    match device.driver.known().map(String::as_str) {
        Some("mlx5_core" | "mlx4_core") => format!(
            "mstconfig -d {name} set SRIOV_EN=1 NUM_OF_VFS=8, then reboot; {machine}"
        ),
        Some("bnxt_en") => format!(
            "devlink dev param set {bus}/{name} name enable_sriov value true cmode permanent, then reboot; {machine}"
        ),
        _ => "enable SR-IOV in the NIC's own firmware set-up and in the machine's (BIOS), then reboot; a NIC that cannot \
              have VFs must be exchanged, or take `sriov` from the switch's vNICs"
            .to_owned(),
    }
}

fn title(device: &Device) -> String {
    format!("{} {}", device.name, device.identity).trim_end().to_owned()
}
