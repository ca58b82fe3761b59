//! The userspace engine beside its peers: Open vSwitch with DPDK, and DPDK's testpmd, which has no policy at all.
//!
//! Each switch has one polling thread, on the last CPU; what generates frames has the first. Two switches that poll cannot stand side
//! by side on few CPUs, so each round starts every one of them anew; ratios are between medians of samples that were taken between
//! cores equally [far](distance) from each other.
//!
//! **vhost-user**: one guest with two virtio-net cards ([`testpmd::Guest`]) sends minimal frames from each to the other and counts
//! what arrives. **AF_XDP**: two veth guests as for the kernel engine; the switch takes frames from the host's ends by AF_XDP.
//! **TCP**: two guests with IP stacks, which have their network cards do checksums and segmentation, or not.
//!
//! Sluice's vNICs are always under MAC, IP, DHCP and RA guard. The peers are once without any policy, and, named so, with
//! anti-spoofing and ten rules.

mod distance;
mod hugepages;
mod ovs;
mod policy;
mod process;
pub(crate) mod report;
mod sluice;
mod tcp;
mod testpmd;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sluice_tests::Netns;
use sluice_user::vhost::Mode;
use tempfile::TempDir;

use crate::bpf::Kind;
use crate::measure;
use crate::world::World;
use distance::Sample;
use hugepages::HugePages;
use ovs::Ovs;
use policy::Rules;
use report::{Lane, Report, Row};
use sluice::Sluice;
use tcp::Guests;
use testpmd::{Guest, Wire};

/// Where frames are generated.
const GENERATOR_CPU: usize = 0;
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// As of the veth guests.
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
/// The rules of set-ups that have some.
const RULES: usize = 10;

/// What stands between the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Switch {
    /// testpmd.
    Wire,
    /// Open vSwitch: a learning switch, or anti-spoofing and rules in front of it.
    Ovs { has_policy: bool },
    /// Sluice's userspace engine, with so many rules.
    Sluice { rules: usize },
    /// The same, between guests with IP stacks.
    Stacks { has_offloads: bool },
}

/// A set-up.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) name: &'static str,
    pub(crate) lane: Lane,
    switch: Switch,
}

pub(crate) const WIRE: &str = "testpmd-io";
pub(crate) const OVS: &str = "ovs-dpdk";
pub(crate) const OVS_RULES: &str = "ovs-dpdk-10";
pub(crate) const SLUICE: &str = "sluice-user";
pub(crate) const SLUICE_RULES: &str = "sluice-user-10";
pub(crate) const XDP_WIRE: &str = "xsk-testpmd-io";
pub(crate) const XDP_OVS: &str = "xsk-ovs";
pub(crate) const XDP_SLUICE: &str = "xsk-sluice";
pub(crate) const TCP_PLAIN: &str = "tcp-plain";
pub(crate) const TCP_OFFLOADS: &str = "tcp-offloads";

const fn setup(name: &'static str, lane: Lane, switch: Switch) -> Setup {
    Setup { name, lane, switch }
}

/// All set-ups, in the order in which a round takes them.
pub(crate) const SETUPS: [Setup; 10] = [
    setup(WIRE, Lane::Vhost, Switch::Wire),
    setup(OVS, Lane::Vhost, Switch::Ovs { has_policy: false }),
    setup(SLUICE, Lane::Vhost, Switch::Sluice { rules: 0 }),
    setup(OVS_RULES, Lane::Vhost, Switch::Ovs { has_policy: true }),
    setup(SLUICE_RULES, Lane::Vhost, Switch::Sluice { rules: RULES }),
    setup(XDP_WIRE, Lane::Xdp, Switch::Wire),
    setup(XDP_OVS, Lane::Xdp, Switch::Ovs { has_policy: false }),
    setup(XDP_SLUICE, Lane::Xdp, Switch::Sluice { rules: 0 }),
    setup(TCP_PLAIN, Lane::Tcp, Switch::Stacks { has_offloads: false }),
    setup(TCP_OFFLOADS, Lane::Tcp, Switch::Stacks { has_offloads: true }),
];

/// How much is measured.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) flows: u16,
    pub(crate) tcp_seconds: u32,
}

/// A switch that runs; dropped, it ends.
enum Running {
    Wire { _switch: Wire },
    Ovs { _switch: Ovs },
    Sluice { switch: Sluice },
}

impl Running {
    /// What is known of it when frames do not pass.
    fn describe(&self) -> String {
        match self {
            Running::Sluice { switch } => switch.describe(),
            Running::Wire { .. } | Running::Ovs { .. } => "the peer does not pass frames".to_owned(),
        }
    }
}

/// Measures these set-ups.
pub(crate) fn measure(setups: &[&'static Setup], options: &Options) -> Result<Report> {
    ensure!(
        std::thread::available_parallelism()?.get() >= 2,
        "a generator and a polling switch need a CPU each, and there is one"
    );
    let _pages = HugePages::reserve()?;
    let mut report = Report::new(setups, options.flows)?;
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        for setup in setups {
            measure_one(setup, options, report.row(setup.name))
                .with_context(|| format!("measuring {}", setup.name))?;
        }
    }
    report.finish()?;
    Ok(report)
}

fn measure_one(setup: &Setup, options: &Options, row: &mut Row) -> Result<()> {
    match setup.switch {
        Switch::Stacks { has_offloads } => row.add_stream(stacks(has_offloads, options.tcp_seconds)?),
        Switch::Wire | Switch::Ovs { .. } | Switch::Sluice { .. } => {
            let between = if setup.lane == Lane::Xdp { xdp_sockets } else { rings };
            row.add(between(setup, options)?);
        }
    }
    Ok(())
}

/// Gbit/s of a stream between guests with IP stacks.
fn stacks(has_offloads: bool, seconds: u32) -> Result<f64> {
    let folder = folder()?;
    let switch = Sluice::between_rings(folder.path(), Mode::Server, &Rules::new(0)?)?;
    let stream = || Guests::start(folder.path(), has_offloads)?.stream(seconds);
    stream().with_context(|| switch.describe())
}

/// Rates with one flow, and with many, between guests' rings.
fn rings(setup: &Setup, options: &Options) -> Result<[Vec<Sample>; 2]> {
    let netns = Netns::create(&format!("sl-{}-{}", std::process::id(), setup.name))?;
    let folder = folder()?;
    let path = folder.path();
    let running = match setup.switch {
        Switch::Wire => Running::Wire { _switch: Wire::between_rings(&netns, path)? },
        Switch::Ovs { has_policy } => {
            let rules = has_policy.then(|| Rules::new(RULES)).transpose()?;
            Running::Ovs { _switch: Ovs::between_rings(&netns, path, rules.as_ref())? }
        }
        Switch::Sluice { rules } => {
            let rules = Rules::new(rules)?;
            Running::Sluice { switch: Sluice::between_rings(path, Mode::Client, &rules)? }
        }
        Switch::Stacks { .. } => bail!("{} is measured by streams", setup.name),
    };
    let measure = |flows| -> Result<Vec<Sample>> {
        distance::sample([GENERATOR_CPU, switch_cpu()?], || {
            let mut guest = Guest::start(&netns, path, flows)?;
            guest.rate(path, options.seconds.ceil() as usize)
        })
    };
    let rates = || -> Result<[Vec<Sample>; 2]> { Ok([measure(1)?, measure(options.flows)?]) };
    rates().with_context(|| running.describe())
}

/// Rates with one flow, and with many, between AF_XDP sockets.
fn xdp_sockets(setup: &Setup, options: &Options) -> Result<[Vec<Sample>; 2]> {
    let world = World::new(setup.name, Kind::Xdp)?;
    let folder = folder()?;
    let path = folder.path();
    let interfaces = world.guests.each_ref().map(|guest| guest.port);
    let running = match setup.switch {
        Switch::Wire => Running::Wire { _switch: Wire::between_sockets(&world.host, path, interfaces)? },
        Switch::Ovs { has_policy } => {
            let rules = has_policy.then(|| Rules::new(RULES)).transpose()?;
            Running::Ovs { _switch: Ovs::between_sockets(&world.host, path, interfaces, rules.as_ref())? }
        }
        Switch::Sluice { rules } => {
            let rules = Rules::new(rules)?;
            Running::Sluice { switch: Sluice::between_sockets(&world.host, interfaces, &rules)? }
        }
        Switch::Stacks { .. } => bail!("{} is measured by streams", setup.name),
    };
    let measure = |flows| -> Result<Vec<Sample>> {
        distance::sample([GENERATOR_CPU, switch_cpu()?], || {
            Ok(measure::rate(&world, Kind::Xdp, flows, options.seconds, GENERATOR_CPU)?.mpps)
        })
    };
    let rates = || -> Result<[Vec<Sample>; 2]> { Ok([measure(1)?, measure(options.flows)?]) };
    rates().with_context(|| running.describe())
}

/// A folder for sockets, which the next bench removes if this one cannot.
fn folder() -> Result<TempDir> {
    let prefix = format!("sl-{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir().context("a folder for sockets")
}

/// The sockets of the two cards.
fn sockets(folder: &Path) -> [PathBuf; 2] {
    ["a.sock", "b.sock"].map(|name| folder.join(name))
}

/// The CPU of the switch: the last.
fn switch_cpu() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get() - 1)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
