//! Changing mode and number of VFs, and the way back when that fails.

use super::*;

use sluice_eswitch::contract::VfIndex;
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Mode, Program, VfSettings};

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn there_and_back_with_all_vfs_closed() -> Result<()> {
    let simulated = Simulated::create(42)?;
    simulated.set_vfs(1)?;
    let mut nic = simulated.open()?;
    for (mode, vfs) in [
        (Mode::Switchdev, 3),
        (Mode::Switchdev, 2),
        (Mode::Legacy, 2),
        (Mode::Switchdev, 0),
        (Mode::Switchdev, 2),
        (Mode::Legacy, 0),
    ] {
        nic.set_mode(mode, vfs)?;
        ensure!(nic.mode() == mode, "{mode:?} was wanted");
        changed(&mut nic, &[])?;
        let found = nic.eswitch().vfs()?;
        ensure!(found.len() == usize::from(vfs), "{vfs} VFs were wanted: {found:?}");
        for vf in found {
            ensure!(!nic.eswitch().read_back(vf.index)?.enabled, "{} is open in {mode:?}", vf.index);
        }
        let writes = nic.writes();
        nic.set_mode(mode, vfs)?;
        ensure!(nic.writes() == writes, "all was so, and something was written");
    }
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_fails_half_way_is_put_back() -> Result<()> {
    let simulated = Simulated::create(43)?;
    let too_many = simulated.limit_vfs(4)? + 1;
    simulated.set_vfs(2)?;
    let mut nic = simulated.open()?;
    // The mode changes, and then so many VFs cannot be had.
    let failed = nic.set_mode(Mode::Switchdev, too_many);
    ensure!(failed.is_err(), "{too_many} VFs");
    ensure!(nic.mode() == Mode::Legacy, "it stayed in the other mode");
    changed(&mut nic, &[])?;
    ensure!(nic.eswitch().vfs()?.len() == 2, "the former VFs are not back");
    nic.set_mode(Mode::Switchdev, 4)?;
    let failed = nic.set_mode(Mode::Legacy, too_many);
    ensure!(failed.is_err(), "{too_many} VFs");
    ensure!(nic.mode() == Mode::Switchdev && nic.eswitch().vfs()?.len() == 4, "it is not as it was");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_that_run_programs_are_not_removed() -> Result<()> {
    let simulated = Simulated::create(44)?;
    let mut nic = simulated.open()?;
    nic.set_vf_count(2)?;
    let settings = VfSettings { mac: MacAddr([2, 0, 0, 0, 0, 9]), ..VfSettings::default() };
    nic.eswitch().program(VfIndex(1), &Program::Legacy(settings))?;
    let writes = nic.writes();
    for refused in [nic.set_mode(Mode::Switchdev, 2), nic.set_vf_count(0)] {
        ensure!(matches!(refused, Err(EswitchError::Busy { .. })), "{refused:?}");
    }
    ensure!(nic.writes() == writes && nic.mode() == Mode::Legacy, "something was done");
    nic.eswitch().unprogram(VfIndex(1))?;
    nic.set_vf_count(0)?;
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_nic_without_the_mode_stays_as_it_is() -> Result<()> {
    lab_guest::require()?;
    let mut nic = HostNic::open(PORT)?;
    nic.set_vf_count(2)?;
    let refused = nic.set_mode(Mode::Switchdev, 2);
    ensure!(matches!(refused, Err(EswitchError::Uncovered { .. })), "igb has no such mode: {refused:?}");
    ensure!(nic.mode() == Mode::Legacy && nic.eswitch().vfs()?.len() == 2, "it is not as it was");
    nic.set_vf_count(0)?;
    Ok(())
}
