//! A daemon that dies leaves VFs alone, and one that starts takes them over as they are.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_tests::api::text;
use sluice_tests::lab::Vm;
use sluice_tests::vf_lab::{PATIENCE, scenario};
use sluice_tests::{Flow, wait_until};

use super::{ATTESTED, PACE};

/// So long after the start the path is looked at; the daemon looks at the NIC every second.
const WATCHED: Duration = Duration::from_secs(5);

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_outlives_the_daemon_and_is_adopted_without_a_write() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2) = (lab.guest(1)?, lab.guest(2)?);
        let (soft, outside) = (lab.software(4)?, lab.outside(None)?);
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}",
            lab.switch(ATTESTED),
            lab.vnic(&vm1, "", 50),
            lab.vnic(&vm2, "", 50),
            soft.vnic(""),
        ))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        lab.wait_path(&vm2, "HARDWARE")?;
        for (from, to) in [(&vm1, &outside), (&vm1, &soft), (&vm1, &vm2)] {
            from.ping(to)?;
        }
        let vf = lab.vf_of(&vm1)?;
        let stream = |from: &Vm, to: &Vm, port: u16| {
            Flow::start_paced(&from.netns, &to.netns, (to.ip4(), port).into(), PACE)
        };
        let streams = [
            ("guest to outside", stream(&vm1, &outside, 7001)?),
            ("outside to guest", stream(&outside, &vm1, 7002)?),
            ("guest to software", stream(&vm1, &soft, 7003)?),
            ("software to guest", stream(&soft, &vm1, 7004)?),
            ("guest to guest", stream(&vm1, &vm2, 7005)?),
        ];
        let go_on = || -> Result<()> {
            streams.iter().try_for_each(|(_, stream)| stream.wait_received(stream.received() + 100, PATIENCE))
        };
        go_on()?;
        lab.lab.kill()?;
        go_on()?;
        // New flows too.
        soft.ping(&vm1)?;
        vm1.ping(&soft)?;
        lab.lab.start()?;
        let start = Instant::now();
        let mut looks = 0;
        wait_until("it was watched for a while", PATIENCE, || {
            let path = lab.path(&vm1)?;
            if text(&path["path"]) != "HARDWARE" {
                looks = -1_000_000;
            }
            looks += 1;
            Ok((start.elapsed() > WATCHED || looks < 0).then_some(()))
        })?;
        let path = lab.path(&vm1)?;
        ensure!(looks > 0, "it left its VF: {path}");
        ensure!(lab.vf_of(&vm1)? == vf, "it is on another VF: {path}");
        lab.wait_explain(&vm1, "adopted")?;
        let writes = lab.writes()?;
        ensure!(writes == 0, "the restarted daemon wrote {writes} times to the NIC");
        go_on()?;
        println!("adopted with 0 writes, in hardware at all of {looks} looks in {WATCHED:?}");
        for (name, stream) in streams {
            let report = stream.finish()?;
            println!(
                "{name}: {} sent, {} lost, {} duplicated, longest gap {:.0?}",
                report.sent,
                report.lost(),
                report.duplicated,
                report.longest_gap
            );
            ensure!(report.lost() == 0 && report.duplicated == 0, "{name}: {report:?}");
        }
        Ok(())
    })
}
