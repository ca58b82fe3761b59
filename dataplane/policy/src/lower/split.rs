//! One host, two engines: what each of them has of an image.
//!
//! A switch with vhost-user vNICs is served by both, joined by a tap. Each vNIC's whole policy is enforced by the engine that
//! serves it; the tap carries every VLAN and guards nothing. Seen from the kernel engine, all that is served in user space is
//! behind the tap; seen from the userspace engine, the tap is the uplink, and everything else is behind that.

use std::collections::{BTreeMap, BTreeSet};

use sluice_pipeline::tables::{PortConfig, port_flag};

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

fn groups(config: &PortConfig) -> impl Iterator<Item = u32> {
    config.acl.iter().flat_map(|acl| acl.groups.iter().take(acl.group_count as usize).copied())
}

#[cfg(test)]
mod tests;
