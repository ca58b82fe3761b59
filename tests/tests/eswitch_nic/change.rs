//! What others do to a PF is noticed, and the right eSwitch opened.

use super::*;

use sluice_eswitch::contract::{ErrorClass, VfIndex};
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Mode, Program, VfSettings};
use std::collections::BTreeSet;

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn it_is_known_which_nic_it_is() -> Result<()> {
    lab_guest::require()?;
    let nic = HostNic::open(PORT)?;
    let identity = nic.identity();
    ensure!(identity.driver == "igb" && identity.bus == "pci", "{identity}");
    ensure!(identity.pci.is_some_and(|id| id.to_string() == "8086:10c9 1af4:1100"), "{identity}");
    ensure!(!identity.firmware.is_empty(), "ethtool -i shows a version of firmware: {identity}");
    let other = HostNic::open("pf1")?;
    ensure!(other.identity().address != identity.address, "both are at {}", identity.address);
    ensure!(other.identity().is_same_kind(identity), "{identity} and {}", other.identity());
    let simulated = Simulated::create(40)?;
    let nic = simulated.open()?;
    ensure!(
        nic.identity().key().starts_with("driver netdevsim, device netdevsim, firmware "),
        "{}",
        nic.identity()
    );
    ensure!(!nic.identity().is_same_kind(identity));
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn names_and_numbers_of_vfs_that_change_are_noticed() -> Result<()> {
    lab_guest::require()?;
    ip(&["link", "set", PORT, "up"])?;
    let mut nic = HostNic::open(PORT)?;
    nic.set_vf_count(0)?;
    changed(&mut nic, &[])?;
    nic.set_vf_count(2)?;
    changed(&mut nic, &[])?;
    ensure!(nic.eswitch().vfs()?.iter().all(|vf| vf.driver.is_none()), "new VFs have drivers");
    write_device(PORT, "sriov_numvfs", "0")?;
    changed(&mut nic, &[Change::VfCount { from: 2, to: 0 }])?;
    write_device(PORT, "sriov_numvfs", "3")?;
    changed(&mut nic, &[Change::VfCount { from: 0, to: 3 }])?;
    for count in ["0", "3"] {
        write_device(PORT, "sriov_numvfs", count)?;
    }
    changed(&mut nic, &[Change::VfsRemade])?;

    ip(&["link", "set", PORT, "down"])?;
    ip(&["link", "set", PORT, "name", "wan0"])?;
    let renamed = changed(&mut nic, &[Change::Renamed { from: PORT.into(), to: "wan0".into() }]);
    let works = nic.eswitch().vfs().map(|vfs| vfs.len());
    ip(&["link", "set", "wan0", "name", PORT])?;
    ip(&["link", "set", PORT, "up"])?;
    renamed?;
    ensure!(works? == 3, "it does not work under its new name");
    changed(&mut nic, &[Change::Renamed { from: "wan0".into(), to: PORT.into() }])?;
    nic.set_vf_count(0)?;
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_pf_that_is_unplugged_and_plugged_is_used_again() -> Result<()> {
    lab_guest::require()?;
    let mut nic = HostNic::open("pf1")?;
    nic.set_vf_count(0)?;
    let writes = nic.writes();
    let address = nic.identity().address.clone();
    write_device("pf1", "remove", "1")?;
    let gone = changed(&mut nic, &[Change::Gone]);
    let is_present = nic.is_present();
    let error = nic.eswitch().vfs();
    fs::write("/sys/bus/pci/rescan", "1")?;
    gone?;
    ensure!(!is_present, "it is said to be there");
    ensure!(error.as_ref().is_err_and(|error| error.class() == ErrorClass::Gone), "without a PF: {error:?}");
    let net = format!("/sys/bus/pci/devices/{address}/net");
    let name = wait_until("the port has an interface again", PATIENCE, || {
        let Ok(mut entries) = fs::read_dir(&net) else { return Ok(None) };
        Ok(entries.next().transpose()?.map(|entry| entry.file_name().to_string_lossy().into_owned()))
    })?;
    let found = nic.refresh()?;
    let listed = nic.eswitch().vfs();
    if name != "pf1" {
        ip(&["link", "set", &name, "name", "pf1"])?;
    }
    ip(&["link", "set", "pf1", "up"])?;
    ensure!(found.changes.first() == Some(&Change::Back) && found.loses_programs(), "{found}");
    ensure!(nic.is_present() && listed?.is_empty(), "it is back, and does not work");
    nic.refresh()?;
    ensure!(nic.netdev() == "pf1" && nic.identity().address == address, "{}", nic.identity());
    ensure!(nic.writes() == writes, "looking wrote something");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_mode_that_flips_opens_the_other_eswitch() -> Result<()> {
    let simulated = Simulated::create(41)?;
    simulated.set_vfs(2)?;
    let mut nic = simulated.open()?;
    ensure!(nic.mode() == Mode::Legacy && nic.representors()?.is_none(), "new ones are in legacy mode");
    let settings = VfSettings { mac: MacAddr([2, 0, 0, 0, 0, 9]), ..VfSettings::default() };
    nic.eswitch().disable(VfIndex(0))?;
    nic.eswitch().program(VfIndex(0), &Program::Legacy(settings))?;
    let mac = BTreeSet::from([MacAddr([2, 0, 0, 0, 0, 10])]);
    nic.adopt_unicast_filter(&mac);
    let writes = nic.writes();
    ensure!(writes > 0, "it was programmed without a write");

    simulated.set_mode("switchdev")?;
    let wrong = nic.eswitch().program(VfIndex(0), &Program::Switchdev(Default::default()));
    ensure!(wrong == Err(EswitchError::WrongMode), "not looked yet: {wrong:?}");
    changed(&mut nic, &[Change::Mode { to: Mode::Switchdev }])?;
    let ports = nic.representors()?.context("representors")?;
    ensure!(ports.vfs.len() == 2 && ports.uplink.netdev == simulated.netdev, "{ports:?}");
    ensure!(nic.eswitch().capabilities()?.mode == Mode::Switchdev, "it is the other back-end");
    ensure!(!nic.opens_by_binding(VfIndex(0))?, "representors open VFs");
    ensure!(nic.unicast_filter() == mac, "it forgot what is ours in the filter");

    simulated.set_mode("legacy")?;
    changed(&mut nic, &[Change::Mode { to: Mode::Legacy }])?;
    ensure!(nic.unicast_filter() == mac, "it forgot what is ours in the filter");
    ensure!(nic.writes() >= writes, "writes went backwards");
    Ok(())
}
