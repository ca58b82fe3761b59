//! Sluice's userspace engine: what the daemon runs, with one worker.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use sluice_pipeline::DropReason;
use sluice_policy::config::Config;
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings};
use sluice_policy::lower::{assign_ids, lower, ports};
use sluice_tests::Netns;
use sluice_user::engine::Engine;
use sluice_user::frame::{Region, RegionLayout};
use sluice_user::port::{Receive, Transmit};
use sluice_user::vhost::{Mode, Port, PortConfig};
use sluice_user::workers::{Patience, QueueId, Workers};
use sluice_user::xdp::{self, Steering, XdpOptions};

use super::policy::{self, Rules};
use super::{sockets, switch_cpu};

/// As the daemon's.
const LAYOUT: RegionLayout = RegionLayout { small: 16_384, large: 512 };
/// As the daemon's.
const MTU: u16 = 9_000;

/// An engine between two ports.
#[derive(Debug)]
pub(crate) struct Sluice {
    // Dropped in this order: nobody serves a queue whose port is gone.
    workers: Workers,
    engine: Engine,
    ports: Vec<Port>,
    steerings: Vec<Steering>,
    region: Arc<Region>,
    ids: [u32; 2],
}

impl Sluice {
    /// Between guests' rings, which the guests listen for; a guest may take offloads or not.
    pub(crate) fn between_rings(folder: &Path, mode: Mode, rules: &Rules) -> Result<Sluice> {
        let mut sluice = Sluice::start(&policy::config(rules)?)?;
        for (number, path) in sockets(folder).into_iter().enumerate() {
            let config = PortConfig { path, mode, queue_pairs: 1, mtu: MTU, offloads: true, standby: false };
            let port = Port::open(config, Box::new(|_| {}))?;
            for (receive, transmit) in port.queues() {
                sluice.place(number, Box::new(receive), Box::new(transmit))?;
            }
            sluice.ports.push(port);
        }
        Ok(sluice)
    }

    /// Between AF_XDP sockets on interfaces of a namespace.
    pub(crate) fn between_sockets(netns: &Netns, interfaces: [&str; 2], rules: &Rules) -> Result<Sluice> {
        let mut sluice = Sluice::start(&policy::config(rules)?)?;
        for (number, interface) in interfaces.into_iter().enumerate() {
            let (queue, steering) = netns.enter(|| {
                let ifindex = if_nametoindex(interface)?;
                // The guests' ends have XDP.
                let options = XdpOptions { redirect: true, ..XdpOptions::default() };
                let queue = xdp::open(ifindex, 0, &sluice.region, &options)?;
                ensure!(queue.mode().redirect, "there is no tap to redirect from");
                let steering = Steering::attach(ifindex, 1, true)?;
                steering.set(0, queue.receive.socket())?;
                Ok((queue, steering))
            })?;
            ensure!(steering.is_in_driver(), "a veth has XDP in its driver");
            sluice.steerings.push(steering);
            sluice.place(number, Box::new(queue.receive), Box::new(queue.transmit))?;
        }
        Ok(sluice)
    }

    fn start(config: &Config) -> Result<Sluice> {
        let mut ids = Ids::default();
        assign_ids(config, &mut ids)?;
        // No interface of the kernel's has anything to do with these ports: the numbers stand for nothing.
        let bindings: Bindings = (1..)
            .zip(ports(config))
            .map(|(ifindex, spec)| (spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false }))
            .collect();
        let engine = Engine::new();
        engine.apply(lower(config, &ids, &bindings)?);
        let region = Region::new(LAYOUT)?;
        let workers = Workers::start(&engine, &region, &[switch_cpu()?], Patience::default())?;
        let id = |name| ids.ports.get(name).with_context(|| format!("{name} has no number"));
        let ids = [id("vnic/a")?, id("vnic/b")?];
        Ok(Sluice { workers, engine, ports: Vec::new(), steerings: Vec::new(), region, ids })
    }

    /// What its ports and counters say.
    pub(crate) fn describe(&self) -> String {
        let drops = |port| {
            let count = |&reason: &DropReason| (reason, self.engine.drops(port, reason));
            DropReason::ALL.iter().map(count).filter(|(_, count)| *count > 0).collect::<Vec<_>>()
        };
        let ports = self.ids.map(|port| (self.engine.port_stats(port), drops(port)));
        let rings: Vec<_> = self.ports.iter().map(Port::status).collect();
        format!("Sluice does not pass frames: {ports:?} {rings:?}")
    }

    fn place(&self, number: usize, receive: Box<dyn Receive>, transmit: Box<dyn Transmit>) -> Result<()> {
        let port = self.ids[number];
        self.engine.attach(port, vec![transmit]);
        self.workers.place_anywhere(QueueId { port, queue: 0 }, receive)?;
        Ok(())
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        for port in self.ids {
            // One that could not be opened was not placed.
            let _ = self.workers.remove(QueueId { port, queue: 0 });
            self.engine.detach(port);
        }
    }
}
