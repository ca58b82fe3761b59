//! A PF and its VFs in sysfs: how many there are, which drivers they have, and binding and unbinding those.
//!
//! Everything goes by the PF's device, not by its name, so that an interface may be renamed at any time.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::contract::{Vf, VfIndex};
use crate::nic::PciId;

/// Where sysfs is, outside of tests.
pub(crate) const SYSFS: &str = "/sys";

/// An interface of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Netdev {
    pub(crate) name: String,
    pub(crate) ifindex: u32,
}

/// The device behind a PF: its folder below `/sys/devices`.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    sysfs: PathBuf,
    path: PathBuf,
}

impl Device {
    /// The device of an interface.
    pub(crate) fn of(sysfs: &Path, netdev: &str) -> io::Result<Device> {
        let path = fs::canonicalize(sysfs.join("class/net").join(netdev).join("device"))?;
        Ok(Device { sysfs: sysfs.to_owned(), path })
    }

    /// Its name on its bus, such as a PCI address.
    pub(crate) fn name(&self) -> String {
        file_name(&self.path)
    }

    /// Whether it is a PCI function, whose VFs can be bound to drivers.
    pub(crate) fn is_pci(&self) -> bool {
        self.bus() == "pci"
    }

    /// Its interfaces in this network namespace, by index.
    pub(crate) fn netdevs(&self) -> Vec<Netdev> {
        netdevs(&self.path)
    }

    /// How many VFs there are.
    pub(crate) fn vf_count(&self) -> io::Result<u16> {
        number(&self.path.join("sriov_numvfs"))
    }

    /// How many there can be; `None` if the bus does not say.
    pub(crate) fn vf_limit(&self) -> Option<u16> {
        number(&self.path.join("sriov_totalvfs")).ok()
    }

    /// Makes or removes VFs.
    pub(crate) fn set_vf_count(&self, count: u16) -> io::Result<()> {
        fs::write(self.path.join("sriov_numvfs"), count.to_string())
    }

    /// Whether new VFs get a driver at once.
    pub(crate) fn autoprobe(&self) -> bool {
        text(&self.path.join("sriov_drivers_autoprobe")).is_none_or(|text| text != "0")
    }

    /// Has new VFs get a driver at once, or not.
    pub(crate) fn set_autoprobe(&self, on: bool) -> io::Result<()> {
        fs::write(self.path.join("sriov_drivers_autoprobe"), if on { "1" } else { "0" })
    }

    /// The driver of the PF.
    pub(crate) fn driver(&self) -> Option<String> {
        driver(&self.path)
    }

    /// What PCI says that it is, if it is a PCI function.
    pub(crate) fn pci_id(&self) -> Option<PciId> {
        let id =
            |name: &str| u16::from_str_radix(text(&self.path.join(name))?.trim_start_matches("0x"), 16).ok();
        Some(PciId {
            vendor: id("vendor")?,
            device: id("device")?,
            subsystem_vendor: id("subsystem_vendor")?,
            subsystem_device: id("subsystem_device")?,
        })
    }

    /// Its bus, such as `pci`.
    pub(crate) fn bus(&self) -> String {
        fs::canonicalize(self.path.join("subsystem")).map(|bus| file_name(&bus)).unwrap_or_default()
    }

    /// What tells it from one that is plugged into its place later: sysfs gives each a number of its own. `None` if it is
    /// gone.
    pub(crate) fn node(&self) -> Option<u64> {
        fs::metadata(&self.path).ok().map(|folder| folder.ino())
    }

    /// The same of its first VF; all come and go together.
    pub(crate) fn vf_node(&self) -> Option<u64> {
        fs::metadata(self.path.join("virtfn0")).ok().map(|folder| folder.ino())
    }

    /// Whether an interface stands for a VF's port of the eSwitch, which has the same device behind it.
    pub(crate) fn is_representor(&self, netdev: &Netdev) -> bool {
        let name = text(&self.path.join("net").join(&netdev.name).join("phys_port_name"));
        name.is_some_and(|name| name.contains("vf") || name.contains("sf"))
    }

    /// A VF, as far as sysfs knows it.
    pub(crate) fn vf(&self, index: VfIndex) -> Vf {
        let Some(path) = self.vf_path(index) else {
            return Vf { index, pci: None, netdev: None, driver: None };
        };
        Vf {
            index,
            pci: Some(file_name(&path)),
            netdev: netdevs(&path).into_iter().next().map(|netdev| netdev.name),
            driver: driver(&path),
        }
    }

    /// The address of the VF's interface, if it is in this network namespace.
    pub(crate) fn vf_address(&self, index: VfIndex) -> Option<String> {
        let path = self.vf_path(index)?;
        let netdev = netdevs(&path).into_iter().next()?;
        text(&path.join("net").join(netdev.name).join("address"))
    }

    /// Whether the VF's interface is in this network namespace and administratively down.
    pub(crate) fn vf_is_down(&self, index: VfIndex) -> bool {
        let flags = || {
            let path = self.vf_path(index)?;
            let netdev = netdevs(&path).into_iter().next()?;
            let text = text(&path.join("net").join(netdev.name).join("flags"))?;
            u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
        };
        flags().is_some_and(|flags| flags & 1 == 0)
    }

    /// Opens the VF's VFIO group for a moment, which the kernel allows only while nobody else has it open.
    pub(crate) fn try_vfio_group(&self, index: VfIndex) -> io::Result<()> {
        let path = self.vf_path(index).ok_or(io::ErrorKind::NotFound)?;
        let group = file_name(&fs::canonicalize(path.join("iommu_group"))?);
        fs::OpenOptions::new().read(true).write(true).open(Path::new("/dev/vfio").join(group)).map(drop)
    }

    /// Takes the driver from a VF.
    pub(crate) fn unbind(&self, index: VfIndex) -> io::Result<()> {
        let path = self.vf_path(index).ok_or(io::ErrorKind::NotFound)?;
        fs::write(path.join("driver/unbind"), file_name(&path))
    }

    /// Has the kernel bind a driver to a VF: this one, or else the one that suits. Says nothing about success.
    pub(crate) fn bind(&self, index: VfIndex, driver: Option<&str>) -> io::Result<()> {
        let path = self.vf_path(index).ok_or(io::ErrorKind::NotFound)?;
        let overriding = path.join("driver_override");
        if let Some(driver) = driver {
            fs::write(&overriding, driver)?;
        }
        let probed = fs::write(self.sysfs.join("bus/pci/drivers_probe"), file_name(&path));
        if driver.is_some() {
            // An empty line takes it back, so that others may bind what they like later.
            fs::write(&overriding, "\n")?;
        }
        probed
    }

    fn vf_path(&self, index: VfIndex) -> Option<PathBuf> {
        fs::canonicalize(self.path.join(format!("virtfn{}", index.0))).ok()
    }
}

fn netdevs(device: &Path) -> Vec<Netdev> {
    let entries = fs::read_dir(device.join("net")).into_iter().flatten().flatten();
    let netdev = |entry: fs::DirEntry| {
        let ifindex = text(&entry.path().join("ifindex"))?.parse().ok()?;
        Some(Netdev { name: entry.file_name().to_string_lossy().into_owned(), ifindex })
    };
    let mut netdevs: Vec<Netdev> = entries.filter_map(netdev).collect();
    netdevs.sort_by_key(|netdev| netdev.ifindex);
    netdevs
}

fn driver(device: &Path) -> Option<String> {
    fs::canonicalize(device.join("driver")).ok().map(|path| file_name(&path))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: &Path) -> io::Result<u16> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with a PF `name` that has two VFs, the first with a driver and an interface.
    fn tree(name: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let path = |path: &str| root.path().join(path);
        let folder = |name: &str| fs::create_dir_all(path(name)).expect("a folder");
        let file = |name: &str, text: &str| fs::write(path(name), text).expect("a file");
        let link = |to: &str, name: &str| symlink(path(to), path(name)).expect("a link");
        for name in ["class/net", "bus/pci/drivers/vfd", "devices/01:00.0/net/", "devices/01:10.2"] {
            folder(name);
        }
        folder(&format!("devices/01:00.0/net/{name}"));
        folder("devices/01:10.0/net/eth7");
        link(&format!("devices/01:00.0/net/{name}"), &format!("class/net/{name}"));
        link("devices/01:00.0", &format!("devices/01:00.0/net/{name}/device"));
        link("bus/pci", "devices/01:00.0/subsystem");
        link("devices/01:10.0", "devices/01:00.0/virtfn0");
        link("devices/01:10.2", "devices/01:00.0/virtfn1");
        link("bus/pci/drivers/vfd", "devices/01:10.0/driver");
        file(&format!("devices/01:00.0/net/{name}/ifindex"), "4\n");
        file("devices/01:10.0/net/eth7/ifindex", "9\n");
        file("devices/01:10.0/net/eth7/flags", "0x1002\n");
        file("devices/01:00.0/sriov_numvfs", "2\n");
        file("devices/01:00.0/sriov_totalvfs", "7\n");
        file("devices/01:00.0/sriov_drivers_autoprobe", "1\n");
        for (name, id) in [
            ("vendor", "8086"),
            ("device", "10c9"),
            ("subsystem_vendor", "1af4"),
            ("subsystem_device", "1100"),
        ] {
            file(&format!("devices/01:00.0/{name}"), &format!("0x{id}\n"));
        }
        root
    }

    #[test]
    fn a_pf_and_its_vfs_are_found() {
        let root = tree("pf0");
        let device = Device::of(root.path(), "pf0").expect("it is there");
        assert_eq!((device.vf_count().ok(), device.vf_limit(), device.autoprobe()), (Some(2), Some(7), true));
        assert_eq!(device.netdevs(), [Netdev { name: "pf0".into(), ifindex: 4 }]);
        assert!(device.is_pci());
        assert_eq!(device.pci_id().map(|id| id.to_string()).as_deref(), Some("8086:10c9 1af4:1100"));
        let first = Vf {
            index: VfIndex(0),
            pci: Some("01:10.0".into()),
            netdev: Some("eth7".into()),
            driver: Some("vfd".into()),
        };
        assert_eq!(device.vf(VfIndex(0)), first);
        assert!(device.vf_is_down(VfIndex(0)) && !device.vf_is_down(VfIndex(1)));
        let second = device.vf(VfIndex(1));
        assert_eq!((second.pci.as_deref(), second.netdev, second.driver), (Some("01:10.2"), None, None));
        assert_eq!(device.vf(VfIndex(2)).pci, None);
        assert!(Device::of(root.path(), "pf1").is_err());
    }

    #[test]
    fn a_renamed_interface_is_found_again() {
        let root = tree("pf0");
        let device = Device::of(root.path(), "pf0").expect("it is there");
        let net = root.path().join("devices/01:00.0/net");
        fs::rename(net.join("pf0"), net.join("wan0")).expect("renaming");
        assert_eq!(device.netdevs(), [Netdev { name: "wan0".into(), ifindex: 4 }]);
    }
}
