//! vNICs on VFs under the real daemon, in the SR-IOV lab: where frames go, what changes of the path cost, what becomes
//! of drift, and that nothing ever leaves a vNIC without network.
//!
//! The one test that is not ignored boots the lab; the others run there.

#![forbid(unsafe_code)]
// The figures are what these tests are read for.
#![allow(clippy::print_stdout)]

mod adoption;
mod coverage;
mod drift;
mod switchdev;
mod traffic;
mod transitions;
mod trouble;

use std::time::Duration;

use anyhow::Result;
use sluice_tests::lab::Vm;
use sluice_tests::lab_guest;
use sluice_tests::vf_lab::VfLab;

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

/// What the emulated NIC is said to enforce: it does not, and no test here sends what it would have to stop.
const ATTESTED: &str = "attest: [macGuard, untagged]";

/// A policy of which the emulated NIC enforces everything.
fn in_vlan(vlan: u16) -> String {
    format!("vlan: {{access: {vlan}}}, allowSpoofing: true")
}

/// Between two packets of a stream: as many as the emulated NIC carries without losing some.
const PACE: Duration = Duration::from_millis(10);

/// Takes a guest's VF until it is released; it is then on its software path.
fn revoke(lab: &VfLab, vm: &Vm) -> Result<()> {
    lab.lab.sluice().run(&["revoke", "vnic", &vm.name, "--hold", "0"]).map(drop)
}
