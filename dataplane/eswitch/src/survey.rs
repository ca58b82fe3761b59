//! What a host says about VFs on one of its interfaces: from the firmware's tables over IOMMU, PCI Express and driver to
//! the eSwitch's mode.
//!
//! A [`Survey`] is a plain value. Reading it writes nothing, and never fails: what cannot be read is in it as *absent* or
//! *unknown, because* ([`Reading`]). `sluice doctor` makes reasons and remedies of it; it may be read from any thread,
//! in the network namespace of the interface. It takes some milliseconds, and more with many VFs.

mod device;
mod host;
mod netlink;
mod pci;
mod reading;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use device::{Device, Group, Port, Role, Sriov, Vf};
pub use host::{Cpu, Host, Iommu, Module, Release};
pub use netlink::{EswitchMode, Link, Offload, Parent, Version};
pub use pci::{Acs, PortKind};
pub use reading::{Reading, Why};

/// `IFNAMSIZ` of linux/if.h, with its zero.
const NAME_MAX: usize = 16;

/// What there is to know about VFs on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The interface.
    pub netdev: String,
    /// The host.
    pub host: Host,
    /// What is behind the interface.
    pub nic: Nic,
}

/// What is behind an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nic {
    /// No interface can have this name.
    BadName,
    /// There is no such interface in this network namespace.
    Missing,
    /// The kernel does not tell.
    Unknown(Why),
    /// No device: it is made of software.
    Virtual {
        /// Of which kind, such as `veth` or `bond`.
        kind: Option<String>,
        /// The interfaces of a bond.
        members: Vec<String>,
    },
    /// A device that is not in sysfs, or no longer.
    Gone(Parent),
    /// A device.
    Device {
        /// Whether the interface is administratively up.
        is_up: bool,
        /// The device.
        device: Box<Device>,
    },
}

impl Survey {
    /// Looks at an interface of this thread's network namespace.
    pub fn of(netdev: &str) -> Survey {
        let root = Path::new("/");
        if !is_name(netdev) {
            return Survey::without(root, netdev, Nic::BadName);
        }
        let link = match netlink::link(netdev) {
            Reading::Known(link) => link,
            Reading::Absent => return Survey::without(root, netdev, Nic::Missing),
            Reading::Unknown(why) => return Survey::without(root, netdev, Nic::Unknown(why)),
        };
        let mut survey = Survey::read(root, netdev, &link);
        if let (Nic::Device { device, .. }, Some(parent)) = (&mut survey.nic, &link.parent) {
            device.eswitch = netlink::eswitch_mode(parent);
            device.firmware = firmware(netdev, parent);
            device.tc_offload = netlink::tc_offload(link.ifindex);
        }
        survey
    }

    /// Reads the files about an interface of which the kernel has told this. `root` is `/` outside of tests.
    fn read(root: &Path, netdev: &str, link: &Link) -> Survey {
        let nic = match &link.parent {
            None => Nic::Virtual { kind: link.kind.clone(), members: link.members.clone() },
            Some(parent) => match Device::read(root, &parent.bus, &parent.device) {
                None => Nic::Gone(parent.clone()),
                Some(device) => Nic::Device { is_up: link.is_up, device: Box::new(device) },
            },
        };
        Survey::without(root, netdev, nic)
    }

    fn without(root: &Path, netdev: &str, nic: Nic) -> Survey {
        Survey { netdev: netdev.to_owned(), host: Host::read(root), nic }
    }

    /// The device behind the interface.
    pub fn device(&self) -> Option<&Device> {
        match &self.nic {
            Nic::Device { device, .. } => Some(device),
            _ => None,
        }
    }
}

/// Versions of the firmware: from devlink, or as old drivers tell it.
fn firmware(netdev: &str, parent: &Parent) -> Reading<Vec<Version>> {
    match netlink::versions(parent) {
        Reading::Known(versions) => Reading::Known(versions),
        other => match crate::nic::firmware::version(netdev) {
            told if told.is_empty() => other,
            value => Reading::Known(vec![Version { name: "fw".to_owned(), value }]),
        },
    }
}

/// Whether an interface can have this name (`dev_valid_name` of the kernel).
fn is_name(text: &str) -> bool {
    let is_good = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':' | '\0');
    !text.is_empty() && text.len() < NAME_MAX && !matches!(text, "." | "..") && text.chars().all(is_good)
}
