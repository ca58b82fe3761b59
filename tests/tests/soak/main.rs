//! Soak: for as long as one likes, ports come and go at random under load, policies change, and guests misbehave; and bystanders
//! notice nothing of it.
//!
//! At the end nothing may be left over: every frame of the userspace engine is home, and the daemon has the threads, open files,
//! mappings and pins that it had before, and as much memory. Of the frames that bystanders number, none is doubled or spoilt, and
//! none lost but where the kernel says that a queue of its own was full: those of guests with rings have no such excuse.
//!
//! `SLUICE_SOAK_SECONDS` says how long (60 unless told), `SLUICE_SEED` replays what is done, though not when.
//! `cargo xtask soak --seconds N` runs it alone.

#![forbid(unsafe_code)]
// The seed and what was seen are what one wants to read.
#![allow(clippy::print_stderr)]

mod churn;
mod guest;
mod numbered;
mod watch;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{Mac, mac, mac_text};
use sluice_tests::{Lab, PATIENCE, PacketSocket, scenario, wait_until};

use crate::churn::{Crowd, groups};
use crate::guest::{Guest, Meeting, Mischief};
use crate::numbered::{End, Pair};
use crate::watch::{Dropped, Holdings, dropped_by_kernel, frames_in_use, halves, memory};

/// How long it lasts unless told.
const SECONDS: u64 = 60;
/// Between two looks at the daemon.
const LOOK: Duration = Duration::from_millis(500);
/// Between two deeds.
const BREATHER: Duration = Duration::from_millis(5);
/// Entries of the rings of bystanders, who must not lose what the others flood while they wait for a CPU.
const MANY_ENTRIES: u16 = 1024;
/// How much more of its own memory the daemon may have in the second half than in the first, in KiB: what an allocator's caches
/// vary by. A kilobyte lost with each deed would be ten times that in an hour.
const GROWTH: u64 = 4096;
/// How long threads and files of what has ended may linger.
const LINGER: Duration = Duration::from_secs(30);

fn number(variable: &str, default: impl FnOnce() -> u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number: {text}")),
        Err(_) => Ok(default()),
    }
}

/// A guest with rings that nobody disturbs.
fn bystander(lab: &Lab, number: u8) -> Result<(End, Mac)> {
    let path = lab.places().socket.with_file_name(format!("vm{number}.sock"));
    let guest = wait_until("a bystander connects", PATIENCE, || {
        Guest::meet(&Meeting::Connect(path.clone()), 1, MANY_ENTRIES)
    })?;
    lab.sluice().wait_ready("vnic", &format!("vm{number}"), PATIENCE)?;
    Ok((End::Rings(Box::new(guest)), mac(number)))
}

#[test]
fn nothing_is_lost_or_left_over_while_ports_come_and_go() -> Result<()> {
    let seed = number("SLUICE_SEED", || {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(1, |elapsed| elapsed.as_nanos() as u64);
        now ^ u64::from(std::process::id()) << 40
    })?;
    let lasts = Duration::from_secs(number("SLUICE_SOAK_SECONDS", || SECONDS)?);
    eprintln!("SLUICE_SEED={seed} SLUICE_SOAK_SECONDS={}", lasts.as_secs());
    scenario(|lab| soak(lab, seed, lasts).with_context(|| format!("SLUICE_SEED={seed}")))
}

fn soak(lab: &Lab, seed: u64, lasts: Duration) -> Result<()> {
    let wired = [lab.bare_vm(4)?, lab.bare_vm(5)?, lab.bare_vm(6)?];
    let rings = |number: u8| {
        let path = lab.places().socket.with_file_name(format!("vm{number}.sock"));
        let mac = mac_text(mac(number));
        format!(
            "- {{name: vm{number}, switch: blue, attach: {{vhostUser: {{path: {}}}}}, mac: \"{mac}\"}}\n",
            path.display()
        )
    };
    let vnics: String =
        (1..=3).map(rings).chain(wired.iter().map(|vm| vm.vnic(""))).collect::<Vec<_>>().concat();
    lab.sluice().apply(&format!("switches: [{{name: blue}}]\n{}vnics:\n{vnics}", groups(1)))?;
    let wire = |vm: &sluice_tests::Vm| -> Result<(End, Mac)> {
        Ok((End::Wire(PacketSocket::open(&vm.netns, INTERFACE)?), vm.mac()))
    };
    // Both in the userspace engine, both in the kernel's, and one in each.
    let ends = [bystander(lab, 1)?, bystander(lab, 2)?];
    let pairs = [
        Pair::start("rings", ends)?,
        Pair::start("wires", [wire(&wired[0])?, wire(&wired[1])?])?,
        Pair::start("rings and wire", [bystander(lab, 3)?, wire(&wired[2])?])?,
    ];
    let mut crowd = Crowd::new(lab, seed)?;
    crowd.rehearse()?;
    let before = settled(lab)?;
    let dropped = dropped_by_kernel(lab.host())?;

    let (mut memories, mut most_frames, mut looked) = (Vec::new(), 0, None::<Instant>);
    let begin = Instant::now();
    while begin.elapsed() < lasts {
        crowd.turn()?;
        if looked.is_none_or(|looked| looked.elapsed() > LOOK) {
            memories.push(memory(lab)?);
            most_frames = most_frames.max(frames_in_use(lab)?);
            looked = Some(Instant::now());
        }
        std::thread::sleep(BREATHER);
    }
    crowd.disperse()?;
    wait_until("the daemon is as it was", LINGER, || {
        let now = Holdings::of(lab)?;
        ensure!(now == before, "before: {before:#?}\nnow: {now:#?}");
        Ok(Some(()))
    })?;
    let deeds = &crowd.deeds;
    let [sent, received, connections] =
        [&deeds.sent, &deeds.received, &deeds.connections].map(|count| count.load(Ordering::Relaxed));
    let now = dropped_by_kernel(lab.host())?;
    let dropped = Dropped { trunk: now.trunk - dropped.trunk, backlogs: now.backlogs - dropped.backlogs };
    eprintln!(
        "{sent} frames sent and {received} received by those that came and went; {connections} connections; at most \
         {most_frames} frames in use; the kernel: {dropped:?}; {:?}",
        deeds.done
    );

    for (pair, excused) in pairs.into_iter().zip([0, dropped.backlogs, dropped.backlogs + dropped.trunk]) {
        let name = pair.name;
        ensure!(pair.sent() > 100 * lasts.as_secs(), "the bystanders {name} sent only {}", pair.sent());
        let tally = pair.finish()?;
        eprintln!("bystanders {name}: {tally:?}");
        ensure!(
            tally.lost <= excused && tally.doubled == 0 && tally.spoilt == 0,
            "bystanders {name}: {tally:?}, of which the kernel had no room for {excused} at most"
        );
    }
    wait_until("every frame is home", PATIENCE, || {
        let frames = frames_in_use(lab)?;
        ensure!(frames == 0, "{frames} frames are still in use");
        Ok(Some(()))
    })?;
    let (first, second) = halves(&memories);
    eprintln!("the daemon's memory: {first} KiB in the first half, {second} KiB in the second");
    ensure!(second <= first + GROWTH, "the daemon grew from {first} to {second} KiB: {memories:?}");
    let log = std::fs::read_to_string(&lab.places().log).context("the daemon's log")?;
    ensure!(!log.contains("panicked"), "something panicked in the daemon");
    // That all of it happened is part of it.
    let missing: BTreeSet<String> = Mischief::ALL
        .iter()
        .map(|mischief| format!("{mischief:?}"))
        .chain(
            ["a port comes", "a port goes", "a machine comes", "a machine leaves", "a policy changes"]
                .map(String::from),
        )
        .filter(|deed| !deeds.done.contains_key(deed))
        .collect();
    ensure!(lasts < Duration::from_secs(30) || missing.is_empty(), "it never happened: {missing:?}");
    ensure!(received > 0 && sent > 1000 * lasts.as_secs(), "there was hardly any load");
    Ok(())
}

/// What the daemon holds once all that ended has ended: two looks that are the same.
fn settled(lab: &Lab) -> Result<Holdings> {
    wait_until("the daemon has settled", LINGER, || {
        let one = Holdings::of(lab)?;
        std::thread::sleep(LOOK);
        Ok((Holdings::of(lab)? == one).then_some(one))
    })
}
