//! The plugs, on real interfaces: into network namespaces and bonds of hostile guests, and into QEMU.
//!
//! On any host a veth stands in for the VF, and an emulated NIC for the device. In the SR-IOV lab it is a VF of an igb
//! port, opened and closed by the legacy back-end.

#![forbid(unsafe_code)]

mod bond;
mod hostile;
mod stand_in;
mod vm;

use std::fs;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use sluice_control::vf::plug::netns::{self, Host};
use sluice_control::vf::plug::{Candidate, Plug, PlugError, Progress};
use sluice_eswitch::contract::{Eswitch, VfIndex};
use sluice_eswitch::legacy::Legacy;
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Program, VfSettings};
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::netns::check;
use sluice_tests::{Netns, wait_until};

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

/// The lab's first port, and the one that it is wired to.
const PORT: &str = "pf0";
const FAR_PORT: &str = "pf1";
const VF: VfIndex = VfIndex(0);
const MAC: MacAddr = MacAddr([0x02, 0, 0, 0, 0x1f, 1]);

/// A namespace of this test.
fn namespace(role: &str) -> Result<Netns> {
    Netns::create(&format!("sl-{}-plug-{role}", std::process::id()))
}

/// A plug into a guest's namespace.
fn plug_into(guest: &Netns, netdev: &str, bond: Option<&str>) -> netns::Netns {
    netns::Netns::new(guest.name(), netdev, bond, Arc::new(Host::open()))
}

fn run(program: &str, words: &str) -> Result<String> {
    check(Command::new(program).args(words.split(' ')))
}

fn ip(words: &str) -> Result<String> {
    run("ip", words)
}

/// `ip` in a namespace.
fn ip_in(netns: &Netns, words: &str) -> Result<String> {
    let words: Vec<&str> = std::iter::once("ip").chain(words.split(' ')).collect();
    netns.run(&words)
}

/// Asks until it is done.
fn done(what: &str, mut ask: impl FnMut() -> Result<Progress, PlugError>) -> Result<()> {
    let mut outcome = Ok(());
    wait_until(what, PATIENCE, || {
        Ok(match ask() {
            Ok(Progress::Pending) => None,
            Ok(Progress::Done) => Some(()),
            Err(error) => {
                outcome = Err(error);
                Some(())
            }
        })
    })?;
    outcome.context(what.to_owned())
}

/// Asks until it is refused, and wants these words in the reason.
fn refused(words: &str, mut ask: impl FnMut() -> Result<Progress, PlugError>) -> Result<()> {
    let reason = wait_until(words, PATIENCE, || match ask() {
        Ok(Progress::Pending) => Ok(None),
        Ok(Progress::Done) => Ok(Some("it was done".to_owned())),
        Err(PlugError::Refused(reason)) => Ok(Some(reason)),
        Err(error) => Ok(Some(format!("not refused, but {error}"))),
    })?;
    ensure!(reason.contains(words), "`{words}` is not said in: {reason}");
    Ok(())
}

fn is_active(plug: &mut dyn Plug, vf: &Candidate) -> Result<()> {
    wait_until("the guest is active on the VF", PATIENCE, || Ok(plug.is_active(vf)?.then_some(())))
}

/// The lab's port with closed VFs, VF 0 programmed and open, and what the manager would say of it.
fn open_vf() -> Result<(Legacy, Candidate)> {
    lab_guest::require()?;
    ip(&format!("link set {PORT} up"))?;
    ip(&format!("link set {FAR_PORT} up"))?;
    let mut eswitch = Legacy::open(PORT)?;
    if eswitch.vfs()?.len() != 7 {
        eswitch.set_vf_count(0)?;
        eswitch.set_vf_count(7)?;
    }
    for vf in (0..7).map(VfIndex) {
        eswitch.unprogram(vf)?;
    }
    wait_carrier()?;
    let settings = VfSettings { mac: MAC, spoofchk: true, ..VfSettings::default() };
    eswitch.program(VF, &Program::Legacy(settings))?;
    eswitch.enable(VF)?;
    let candidate = candidate(&mut eswitch)?;
    Ok((eswitch, candidate))
}

fn wait_carrier() -> Result<()> {
    wait_until("the port has a carrier", PATIENCE, || {
        let state = fs::read_to_string(format!("/sys/class/net/{PORT}/operstate"))?;
        Ok((state.trim() == "up").then_some(()))
    })
}

fn candidate(eswitch: &mut Legacy) -> Result<Candidate> {
    let vfs = eswitch.vfs()?;
    let vf = vfs.into_iter().find(|vf| vf.index == VF).context("there is no VF")?;
    Ok(Candidate { pf: PORT.into(), index: VF.0, pci: vf.pci, netdev: vf.netdev, mac: MAC })
}

/// The driver of a VF.
fn driver(vf: &Candidate) -> Option<String> {
    let pci = vf.pci.as_deref().unwrap_or_default();
    let driver = fs::canonicalize(format!("/sys/bus/pci/devices/{pci}/driver")).ok()?;
    Some(driver.file_name().unwrap_or_default().to_string_lossy().into_owned())
}
