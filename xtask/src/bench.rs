//! `bench`: Sluice and its peers, side by side.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::packages::{self, Need};
use crate::process::{clean, run, say};
use crate::test::{NETWORK_TOOLS, require_root};
use crate::{ebpf, workspace};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Lane {
    /// The kernel engine and a Linux bridge, between veth guests.
    Kernel,
    /// The userspace engine, OVS-DPDK and testpmd, between guests' rings.
    Vhost,
    /// The userspace engine, OVS and testpmd, on AF_XDP between veth guests.
    Xdp,
    /// The userspace engine between guests with IP stacks, with and without offloads.
    Tcp,
}

impl Lane {
    fn name(self) -> &'static str {
        match self {
            Lane::Kernel => "kernel",
            Lane::Vhost => "vhost",
            Lane::Xdp => "xdp",
            Lane::Tcp => "tcp",
        }
    }

    fn has_peers(self) -> bool {
        matches!(self, Lane::Vhost | Lane::Xdp)
    }
}

/// The peers, and what Open vSwitch wants of the system.
const PEERS: [Need; 4] = [
    Need::program("dpdk-testpmd", "dpdk-dev"),
    Need::program("openssl", "openssl"),
    Need::library("libunbound.so.8", "libunbound8"),
    Need::library("libxdp.so.1", "libxdp1"),
];

/// Debian's packages of Open vSwitch. Installed, they would start a service.
const OPEN_VSWITCH: [&str; 3] = ["openvswitch-switch-dpdk", "openvswitch-switch", "openvswitch-common"];

/// Build what is measured, optimised, and measure it: these lanes, or all. `extra` goes to the harness (`--help` lists what it
/// takes).
pub(crate) fn bench(lanes: &[Lane], extra: &[String]) -> Result<()> {
    require_root("the bench", "bench")?;
    packages::ensure("the bench", &NETWORK_TOOLS)?;
    if lanes.is_empty() || lanes.iter().any(|lane| lane.has_peers()) {
        packages::ensure("comparing with others", &PEERS)?;
        let folder = workspace::tools().join("openvswitch");
        if !folder.join("usr").exists() {
            unpack(&OPEN_VSWITCH, &folder)?;
        }
    }
    ebpf::build(None, false)?;
    say("building the bench");
    run(clean(Command::new("cargo")).args(["build", "--quiet", "--release", "--package", "sluice-benches"]))?;
    let mut bench = Command::new(workspace::target().join("release/sluice-bench"));
    for lane in lanes {
        bench.args(["--lane", lane.name()]);
    }
    run(bench.args(extra))
}

/// Fetches Debian's packages and unpacks them into a folder, without installing them.
fn unpack(packages: &[&str], folder: &Path) -> Result<()> {
    say(&format!("fetching {} into {}, without installing them", packages.join(", "), folder.display()));
    let fetched = folder.with_extension("fetched");
    // Of an attempt that failed.
    for old in [&fetched, &folder.with_extension("part")] {
        let _ = std::fs::remove_dir_all(old);
    }
    std::fs::create_dir_all(&fetched).context("a folder for packages")?;
    let options = ["-qq", "-o", "APT::Sandbox::User=root", "download"];
    run(Command::new("apt-get").current_dir(&fetched).args(options).args(packages))?;
    let part = folder.with_extension("part");
    for entry in std::fs::read_dir(&fetched)? {
        run(Command::new("dpkg-deb").arg("--extract").arg(entry?.path()).arg(&part))?;
    }
    std::fs::remove_dir_all(&fetched).context("removing packages that are unpacked")?;
    std::fs::rename(&part, folder).context("putting Open vSwitch in place")
}
