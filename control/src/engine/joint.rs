//! Two engines as one [`DataPlane`]: the kernel engine, and the userspace engine for vNICs attached by vhost-user.
//!
//! On a switch that both serve they are joined by a tap, a port of each (see [`lower::split`]). Each port is asked about where it
//! is served; numbers are unique over both, so what is summed up is never counted twice.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use sluice_kernel::{
    EngineError, FdbRow, FdbSweep, HooksInUse, Observation, PortState, PortStatus, SyncReport, WireView,
};
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{PortStats, RuleStats, port_flag};
use sluice_policy::image::{Behind, Binding, Image};
use sluice_policy::lower::{self, PortSpec, PortSpecKind};
use sluice_user::workers::Move;

use super::wires::by_tap;
use super::{
    Adoption, DataPlane, FrameUse, Steer, UserError, Wake, Wire, WireReport, WorkersPlan, WorkersView,
};
use crate::trace::{LiveTrace, Step};

/// What a sync of the userspace engine did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserReport {
    /// What was opened or closed, one line each; none on a second pass.
    pub changes: Vec<String>,
    /// State of every vhost-user port of the image, by name.
    pub ports: BTreeMap<String, PortStatus>,
}

/// What the joint engine needs of the userspace engine. Nothing here fails as a whole: what concerns one port is in its
/// status.
pub trait UserPlane {
    /// Makes the taps of these ports, unless they are there, and removes all others. Says what was done.
    fn ensure_taps(&mut self, ports: &[&PortSpec]) -> Vec<String>;
    /// Why a tap is not there.
    fn trouble(&self, netdev: &str) -> Option<String>;
    /// Frames from a tap that were dropped, since their header was not true of them.
    fn refused(&self, netdev: &str) -> u64;
    /// Whether a vhost-user port is open for its guest.
    fn is_open(&self, port: &str) -> bool;
    /// Makes tables and open ports equal to the image, and parts from trunks that are not in it.
    fn sync(&mut self, image: &Image) -> UserReport;
    /// Serves these trunks, by interface with the port's number, and parts from all others. Says what was done.
    fn serve_trunks(&mut self, attached: &BTreeMap<&str, u32>) -> Vec<String>;
    /// Serves these uplinks by AF_XDP, and no others; has `steer` bring frames to their sockets.
    fn serve_wires(&mut self, wires: &[Wire], steer: &mut Steer<'_>) -> WireReport;
    /// Forgets learnt addresses that are too old.
    fn age_fdb(&mut self);
    /// Learnt addresses.
    fn fdb(&self) -> Vec<FdbRow>;
    /// Counters of a port.
    fn port_stats(&self, port: u32) -> PortStats;
    /// Drops on a port that are not zero.
    fn drops(&self, port: u32) -> Vec<(DropReason, u64)>;
    /// A rule's counters.
    fn rule_stats(&self, counter: u32) -> RuleStats;
    /// Takes a frame through the tables, without any side effect.
    fn trace(&self, ingress: u32, frame: &[u8]) -> LiveTrace;
    /// As [`DataPlane::set_workers`].
    ///
    /// # Errors
    /// The same.
    fn set_workers(&mut self, _plan: &WorkersPlan) -> Result<(), UserError> {
        Ok(())
    }
    /// What workers do.
    fn workers(&self) -> WorkersView {
        WorkersView::default()
    }
    /// As [`DataPlane::balance_workers`].
    ///
    /// # Errors
    /// The same.
    fn balance_workers(&mut self) -> Result<Vec<Move>, UserError> {
        Ok(Vec::new())
    }
    /// Memory of frames; `None` before there is any.
    fn frames(&self) -> Option<FrameUse> {
        None
    }
    /// From now on tells `wake` of guests that come and go.
    fn watch(&mut self, wake: Wake);
}

/// Who serves a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Kernel,
    User,
    /// The trunk.
    Both,
    /// An uplink, by which the userspace engine may send too.
    Uplink,
}

/// Both engines.
#[derive(Debug)]
pub struct JointEngine<K, U> {
    kernel: K,
    user: U,
    /// By port, as of the last sync.
    servers: BTreeMap<u32, Server>,
    /// Names of the uplinks that the userspace engine has been able to send to, by port.
    uplinks: BTreeMap<u32, String>,
}

impl<K: DataPlane, U: UserPlane> JointEngine<K, U> {
    /// Joins two engines.
    pub fn new(kernel: K, user: U) -> Self {
        JointEngine { kernel, user, servers: BTreeMap::new(), uplinks: BTreeMap::new() }
    }

    fn server(&self, port: u32) -> Server {
        self.servers.get(&port).copied().unwrap_or(Server::Kernel)
    }

    fn is_trunk(&self, port: u32) -> bool {
        self.server(port) == Server::Both
    }

    /// Uplinks that the userspace engine sends to, or has sent to: what it has counted stays counted.
    fn note_uplinks(&mut self, image: &Image, user: &Image) {
        self.uplinks.retain(|id, name| image.ports.get(id).is_some_and(|port| port.name == *name));
        let of_both = user.ports.iter().filter(|(_, port)| port.behind == Behind::Uplink);
        self.uplinks.extend(of_both.map(|(id, port)| (*id, port.name.clone())));
        for id in self.uplinks.keys() {
            self.servers.insert(*id, Server::Uplink);
        }
    }

    /// Has the userspace engine serve uplinks whose XDP can steer to it, and says of each how guests with rings are served.
    fn serve_wires(&mut self, image: &Image, user: &Image, report: &mut SyncReport) {
        let mut wires = Vec::new();
        let mut notes: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let is_attached = |report: &SyncReport, name: &String| {
            report.ports.get(name).is_some_and(|port| port.state == PortState::Attached)
        };
        for (trunk, port) in image.ports.iter().filter(|(_, port)| port.behind == Behind::UserTap) {
            let uplink = image.switches.get(&port.config.switch).map_or(0, |switch| switch.uplink);
            let Some(of_uplink) = image.ports.get(&uplink) else { continue };
            if !is_attached(report, &port.name) || !is_attached(report, &of_uplink.name) {
                continue;
            }
            let hooks = report.ports.get(&of_uplink.name).map(|port| port.hooks);
            if hooks != Some(HooksInUse::XdpAndTcx) {
                notes.insert(uplink, vec![by_tap("no XDP serves it")]);
                continue;
            }
            let ifindex = of_uplink.config.ifindex;
            match self.kernel.wire(ifindex) {
                Ok(WireView { queues, mtu, from_any_cpu }) => {
                    let is_target = of_uplink.config.flags & port_flag::XDP_TARGET != 0;
                    let redirect = is_target && from_any_cpu;
                    wires.push(Wire { uplink, trunk: *trunk, ifindex, queues, mtu, redirect });
                }
                Err(error) => drop(notes.insert(uplink, vec![by_tap(&error.to_string())])),
            }
        }
        let kernel = &mut self.kernel;
        let served =
            self.user.serve_wires(&wires, &mut |port, queue, socket| kernel.steer(port, queue, socket));
        report.link_changes.extend(served.changes);
        notes.extend(served.notes);
        for (uplink, mut lines) in notes {
            let Some(name) = image.ports.get(&uplink).map(|port| &port.name) else { continue };
            if wires.iter().any(|wire| wire.uplink == uplink) && !user.ports.contains_key(&uplink) {
                lines.push(ONE_WAY.to_owned());
            }
            if let Some(status) = report.ports.get_mut(name) {
                status.notes.extend(lines);
            }
        }
    }
}

/// Of an uplink that is no port of the userspace engine's.
const ONE_WAY: &str = "what guests with rings send to it takes the tap, since other vNICs of its switch may spoof, or \
                       addresses are learnt behind them and not behind it";

/// The ports that are interfaces.
fn netdevs(ports: &[PortSpec]) -> Vec<PortSpec> {
    ports.iter().filter(|port| port.kind != PortSpecKind::VhostUser).cloned().collect()
}

impl<K: DataPlane, U: UserPlane> DataPlane for JointEngine<K, U> {
    fn adoption(&self) -> Adoption {
        self.kernel.adoption()
    }

    fn observe(&self, ports: &[PortSpec]) -> Result<Observation, EngineError> {
        let mut observation = self.kernel.observe(&netdevs(ports))?;
        for port in ports {
            match port.kind {
                PortSpecKind::VhostUser if self.user.is_open(&port.name) => {
                    observation.bindings.insert(port.name.clone(), Binding::default());
                }
                PortSpecKind::UserTap => {
                    // Better than that it is not there: why not.
                    if let Some(trouble) = self.user.trouble(&port.netdev) {
                        observation.absent.insert(port.name.clone(), trouble);
                    }
                }
                _ => {}
            }
        }
        Ok(observation)
    }

    fn ensure_internal(&mut self, ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
        let taps: Vec<&PortSpec> = ports.iter().filter(|port| port.kind == PortSpecKind::UserTap).collect();
        let mut done = self.user.ensure_taps(&taps);
        done.extend(self.kernel.ensure_internal(&netdevs(ports))?);
        Ok(done)
    }

    fn sync(&mut self, image: &Image) -> Result<SyncReport, EngineError> {
        let parts = lower::split(image);
        let server = |behind: &Behind| match behind {
            Behind::Netdev | Behind::Uplink => Server::Kernel,
            Behind::VhostUser(_) => Server::User,
            Behind::UserTap => Server::Both,
        };
        self.servers = image.ports.iter().map(|(id, port)| (*id, server(&port.behind))).collect();
        self.note_uplinks(image, &parts.user);
        // A guest's policy is in force before the kernel sends it anything, and after it has ceased to; and the kernel's
        // before it gets anything of a guest.
        let UserReport { changes, ports } = self.user.sync(&parts.user);
        let mut report = self.kernel.sync(&parts.kernel)?;
        report.observe_again |= !changes.is_empty();
        report.link_changes.extend(changes);
        // What is sent to a tap without the kernel engine's program would be the host's to receive.
        let is_attached =
            |name: &String| report.ports.get(name).is_some_and(|port| port.state == PortState::Attached);
        let trunks = image.ports.iter().filter(|(_, port)| port.behind == Behind::UserTap);
        let attached = trunks
            .filter(|(_, port)| is_attached(&port.name))
            .map(|(id, port)| (port.netdev.as_str(), *id))
            .collect();
        let served = self.user.serve_trunks(&attached);
        report.link_changes.extend(served);
        self.serve_wires(image, &parts.user, &mut report);
        for port in image.ports.values().filter(|port| port.behind == Behind::UserTap) {
            let refused = self.user.refused(&port.netdev);
            if let Some(status) = report.ports.get_mut(&port.name).filter(|_| refused > 0) {
                status.notes.push(format!("frames from the kernel refused for their offloads: {refused}"));
            }
        }
        report.ports.extend(ports);
        Ok(report)
    }

    fn wire(&self, ifindex: u32) -> Result<WireView, EngineError> {
        self.kernel.wire(ifindex)
    }

    fn steer(&mut self, port: u32, queue: u32, socket: BorrowedFd<'_>) -> Result<(), EngineError> {
        self.kernel.steer(port, queue, socket)
    }

    fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        self.kernel.repair()
    }

    fn age_fdb(&mut self) -> Result<FdbSweep, EngineError> {
        self.user.age_fdb();
        self.kernel.age_fdb()
    }

    /// What the userspace engine knows behind the trunk, the kernel engine knows better.
    fn fdb(&self) -> Result<Vec<FdbRow>, EngineError> {
        let mut rows = self.kernel.fdb()?;
        rows.extend(self.user.fdb().into_iter().filter(|row| self.server(row.port) == Server::User));
        Ok(rows)
    }

    /// Those of a trunk are the kernel's: both count the same frames.
    fn port_stats(&self, port: u32) -> Result<PortStats, EngineError> {
        match self.server(port) {
            Server::User => Ok(self.user.port_stats(port)),
            Server::Kernel | Server::Both => self.kernel.port_stats(port),
            // What comes in is the kernel's; each counts what it sends.
            Server::Uplink => {
                let mut stats = self.kernel.port_stats(port)?;
                let more = self.user.port_stats(port);
                stats.tx_packets += more.tx_packets;
                stats.tx_bytes += more.tx_bytes;
                Ok(stats)
            }
        }
    }

    fn drops(&self, port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
        let server = self.server(port);
        if server == Server::User {
            return Ok(self.user.drops(port));
        }
        let mut drops = self.kernel.drops(port)?;
        if server != Server::Kernel {
            for (reason, count) in self.user.drops(port) {
                match drops.iter_mut().find(|(known, _)| *known == reason) {
                    Some((_, sum)) => *sum += count,
                    None => drops.push((reason, count)),
                }
            }
        }
        Ok(drops)
    }

    fn rule_stats(&self, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
        let mut stats = self.kernel.rule_stats(counters)?;
        for (sum, counter) in stats.iter_mut().zip(counters) {
            let more = self.user.rule_stats(*counter);
            sum.packets += more.packets;
            sum.bytes += more.bytes;
        }
        Ok(stats)
    }

    /// As if one engine served all ports: what happens on a trunk is left out.
    fn trace(&self, ingress: u32, frame: &[u8]) -> LiveTrace {
        let from_user = self.server(ingress) == Server::User;
        let ask = |user: bool, port: u32, frame: &[u8]| {
            if user { self.user.trace(port, frame) } else { self.kernel.trace(port, frame) }
        };
        let mut all = ask(from_user, ingress, frame);
        let (crossing, stay): (Vec<_>, Vec<_>) =
            all.frames.into_iter().partition(|(port, _)| self.is_trunk(*port));
        all.frames = stay;
        for (trunk, bytes) in &crossing {
            let other = ask(!from_user, *trunk, bytes);
            all.frames.extend(other.frames);
            // It learns that the sender is behind the trunk, which is nobody's news.
            all.steps.extend(other.steps.into_iter().filter(|step| *step != Step::Learn));
        }
        all.steps.retain(|step| !step.port().is_some_and(|port| self.is_trunk(port)));
        let is_dropped = all.steps.iter().any(|step| matches!(step, Step::Drop(..)));
        if !crossing.is_empty() && all.frames.is_empty() && !is_dropped {
            all.steps.push(Step::Drop(ingress, DropReason::NoDestination));
        }
        all
    }

    fn set_workers(&mut self, plan: &WorkersPlan) -> Result<(), UserError> {
        self.user.set_workers(plan)
    }

    fn workers(&self) -> WorkersView {
        self.user.workers()
    }

    fn balance_workers(&mut self) -> Result<Vec<Move>, UserError> {
        self.user.balance_workers()
    }

    fn frames(&self) -> Option<FrameUse> {
        self.user.frames()
    }

    fn watch(&mut self, wake: Wake) {
        self.user.watch(wake);
    }
}

#[cfg(test)]
mod tests;
