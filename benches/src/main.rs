//! Side-by-side throughput: Sluice and its peers, in one run on one machine.
//!
//! Run it as `cargo xtask bench`, which builds and fetches what it needs. [`kernel`] compares the kernel engine with a Linux
//! bridge, [`user`] the userspace engine with Open vSwitch's and with DPDK's testpmd. Rounds are interleaved, so that what disturbs
//! the machine disturbs every set-up; ratios are medians over pairs of measurements of the same round, or as [`user`] has them.

#![deny(unsafe_code)]
// The result is what this program is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bpf;
mod kernel;
mod measure;
mod priority;
mod programs;
mod report;
mod rules;
mod switch;
mod user;
mod world;

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use priority::Priority;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lane {
    /// The kernel engine and a Linux bridge, between veth guests.
    Kernel,
    /// The userspace engine, OVS-DPDK and testpmd, between guests' rings.
    Vhost,
    /// The userspace engine, OVS and testpmd, on AF_XDP between veth guests.
    Xdp,
    /// The userspace engine between guests with IP stacks, with and without offloads.
    Tcp,
}

/// Compare Sluice with its peers.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// What to compare; everything unless given.
    #[arg(long, value_enum, value_delimiter = ',')]
    lane: Vec<Lane>,
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
    /// Set-ups to measure, by name; all of the lanes unless given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Fail if a goal is missed.
    #[arg(long)]
    check: bool,
    /// Folder for the results as JSON.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"))]
    out: PathBuf,
}

impl Arguments {
    fn has(&self, lane: Lane) -> bool {
        self.lane.is_empty() || self.lane.contains(&lane)
    }

    fn has_setup(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(nix::unistd::geteuid().is_root(), "the bench makes network namespaces: run it as root");
    let kernel: Vec<&'static switch::Setup> = switch::SETUPS
        .iter()
        .filter(|setup| arguments.has(Lane::Kernel) && arguments.has_setup(setup.name))
        .collect();
    let user: Vec<&'static user::Setup> = user::SETUPS
        .iter()
        .filter(|setup| arguments.has(setup.lane.into()) && arguments.has_setup(setup.name))
        .filter(|setup| setup.lane != user::report::Lane::Tcp || arguments.tcp_seconds > 0)
        .collect();
    known(&arguments.only)?;
    ensure!(!kernel.is_empty() || !user.is_empty(), "the lanes have none of these set-ups");
    let _alone = alone(&arguments.out)?;
    let _first = Priority::raise();
    sluice_tests::lab::sweep()?;

    let mut meets_goals = true;
    if !user.is_empty() {
        let Arguments { rounds, seconds, flows, tcp_seconds, .. } = arguments;
        let report = user::measure(&user, &user::Options { rounds, seconds, flows, tcp_seconds })?;
        print!("{report}");
        println!("results: {}\n", report::save(&report, "user", &arguments.out)?.display());
        meets_goals &= report.meets_goals();
    }
    if !kernel.is_empty() {
        let report = kernel::measure(&arguments, &kernel)?;
        print!("{report}");
        println!("results: {}", report::save(&report, "latest", &arguments.out)?.display());
        meets_goals &= report.meets_goals();
    }
    ensure!(!arguments.check || meets_goals, "a goal is missed");
    Ok(())
}

impl From<user::report::Lane> for Lane {
    fn from(lane: user::report::Lane) -> Lane {
        match lane {
            user::report::Lane::Vhost => Lane::Vhost,
            user::report::Lane::Xdp => Lane::Xdp,
            user::report::Lane::Tcp => Lane::Tcp,
        }
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

/// Refuses names that no set-up has.
fn known(names: &[String]) -> Result<()> {
    let known = switch::SETUPS.iter().map(|setup| setup.name);
    let known: Vec<&str> = known.chain(user::SETUPS.iter().map(|setup| setup.name)).collect();
    for name in names {
        ensure!(
            known.contains(&name.as_str()),
            "no set-up is called `{name}`; there are: {}",
            known.join(", ")
        );
    }
    Ok(())
}
