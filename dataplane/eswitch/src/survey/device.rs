//! The device behind an interface: its SR-IOV files, its VFs, their groups, and the ports above it.

use std::path::{Path, PathBuf};

use super::netlink::{EswitchMode, Offload, Version};
use super::pci::{Acs, PortKind, Space};
use super::reading::{Reading, Why, bytes, flag, name, names, parsed, target, target_name, text};
use crate::contract::VfIndex;

/// A device on a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its bus, such as `pci`.
    pub bus: String,
    /// Its address there, such as `0000:01:00.0`.
    pub name: String,
    /// Vendor and device, as in `lspci -n`: `8086:10c9`; empty on buses without.
    pub identity: String,
    /// Its driver; absent if none is bound.
    pub driver: Reading<String>,
    /// Version of the driver's module, which those in the kernel's own tree rarely have.
    pub driver_version: Reading<String>,
    /// Versions that the driver tells of its firmware.
    pub firmware: Reading<Vec<Version>>,
    /// Which part of the NIC it is.
    pub role: Role,
    /// What it says about VFs.
    pub sriov: Sriov,
    /// The VFs that exist, by index; at most [`Device::VFS_READ`].
    pub vfs: Vec<Vf>,
    /// Its own IOMMU group.
    pub group: Reading<Group>,
    /// The PCI Express ports between it and the CPU that can keep devices apart, from the CPU on.
    pub ports: Vec<Port>,
    /// The mode of its eSwitch; absent without one.
    pub eswitch: Reading<EswitchMode>,
    /// Whether it takes flower rules.
    pub tc_offload: Reading<Offload>,
    /// It went away, or another came in its place, while it was read.
    pub changed: bool,
}

/// Parts of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A physical function that the kernel knows to have VFs.
    Pf,
    /// A virtual function, of the device with this address.
    Vf(String),
    /// A function that, for the kernel, has no VFs.
    Plain,
}

/// What sysfs and the configuration space say about VFs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// `sriov_totalvfs`: as many as the driver allows.
    pub total: Reading<u16>,
    /// `sriov_numvfs`: as many as there are.
    pub count: Reading<u16>,
    /// `sriov_drivers_autoprobe`: whether new VFs get a driver at once.
    pub autoprobe: Reading<bool>,
    /// `sriov_vf_device`: what VFs are, as `10ca`.
    pub vf_device: Reading<String>,
    /// As many as the hardware says; absent without the capability, unknown without CAP_SYS_ADMIN.
    pub hardware_total: Reading<u16>,
}

/// A VF as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    /// Which.
    pub index: VfIndex,
    /// Its address.
    pub name: String,
    /// Its driver; absent if none is bound.
    pub driver: Reading<String>,
    /// The only driver that may be bound to it; absent without such an order.
    pub driver_override: Reading<String>,
    /// Its interfaces in the network namespace that `/sys` shows.
    pub netdevs: Vec<String>,
    /// Its IOMMU group.
    pub group: Reading<Group>,
}

/// An IOMMU group: what can only be given away together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// Its domain, such as `DMA` or `identity`.
    pub domain: Reading<String>,
    /// Its other members, without bridges and ports, which nobody needs to give away.
    pub others: Vec<String>,
}

/// A port that can keep devices below it apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its address.
    pub name: String,
    /// What it is.
    pub kind: PortKind,
    /// Its access control services; absent if it has none.
    pub acs: Reading<Acs>,
}

/// Class of bridges, ports among them, in `class`.
const BRIDGE: &str = "0x0604";

impl Device {
    /// So many VFs are looked at.
    pub const VFS_READ: u16 = 1024;

    /// Reads the files about a device; `None` if it is not there.
    pub(super) fn read(root: &Path, bus: &str, device: &str) -> Option<Device> {
        let link = root.join("sys/bus").join(bus).join("devices").join(device);
        let Reading::Known(path) = target(&link) else { return None };
        let file = |name: &str| path.join(name);
        let driver = target_name(&file("driver"));
        let sriov = Sriov::read(&path);
        let id = |name: &str| text(&file(name)).known().map(|id| id.trim_start_matches("0x").to_owned());
        let identity = id("vendor").zip(id("device")).map(|(vendor, device)| format!("{vendor}:{device}"));
        let role = match target_name(&file("physfn")) {
            Reading::Known(pf) => Role::Vf(pf),
            _ if sriov.count.is_absent() => Role::Plain,
            _ => Role::Pf,
        };
        let count = sriov.count.known().copied().unwrap_or(0).min(Device::VFS_READ);
        let version = match &driver {
            Reading::Known(driver) => text(&root.join("sys/module").join(driver).join("version")),
            _ => Reading::Absent,
        };
        let mut read = Device {
            bus: bus.to_owned(),
            name: device.to_owned(),
            identity: identity.unwrap_or_default(),
            driver,
            driver_version: version,
            firmware: Reading::Unknown(Why::NotAsked),
            role,
            sriov,
            vfs: (0..count).filter_map(|index| Vf::read(root, &path, VfIndex(index))).collect(),
            group: Group::of(root, &path),
            ports: ports(&path),
            eswitch: Reading::Unknown(Why::NotAsked),
            tc_offload: Reading::Unknown(Why::NotAsked),
            changed: false,
        };
        read.changed = target(&link) != Reading::Known(path.clone())
            || Sriov::read(&path).count != read.sriov.count
            || target_name(&file("driver")) != read.driver;
        Some(read)
    }

    /// Whether it is on a PCI bus, so that its VFs can be given to VMs.
    pub fn is_pci(&self) -> bool {
        self.bus == "pci"
    }
}

impl Sriov {
    fn read(device: &Path) -> Sriov {
        let file = |name: &str| device.join(name);
        Sriov {
            total: parsed(&file("sriov_totalvfs")),
            count: parsed(&file("sriov_numvfs")),
            autoprobe: flag(&file("sriov_drivers_autoprobe")),
            vf_device: text(&file("sriov_vf_device")),
            hardware_total: Space::new(bytes(&file("config"))).total_vfs(),
        }
    }
}

impl Vf {
    fn read(root: &Path, pf: &Path, index: VfIndex) -> Option<Vf> {
        let Reading::Known(path) = target(&pf.join(format!("virtfn{}", index.0))) else { return None };
        let wanted = text(&path.join("driver_override")).and_then(|text| match text.as_str() {
            // So the kernel writes that there is none.
            "" | "(null)" => Reading::Absent,
            _ => Reading::Known(text),
        });
        Some(Vf {
            index,
            name: name(&path),
            driver: target_name(&path.join("driver")),
            driver_override: wanted,
            netdevs: names(&path.join("net")).known().cloned().unwrap_or_default(),
            group: Group::of(root, &path),
        })
    }
}

impl Group {
    fn of(root: &Path, device: &Path) -> Reading<Group> {
        target_name(&device.join("iommu_group")).and_then(|id| {
            let Ok(number) = id.parse() else { return super::reading::garbled(&id) };
            let folder = root.join("sys/kernel/iommu_groups").join(&id);
            names(&folder.join("devices")).map(|members| Group {
                id: number,
                domain: text(&folder.join("type")),
                others: others(&folder, members, &name(device)),
            })
        })
    }
}

fn others(group: &Path, members: Vec<String>, own: &str) -> Vec<String> {
    let is_bridge = |member: &str| {
        let class = text(&group.join("devices").join(member).join("class"));
        class.known().is_some_and(|class| class.starts_with(BRIDGE))
    };
    members.into_iter().filter(|member| member != own && !is_bridge(member)).collect()
}

/// The ports above a device, which are the folders that its folder lies in.
fn ports(device: &Path) -> Vec<Port> {
    let mut above: Vec<PathBuf> = device.ancestors().skip(1).map(Path::to_owned).collect();
    above.reverse();
    let port = |path: PathBuf| {
        let space = Space::new(bytes(&path.join("config")));
        match space.port() {
            Reading::Known(kind @ (PortKind::Root | PortKind::Downstream)) => {
                Some(Port { name: name(&path), kind, acs: space.acs() })
            }
            // A bridge whose registers are hidden may be one.
            Reading::Unknown(_) if is_bridge(&path) => {
                Some(Port { name: name(&path), kind: PortKind::Root, acs: space.acs() })
            }
            _ => None,
        }
    };
    above.into_iter().filter_map(port).collect()
}

fn is_bridge(path: &Path) -> bool {
    text(&path.join("class")).known().is_some_and(|class| class.starts_with(BRIDGE))
}
