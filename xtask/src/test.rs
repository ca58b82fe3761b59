//! `test`: everything that is tested, in one command.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::fuzz::{Which, fuzz};
use crate::packages::{self, Need};
use crate::process::{clean, find, is_root, output, run, say};
use crate::{ebpf, lab, workspace};

const NEXTEST_VERSION: &str = "0.9.143";

/// How long each fuzz target runs with the tests.
const FUZZ_SECONDS: u64 = 5;

/// All but the end-to-end suites, and the lab's own tests, which take time too.
const QUICK: &str =
    "(not (package(sluice-tests) & kind(test)) or binary(conformance)) and not test(/in_the_lab$/)";
/// All but what boots the SR-IOV lab, or guests with its kernel.
const WITHOUT_LAB: &str = "not test(/in_the_lab$/) and not test(/real_guest/)";

/// Programs that the end-to-end suites and the demo call.
pub(crate) const NETWORK_TOOLS: [Need; 7] = [
    Need::program("ip", "iproute2"),
    Need::program("ping", "iputils-ping"),
    Need::program("iperf3", "iperf3"),
    Need::program("tcpdump", "tcpdump"),
    Need::program("ethtool", "ethtool"),
    Need::program("dnsmasq", "dnsmasq-base"),
    Need::program("udhcpc", "udhcpc"),
];

/// Guests and front-ends that others wrote, for the tests of vhost-user.
const PEERS: [Need; 2] =
    [Need::program("dpdk-testpmd", "dpdk-dev"), Need::program("qemu-system-x86_64", "qemu-system-x86")];

/// Run the tests; `quick` leaves out the end-to-end suites and fuzzing, `without_lab` the suites in the SR-IOV lab. `extra` goes to
/// the test runner; with it, the rest is left out.
pub(crate) fn test(quick: bool, without_lab: bool, extra: &[String]) -> Result<()> {
    require_root("the tests", "test")?;
    packages::ensure("testing", &NETWORK_TOOLS)?;
    ebpf::build(None, false)?;
    build_programs()?;
    if !quick && !without_lab {
        lab::prepare().context("the SR-IOV lab cannot be had here; --without-lab leaves it out")?;
    }
    // After the lab, which wants a QEMU of its own choice.
    packages::ensure("testing vhost-user", &PEERS)?;

    say("running the examples in the documentation");
    run(clean(Command::new("cargo")).args(["test", "--quiet", "--doc", "--workspace"]))?;

    let filter: &[&str] = match (quick, without_lab) {
        (true, _) => &["-E", QUICK],
        (false, true) => &["-E", WITHOUT_LAB],
        (false, false) => &[],
    };
    if !quick && extra.is_empty() {
        fuzz(&Which::Quick, FUZZ_SECONDS)?;
    }
    let own = std::env::current_exe().context("which program are we?")?;
    match nextest() {
        Some(nextest) => {
            run(clean(Command::new(nextest))
                .args(["nextest", "run", "--workspace"])
                .args(filter)
                .args(extra)
                // Tests in the lab boot it with this program.
                .env("SLUICE_XTASK", own)
                // Errors of the suites say what went wrong and why; a backtrace adds nothing.
                .env("RUST_LIB_BACKTRACE", "0"))
        }
        None => {
            say("cargo-nextest cannot be had; using cargo test");
            let mut command = clean(Command::new("cargo"));
            command.args(["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"]);
            if quick {
                command.args(["--exclude", "sluice-tests"]);
            }
            // One at a time: the suites share the machine's two or more cores and must not disturb each other.
            command.args(["--", "--test-threads=1"]).args(extra).env("SLUICE_XTASK", own);
            if without_lab {
                command.args(["--skip", "in_the_lab", "--skip", "real_guest"]);
            }
            run(&mut command)
        }
    }
}

/// Stop, and say how to go on, unless we are root.
pub(crate) fn require_root(what: &str, task: &str) -> Result<()> {
    if !is_root() {
        bail!(
            "{what} need network namespaces and eBPF programs, which only root may make. Run:\n  \
             sudo --preserve-env=PATH,CARGO_HOME,RUSTUP_HOME env HOME=\"$HOME\" cargo xtask {task}"
        );
    }
    Ok(())
}

/// The daemon and the CLI, which the end-to-end suites run as programs.
pub(crate) fn build_programs() -> Result<()> {
    say("building sluiced and sluice");
    run(clean(Command::new("cargo")).args(["build", "--quiet", "--package", "sluice-control", "--bins"]))
        .context("the daemon does not build")
}

/// cargo-nextest: from PATH, from `target/tools`, or built into `target/tools`.
fn nextest() -> Option<PathBuf> {
    let own = workspace::tools().join("bin/cargo-nextest");
    for candidate in [find("cargo-nextest"), Some(own.clone())].into_iter().flatten() {
        if output(Command::new(&candidate).args(["nextest", "--version"])).is_some() {
            return Some(candidate);
        }
    }
    say(&format!("building cargo-nextest into {} (a minute or two, once)", own.display()));
    run(clean(Command::new("cargo"))
        .args(["install", "--locked", "--quiet", "--debug"])
        .arg(format!("cargo-nextest@{NEXTEST_VERSION}"))
        .arg("--root")
        .arg(workspace::tools())
        .env_remove("CARGO_TARGET_DIR"))
    .ok()?;
    Some(own)
}
