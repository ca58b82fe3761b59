//! Workers of the daemon: what they cost without traffic, and that queues and workers change places while guests talk.

// Figures are worth seeing.
#![allow(clippy::print_stdout)]

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_tests::flow::{Flow, FlowReport};
use sluice_tests::{Lab, PATIENCE, Vm, scenario, tools, wait_until};

use super::Guest;

/// Over so long the cost of guests without traffic is measured.
const QUIET: Duration = Duration::from_secs(5);
/// Between two packets of a flow: what a guest's rings have room for, however busy this machine is.
const PAUSE: Duration = Duration::from_micros(20);

/// A thread of the daemon.
struct Thread {
    name: String,
    /// Nanoseconds on a CPU, ever.
    ran: u64,
    /// Capabilities in force, as the kernel prints them.
    capabilities: String,
}

fn threads(lab: &Lab) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", lab.daemon_pid()))? {
        let folder = task?.path();
        let read = |file: &str| fs::read_to_string(folder.join(file)).context("a thread of the daemon");
        let ran = read("schedstat")?.split_whitespace().next().context("a time")?.parse()?;
        let status = read("status")?;
        let capabilities =
            status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("capabilities")?;
        let (name, capabilities) = (read("comm")?.trim().to_owned(), capabilities.trim().to_owned());
        threads.push(Thread { name, ran, capabilities });
    }
    Ok(threads)
}

fn workers(threads: &[Thread]) -> impl Iterator<Item = &Thread> {
    threads.iter().filter(|thread| thread.name.starts_with("sluice-worker"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Cores of the workers.
fn cores(status: &Value) -> Vec<u64> {
    list(&status["workers"]).iter().filter_map(|worker| worker["core"].as_u64()).collect()
}

/// Where a queue is, and where it is pinned to.
fn place(status: &Value, port: &str) -> Option<(u64, Option<u64>)> {
    list(&status["workers"]).iter().find_map(|worker| {
        let queue = list(&worker["queues"]).iter().find(|queue| queue["port"] == port)?;
        Some((worker["core"].as_u64()?, queue["pin"].as_u64()))
    })
}

/// Waits until one finds the other. That none is lost is for flows to show.
fn reach(one: &Vm, other: &Vm) -> Result<()> {
    wait_until("an answer", PATIENCE, || {
        Ok((tools::pings_answered(&one.netns, &other.ip4().to_string(), 1)? == 1).then_some(()))
    })
}

/// Two cores that the daemon may use.
fn two_cores(lab: &Lab) -> Result<[u64; 2]> {
    let status = lab.sluice().json(&["workers"])?;
    let allowed: Vec<u64> = list(&status["allowedCores"]).iter().filter_map(Value::as_u64).collect();
    ensure!(allowed.len() >= 2, "this test needs two cores: {allowed:?}");
    Ok([allowed[0], allowed[1]])
}

#[test]
fn guests_without_traffic_cost_next_to_nothing() -> Result<()> {
    scenario(|lab| {
        let guests = [2, 3, 4, 5].map(|number| Guest::new(lab, number));
        let guests: Vec<Guest> = guests.into_iter().collect::<Result<_>>()?;
        let vnics: String = guests.iter().map(|guest| guest.vnic("")).collect();
        lab.sluice().apply(&format!("switches: [{{name: blue}}]\nvnics:\n{vnics}"))?;
        let [one, two] = two_cores(lab)?;
        lab.sluice().run(&["workers", "cores", &format!("{one},{two}")])?;
        let vmms: Vec<_> = guests.iter().map(|guest| guest.boot(lab, true)).collect::<Result<_>>()?;
        reach(&guests[0].vm, &guests[3].vm)?;
        // Guests that have just come look for routers and neighbours. What they still say is traffic, and may cost its part.
        let quiet = wait_until("guests without traffic cost below 1 % of a core", 3 * PATIENCE, || {
            let (before, begin) = (threads(lab)?, Instant::now());
            std::thread::sleep(QUIET);
            let (after, took) = (threads(lab)?, begin.elapsed());
            let share = |of: &dyn Fn(&[Thread]) -> u64| {
                of(&after).saturating_sub(of(&before)) as f64 / took.as_nanos() as f64
            };
            let busy = share(&|threads| workers(threads).map(|thread| thread.ran).sum());
            let all = share(&|threads| threads.iter().map(|thread| thread.ran).sum());
            println!("workers: {:.3} % of a core; the whole daemon: {:.3} %", 100.0 * busy, 100.0 * all);
            ensure!(busy < 0.01, "workers take {:.2} % of a core", 100.0 * busy);
            Ok(Some(after))
        })?;
        ensure!(workers(&quiet).count() == 2, "there are two workers");
        for worker in workers(&quiet) {
            let name = &worker.name;
            ensure!(
                worker.capabilities.bytes().all(|byte| byte == b'0'),
                "{name} has {}",
                worker.capabilities
            );
        }
        // Some guest may be saying something just now.
        wait_until("the daemon says so too", PATIENCE, || {
            let status = lab.sluice().json(&["workers"])?;
            for worker in list(&status["workers"]) {
                let load = worker["load"].as_f64().context("a load")?;
                ensure!(worker["state"] == "ASLEEP" && load < 0.01, "{worker}");
            }
            Ok(Some(()))
        })?;
        vmms.into_iter().try_for_each(|vmm| vmm.end())
    })
}

fn is_whole(flow: &str, report: &FlowReport) -> Result<()> {
    ensure!(
        report.lost() == 0 && report.reordered == 0 && report.duplicated == 0 && report.sent > 0,
        "{flow}: {report:?}"
    );
    println!("{flow}: {} packets, longest gap {:?}", report.sent, report.longest_gap);
    Ok(())
}

#[test]
fn queues_and_workers_change_places_while_guests_talk() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        let (vm2, vm3) = (Guest::new(lab, 2)?, Guest::new(lab, 3)?);
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}{}",
            vm1.vnic(""),
            vm2.vnic(""),
            vm3.vnic("")
        ))?;
        let (first, second) = (vm2.boot(lab, false)?, vm3.boot(lab, false)?);
        let [one, two] = two_cores(lab)?.map(|core| core.to_string());
        let both = format!("{one},{two}");
        let move_to = |port: &str, core: &str| lab.sluice().run(&["workers", "move", port, "0", core]);
        lab.sluice().run(&["workers", "cores", &both])?;
        reach(&vm2.vm, &vm3.vm)?;
        reach(&vm1, &vm2.vm)?;
        // One to each guest: its rings have room for what one has in flight.
        let flow = |from: &Vm, to: &Vm| {
            Flow::start_paced(&from.netns, &to.netns, SocketAddr::from((to.ip4(), 7001)), PAUSE)
        };
        let (rings, trunk) = (flow(&vm2.vm, &vm3.vm)?, flow(&vm1, &vm2.vm)?);
        for round in 0..10 {
            let core = if round % 2 == 0 { &two } else { &one };
            for port in ["vnic/vm2", "user/blue", "vnic/vm3"] {
                move_to(port, core)?;
            }
            let status = lab.sluice().json(&["workers"])?;
            let core = core.parse()?;
            ensure!(place(&status, "vnic/vm2") == Some((core, Some(core))), "{status}");
            // All move at once, since a worker ends; and back, since they are pinned.
            lab.sluice().run(&["workers", "cores", if round % 3 == 0 { &one } else { &two }])?;
            lab.sluice().run(&["workers", "cores", &both])?;
        }
        let so_far = rings.received();
        rings.wait_received(so_far + 1_000, PATIENCE)?;
        is_whole("between guests with rings", &rings.finish()?)?;
        is_whole("over the trunk", &trunk.finish()?)?;

        // What was said outlives the daemon, which numbers its workers by core.
        let chosen = lab.sluice().json(&["workers", "cores", &one])?;
        ensure!(cores(&chosen) == [one.parse::<u64>()?], "{chosen}");
        lab.stop()?;
        lab.start()?;
        lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
        let status = lab.sluice().json(&["workers"])?;
        ensure!(cores(&status) == cores(&chosen), "{status}");
        let pinned = place(&status, "vnic/vm2").context("it is served")?.1;
        ensure!(pinned.is_some(), "the pin outlives the daemon: {status}");
        let status = lab.sluice().json(&["workers", "auto", "vnic/vm2"])?;
        ensure!(place(&status, "vnic/vm2").context("it is served")?.1.is_none(), "{status}");

        for (words, wanted) in [
            (&["workers", "move", "vnic/vm9", "0", &one][..], "no such port"),
            (&["workers", "move", "vnic/vm1", "0", &one], "kernel engine serves it"),
            (&["workers", "move", "vnic/vm2", "7", &one], "no queue 7"),
            (&["workers", "move", "vnic/vm2", "0", "4000"], "no worker runs on core 4000"),
            (&["workers", "cores", "4000"], "may not use core 4000"),
        ] {
            let output = lab.sluice().attempt(words)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(1) && said.contains(wanted), "{words:?}: {said}");
        }
        first.end()?;
        second.end()
    })
}
