//! `demo`: what Sluice does, on screen, in a minute.

use std::process::Command;

use anyhow::{Context, Result};

use crate::packages;
use crate::process::{clean, run, say};
use crate::test::{NETWORK_TOOLS, build_programs, require_root};
use crate::{ebpf, lab, workspace};

/// Sets everything up and runs the demo; fails when any of its claims is false.
pub(crate) fn demo(sriov: bool) -> Result<()> {
    require_root("the demo's VMs", "demo")?;
    packages::ensure("the demo", &NETWORK_TOOLS)?;
    ebpf::build(None, false)?;
    build_programs()?;
    if sriov {
        lab::prepare()?;
    }
    say("building the demo");
    let program = if sriov { "sluice-demo-sriov" } else { "sluice-demo" };
    run(clean(Command::new("cargo")).args([
        "build",
        "--quiet",
        "--package",
        "sluice-tests",
        "--bin",
        program,
    ]))?;
    let program = workspace::target().join("debug").join(program);
    let mut command = if sriov {
        say("booting the lab");
        let own = std::env::current_exe().context("which program are we?")?;
        let mut command = Command::new(own);
        command.args(["lab", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    run(command.env("RUST_LIB_BACKTRACE", "0")).context("the demo is not true on this machine")
}
