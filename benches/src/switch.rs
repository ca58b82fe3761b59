//! The set-ups: what may stand between the two guests.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use nix::net::if_::if_nametoindex;
use sluice_kernel::{Engine, EngineOptions, HooksInUse, PortState, SyncReport};
use sluice_policy::config::{Config, Hook};
use sluice_policy::ids::Ids;
use sluice_policy::lower;
use sluice_policy::validate::validate;
use sluice_tests::{Netns, tools};

use crate::bpf::{self, Kind};
use crate::world::World;
use crate::{programs, rules};

/// What forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forwarder {
    /// A program that redirects everything to the other port: the floor.
    Bare,
    /// A Linux bridge.
    Bridge,
    /// Sluice, with so many ACL rules.
    Sluice {
        /// How many.
        rules: usize,
    },
}

/// A set-up.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// What forwards.
    pub(crate) forwarder: Forwarder,
    /// On which hook the ports are, where that can be chosen; and how the guests are.
    pub(crate) hook: Kind,
    /// Where small frames are counted.
    pub(crate) sink: Kind,
    /// Whether TCP is worth measuring.
    pub(crate) has_tcp: bool,
}

impl Setup {
    pub(crate) fn is_sluice(&self) -> bool {
        matches!(self.forwarder, Forwarder::Sluice { .. })
    }
}

const fn setup(name: &'static str, forwarder: Forwarder, hook: Kind, sink: Kind, has_tcp: bool) -> Setup {
    Setup { name, forwarder, hook, sink, has_tcp }
}

/// All set-ups, in the order in which a round takes them: peers stand beside what they are compared with.
pub(crate) const SETUPS: [Setup; 8] = [
    setup(BARE_TCX, Forwarder::Bare, Kind::Tcx, Kind::Tcx, false),
    setup(BRIDGE, Forwarder::Bridge, Kind::Tcx, Kind::Tcx, true),
    setup(TCX, Forwarder::Sluice { rules: 0 }, Kind::Tcx, Kind::Tcx, true),
    setup(TCX_RULES, Forwarder::Sluice { rules: 1000 }, Kind::Tcx, Kind::Tcx, true),
    setup(BARE_XDP, Forwarder::Bare, Kind::Xdp, Kind::Xdp, false),
    setup(BRIDGE_XDP_SINK, Forwarder::Bridge, Kind::Tcx, Kind::Xdp, false),
    setup(XDP, Forwarder::Sluice { rules: 0 }, Kind::Xdp, Kind::Xdp, true),
    setup(XDP_RULES, Forwarder::Sluice { rules: 1000 }, Kind::Xdp, Kind::Xdp, true),
];

pub(crate) const BARE_TCX: &str = "bare-tcx";
pub(crate) const BRIDGE: &str = "bridge";
pub(crate) const TCX: &str = "sluice-tcx";
pub(crate) const TCX_RULES: &str = "sluice-tcx-1000";
pub(crate) const BARE_XDP: &str = "bare-xdp";
pub(crate) const BRIDGE_XDP_SINK: &str = "bridge-xdp-sink";
pub(crate) const XDP: &str = "sluice-xdp";
pub(crate) const XDP_RULES: &str = "sluice-xdp-1000";

/// A set-up that stands and forwards.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) setup: &'static Setup,
    pub(crate) world: World,
    engine: Option<Engine>,
    _links: Vec<OwnedFd>,
}

impl Bed {
    /// Builds it, and waits until the guests hear each other.
    pub(crate) fn new(setup: &'static Setup) -> Result<Bed> {
        let build = || -> Result<Bed> {
            let world = World::new(setup.name, setup.hook)?;
            let mut bed = Bed { setup, world, engine: None, _links: Vec::new() };
            match setup.forwarder {
                Forwarder::Bare => bed._links = redirect(&bed.world, setup.hook)?,
                Forwarder::Bridge => bridge(&bed.world.host)?,
                Forwarder::Sluice { rules } => bed.engine = Some(sluice(setup, &bed.world, rules)?),
            }
            let [a, b] = &bed.world.guests;
            tools::ping(&a.netns, &b.ip.to_string())?;
            Ok(bed)
        };
        build().with_context(|| format!("setting up {}", setup.name))
    }

    /// Takes it down. What is left behind when this is not reached, the next run sweeps up.
    pub(crate) fn take_down(mut self) -> Result<()> {
        match self.engine.take() {
            Some(engine) => self.world.host.enter(|| Ok(engine.detach_all()?)),
            None => Ok(()),
        }
    }
}

fn redirect(world: &World, kind: Kind) -> Result<Vec<OwnedFd>> {
    let [a, b] = world.guests.each_ref().map(|guest| guest.port);
    world.host.enter(|| {
        let attach = |from: &str, to: &str| -> Result<OwnedFd> {
            let program = programs::redirect(kind, if_nametoindex(to)?)?;
            bpf::attach(kind, program.as_fd(), if_nametoindex(from)?)
        };
        Ok(vec![attach(a, b)?, attach(b, a)?])
    })
}

fn bridge(host: &Netns) -> Result<()> {
    host.ip_batch(
        "link add br0 type bridge\nlink set p1 master br0\nlink set p2 master br0\nlink set br0 up\n",
    )?;
    // Where the kernel has it, it is on by default, and costs the bridge half of its speed.
    for family in ["ip", "ip6", "arp"] {
        let knob = format!("net/bridge/bridge-nf-call-{family}tables");
        if std::path::Path::new("/proc/sys").join(&knob).exists() {
            host.sysctl(&knob, "0")?;
        }
    }
    Ok(())
}

/// Starts the kernel engine as the daemon does, and sees to it that both ports are served by the hook that is wanted.
fn sluice(setup: &Setup, world: &World, rules: usize) -> Result<Engine> {
    let hook = match setup.hook {
        Kind::Xdp => Hook::Xdp,
        Kind::Tcx => Hook::Tcx,
    };
    let config = rules::config(&world.guests, hook, rules)?;
    if let Err(violations) = validate(&config) {
        bail!("the configuration is not valid: {violations:?}");
    }
    let pin_dir = PathBuf::from("/sys/fs/bpf").join(world.host.name());
    world.host.enter(|| {
        let (mut engine, _) = Engine::open(&EngineOptions { pin_dir })?;
        let report = settle(&mut engine, &config)?;
        let wanted = match setup.hook {
            Kind::Xdp => HooksInUse::XdpAndTcx,
            Kind::Tcx => HooksInUse::Tcx,
        };
        for (name, port) in &report.ports {
            let is_served = port.state == PortState::Attached && port.hooks == wanted;
            ensure!(is_served, "{name} is not served as wanted: {port:?}");
        }
        Ok(engine)
    })
}

/// Syncs until interfaces are as they were when they were observed.
fn settle(engine: &mut Engine, config: &Config) -> Result<SyncReport> {
    let ports = lower::ports(config);
    let mut ids = Ids::default();
    lower::assign_ids(config, &mut ids)?;
    for _ in 0..4 {
        let bindings = engine.observe(&ports)?.bindings;
        let report = engine.sync(&lower::lower(config, &ids, &bindings)?)?;
        if !report.observe_again {
            return Ok(report);
        }
    }
    bail!("the interfaces keep changing")
}
