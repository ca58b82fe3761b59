//! Packages of other Debian releases, by an apt configuration of our own: the machine's own sources stay as they are.
//!
//! The mirror is the one that this machine uses already; what comes is checked with Debian's own keys.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{output, run, say};

/// Debian's keys, of package `debian-archive-keyring`, which every Debian has.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The release that a machine is of; `None` when it is not a Debian.
pub(super) fn release() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME")).flatten()
}

/// One version of a package, as apt lists it.
pub(super) struct Version {
    pub(super) version: String,
    /// The suite that has it, such as `trixie-backports`.
    pub(super) suite: String,
}

/// Packages of some suites.
pub(super) struct Archive {
    folder: PathBuf,
}

impl Archive {
    /// Reads what is in the suites; lists and sources are kept in `folder`.
    pub(super) fn open(folder: &Path, suites: &[&str]) -> Result<Archive> {
        let Some(release) = release() else {
            bail!(
                "the lab's kernel comes from Debian packages and is fetched with Debian's apt, which this system is \
                 not; prepare the lab on a Debian and copy its folder target/lab here"
            );
        };
        let archive = Archive { folder: folder.to_owned() };
        for kept in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(folder.join(kept))
                .with_context(|| format!("making a folder in {}", folder.display()))?;
        }
        let mirror = mirror(&release)?;
        let sources = format!(
            "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\nSigned-By: {KEYS}\n",
            suites.join(" ")
        );
        std::fs::write(folder.join("lab.sources"), sources).context("writing apt's sources")?;
        say(&format!("reading what Debian's suites {} have", suites.join(", ")));
        run(archive.apt("apt-get").args(["-qq", "update"])).with_context(|| {
            format!("cannot read {} from {mirror}; is it reachable, and a full mirror?", suites.join(", "))
        })?;
        Ok(archive)
    }

    /// A program of apt's that knows these suites and nothing else.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.folder.join("lab.sources")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::Etc::preferences", "/dev/null".into()),
            ("Dir::Etc::preferencesparts", "/dev/null".into()),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::Cache", self.folder.join("cache")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        // What is downloaded lies in folders that apt's own user need not be able to write to.
        for option in [
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::Retries=3",
            "Dpkg::Use-Pty=0",
        ] {
            command.args(["-o", option]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The versions of a package, best first.
    pub(super) fn versions(&self, package: &str) -> Vec<Version> {
        let text = output(self.apt("apt-cache").args(["madison", package])).unwrap_or_default();
        text.lines()
            .filter_map(|line| {
                let mut columns = line.split('|').map(str::trim).skip(1);
                let version = columns.next()?.to_owned();
                let suite = columns.next()?.split_whitespace().nth(1)?.split('/').next()?.to_owned();
                Some(Version { version, suite })
            })
            .collect()
    }

    /// What a version of a package depends on; `None` when there is no such version.
    pub(super) fn depends(&self, package: &str, version: &str) -> Option<String> {
        let text = output(
            self.apt("apt-cache").args(["show", &format!("{package}={version}")]).stderr(Stdio::null()),
        )?;
        let depends = text.lines().find_map(|line| line.strip_prefix("Depends: "));
        text.contains("Package: ").then(|| depends.unwrap_or_default().to_owned())
    }

    /// Downloads packages, each as `name=version` or `name/suite`, into a folder that is empty yet; returns the files.
    pub(super) fn download(&self, packages: &[String], folder: &Path) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        run(self.apt("apt-get").args(["-qq", "download"]).args(packages).current_dir(folder))?;
        let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
        Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
    }

    /// Installs a package of a suite, and what it needs of that suite and the machine's release.
    pub(super) fn install(&self, package: &str, suite: &str) -> Result<()> {
        run(self
            .apt("apt-get")
            .args(["-qq", "install", "-y", "--no-install-recommends", "-t", suite, package])
            // What matters of its chatter is on its standard error.
            .stdout(Stdio::null()))
    }
}

/// Where this machine gets its Debian from.
fn mirror(release: &str) -> Result<String> {
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(RELEASE) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]));
    targets
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{release} main ")))
        .map(str::to_owned)
        .with_context(|| format!("apt has no source for Debian {release}, whose mirror the lab would use"))
}
