//! Tasks of the workspace, run as `cargo xtask TASK`.
//!
//! Each task sets up what it needs and says so on screen: as root it installs what is missing, otherwise it prints
//! the exact commands and stops. Nothing outside `target/` and the system's own packages is touched.

#![forbid(unsafe_code)]
// A task runner talks to the person who runs it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod demo;
mod ebpf;
mod fuzz;
mod lab;
mod lint;
mod packages;
mod process;
mod soak;
mod test;
mod workspace;

use clap::{Parser, Subcommand};

/// Tasks of the Sluice workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compare throughput with a Linux bridge's, Open vSwitch's and testpmd's, side by side. Needs root.
    Bench {
        /// What to compare; everything unless given.
        #[arg(long, value_enum, value_delimiter = ',')]
        lane: Vec<bench::Lane>,
        /// Arguments of the harness, such as `--rounds 5`; after `--`, `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        extra: Vec<String>,
    },
    /// Build the eBPF programs into target/bpf/sluice.o.
    BuildEbpf {
        /// Which compiler to use; found automatically unless given.
        #[arg(long, value_enum)]
        toolchain: Option<ebpf::Toolchain>,
        /// Build even when the sources have not changed.
        #[arg(long)]
        force: bool,
    },
    /// Show what Sluice does: two VMs, an outside, and the switch between them. Needs root.
    Demo {
        /// VFs of an emulated NIC instead, in the SR-IOV lab.
        #[arg(long)]
        sriov: bool,
    },
    /// Run the fuzz targets of all that reads what others wrote: guests, front-ends, QEMU, operators.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u64,
        /// Names of targets; all unless given.
        targets: Vec<String>,
    },
    /// Run a command in a throw-away machine with SR-IOV: a Debian kernel in QEMU, this machine's files read-only.
    Lab(lab::Options),
    /// Make a small guest for the tests that boot VMs, and print where its kernel and its RAM disk are.
    GuestImage,
    /// Check the rules of the house: crate arrows, unsafe code, module docs, portable text, dependencies.
    Lint,
    /// Let ports come and go at random under load, and see that nothing is lost or left over. Needs root.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The seed of an earlier run, which does the same.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Run every test: units, examples, conformance, the end-to-end suites and the fuzz targets. Needs root.
    Test {
        /// Leave out the end-to-end suites.
        #[arg(long)]
        quick: bool,
        /// Leave out the suites that run in the SR-IOV lab.
        #[arg(long)]
        without_lab: bool,
        /// Further arguments of `cargo nextest run`, such as the name of a test.
        #[arg(trailing_var_arg = true)]
        extra: Vec<String>,
    },
}

fn main() -> std::process::ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Bench { lane, extra } => bench::bench(&lane, &extra),
        Task::BuildEbpf { toolchain, force } => ebpf::build(toolchain, force).map(drop),
        Task::Demo { sriov } => demo::demo(sriov),
        Task::Fuzz { seconds, targets } => fuzz::fuzz(&fuzz::Which::Named(&targets), seconds),
        Task::Lab(options) => return lab::lab(&options),
        Task::GuestImage => lab::small_guest(),
        Task::Lint => lint::lint(),
        Task::Soak { seconds, seed } => soak::soak(seconds, seed),
        Task::Test { quick, without_lab, extra } => test::test(quick, without_lab, &extra),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            process::say_error(&format!("{error:#}"));
            std::process::ExitCode::FAILURE
        }
    }
}
