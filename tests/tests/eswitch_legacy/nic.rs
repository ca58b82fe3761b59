//! igb: what is programmed is in the NIC, and does to frames what it says.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use sluice_eswitch::contract::{Eswitch, VfIndex};
use sluice_eswitch::legacy::Legacy;
use sluice_policy::placement::{Evidence, Program, VfSettings};
use sluice_tests::lab_guest::give;
use sluice_tests::netns::check;
use sluice_tests::tools;

use super::{
    PORT, found, grant, interface, ip, lifecycle, mac, ping, port, set_port, set_vfs, settings, vm, writes,
};

const VF: VfIndex = VfIndex(0);

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_is_programmed_opened_repaired_and_given_back() -> Result<()> {
    let mut eswitch = port(7)?;
    let wanted = settings(1, Some(100))?;
    grant(&mut eswitch, VF, wanted)?;
    let netdev = interface(&mut eswitch, VF)?;
    let address = fs::read_to_string(format!("/sys/class/net/{netdev}/address"))?;
    ensure!(address.trim() == mac(1).to_string(), "the VF came up as {address}");
    let program = Program::Legacy(wanted);
    writes(&mut eswitch, 0, |eswitch| {
        eswitch.program(VF, &program)?;
        eswitch.enable(VF)?;
        Ok(eswitch.read_back(VF)?)
    })?;

    // Somebody else changes one thing: it is named, and repaired without closing the VF.
    set_port("vf 0 spoofchk off")?;
    let differences = eswitch.read_back(VF)?.differences(&program);
    ensure!(differences.len() == 1 && differences[0].what == "spoofchk", "{differences:?}");
    writes(&mut eswitch, 1, |eswitch| Ok(eswitch.program(VF, &program)?))?;
    let observed = eswitch.read_back(VF)?;
    ensure!(observed.enabled && observed.differences(&program).is_empty(), "{observed:?}");

    eswitch.unprogram(VF)?;
    ensure!(!eswitch.read_back(VF)?.enabled, "it was given back and is still open");
    let left = found(&mut eswitch, VF)?;
    ensure!(left == VfSettings { spoofchk: true, ..VfSettings::default() }, "{left:?} is left behind");
    writes(&mut eswitch, 0, |eswitch| {
        eswitch.disable(VF)?;
        Ok(eswitch.unprogram(VF)?)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn the_lifecycle_finds_what_it_looks_for() -> Result<()> {
    let mut eswitch = port(7)?;
    let wanted = settings(1, Some(100))?;
    lifecycle(&mut eswitch, VF, wanted, true)?;
    lifecycle(&mut eswitch, VF, VfSettings { spoofchk: false, vlan: None, ..wanted }, true)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vms_of_one_vlan_reach_each_other_and_no_others() -> Result<()> {
    let mut eswitch = port(7)?;
    let vm1 = vm(&mut eswitch, 0, 1, Some(100))?;
    let _vm2 = vm(&mut eswitch, 1, 2, Some(100))?;
    let vm3 = vm(&mut eswitch, 2, 3, Some(200))?;
    let _vm4 = vm(&mut eswitch, 3, 4, Some(200))?;
    ping(&vm1, 2)?;
    ping(&vm3, 4)?;
    tools::no_ping(&vm1, &ip(3))?;
    tools::no_ping(&vm3, &ip(2))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn closed_is_closed_and_opens_again() -> Result<()> {
    let mut eswitch = port(7)?;
    let vm1 = vm(&mut eswitch, 0, 1, Some(100))?;
    let vm2 = vm(&mut eswitch, 1, 2, Some(100))?;
    ping(&vm1, 2)?;
    eswitch.disable(VfIndex(1))?;
    ensure!(!eswitch.read_back(VfIndex(1))?.enabled, "closed, and reads back open");
    tools::no_ping(&vm1, &ip(2))?;
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.disable(VfIndex(1))?))?;
    eswitch.enable(VfIndex(1))?;
    let netdev = interface(&mut eswitch, VfIndex(1))?;
    give(&netdev, &vm2, &[&format!("{}/24", ip(2))])?;
    ping(&vm1, 2)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_port_that_goes_down_and_up_loses_nothing_of_ours() -> Result<()> {
    let mut eswitch = port(7)?;
    let vm1 = vm(&mut eswitch, 0, 1, Some(100))?;
    let _vm2 = vm(&mut eswitch, 1, 2, Some(100))?;
    ping(&vm1, 2)?;
    for state in ["down", "up"] {
        set_port(state)?;
        let programs = [settings(1, Some(100))?, settings(2, Some(100))?];
        for (vf, settings) in [VfIndex(0), VfIndex(1)].into_iter().zip(programs) {
            let observed = eswitch.read_back(vf)?;
            let differences = observed.differences(&Program::Legacy(settings));
            ensure!(differences.is_empty(), "with the port {state}: {differences:?}");
            writes(&mut eswitch, 0, |eswitch| Ok(eswitch.program(vf, &Program::Legacy(settings))?))?;
        }
    }
    ping(&vm1, 2)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_the_driver_takes_is_found_out_and_not_believed_beyond() -> Result<()> {
    let mut eswitch = port(2)?;
    grant(&mut eswitch, VF, settings(1, Some(100))?)?;
    let before = [found(&mut eswitch, VF)?, found(&mut eswitch, VfIndex(1))?];
    let capabilities = eswitch.capabilities()?;
    let after = [found(&mut eswitch, VF)?, found(&mut eswitch, VfIndex(1))?];
    ensure!(before == after, "trying left traces: {before:?}, {after:?}");
    for (what, found, wanted) in [
        ("port VLAN", capabilities.access_vlan, Evidence::ReadBack),
        ("its priority", capabilities.vlan_qos, Evidence::ReadBack),
        ("802.1ad", capabilities.tunnel_vlan, Evidence::Missing),
        ("spoofchk", capabilities.mac_guard, Evidence::Refuted),
        ("max_tx_rate", capabilities.rate_max, Evidence::Refuted),
        ("min_tx_rate", capabilities.rate_min, Evidence::Missing),
        ("trust", capabilities.trust, Evidence::ReadBack),
        ("query_rss", capabilities.query_rss, Evidence::Missing),
        ("link state", capabilities.link_state, Evidence::Missing),
        ("no tags", capabilities.untagged_only, Evidence::Refuted),
    ] {
        ensure!(found == wanted, "{what}: {found:?}, and igb in QEMU is {wanted:?}");
    }
    ensure!(capabilities.max_vfs == 2 && eswitch.vf_limit() == Some(7), "{capabilities:?}");
    let again = writes(&mut eswitch, 0, |eswitch| Ok(eswitch.capabilities()?))?;
    ensure!(again == capabilities, "it changed its mind: {again:?}");
    // With every VF in use nothing can be tried, and what was found stays found.
    grant(&mut eswitch, VfIndex(1), settings(2, Some(100))?)?;
    let again = writes(&mut eswitch, 0, |eswitch| Ok(eswitch.capabilities()?))?;
    ensure!(again == capabilities, "it forgot: {again:?}");
    // Nor does the next daemon find an idle VF; it believes what it sees set.
    let mut second = Legacy::open(PORT)?;
    for vf in [VF, VfIndex(1)] {
        let netdev = interface(&mut second, vf)?;
        check(Command::new("ip").args(["link", "set", &netdev, "up"]))?;
    }
    let seen = writes(&mut second, 0, |second| Ok(second.capabilities()?))?;
    ensure!(seen.access_vlan == Evidence::ReadBack && seen.tunnel_vlan == Evidence::Assumed, "{seen:?}");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_that_were_bound_at_once_are_open_and_get_their_address_when_granted() -> Result<()> {
    let mut eswitch = port(0)?;
    fs::write(format!("/sys/class/net/{PORT}/device/sriov_drivers_autoprobe"), "1")?;
    set_vfs(1)?;
    let observed = eswitch.read_back(VF)?;
    ensure!(observed.enabled, "a VF with a driver is open: {observed:?}");
    eswitch.disable(VF)?;
    grant(&mut eswitch, VF, settings(1, Some(100))?)?;
    let netdev = interface(&mut eswitch, VF)?;
    let address = fs::read_to_string(format!("/sys/class/net/{netdev}/address"))?;
    ensure!(address.trim() == mac(1).to_string(), "the VF came up as {address}");
    Ok(())
}
