//! `lab`: a throw-away machine with SR-IOV, for what the machine at hand cannot do.
//!
//! QEMU (TCG, so no virtualisation is needed) boots a Debian kernel with two emulated igb ports of seven VFs each,
//! wired back to back, an IOMMU with interrupt remapping, and the `netdevsim` module. The host's files are the guest's,
//! through 9p and a layer in memory: the guest runs what was built here, and changes nothing here. It runs one command
//! and ends with it. It proves behaviour, never speed.
//!
//! What it needs is fetched from Debian once, into `target/lab`; see [`kernel`] and [`debian`].

mod debian;
mod guest;
mod kernel;
mod qemu;
mod ram_disk;
mod small;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::say_error;

/// The lab itself failed: it could not be prepared, or the guest died before the command ended.
const LAB_FAILED: u8 = 125;

/// How to run the lab.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The kernel's series, such as 7.2; by default what is there, else the newest that Debian's backports have.
    #[arg(long, value_name = "SERIES")]
    kernel: Option<String>,
    /// Processors of the guest.
    #[arg(long, default_value_t = 2)]
    cpus: u16,
    /// Memory of the guest in MiB; files that it writes are in there too.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// After so many seconds the guest is ended, and the status is 124.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// One more word of QEMU's command line; may be given again and again.
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    qemu: Vec<String>,
    /// One more word of the kernel's command line; may be given again and again.
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Only fetch and build what the lab needs, where it is missing.
    #[arg(long, conflicts_with = "command")]
    prepare: bool,
    /// What to run in the guest, and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "prepare")]
    command: Vec<String>,
}

/// Runs a command in the guest: its output is ours, and so is its status, but for 124 (out of time) and 125 (the lab
/// itself failed).
pub(crate) fn lab(options: &Options) -> ExitCode {
    match attempt(options) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say_error(&format!("{error:#}"));
            ExitCode::from(LAB_FAILED)
        }
    }
}

/// Fetches and builds what the lab needs, where it is missing.
pub(crate) fn prepare() -> Result<()> {
    make_ready(None).map(drop)
}

/// Makes a small guest for tests that boot QEMU themselves, and prints where its kernel and its RAM disk are, each on a line of
/// its own.
pub(crate) fn small_guest() -> Result<()> {
    let (_, kernel) = make_ready(None)?;
    let ram_disk = small::make(&kernel)?;
    println!("{}\n{}", kernel.folder.join("vmlinuz").display(), ram_disk.display());
    Ok(())
}

fn make_ready(series: Option<&str>) -> Result<(PathBuf, kernel::Kernel)> {
    if !cfg!(target_arch = "x86_64") {
        bail!(
            "the lab emulates an x86-64 machine that runs this machine's programs; this one is not of that kind"
        );
    }
    Ok((qemu::ensure()?, kernel::ensure(series)?))
}

fn attempt(options: &Options) -> Result<u8> {
    let (qemu, kernel) = make_ready(options.kernel.as_deref())?;
    if options.prepare {
        return Ok(0);
    }
    guest::run(
        &qemu,
        &kernel,
        &guest::Machine {
            cpus: options.cpus,
            memory: options.memory,
            timeout: Duration::from_secs(options.timeout),
            qemu: &options.qemu,
            append: &options.append,
        },
        &options.command,
    )
}
