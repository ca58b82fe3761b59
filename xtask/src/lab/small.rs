//! A small guest for tests that boot VMs: a Debian kernel, busybox, iperf3, a virtio network card, and an agent that runs what the test
//! says; see `small.sh`. Nothing of this machine is mounted in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::kernel::Kernel;
use super::ram_disk::RamDisk;
use crate::packages::{self, Need};
use crate::process::{find, output};
use crate::workspace;

const INIT: &str = include_str!("small.sh");
/// The network card; its bus and the agent's serial port are in the kernel, or come along.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_console", "virtio_net"];
const PROGRAM: &str = "iperf3";

/// Makes the guest's RAM disk; returns where it is. It is made anew each time, in less than a second, and so never out of date.
pub(super) fn make(kernel: &Kernel) -> Result<PathBuf> {
    packages::ensure("the small guest", &[Need::program(PROGRAM, PROGRAM)])?;
    let folder = workspace::target().join("lab/guest");
    // Several may be at it; each has a folder of its own, and the file comes to its place in one step.
    let work = folder.join(format!("work-{}", std::process::id()));
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    let disk = RamDisk::create(kernel, &work.join("files"), INIT)?;
    disk.add_modules(kernel, &MODULES)?;
    add_program(&disk, PROGRAM)?;
    let packed = work.join("ram-disk.cpio");
    disk.pack(&packed)?;
    let ready = folder.join(format!("{}.cpio", kernel.release));
    fs::rename(&packed, &ready).with_context(|| format!("moving the RAM disk to {}", ready.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    Ok(ready)
}

/// Adds a program of this machine and the libraries that it is linked to.
fn add_program(disk: &RamDisk, name: &str) -> Result<()> {
    let program = find(name).with_context(|| format!("there is no {name}"))?;
    disk.add(&program, &format!("bin/{name}"))?;
    let needed = output(Command::new("ldd").arg(&program))
        .with_context(|| format!("ldd cannot say what {name} is linked to"))?;
    // `NAME => FILE (ADDRESS)`, or `FILE (ADDRESS)` for the loader; what the kernel itself brings has no file.
    for file in needed.split_whitespace().filter(|word| word.starts_with('/')) {
        disk.add(Path::new(file), file.trim_start_matches('/'))?;
    }
    Ok(())
}
