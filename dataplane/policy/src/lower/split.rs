//! One host, two engines: what each of them has of an image.
//!
//! A switch with vhost-user vNICs is served by both, joined by a tap. Each vNIC's whole policy is enforced by the engine that
//! serves it; the tap carries every VLAN and guards nothing. Seen from the kernel engine, all that is served in user space is
//! behind the tap; seen from the userspace engine, the tap is the uplink, and everything else is behind that.
//!
//! Where all that can be learnt behind the tap is behind the real uplink, the userspace engine has that as a port too, to send
//! to. Addresses stay learnt behind the tap, which is the way when the uplink cannot be sent to directly.

use std::collections::{BTreeMap, BTreeSet};

use sluice_pipeline::tables::{PortConfig, port_flag, port_kind};

use crate::image::{Behind, Image, PortImage};
use crate::lower::flood;

/// Most addresses that the userspace engine learns behind a tap: as many as behind an uplink, unless told.
const LEARN_LIMIT: u32 = 16_384;

/// An image for each engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// The kernel engine's.
    pub kernel: Image,
    /// The userspace engine's; empty if it serves nothing.
    pub user: Image,
}

/// Parts an image among the engines.
pub fn split(whole: &Image) -> Split {
    let is_user = |port: &PortImage| matches!(port.behind, Behind::VhostUser(_));
    let served: BTreeSet<u32> =
        whole.ports.iter().filter(|(_, port)| is_user(port)).map(|(id, _)| *id).collect();
    if served.is_empty() {
        return Split { kernel: whole.clone(), user: Image::default() };
    }
    let taps: BTreeMap<u32, u32> = whole
        .ports
        .iter()
        .filter(|(_, port)| port.behind == Behind::UserTap)
        .map(|(id, port)| (port.config.switch, *id))
        .collect();
    Split { kernel: kernel(whole, &served, &taps), user: user(whole, &served, &taps) }
}

fn kernel(whole: &Image, served: &BTreeSet<u32>, taps: &BTreeMap<u32, u32>) -> Image {
    let mut image = whole.clone();
    image.ports.retain(|id, _| !served.contains(id));
    image.ip_guard.retain(|key| !served.contains(&key.port));
    for (key, port) in &mut image.macs {
        if let Some(tap) = taps.get(&u32::from(key.switch)).filter(|_| served.contains(port)) {
            *port = *tap;
        }
    }
    image.flood.clear();
    flood::lower_lists(&mut image);
    image
}

fn user(whole: &Image, served: &BTreeSet<u32>, taps: &BTreeMap<u32, u32>) -> Image {
    let mut image = Image::default();
    for (id, port) in &whole.ports {
        if served.contains(id) {
            image.ports.insert(*id, port.clone());
        } else if port.behind == Behind::UserTap {
            let mut port = port.clone();
            port.config.flags |= port_flag::LEARN;
            port.config.learn_limit = LEARN_LIMIT;
            port.config.ifindex = 0;
            image.ports.insert(*id, port);
        }
    }
    for (id, switch) in &whole.switches {
        if let Some(tap) = taps.get(id) {
            if let Some(uplink) = short_cut(whole, *id, switch.uplink, served) {
                image.ports.insert(switch.uplink, uplink);
            }
            let mut switch = *switch;
            switch.uplink = *tap;
            image.switches.insert(*id, switch);
        }
    }
    for (key, port) in &whole.macs {
        if let Some(tap) = taps.get(&u32::from(key.switch)) {
            image.macs.insert(*key, if served.contains(port) { *port } else { *tap });
        }
    }
    image.ip_guard = whole.ip_guard.iter().filter(|key| served.contains(&key.port)).copied().collect();
    let used: BTreeSet<u32> = image.ports.values().flat_map(|port| groups(&port.config)).collect();
    let of_them = whole.groups.iter().filter(|(id, _)| used.contains(id));
    image.groups = of_them.map(|(id, group)| (*id, group.clone())).collect();
    flood::lower_lists(&mut image);
    image
}

/// The uplink as the userspace engine's port, if whatever has no static address and comes by the trunk has come by the uplink.
fn short_cut(whole: &Image, switch: u32, uplink: u32, served: &BTreeSet<u32>) -> Option<PortImage> {
    let mut port = whole.ports.get(&uplink).filter(|port| port.config.flags & port_flag::LEARN != 0)?.clone();
    let is_other = |id: &u32, port: &PortImage| {
        port.config.switch == switch
            && *id != uplink
            && !served.contains(id)
            && port.behind != Behind::UserTap
            && port.config.kind != port_kind::INTERNAL
    };
    // Others send as themselves, and nothing is learnt behind them.
    const GUARDED: u32 = port_flag::MAC_GUARD;
    let is_guarded = |port: &PortImage| port.config.flags & (port_flag::LEARN | GUARDED) == GUARDED;
    if whole.ports.iter().any(|(id, port)| is_other(id, port) && !is_guarded(port)) {
        return None;
    }
    port.behind = Behind::Uplink;
    port.config.ifindex = 0;
    // What is flooded takes the trunk.
    port.is_standby = true;
    Some(port)
}

fn groups(config: &PortConfig) -> impl Iterator<Item = u32> {
    config.acl.iter().flat_map(|acl| acl.groups.iter().take(acl.group_count as usize).copied())
}

#[cfg(test)]
mod tests;
