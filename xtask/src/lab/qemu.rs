//! A QEMU that can emulate an SR-IOV NIC: its `igb` device, since QEMU 8.0.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use super::debian::{self, Archive};
use crate::process::{find, is_root, output, say};
use crate::{packages, workspace};

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// Where such a QEMU is; installs it as root where it is missing.
pub(super) fn ensure() -> Result<PathBuf> {
    if let Some(program) = suitable() {
        return Ok(program);
    }
    match debian::release().as_deref() {
        // Debian 12 itself has QEMU 7.2; its backports have a newer one.
        Some("bookworm") => {
            if !is_root() {
                bail!(
                    "the lab needs QEMU 8.0 or later, which Debian 12 has in its backports. As root, with \
                     bookworm-backports among apt's sources, run:\n  \
                     apt-get install --no-install-recommends -t bookworm-backports {PACKAGE}\n\
                     or run this task once as root, which does the like without a change to apt's sources"
                );
            }
            say("the lab needs QEMU 8.0 or later: installing qemu-system-x86 from bookworm-backports");
            Archive::open(&workspace::target().join("lab/apt-qemu"), &["bookworm", "bookworm-backports"])?
                .install(PACKAGE, "bookworm-backports")?;
        }
        _ => packages::ensure("the lab", &[packages::Need::program(PROGRAM, PACKAGE)])?,
    }
    match suitable() {
        Some(program) => Ok(program),
        None => bail!("the {PROGRAM} in PATH does not know the device igb; the lab needs QEMU 8.0 or later"),
    }
}

fn suitable() -> Option<PathBuf> {
    let program = find(PROGRAM)?;
    let devices = output(Command::new(&program).args(["-device", "help"]))?;
    devices.contains("name \"igb\"").then_some(program)
}
