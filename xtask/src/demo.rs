//! `demo`: what Sluice does, on screen, in a minute.

use std::process::Command;

use anyhow::{Context, Result};

use crate::packages;
use crate::process::{clean, run, say};
use crate::test::{NETWORK_TOOLS, build_programs, require_root};
use crate::{ebpf, workspace};

/// Sets everything up and runs the demo; fails when any of its claims is false.
pub(crate) fn demo() -> Result<()> {
    require_root("the demo's VMs", "demo")?;
    packages::ensure("the demo", &NETWORK_TOOLS)?;
    ebpf::build(None, false)?;
    build_programs()?;
    say("building the demo");
    run(clean(Command::new("cargo")).args([
        "build",
        "--quiet",
        "--package",
        "sluice-tests",
        "--bin",
        "sluice-demo",
    ]))?;
    run(Command::new(workspace::target().join("debug/sluice-demo")).env("RUST_LIB_BACKTRACE", "0"))
        .context("the demo is not true on this machine")
}
