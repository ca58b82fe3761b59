//! Whatever goes wrong: the vNIC is on its software path, with network, and says why.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sluice_tests::api::text;
use sluice_tests::lab::Vm;
use sluice_tests::lab_guest;
use sluice_tests::vf_lab::{
    BOND, PF, VF, device, ip, scenario, set_vfs, vf_address, virtual_function, wait_carrier,
};
use sluice_tests::{Netns, wait_until};

use super::{ATTESTED, revoke};

/// A vNIC whose VF reaches it as said.
fn vnic(vm: &Vm, path: &str, bond: Option<&str>) -> String {
    let bond = bond.map_or_else(String::new, |bond| format!(", bond: {bond}"));
    vm.vnic(&format!("sriov: {{attach: {{netns: {{path: {path}, netdev: {VF}{bond}}}}}}}"))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn one_vf_goes_to_who_weighs_more() -> Result<()> {
    scenario(1, |lab| {
        let (vm1, vm2, soft) = (lab.guest(1)?, lab.guest(2)?, lab.software(4)?);
        let machines = lab.vnic(&vm1, "", 20) + &lab.vnic(&vm2, "", 60) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        lab.wait_path(&vm2, "HARDWARE")?;
        let path = lab.wait_reason(&vm1, "NO_FREE_VF")?;
        println!("the lighter one: {}", text(&path["message"]));
        vm1.ping(&soft)?;
        vm1.ping(&vm2)?;
        // A little more is not worth a move.
        lab.lab.apply(&format!("vnics:\n{}", lab.vnic(&vm1, "", 65)))?;
        lab.wait_reason(&vm1, "NO_FREE_VF")?;
        lab.lab.sluice().run(&["revoke", "vnic", &vm2.name, "--hold", "0"])?;
        lab.wait_path(&vm1, "HARDWARE")?;
        lab.lab.sluice().run(&["release", "vnic", &vm2.name])?;
        lab.wait_reason(&vm2, "NO_FREE_VF")?;
        vm1.ping(&soft)?;
        vm2.ping(&vm1)
    })
}

/// Gives a VF a driver, as an operator does.
fn bind(vf: u16, driver: &str) -> Result<()> {
    let device = virtual_function(vf)?;
    fs::write(device.join("driver_override"), driver)?;
    fs::write("/sys/bus/pci/drivers_probe", vf_address(vf)?)?;
    fs::write(device.join("driver_override"), "\n")?;
    wait_until(&format!("VF {vf} has driver {driver}"), lab_guest::PATIENCE, || {
        Ok(device.join("driver").exists().then_some(()))
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_that_somebody_uses_are_left_alone() -> Result<()> {
    scenario(4, |lab| {
        bind(0, "igbvf")?;
        bind(1, "vfio-pci")?;
        let entry =
            fs::read_dir(virtual_function(0)?.join("net"))?.next().context("VF 0 has no interface")??;
        let theirs = entry.file_name().to_string_lossy().into_owned();
        ip(&["link", "set", &theirs, "up"])?;
        let (vm1, vm2, vm3, soft) = (lab.guest(1)?, lab.guest(2)?, lab.guest(3)?, lab.software(4)?);
        let machines =
            [(&vm1, 50), (&vm2, 40), (&vm3, 30)].map(|(vm, weight)| lab.vnic(vm, "", weight)).concat();
        lab.lab.apply(&format!("{}vnics:\n{machines}{}", lab.switch(ATTESTED), soft.vnic("")))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        lab.wait_path(&vm2, "HARDWARE")?;
        let path = lab.wait_reason(&vm3, "NO_FREE_VF")?;
        println!("with 2 of 4 VFs in others' hands: {}", text(&path["message"]));
        let held = [lab.vf_of(&vm1)?, lab.vf_of(&vm2)?];
        ensure!(held.iter().all(|vf| [2, 3].contains(vf)), "VFs {held:?} were granted");
        let driver = fs::canonicalize(virtual_function(1)?.join("driver"))?;
        ensure!(driver.ends_with("vfio-pci"), "VF 1 has driver {}", driver.display());
        ensure!(Path::new("/sys/class/net").join(&theirs).exists(), "{theirs} is gone");
        vm3.ping(&soft)?;
        vm3.ping(&vm1)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn guests_that_do_not_play_along_keep_their_network() -> Result<()> {
    scenario(4, |lab| {
        let (nowhere, bondless, sleeper) = (lab.software(11)?, lab.software(12)?, lab.software(13)?);
        let (broken, soft) = (lab.guest(14)?, lab.software(4)?);
        broken.netns.run(&["ip", "link", "set", BOND, "type", "bond", "miimon", "0"])?;
        let machines = [
            vnic(&nowhere, "sl-nowhere", Some(BOND)),
            vnic(&bondless, bondless.netns.name(), Some(BOND)),
            vnic(&sleeper, sleeper.netns.name(), None),
            vnic(&broken, broken.netns.name(), Some(BOND)),
            soft.vnic(""),
        ];
        lab.lab.apply(&format!("{}vnics:\n{}", lab.switch(ATTESTED), machines.concat()))?;
        for (vm, wanted) in [
            (&nowhere, "is not there"),
            (&bondless, "there is no bond bond0"),
            (&broken, "does not watch links"),
        ] {
            let path = lab.wait_reason(vm, "BACKING_OFF")?;
            println!("{}: {}", vm.name, text(&path["message"]));
            ensure!(text(&path["message"]).contains(wanted), "{}: {path}", vm.name);
            vm.ping(&soft)?;
        }
        // This one is given its VF, and never sets it up.
        lab.wait_path(&sleeper, "ATTACHING")?;
        sleeper.ping(&soft)?;
        let path = lab.wait_reason(&sleeper, "BACKING_OFF")?;
        println!("{}: {}", sleeper.name, text(&path["message"]));
        ensure!(text(&path["message"]).contains("did not become active"), "{path}");
        sleeper.ping(&soft)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guest_that_clings_to_its_vf_is_cut_off() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, soft) = (lab.guest(1)?, lab.software(4)?);
        let machines = lab.vnic(&vm1, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        vm1.ping(&soft)?;
        let vf = lab.vf_of(&vm1)?;
        // Where the daemon cannot look for it.
        let lair: Netns = lab.lab.netns("lair")?;
        vm1.netns.run(&["ip", "link", "set", VF, "netns", lair.name()])?;
        revoke(lab, &vm1)?;
        let path = lab.path(&vm1)?;
        println!("{}", text(&path["cause"]));
        vm1.ping(&soft)?;
        ensure!(lair.ifindex(VF)?.is_none(), "the guest still has its VF");
        ensure!(!virtual_function(vf)?.join("driver").exists(), "the VF is open");
        lab.lab.sluice().run(&["release", "vnic", &vm1.name])?;
        lab.wait_path(&vm1, "HARDWARE")?;
        vm1.ping(&soft)
    })
}

/// The last test by name: the port is another one afterwards.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn z_a_port_that_is_unplugged_leaves_vnics_with_each_other() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2, soft) = (lab.guest(1)?, lab.guest(2)?, lab.software(4)?);
        let machines = lab.vnic(&vm1, "", 50) + &lab.vnic(&vm2, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        let pci = fs::canonicalize(device())?;
        // In the middle of a transition of the other.
        lab.lab.sluice().run(&["revoke", "vnic", &vm2.name, "--hold", "0"])?;
        lab.lab.sluice().run(&["release", "vnic", &vm2.name])?;
        fs::write(pci.join("remove"), "1").context("unplugging the port")?;
        for vm in [&vm1, &vm2] {
            let path = lab.wait_reason(vm, "NIC_UNAVAILABLE")?;
            println!("{}: {}", vm.name, text(&path["message"]));
            vm.ping(&soft)?;
        }
        vm1.ping(&vm2)?;
        plug(&pci)?;
        set_vfs(4)?;
        wait_carrier()?;
        for vm in [&vm1, &vm2] {
            lab.wait_path(vm, "HARDWARE")?;
            vm.ping(&soft)?;
        }
        vm1.ping(&vm2)
    })
}

/// Plugs the port in again, under its name.
fn plug(pci: &Path) -> Result<()> {
    fs::write("/sys/bus/pci/rescan", "1")?;
    let name = wait_until("the port is back", lab_guest::PATIENCE, || {
        let entry = fs::read_dir(pci.join("net"))?.next().transpose()?;
        Ok(entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
    })?;
    if name != PF {
        ip(&["link", "set", &name, "down"])?;
        ip(&["link", "set", &name, "name", PF])?;
    }
    fs::write(device().join("sriov_drivers_autoprobe"), "0")?;
    ip(&["link", "set", PF, "up"]).map(drop)
}
