//! How many VFs there are and could be, who drives them, and what becomes of new ones.

use std::collections::BTreeMap;

use sluice_eswitch::survey::{Device, Reading, Vf};
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use super::{Code, Scope, finding, nic, unknown};

/// So many VFs are named one by one.
const NAMED: usize = 8;

pub(super) fn all(scope: &Scope<'_>, device: &Device) -> Vec<Finding> {
    let mut found = vec![count(scope, device)];
    if device.is_pci() {
        found.push(autoprobe(scope, device));
    }
    found
}

fn count(scope: &Scope<'_>, device: &Device) -> Finding {
    let folder = scope.folder(device);
    let wanted = scope.demand.vnics;
    let total = device.sriov.total.known().copied();
    let of = total.map_or(String::new(), |total| format!(" of {total}"));
    match &device.sriov.count {
        _ if total == Some(0) => finding(
            Code::VfsDisabled,
            Level::Problem,
            "VFs",
            match device.sriov.hardware_total.known() {
                Some(more) if *more > 0 => format!("the driver allows 0 of the {more} that the hardware has"),
                _ => "the NIC allows 0 (sriov_totalvfs)".to_owned(),
            },
            nic::in_firmware(device),
        ),
        Reading::Known(0) => {
            // All that ask, as far as there can be so many; one as an example when none does.
            let number = wanted.max(1).min(total.map_or(usize::MAX, usize::from));
            finding(
                Code::VfsNone,
                Level::Problem,
                "VFs",
                format!("0{of}: none has been made"),
                format!("{}echo {number} > {folder}/sriov_numvfs", quietly(device, &folder)),
            )
        }
        Reading::Known(count) => {
            let drivers = drivers(&device.vfs);
            let kind =
                device.sriov.vf_device.known().map_or(String::new(), |id| format!(", PCI device {id}"));
            let detail = format!("{count}{of}{kind}: {drivers}");
            let mut found = if wanted > usize::from(*count) {
                let more = total.map_or(wanted, |total| wanted.min(usize::from(total)));
                let remedy = if more > usize::from(*count) {
                    format!(
                        "echo 0 > {folder}/sriov_numvfs, then echo {more} > {folder}/sriov_numvfs: this takes all VFs away \
                         for a moment, and their vNICs go over to software"
                    )
                } else {
                    "their `sriov.weight` says who gets one".to_owned()
                };
                finding(
                    Code::VfsFew,
                    Level::Note,
                    "VFs",
                    format!("{detail}; {wanted} vNICs ask for one"),
                    remedy,
                )
            } else {
                finding(Code::Vfs, Level::Ok, "VFs", detail, "")
            };
            found.children = device.vfs.iter().filter_map(overridden).take(NAMED).collect();
            found
        }
        Reading::Absent => finding(Code::VfsUnknown, Level::Note, "VFs", "the device went away", "ask again"),
        Reading::Unknown(why) => unknown(Code::VfsUnknown, "VFs", why),
    }
}

/// What to write first, so that new VFs wait for Sluice.
fn quietly(device: &Device, folder: &str) -> String {
    match device.sriov.autoprobe {
        Reading::Known(true) => format!("echo 0 > {folder}/sriov_drivers_autoprobe, then "),
        _ => String::new(),
    }
}

/// `igbvf has 0-4 (eth2, eth3), no driver 5, 6`.
fn drivers(vfs: &[Vf]) -> String {
    let mut by_driver: BTreeMap<String, Vec<&Vf>> = BTreeMap::new();
    for vf in vfs {
        let driver = match &vf.driver {
            Reading::Known(driver) => format!("driver {driver}"),
            Reading::Absent => "no driver".to_owned(),
            Reading::Unknown(_) => "unknown driver".to_owned(),
        };
        by_driver.entry(driver).or_default().push(vf);
    }
    let shown = |(driver, vfs): (&String, &Vec<&Vf>)| {
        let netdevs: Vec<&str> = vfs.iter().flat_map(|vf| &vf.netdevs).map(String::as_str).collect();
        let netdevs = match netdevs.as_slice() {
            [] => String::new(),
            few if few.len() <= NAMED => format!(" ({})", few.join(", ")),
            many => format!(" ({} and {} more interfaces)", many[..NAMED].join(", "), many.len() - NAMED),
        };
        let numbers: Vec<u16> = vfs.iter().map(|vf| vf.index.0).collect();
        format!("{driver}: {}{netdevs}", ranges(&numbers))
    };
    match by_driver.is_empty() {
        true => "no devices of theirs are to be seen".to_owned(),
        false => by_driver.iter().map(shown).collect::<Vec<String>>().join("; "),
    }
}

/// `0-4, 6` of ascending numbers.
pub(super) fn ranges(numbers: &[u16]) -> String {
    let mut parts: Vec<(u16, u16)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let part = |(first, last): &(u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(part).collect::<Vec<String>>().join(", ")
}

/// A VF that waits for another driver than it has.
fn overridden(vf: &Vf) -> Option<Finding> {
    let wanted = vf.driver_override.known()?;
    if vf.driver.known() == Some(wanted) {
        return None;
    }
    let has = match &vf.driver {
        Reading::Known(driver) => format!("it has {driver}"),
        _ => "it has none".to_owned(),
    };
    let folder = format!("/sys/bus/pci/devices/{}", vf.name);
    Some(finding(
        Code::VfOverride,
        Level::Note,
        vf.index.to_string(),
        format!("driver_override keeps {} for driver {wanted}, and {has}", vf.name),
        format!(
            "if nobody is about to give it away: echo > {folder}/driver_override, then echo {} > \
             /sys/bus/pci/drivers_probe",
            vf.name
        ),
    ))
}

fn autoprobe(scope: &Scope<'_>, device: &Device) -> Finding {
    let folder = scope.folder(device);
    match &device.sriov.autoprobe {
        Reading::Known(false) => finding(
            Code::AutoprobeOff,
            Level::Ok,
            "autoprobe",
            "off: new VFs wait until Sluice opens them",
            "",
        ),
        Reading::Known(true) => finding(
            Code::AutoprobeOn,
            Level::Note,
            "autoprobe",
            "on: new VFs get a driver, and with some NICs a network without any policy, before Sluice closes them",
            format!("before VFs are made: echo 0 > {folder}/sriov_drivers_autoprobe"),
        ),
        Reading::Absent => {
            finding(Code::AutoprobeUnknown, Level::Note, "autoprobe", "the kernel has no such switch", "")
        }
        Reading::Unknown(why) => unknown(Code::AutoprobeUnknown, "autoprobe", why),
    }
}
