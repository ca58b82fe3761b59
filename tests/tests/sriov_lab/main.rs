//! What the SR-IOV lab gives, proved inside it: the machine, the NIC that switches by itself, the simulated eSwitch, and
//! the software switch on the lab's kernel with an igb port as uplink.
//!
//! The one test that is not ignored boots the lab; the others run there.

#![forbid(unsafe_code)]

mod nic;
mod simulated;
mod switchdev;
mod uplink;
mod vlan_devices;

use anyhow::Result;
use sluice_tests::lab_guest;

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}
