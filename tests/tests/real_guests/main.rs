//! Real VMs: QEMU, a Debian kernel and its virtio driver on either side of the switch, by vhost-user and by a tap, under VLANs, guards
//! and ACLs; rebooted, killed and left alone by the daemon.
//!
//! Unlike the other suites, nothing in here imitates a guest. See [`sluice_tests::vm`].

#![forbid(unsafe_code)]
// Figures are what one wants to read.
#![allow(clippy::print_stderr)]

mod restarts;
mod setting;
mod traffic;
