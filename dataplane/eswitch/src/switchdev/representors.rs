//! Representors: the interfaces of the host that stand for the ports of an eSwitch.
//!
//! A port's devlink entry names an interface; it counts only if its `phys_switch_id` is the uplink's and its
//! `phys_port_name` is that port's. Names and PCI parents of interfaces say nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::devlink::{DevlinkPort, Flavour, Handle};
use crate::contract::VfIndex;

const NET: &str = "/sys/class/net";

/// An interface that stands for a port of an eSwitch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Representor {
    /// Its index.
    pub ifindex: u32,
    /// Its name now.
    pub netdev: String,
}

/// The interfaces that stand for an eSwitch's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Representors {
    /// What tells this eSwitch from others (`phys_switch_id`).
    pub switch_id: String,
    /// The uplink's.
    pub uplink: Representor,
    /// Those of VFs.
    pub vfs: BTreeMap<VfIndex, Representor>,
}

/// What sysfs says about an interface.
struct Interface {
    netdev: String,
    switch_id: String,
    port_name: String,
}

/// Finds them; `None` if the uplink has none, as in legacy mode.
pub(super) fn find(ports: &[DevlinkPort]) -> Option<Representors> {
    let interfaces = interfaces();
    let of = |port: &DevlinkPort| {
        let interface = interfaces.get(&port.ifindex)?;
        (!interface.switch_id.is_empty() && is_of(&interface.port_name, port.flavour)).then_some(interface)
    };
    let representor = |port: &DevlinkPort, interface: &Interface| Representor {
        ifindex: port.ifindex,
        netdev: interface.netdev.clone(),
    };
    let uplink = ports.iter().find(|port| port.flavour == Flavour::Uplink)?;
    let on_uplink = of(uplink)?;
    let vfs = ports.iter().filter_map(|port| {
        let Flavour::Vf { vf, .. } = port.flavour else { return None };
        let interface = of(port).filter(|interface| interface.switch_id == on_uplink.switch_id)?;
        Some((VfIndex(vf), representor(port, interface)))
    });
    Some(Representors {
        switch_id: on_uplink.switch_id.clone(),
        vfs: vfs.collect(),
        uplink: representor(uplink, on_uplink),
    })
}

/// Whether the kernel's name of a port (`p0`, `pf0vf3`, `c1pf0vf3`) is that of such a port.
fn is_of(name: &str, flavour: Flavour) -> bool {
    match flavour {
        Flavour::Uplink => {
            name.strip_prefix('p').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        }
        Flavour::Vf { pf, vf } => {
            let local = name
                .strip_prefix('c')
                .map_or(name, |rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
            local == format!("pf{pf}vf{vf}")
        }
    }
}

fn interfaces() -> BTreeMap<u32, Interface> {
    let folders = fs::read_dir(NET).into_iter().flatten().flatten().map(|entry| entry.path());
    folders
        .filter_map(|folder| {
            let ifindex = read(&folder, "ifindex")?.parse().ok()?;
            Some((
                ifindex,
                Interface {
                    netdev: base_name(&folder)?,
                    // Not readable where there is none.
                    switch_id: read(&folder, "phys_switch_id").unwrap_or_default(),
                    port_name: read(&folder, "phys_port_name").unwrap_or_default(),
                },
            ))
        })
        .collect()
}

impl Representor {
    /// A counter of the interface.
    pub(super) fn counter(&self, name: &str) -> Option<u64> {
        read(&Path::new(NET).join(&self.netdev).join("statistics"), name)?.parse().ok()
    }

    /// Whether it is administratively up.
    pub(super) fn is_up(&self) -> Option<bool> {
        let flags = read(&Path::new(NET).join(&self.netdev), "flags")?;
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok()?;
        Some(flags & 1 != 0)
    }
}

/// A device in sysfs.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) handle: Handle,
    folder: PathBuf,
}

impl Device {
    /// The device of an interface.
    pub(super) fn of(netdev: &str) -> Option<Device> {
        let folder = fs::canonicalize(Path::new(NET).join(netdev).join("device")).ok()?;
        let bus = base_name(&fs::canonicalize(folder.join("subsystem")).ok()?)?;
        Some(Device { handle: Handle { bus, device: base_name(&folder)? }, folder })
    }

    /// Whether it is still there.
    pub(super) fn exists(&self) -> bool {
        self.folder.exists()
    }

    /// Whether there is such a VF, whatever the mode.
    pub(super) fn has_vf(&self, vf: VfIndex) -> bool {
        let count: u32 = read(&self.folder, "sriov_numvfs").and_then(|text| text.parse().ok()).unwrap_or(0);
        u32::from(vf.0) < count
    }

    /// How many VFs it may have; or, if it does not say, has.
    pub(super) fn max_vfs(&self) -> u16 {
        let number = |name| read(&self.folder, name)?.parse().ok();
        number("sriov_totalvfs").or_else(|| number("sriov_numvfs")).unwrap_or(0)
    }

    /// PCI address, interface and driver of a VF, as far as it has them.
    pub(super) fn vf(&self, vf: VfIndex) -> (Option<String>, Option<String>, Option<String>) {
        let Ok(folder) = fs::canonicalize(self.folder.join(format!("virtfn{}", vf.0))) else {
            return (None, None, None);
        };
        let netdev = fs::read_dir(folder.join("net")).ok().and_then(|mut entries| entries.next()?.ok());
        let driver = fs::canonicalize(folder.join("driver")).ok();
        (
            base_name(&folder),
            netdev.map(|entry| entry.file_name().to_string_lossy().into_owned()),
            driver.as_deref().and_then(base_name),
        )
    }
}

fn read(folder: &Path, name: &str) -> Option<String> {
    fs::read_to_string(folder.join(name)).ok().map(|text| text.trim().to_owned())
}

fn base_name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_known_by_the_kernels_names() {
        let vf = Flavour::Vf { pf: 0, vf: 3 };
        for (name, flavour, is_it) in [
            ("p0", Flavour::Uplink, true),
            ("p1s0", Flavour::Uplink, true),
            ("pf0", Flavour::Uplink, false),
            ("", Flavour::Uplink, false),
            ("pf0vf3", vf, true),
            ("c1pf0vf3", vf, true),
            ("pf0vf33", vf, false),
            ("pf1vf3", vf, false),
            ("pf0sf3", vf, false),
        ] {
            assert_eq!(is_of(name, flavour), is_it, "{name}");
        }
    }
}
