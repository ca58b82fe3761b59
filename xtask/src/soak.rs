//! `soak`: ports come and go at random under load for as long as one likes, and nothing may be lost, leaked or left over.

use std::process::Command;

use anyhow::Result;

use crate::ebpf;
use crate::packages;
use crate::process::{clean, run, say};
use crate::test::{NETWORK_TOOLS, build_programs, require_root};

/// Run the soak suite for so many seconds; a seed replays what was done.
pub(crate) fn soak(seconds: u64, seed: Option<u64>) -> Result<()> {
    require_root("the soak", "soak")?;
    packages::ensure("the soak", &NETWORK_TOOLS)?;
    ebpf::build(None, false)?;
    build_programs()?;
    say(&format!("soaking for {seconds} s"));
    let mut command = clean(Command::new("cargo"));
    // Not under nextest, which ends what takes long: the suite ends by itself.
    command.args(["test", "--quiet", "--package", "sluice-tests", "--test", "soak", "--", "--nocapture"]);
    command.env("SLUICE_SOAK_SECONDS", seconds.to_string()).env("RUST_LIB_BACKTRACE", "0");
    if let Some(seed) = seed {
        command.env("SLUICE_SEED", seed.to_string());
    }
    run(&mut command)
}
