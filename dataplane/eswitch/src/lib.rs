//! The eSwitch engine: policies of vNICs on virtual functions, enforced by the NIC.
//!
//! [`contract`] says what an eSwitch is; the other modules are eSwitches. `sluice_policy::placement` decides what is
//! programmed. Netlink, sysfs and devlink stay inside this crate. What the daemon holds of a NIC is a [`nic::Nic`].
//!
//! Unsafe code is in `nic::firmware` (one ioctl) and `probe::packet` (packet sockets) only.

#![deny(unsafe_code)]

pub mod chaos;
pub mod contract;
pub mod legacy;
pub mod lifecycle;
pub mod links;
mod netlink;
pub mod nic;
pub mod probe;
mod quirks;
pub mod soft;
pub mod survey;
pub mod switchdev;
pub mod watch;
