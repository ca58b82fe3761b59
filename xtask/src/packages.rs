//! System packages that a task needs: looked for by what they bring, installed when root, else named.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::process::{find, is_root, output, run, say};

/// How to tell that something is there.
pub(crate) enum Sign {
    /// A program of this name.
    Program(&'static str),
    /// A file at this place.
    File(&'static str),
    /// A library that programs find by this name.
    Library(&'static str),
}

/// Something that the system must have.
pub(crate) struct Need {
    /// How to tell.
    pub(crate) sign: Sign,
    /// Debian's package that brings it.
    pub(crate) package: &'static str,
}

impl Need {
    /// A program and the package that brings it.
    pub(crate) const fn program(name: &'static str, package: &'static str) -> Need {
        Need { sign: Sign::Program(name), package }
    }

    /// A file and the package that brings it.
    pub(crate) const fn file(path: &'static str, package: &'static str) -> Need {
        Need { sign: Sign::File(path), package }
    }

    /// A library and the package that brings it.
    pub(crate) const fn library(name: &'static str, package: &'static str) -> Need {
        Need { sign: Sign::Library(name), package }
    }

    fn met(&self) -> bool {
        match self.sign {
            Sign::Library(name) => output(Command::new("ldconfig").arg("-p"))
                .is_some_and(|list| list.split_whitespace().any(|word| word == name)),
            Sign::Program(name) => find(name).is_some(),
            Sign::File(path) => Path::new(path).exists(),
        }
    }
}

/// Whether all of them are there.
pub(crate) fn present(needs: &[Need]) -> bool {
    needs.iter().all(Need::met)
}

/// Make sure that all of them are there, for a purpose that is named on screen.
pub(crate) fn ensure(purpose: &str, needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !need.met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let commands =
        format!("apt-get update\n  apt-get install -y --no-install-recommends {}", packages.join(" "));
    if find("apt-get").is_none() {
        bail!(
            "{purpose} needs what Debian's packages {} bring; install their like on this system",
            packages.join(" ")
        );
    }
    if !is_root() {
        bail!("{purpose} needs packages that are not installed. Run as root:\n  {commands}");
    }
    say(&format!("{purpose} needs packages; installing {}", packages.join(" ")));
    // A stale third-party source must not stop us: what counts is whether the packages then install.
    if let Err(error) = run(Command::new("apt-get").args(["-qq", "update"])) {
        say(&format!("going on although {error}"));
    }
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-qq", "-o", "Dpkg::Use-Pty=0", "install", "-y", "--no-install-recommends"])
        .args(&packages)
        // What matters of its chatter is on its standard error.
        .stdout(Stdio::null()))?;
    if let Some(need) = missing.iter().find(|need| !need.met()) {
        bail!("package {} is installed, but what {purpose} needs of it is not there", need.package);
    }
    Ok(())
}
