//! Flood lists: who gets a copy of what goes to many.

use std::collections::BTreeMap;

use sluice_pipeline::tables::{
    FLOOD_CHUNK, FLOOD_TRUNKS, FLOOD_UNKNOWN, FloodChunk, FloodKey, Vlan, port_flag, vlan_mode,
};

use crate::image::Image;

/// Makes the lists from the ports that the image has so far.
///
/// Ports that are down or pending are listed too: what they are is in their configuration, so a port that comes and
/// goes changes no list.
pub(super) fn lower_lists(image: &mut Image) {
    let mut lists: BTreeMap<(u32, Vlan), Vec<u32>> = BTreeMap::new();
    for (&id, port) in image.ports.iter().filter(|(_, port)| !port.is_standby) {
        let config = &port.config;
        let domain = match config.vlan_mode {
            vlan_mode::TRUNK | vlan_mode::ALL => FLOOD_TRUNKS,
            _ => config.vlan,
        };
        lists.entry((config.switch, domain)).or_default().push(id);
        if config.flags & (port_flag::LEARN | port_flag::UNKNOWN_UNICAST) != 0 {
            lists.entry((config.switch, FLOOD_UNKNOWN)).or_default().push(id);
        }
    }
    for ((switch, vlan), ports) in lists {
        // Readers stop at the first chunk that is not full, so a list of full chunks ends with an empty one.
        let chunks = ports.len() / FLOOD_CHUNK + 1;
        for chunk in 0..chunks {
            let members = &ports[chunk * FLOOD_CHUNK..ports.len().min((chunk + 1) * FLOOD_CHUNK)];
            let mut value = FloodChunk { count: members.len() as u32, reserved: 0, ports: [0; FLOOD_CHUNK] };
            value.ports[..members.len()].copy_from_slice(members);
            image.flood.insert(FloodKey { switch, vlan, chunk: chunk as u16 }, value);
        }
    }
}
