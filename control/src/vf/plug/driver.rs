//! The driver of a VF that is a PCI function: which it has, giving it one, taking it away.
//!
//! Interfaces come with a driver and go with it, out of whatever network namespace they are in.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// A PCI function, by its address.
#[derive(Clone, Debug)]
pub(super) struct Function {
    bus: PathBuf,
    path: PathBuf,
    address: String,
    vfio: PathBuf,
}

impl Function {
    /// The function with this PCI address, such as `0000:01:10.0`.
    pub(super) fn new(address: &str) -> Function {
        Function::below(Path::new("/"), address)
    }

    fn below(root: &Path, address: &str) -> Function {
        let bus = root.join("sys/bus/pci");
        Function {
            path: bus.join("devices").join(address),
            bus,
            address: address.to_owned(),
            vfio: root.join("dev/vfio"),
        }
    }

    /// Whether there is one.
    pub(super) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Its driver.
    pub(super) fn driver(&self) -> Option<String> {
        Some(name(&fs::canonicalize(self.path.join("driver")).ok()?))
    }

    /// Whether it waits for a VM to take it.
    pub(super) fn is_for_vms(&self) -> bool {
        self.driver().is_some_and(|driver| driver.starts_with("vfio"))
    }

    /// Whether a VM has it: the kernel lets only one open a VFIO group.
    pub(super) fn is_in_a_vm(&self) -> bool {
        let Ok(group) = fs::canonicalize(self.path.join("iommu_group")) else { return false };
        let opened = OpenOptions::new().read(true).write(true).open(self.vfio.join(name(&group)));
        self.is_for_vms()
            && opened.is_err_and(|error| {
                // Without the module, or with a driver that offers no groups, there is no file, and no VM.
                !matches!(error.kind(), io::ErrorKind::NotFound)
            })
    }

    /// Takes its driver, and its interfaces with it. A VM that has it is not waited for.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while a VM has it.
    pub(super) fn take_driver(&self) -> io::Result<()> {
        if self.driver().is_none() {
            return Ok(());
        }
        // The kernel would wait for the VM.
        if self.is_in_a_vm() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        match fs::write(self.path.join("driver/unbind"), &self.address) {
            // Somebody else was quicker.
            Err(_) if self.driver().is_none() => Ok(()),
            result => result,
        }
    }

    /// Gives it this driver, or else the one that suits.
    ///
    /// # Errors
    /// If there is none, or it fails.
    pub(super) fn give_driver(&self, driver: Option<&str>) -> io::Result<()> {
        let probed = match driver {
            Some(driver) => {
                let overriding = self.path.join("driver_override");
                fs::write(&overriding, driver)?;
                let probed = self.probe();
                // An empty line takes it back, so that others may bind what they like later.
                fs::write(&overriding, "\n")?;
                probed
            }
            None => self.probe_by_itself(),
        };
        match (self.driver(), probed) {
            (Some(found), _) if driver.is_none_or(|driver| driver == found) => Ok(()),
            (Some(found), _) => {
                Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{found} was bound to it meanwhile")))
            }
            (None, Err(error)) => Err(error),
            (None, Ok(())) => {
                Err(io::Error::new(io::ErrorKind::NotFound, "no driver took it; load its module"))
            }
        }
    }

    /// VFs of a PF that does not want its VFs to get drivers by themselves get none but by name, so for a moment it is
    /// made to want it.
    fn probe_by_itself(&self) -> io::Result<()> {
        let switch = self.path.join("physfn/sriov_drivers_autoprobe");
        let is_off = fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "0");
        if is_off {
            fs::write(&switch, "1")?;
        }
        let probed = self.probe();
        if is_off {
            fs::write(&switch, "0")?;
        }
        probed
    }

    fn probe(&self) -> io::Result<()> {
        fs::write(self.bus.join("drivers_probe"), &self.address)
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const ADDRESS: &str = "0000:01:10.0";

    /// A function with this driver, in IOMMU group 7.
    fn tree(driver: Option<&str>) -> (tempfile::TempDir, Function) {
        let root = tempfile::tempdir().expect("a folder");
        let path = |path: &str| root.path().join(path);
        let device = path("sys/bus/pci/devices").join(ADDRESS);
        fs::create_dir_all(device.join("physfn")).expect("a folder");
        fs::create_dir_all(path("dev/vfio")).expect("a folder");
        fs::create_dir_all(path("groups/7")).expect("a folder");
        symlink(path("groups/7"), device.join("iommu_group")).expect("a link");
        for (file, text) in [("physfn/sriov_drivers_autoprobe", "0\n"), ("driver_override", "(null)\n")] {
            fs::write(device.join(file), text).expect("a file");
        }
        if let Some(driver) = driver {
            let folder = path("sys/bus/pci/drivers").join(driver);
            fs::create_dir_all(&folder).expect("a folder");
            symlink(folder, device.join("driver")).expect("a link");
        }
        let function = Function::below(root.path(), ADDRESS);
        (root, function)
    }

    #[test]
    fn a_driver_is_taken_by_address() {
        let (root, function) = tree(Some("igbvf"));
        assert!(function.exists() && !function.is_for_vms() && !function.is_in_a_vm());
        function.take_driver().expect("nobody minds");
        let written = root.path().join("sys/bus/pci/drivers/igbvf/unbind");
        assert_eq!(fs::read_to_string(written).expect("it was written"), ADDRESS);
    }

    #[test]
    fn a_driver_that_a_vm_needs_is_left_alone() {
        let (root, function) = tree(Some("vfio-pci"));
        // Nobody can open a folder for writing, just as a group that is in use.
        fs::create_dir(root.path().join("dev/vfio/7")).expect("a folder");
        assert!(function.is_in_a_vm());
        let error = function.take_driver().expect_err("a VM has it");
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(!root.path().join("sys/bus/pci/drivers/vfio-pci/unbind").exists());
    }

    #[test]
    fn a_driver_that_does_not_come_is_missed_and_leaves_no_trace() {
        let (root, function) = tree(None);
        for driver in [None, Some("vfio-pci")] {
            let error = function.give_driver(driver).expect_err("no kernel listens here");
            assert!(error.to_string().contains("load its module"), "{error}");
        }
        let read = |file: &str| fs::read_to_string(root.path().join("sys/bus/pci").join(file)).expect(file);
        assert_eq!(read("drivers_probe"), ADDRESS);
        assert_eq!(read(&format!("devices/{ADDRESS}/physfn/sriov_drivers_autoprobe")), "0");
        assert_eq!(read(&format!("devices/{ADDRESS}/driver_override")), "\n");
    }

    #[test]
    fn a_function_that_is_gone_has_no_driver() {
        let function = Function::below(Path::new("/nonexistent"), ADDRESS);
        assert!(!function.exists() && function.driver().is_none());
        function.take_driver().expect("there is nothing to take");
        function.give_driver(None).expect_err("there is nobody to give it to");
    }
}
