//! What goes wrong: other people's hands, settings that the NIC refuses, VFs and ports that are not there.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use sluice_eswitch::contract::{ErrorClass, Eswitch, EswitchError, VfIndex};
use sluice_eswitch::legacy::Legacy;
use sluice_policy::placement::{Feature, FlowerProgram, Program, VfSettings, VlanProtocol};
use sluice_tests::lab_guest;
use sluice_tests::netns::check;

use super::{PORT, found, grant, port, port_vlan, set_vfs, settings, writes};

const VF: VfIndex = VfIndex(0);

fn refused(result: Result<(), EswitchError>, wanted: Feature, words: &str) -> Result<()> {
    match result {
        Err(EswitchError::Uncovered { feature, detail }) if feature == wanted && detail.contains(words) => {
            Ok(())
        }
        other => bail!("{wanted:?} ({words}) was to be refused: {other:?}"),
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_igb_cannot_do_is_uncovered_in_the_kernels_words() -> Result<()> {
    let mut eswitch = port(7)?;
    let plain = settings(1, Some(100))?;
    let tunnel = VfSettings { vlan: Some(port_vlan(100, 0, VlanProtocol::Dot1ad)?), ..plain };
    let minimum = VfSettings { min_rate_mbps: 10, ..plain };
    let rss = VfSettings { query_rss: true, ..plain };
    let try_it = |eswitch: &mut Legacy, settings| {
        let result = eswitch.program(VF, &Program::Legacy(settings));
        ensure!(!eswitch.read_back(VF)?.enabled, "it failed, and the VF is open");
        Ok(result)
    };
    refused(try_it(&mut eswitch, tunnel)?, Feature::TunnelVlan, "Protocol not supported")?;
    refused(try_it(&mut eswitch, minimum)?, Feature::RateFromVm, "Invalid argument")?;
    refused(try_it(&mut eswitch, rss)?, Feature::Offload, "not supported")?;

    // The same on a VF in use, where all but the last step is done already: it is closed.
    for (wanted, feature) in [(minimum, Feature::RateFromVm), (rss, Feature::Offload)] {
        grant(&mut eswitch, VF, plain)?;
        let result = try_it(&mut eswitch, wanted)?;
        refused(result, feature, "VF 0")?;
        ensure!(found(&mut eswitch, VF)? == plain, "it was half done");
    }
    let flower = Program::Switchdev(FlowerProgram::default());
    ensure!(eswitch.program(VF, &flower) == Err(EswitchError::WrongMode), "rules in legacy mode");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn an_open_vf_takes_one_change_and_refuses_two() -> Result<()> {
    let mut eswitch = port(7)?;
    let plain = settings(1, Some(100))?;
    grant(&mut eswitch, VF, plain)?;
    let moved = Program::Legacy(VfSettings { mac: super::mac(2), ..settings(1, Some(200))? });
    let result = writes(&mut eswitch, 0, |eswitch| Ok(eswitch.program(VF, &moved)))?;
    ensure!(result == Err(EswitchError::Open(VF)), "{result:?}");
    ensure!(found(&mut eswitch, VF)? == plain, "it was refused and done");
    let other_vlan = Program::Legacy(settings(1, Some(200))?);
    writes(&mut eswitch, 1, |eswitch| Ok(eswitch.program(VF, &other_vlan)?))?;
    ensure!(eswitch.read_back(VF)?.enabled, "one change closed it");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_that_somebody_removes_are_gone_and_come_back_without_a_program() -> Result<()> {
    let mut eswitch = port(2)?;
    let wanted = settings(1, Some(100))?;
    grant(&mut eswitch, VF, wanted)?;
    // Not by us while it is in use, and never from one number to another.
    for count in [0, 1] {
        let result = eswitch.set_vf_count(count);
        ensure!(
            matches!(&result, Err(EswitchError::Busy { detail }) if detail.contains("VF 0")),
            "{result:?}"
        );
    }
    set_vfs(0)?;
    ensure!(eswitch.vfs()?.is_empty(), "they are still listed");
    for result in [eswitch.read_back(VF).map(drop), eswitch.enable(VF), eswitch.stats(VF).map(drop)] {
        let error = result.expect_err("there is no VF");
        ensure!(error == EswitchError::NoSuchVf(VF) && error.class() == ErrorClass::Gone, "{error:?}");
        ensure!(error.to_string().contains("sriov_numvfs"), "{error}");
    }
    writes(&mut eswitch, 0, |eswitch| {
        eswitch.disable(VF)?;
        Ok(eswitch.unprogram(VF)?)
    })?;
    set_vfs(2)?;
    let observed = eswitch.read_back(VF)?;
    let differences = observed.differences(&Program::Legacy(wanted));
    ensure!(differences.iter().any(|one| one.what == "vlan"), "they came back as they were: {observed:?}");
    eswitch.disable(VF)?;
    grant(&mut eswitch, VF, wanted)?;
    eswitch.unprogram(VF)?;
    let result = eswitch.set_vf_count(3);
    let error = result.expect_err("the kernel does not change one number into another");
    ensure!(error.class() == ErrorClass::Passing && error.to_string().contains("set 0 first"), "{error}");
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.set_vf_count(2)?))?;
    eswitch.set_vf_count(0)?;
    ensure!(eswitch.capabilities()?.max_vfs == 0, "no VFs, and there are some to give");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_is_not_there_is_said_to_be_gone() -> Result<()> {
    let mut eswitch = port(7)?;
    let program = Program::Legacy(settings(1, None)?);
    let beyond = VfIndex(7);
    ensure!(eswitch.program(beyond, &program) == Err(EswitchError::NoSuchVf(beyond)), "VF 7 of 7");
    eswitch.unprogram(beyond)?;
    for name in ["nosuch0", "lo"] {
        let error = Legacy::open(name).err().map(|error| error.class());
        ensure!(error == Some(ErrorClass::Gone), "{name}: {error:?}");
    }
    // The port is renamed: it is found by its device.
    let rename = |from: &str, to: &str| {
        check(Command::new("ip").args(["link", "set", from, "down"]))?;
        check(Command::new("ip").args(["link", "set", from, "name", to]))?;
        check(Command::new("ip").args(["link", "set", to, "up"]))
    };
    rename(PORT, "wan0")?;
    let renamed = eswitch.program(VF, &program);
    rename("wan0", PORT)?;
    renamed?;
    ensure!(eswitch.read_back(VF)?.differences(&program).is_empty(), "it was renamed twice");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn an_unplugged_port_is_gone_and_its_vfs_are_closed() -> Result<()> {
    lab_guest::require()?;
    let simulated = super::simulated::Simulated::create(21)?;
    let mut eswitch = Legacy::open(simulated.netdev())?;
    eswitch.set_vf_count(2)?;
    eswitch.disable(VF)?;
    grant(&mut eswitch, VF, settings(1, None)?)?;
    drop(simulated);
    let error = eswitch.read_back(VF).expect_err("it is unplugged");
    ensure!(error.class() == ErrorClass::Gone, "{error:?}");
    let error = eswitch.program(VF, &Program::Legacy(settings(1, None)?)).expect_err("it is unplugged");
    ensure!(matches!(error, EswitchError::DeviceGone { .. }), "{error:?}");
    eswitch.disable(VF)?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_that_a_vm_holds_is_busy_until_it_lets_go() -> Result<()> {
    let mut eswitch = port(7)?.with_vf_driver("vfio-pci");
    check(Command::new("modprobe").arg("vfio-pci"))?;
    grant(&mut eswitch, VF, settings(1, Some(100))?)?;
    let vf = eswitch.vfs()?.swap_remove(0);
    ensure!(vf.driver.as_deref() == Some("vfio-pci"), "{vf:?} has another driver");
    // What QEMU does first of all.
    let device = format!("/sys/bus/pci/devices/{}/iommu_group", vf.pci.as_deref().unwrap_or_default());
    let group = fs::canonicalize(device)?;
    let group = Path::new("/dev/vfio").join(group.file_name().unwrap_or_default());
    let held = fs::OpenOptions::new().read(true).write(true).open(&group)?;
    let error = writes(&mut eswitch, 0, |eswitch| Ok(eswitch.disable(VF)))?.expect_err("a VM holds it");
    ensure!(error.class() == ErrorClass::Passing && error.to_string().contains("vfio-pci"), "{error}");
    ensure!(eswitch.read_back(VF)?.enabled, "it could not be closed, and reads back closed");
    drop(held);
    eswitch.unprogram(VF)?;
    ensure!(!eswitch.read_back(VF)?.enabled, "it was let go, and is still open");
    Ok(())
}
