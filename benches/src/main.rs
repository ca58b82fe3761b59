//! Side-by-side throughput: Sluice and a Linux bridge between the same two guests, in one run on one machine.
//!
//! Run it as `cargo xtask bench`, which builds what it needs. Each set-up has namespaces of its own for the host and
//! for two guests, wired by veth pairs ([`world`]); they differ in what forwards between the host's ends ([`switch`]).
//! Rounds are interleaved, so that what disturbs the machine disturbs every set-up; ratios are medians over
//! pairs of measurements of the same round.
//!
//! **What is measured** ([`measure`]). *Small frames*: the kernel runs a program on live frames in the first guest, as
//! fast as it can; every frame that reaches the second guest is counted and dropped there. *TCP*: iperf3, one stream.
//! *Round trip*: one byte there and back over TCP. All of it happens on one CPU each time, so every figure is what one
//! CPU achieves, with what the two ends cost included (the rows `bare` show how much that is of small frames), and does
//! not hang on where the scheduler puts things.
//!
//! **What is kept equal.** All set-ups of a comparison have the same generator and the same sink. Frames that are
//! redirected from XDP to XDP never become socket buffers, so XDP has an XDP sink, and is compared with a bridge that
//! has one; everything else has a sink on TCX. The bridge is spared netfilter, which would halve it. Sluice's vNICs
//! have the guards that a real one has: MAC, IP, DHCP and RA guard.

#![deny(unsafe_code)]
// The result is what this program is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bpf;
mod measure;
mod programs;
mod report;
mod rules;
mod switch;
mod world;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use report::{Report, Row};
use switch::{Bed, SETUPS, Setup};

/// TCP streams of a set-up in one round.
const STREAMS: usize = 3;

/// Compare Sluice with a Linux bridge.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// Rounds; each measures every set-up.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds per measurement of small frames.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Flows of the second measurement of small frames.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(2..=programs::FLOWS_MAX as i64))]
    flows: u16,
    /// Seconds per TCP stream; 0 leaves TCP out.
    #[arg(long, default_value_t = 1)]
    tcp_seconds: u32,
    /// Set-ups to measure, by name; all unless given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Fail if a goal is missed.
    #[arg(long)]
    check: bool,
    /// Folder for the results as JSON.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"))]
    out: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(nix::unistd::geteuid().is_root(), "the bench makes network namespaces: run it as root");
    let setups = chosen(&arguments.only)?;
    let _alone = alone(&arguments.out)?;
    go_first();
    sluice_tests::lab::sweep()?;

    let mut beds = Vec::with_capacity(setups.len());
    for setup in setups {
        beds.push(Bed::new(setup)?);
    }
    let mut report = Report::new(beds.iter().map(|bed| bed.setup), arguments.flows)?;
    for round in 1..=arguments.rounds {
        eprintln!("round {round} of {}", arguments.rounds);
        for bed in &beds {
            small_frames(&arguments, bed, report.row(bed.setup.name))?;
        }
        for bed in beds.iter().filter(|bed| bed.setup.has_tcp).cycle().take(streams(&beds)) {
            tcp(&arguments, bed, report.row(bed.setup.name))?;
        }
    }
    for bed in beds {
        bed.take_down()?;
    }
    report.finish()?;
    print!("{report}");
    println!("results: {}", report.save(&arguments.out)?.display());
    ensure!(!arguments.check || report.meets_goals(), "a goal is missed");
    Ok(())
}

/// Goes before everything else that runs on the machine, as far as the scheduler allows; children inherit it.
fn go_first() {
    let process = std::process::id().to_string();
    let outcome = Command::new("renice").args(["-n", "-20", "-p", &process]).stdout(Stdio::null()).status();
    if !outcome.is_ok_and(|status| status.success()) {
        eprintln!("cannot raise the priority: whatever else runs here will show in the figures");
    }
}

/// Sees to it that no other bench runs, which would measure this one's noise and make some.
fn alone(folder: &Path) -> Result<File> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let lock = folder.join("lock");
    let file = File::create(&lock).with_context(|| format!("opening {}", lock.display()))?;
    file.try_lock()
        .with_context(|| format!("another bench runs ({} is locked); wait for it", lock.display()))?;
    Ok(file)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Setup>> {
    for name in names {
        let known: Vec<&str> = SETUPS.iter().map(|setup| setup.name).collect();
        ensure!(
            known.contains(&name.as_str()),
            "no set-up is called `{name}`; there are: {}",
            known.join(", ")
        );
    }
    Ok(SETUPS
        .iter()
        .filter(|setup| names.is_empty() || names.iter().any(|name| name == setup.name))
        .collect())
}

/// How many streams a round has: they vary more than the rest.
fn streams(beds: &[Bed]) -> usize {
    STREAMS * beds.iter().filter(|bed| bed.setup.has_tcp).count()
}

fn small_frames(arguments: &Arguments, bed: &Bed, row: &mut Row) -> Result<()> {
    let Setup { name, sink, .. } = bed.setup;
    let measure = |flows| {
        measure::rate(&bed.world, *sink, flows, arguments.seconds)
            .with_context(|| format!("measuring {name}"))
    };
    row.one_flow.add(measure(1)?);
    if bed.setup.is_sluice() {
        row.many_flows.add(measure(arguments.flows)?);
    }
    Ok(())
}

fn tcp(arguments: &Arguments, bed: &Bed, row: &mut Row) -> Result<()> {
    if arguments.tcp_seconds == 0 {
        return Ok(());
    }
    let mut measure = || -> Result<()> {
        row.tcp.add(measure::tcp(&bed.world, arguments.tcp_seconds)?);
        row.round_trip_us.push(measure::round_trip(&bed.world)?);
        Ok(())
    };
    measure().with_context(|| format!("measuring TCP of {}", bed.setup.name))
}
