//! `bench`: Sluice and a Linux bridge, side by side.

use std::process::Command;

use anyhow::Result;

use crate::packages;
use crate::process::{clean, run, say};
use crate::test::{NETWORK_TOOLS, require_root};
use crate::{ebpf, workspace};

/// Build what is measured, optimised, and measure it; `extra` goes to the harness (`--help` lists what it takes).
pub(crate) fn bench(extra: &[String]) -> Result<()> {
    require_root("the bench", "bench")?;
    packages::ensure("the bench", &NETWORK_TOOLS)?;
    ebpf::build(None, false)?;
    say("building the bench");
    run(clean(Command::new("cargo")).args(["build", "--quiet", "--release", "--package", "sluice-benches"]))?;
    run(Command::new(workspace::target().join("release/sluice-bench")).args(extra))
}
