//! What changes of the path cost: connections live, losses are few and counted, and in software there are none.

use std::time::Instant;

use anyhow::{Result, ensure};
use sluice_tests::Flow;
use sluice_tests::flow::{FlowReport, FlowTrace};
use sluice_tests::lab::Vm;
use sluice_tests::tcp::Connection;
use sluice_tests::vf_lab::{PATIENCE, VfLab, scenario};

use super::{ATTESTED, PACE, revoke};

/// Rounds; in each both guests lose their VF and get it again.
const ROUNDS: usize = 25;

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn connections_survive_fifty_grants_and_revokes() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2) = (lab.guest(1)?, lab.guest(2)?);
        let (soft, other, outside) = (lab.software(4)?, lab.software(5)?, lab.outside(None)?);
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}{}",
            lab.switch(ATTESTED),
            lab.vnic(&vm1, "", 50),
            lab.vnic(&vm2, "", 50),
            soft.vnic(""),
            other.vnic(""),
        ))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        lab.wait_path(&vm2, "HARDWARE")?;
        for (from, to) in [(&vm1, &outside), (&vm1, &soft), (&vm1, &vm2), (&soft, &other), (&soft, &outside)]
        {
            from.ping(to)?;
        }
        let connect = |from: &Vm, to: &Vm, port: u16| {
            Connection::start(&from.netns, &to.netns, (to.ip4(), port).into(), PACE)
        };
        let connections = [
            ("guest to outside", connect(&vm1, &outside, 7101)?),
            ("outside to guest", connect(&outside, &vm1, 7102)?),
            ("guest to software", connect(&vm1, &soft, 7103)?),
            ("guest to guest", connect(&vm1, &vm2, 7104)?),
        ];
        let stream = |from: &Vm, to: &Vm, port: u16| {
            Flow::start_paced(&from.netns, &to.netns, (to.ip4(), port).into(), PACE)
        };
        let moving = [
            ("guest to outside", stream(&vm1, &outside, 7001)?),
            ("outside to guest", stream(&outside, &vm1, 7002)?),
            ("guest to software", stream(&vm1, &soft, 7003)?),
            ("software to guest", stream(&soft, &vm1, 7004)?),
        ];
        let still = [
            ("software to software", stream(&soft, &other, 7005)?),
            ("software to outside", stream(&soft, &outside, 7006)?),
            ("outside to software", stream(&outside, &soft, 7007)?),
        ];

        let mut marks: Vec<(&str, Vec<u64>)> = Vec::new();
        let mark = |what: &'static str, marks: &mut Vec<(&str, Vec<u64>)>| {
            marks.push((what, moving.iter().map(|(_, flow)| flow.sent()).collect()));
        };
        let begin = Instant::now();
        mark("start", &mut marks);
        for _ in 0..ROUNDS {
            for vm in [&vm1, &vm2] {
                revoke(lab, vm)?;
            }
            settle(&connections)?;
            mark("revoke", &mut marks);
            for vm in [&vm1, &vm2] {
                lab.lab.sluice().run(&["release", "vnic", &vm.name])?;
            }
            for vm in [&vm1, &vm2] {
                lab.wait_path(vm, "HARDWARE")?;
            }
            settle(&connections)?;
            mark("grant", &mut marks);
        }
        println!("{ROUNDS} revokes and grants of each of two guests in {:.0?}", begin.elapsed());
        for (name, connection) in connections {
            let (answered, slowest) = connection.finish()?;
            println!("TCP {name}: {answered} requests answered, the slowest after {slowest:.0?}");
        }
        for (at, (name, flow)) in moving.into_iter().enumerate() {
            let (report, trace) = flow.finish_traced()?;
            tell(name, &report);
            for kind in ["revoke", "grant"] {
                println!("    per {kind}: {}", costs(&marks, kind, at, &trace));
            }
            // A guest that keeps its connections loses moments, not seconds.
            ensure!(report.lost() * 5 < report.sent, "{name}: most was lost: {report:?}");
        }
        for (name, flow) in still {
            let report = flow.finish()?;
            tell(name, &report);
            ensure!(report.lost() == 0 && report.duplicated == 0, "{name}: {report:?}");
        }
        told(lab, &vm1)
    })
}

/// Every connection goes on.
fn settle(connections: &[(&str, Connection)]) -> Result<()> {
    connections.iter().try_for_each(|(_, connection)| connection.wait_more(5, PATIENCE))
}

fn tell(name: &str, report: &FlowReport) {
    println!(
        "UDP {name}: {} sent, {} lost, {} duplicated, {} reordered, longest gap {:.0?}",
        report.sent,
        report.lost(),
        report.duplicated,
        report.reordered,
        report.longest_gap
    );
}

/// Mean and worst of what was lost, duplicated and reordered between a mark of this kind and the one before it.
fn costs(marks: &[(&str, Vec<u64>)], kind: &str, at: usize, trace: &FlowTrace) -> String {
    let spans: Vec<(u64, u64)> = marks
        .windows(2)
        .filter(|pair| pair[1].0 == kind)
        .map(|pair| (pair[0].1[at], pair[1].1[at]))
        .collect();
    let summary = |sequences: &[u64]| {
        let counts: Vec<usize> = spans
            .iter()
            .map(|(from, to)| sequences.iter().filter(|one| (from..to).contains(one)).count())
            .collect();
        let (sum, worst) = (counts.iter().sum::<usize>(), counts.iter().max().copied().unwrap_or(0));
        format!("{:.1} (worst {worst})", sum as f64 / counts.len().max(1) as f64)
    };
    format!(
        "lost {}, duplicated {}, reordered {}, one packet each {PACE:?}",
        summary(&trace.lost),
        summary(&trace.duplicated),
        summary(&trace.reordered)
    )
}

/// The daemon has counted the transitions.
fn told(lab: &VfLab, vm: &Vm) -> Result<()> {
    let path = lab.path(vm)?;
    let counters = &path["counters"];
    println!("counters of {}: {counters}", vm.name);
    let count = |from: &str, to: &str| -> u64 {
        sluice_tests::api::list(&counters["transitions"])
            .iter()
            .filter(|one| one["from"] == from && one["to"] == to)
            .map(|one| sluice_tests::api::number(&one["count"]))
            .sum()
    };
    let (grants, revokes) = (count("ATTACHING", "HARDWARE"), count("HARDWARE", "DRAINING"));
    ensure!(
        grants as usize > ROUNDS && revokes as usize >= ROUNDS,
        "{grants} grants and {revokes} revokes were counted in {ROUNDS} rounds"
    );
    Ok(())
}
