//! What others do to the NIC behind the daemon's back is noticed, named, and repaired, or the vNIC has left for its
//! software path: within two seconds.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};
use sluice_tests::api::{number, text};
use sluice_tests::lab::Vm;
use sluice_tests::vf_lab::{PATIENCE, PF, VfLab, ip, meddle, scenario, set_vfs, shown, wait_carrier};
use sluice_tests::{Flow, wait_until};

use super::{ATTESTED, PACE};

/// What the issue promises.
const SOON: Duration = Duration::from_secs(2);

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn settings_that_somebody_changes_are_put_back() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, soft) = (lab.guest(1)?, lab.software(4)?);
        // An address of a VF that is changed leaves its policy; others may be left alone.
        let machines = lab.vnic(&vm1, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        for (what, setting) in [
            ("spoofchk", &["spoofchk", "off"][..]),
            ("vlan", &["vlan", "77"]),
            ("trust", &["trust", "on"]),
            ("mac", &["mac", "02:00:00:00:66:66"]),
        ] {
            // Four in a minute, and the NIC is not trusted for a while.
            lab.lab.sluice().run(&["release", "vnic", &vm1.name])?;
            lab.wait_path(&vm1, "HARDWARE")?;
            vm1.ping(&soft)?;
            let vf = lab.vf_of(&vm1)?;
            let before = shown(vf)?;
            meddle(vf, setting)?;
            let start = Instant::now();
            let how = wait_until(&format!("{what} is put back, or the VF taken"), PATIENCE, || {
                let now = shown(vf)?;
                if now == before {
                    return Ok(Some("put back"));
                }
                let path = lab.path(&vm1)?;
                if text(&path["path"]) == "SOFTWARE" { Ok(Some("taken")) } else { bail!("{now}; {path}") }
            })?;
            let time = start.elapsed();
            println!("{what}: {how} after {time:.0?}");
            ensure!(time < SOON, "{what} was {how} after {time:?}");
            // Named in the events, that is: on a line of its own.
            wait_until(&format!("explain tells of {what}"), PATIENCE, || {
                let said = lab.explain(&vm1)?;
                let told = said.lines().find(|line| line.contains("drift") && line.contains(what));
                match told {
                    Some(line) => {
                        println!("    {}", line.trim());
                        Ok(Some(()))
                    }
                    None => bail!("{said}"),
                }
            })?;
            vm1.ping(&soft)?;
        }
        lab.lab.sluice().run(&["release", "vnic", &vm1.name])?;
        lab.wait_path(&vm1, "HARDWARE")?;
        vm1.ping(&soft)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_and_ports_that_go_leave_the_vnic_with_network_and_come_back() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, soft) = (lab.guest(1)?, lab.software(4)?);
        let machines = lab.vnic(&vm1, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        vm1.ping(&soft)?;

        loses_its_vf(lab, &vm1, &soft, "sriov_numvfs=0", || set_vfs(0))?;
        lab.wait_explain(&vm1, "VF")?;
        set_vfs(4)?;
        let time = lab.wait_path(&vm1, "HARDWARE")?;
        println!("and has a VF again {time:.1?} after there were some");
        wait_carrier()?;
        vm1.ping(&soft)?;

        loses_its_vf(lab, &vm1, &soft, "port down", || ip(&["link", "set", PF, "down"]).map(drop))?;
        lab.wait_explain(&vm1, "is down")?;
        ip(&["link", "set", PF, "up"])?;
        let time = lab.wait_path(&vm1, "HARDWARE")?;
        println!("and has a VF again {time:.1?} after the port came up");
        wait_carrier()?;
        vm1.ping(&soft)
    })
}

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}

/// Does something that takes the guest's VF away, and wants it on its software path soon, with network.
fn loses_its_vf(lab: &VfLab, vm: &Vm, peer: &Vm, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let there = Flow::start_paced(&vm.netns, &peer.netns, (peer.ip4(), 7001).into(), PACE)?;
    let back = Flow::start_paced(&peer.netns, &vm.netns, (vm.ip4(), 7002).into(), PACE)?;
    there.wait_received(50, PATIENCE)?;
    back.wait_received(50, PATIENCE)?;
    let (start, clock) = (Instant::now(), now_ms()?);
    act()?;
    let done = start.elapsed();
    let (_, path) = lab
        .wait_status(vm, "no longer on its VF", PATIENCE, |path| matches!(text(&path["path"]), "SOFTWARE"))?;
    // What asks costs more than what is asked for, in an emulated machine.
    let status = Duration::from_millis(number(&path["sinceUnixMs"]).saturating_sub(clock));
    let marks = [there.received(), back.received()];
    there.wait_received(marks[0] + 20, PATIENCE)?;
    back.wait_received(marks[1] + 20, PATIENCE)?;
    let network = start.elapsed();
    let reports = [there.finish()?, back.finish()?];
    println!(
        "{what} (which took {done:.0?}): in software after {status:.0?}, traffic both ways after {network:.0?}; gaps {:.0?} \
         and {:.0?}; {}",
        reports[0].longest_gap,
        reports[1].longest_gap,
        text(&path["message"])
    );
    let gap = reports[0].longest_gap.max(reports[1].longest_gap);
    ensure!(status < SOON + done, "{what}: the status was right after {status:?}");
    ensure!(gap < SOON + done, "{what}: there was no network for {gap:?}");
    ensure!(!text(&path["message"]).is_empty(), "{what}: {path}");
    Ok(())
}
