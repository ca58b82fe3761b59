//! What the maps hold, in memory.

use std::collections::{BTreeMap, BTreeSet};

use bytemuck::Zeroable;
use sluice_pipeline::tables::{
    AclGroup, FloodChunk, FloodKey, Globals, IpGuardKey, LAYOUT_VERSION, MacKey, PortConfig, RuleEntry,
    RuleKey, SwitchConfig, TUPLE_CHUNK, TrunkBitmap, Tuple, TupleKey,
};

use crate::EngineError;
use crate::attach::Attachments;
use crate::maps::Maps;

/// A port, in its live slot.
#[derive(Clone, Debug)]
pub(crate) struct PortMirror {
    pub(crate) slot: u32,
    pub(crate) config: PortConfig,
    pub(crate) trunk: TrunkBitmap,
}

/// A group, with everything that belongs to its id.
#[derive(Clone, Debug, Default)]
pub(crate) struct GroupMirror {
    /// Its entry; `None` if there are only leftovers.
    pub(crate) entry: Option<AclGroup>,
    /// Its live tuples.
    pub(crate) tuples: [Vec<Tuple>; 2],
    /// Every chunk with its id, of any generation.
    pub(crate) chunks: BTreeSet<TupleKey>,
    /// Every rule entry with its id, of any version.
    pub(crate) rules: BTreeMap<RuleKey, RuleEntry>,
}

/// What the maps hold.
#[derive(Clone, Debug)]
pub(crate) struct Mirror {
    pub(crate) ports: BTreeMap<u32, PortMirror>,
    /// Names of ports, as far as known.
    pub(crate) names: BTreeMap<u32, String>,
    pub(crate) port_of: BTreeMap<u32, u32>,
    pub(crate) switches: BTreeMap<u32, SwitchConfig>,
    pub(crate) macs: BTreeMap<MacKey, u32>,
    pub(crate) ip_guard: BTreeSet<IpGuardKey>,
    pub(crate) flood: BTreeMap<FloodKey, FloodChunk>,
    pub(crate) groups: BTreeMap<u32, GroupMirror>,
    pub(crate) devmap: BTreeMap<u32, u32>,
    pub(crate) globals: Globals,
    /// The maps are new: every counter is zero and nothing was ever learnt.
    pub(crate) fresh: bool,
    /// Something was put out of reach since the last grace period.
    pub(crate) unsettled: bool,
}

impl Mirror {
    /// The mirror of new maps.
    pub(crate) fn empty() -> Mirror {
        Mirror {
            ports: BTreeMap::new(),
            names: BTreeMap::new(),
            port_of: BTreeMap::new(),
            switches: BTreeMap::new(),
            macs: BTreeMap::new(),
            ip_guard: BTreeSet::new(),
            flood: BTreeMap::new(),
            groups: BTreeMap::new(),
            devmap: BTreeMap::new(),
            globals: Globals { epoch: 1, layout: LAYOUT_VERSION, reserved: 0 },
            fresh: true,
            unsettled: false,
        }
    }

    /// Reads everything, and makes every cached verdict outdated: whoever wrote last may not have lived to do so, and what
    /// is equal to the image now would never be looked at again.
    pub(crate) fn read(maps: &Maps, attachments: &Attachments) -> Result<Mirror, EngineError> {
        let mut mirror = Mirror::empty();
        mirror.fresh = false;
        mirror.unsettled = true; // who wrote to them last may have been killed a moment ago
        if let Some(globals) = maps.globals.get(&0)? {
            mirror.globals = globals;
        }
        for (id, slot) in maps.port_live.dump()? {
            if slot == 0 {
                continue;
            }
            let config = maps.ports.get(&slot)?.unwrap_or_else(PortConfig::zeroed);
            let trunk = maps.trunks.get(&slot)?.unwrap_or([0; 64]);
            mirror.ports.insert(id, PortMirror { slot, config, trunk });
        }
        mirror.port_of = maps.port_of.dump()?.into_iter().collect();
        mirror.switches = maps
            .switches
            .dump()?
            .into_iter()
            .filter(|(_, config)| *config != SwitchConfig::zeroed())
            .collect();
        mirror.macs = maps.vnic_macs.dump()?.into_iter().collect();
        mirror.ip_guard = maps.ip_guard.dump()?.into_iter().map(|(key, _)| key).collect();
        mirror.flood = maps.flood.dump()?.into_iter().collect();
        mirror.devmap = maps.dump_devmap()?.into_iter().map(|(port, value)| (port, value.ifindex)).collect();
        mirror.names = attachments
            .interfaces()
            .filter_map(|(port, ifindex)| Some((*mirror.port_of.get(&ifindex)?, port.to_owned())))
            .collect();
        mirror.read_groups(maps)?;
        mirror.globals.epoch += 1;
        maps.globals.set(&0, &mirror.globals)?;
        Ok(mirror)
    }

    fn read_groups(&mut self, maps: &Maps) -> Result<(), EngineError> {
        for (id, entry) in maps.acl_groups.dump()? {
            self.groups.entry(id).or_default().entry = Some(entry);
        }
        for (key, entry) in maps.acl_rules.dump()? {
            self.groups.entry(key.group_direction / 2).or_default().rules.insert(key, entry);
        }
        let mut chunks: BTreeMap<TupleKey, _> = BTreeMap::new();
        for (key, chunk) in maps.acl_tuples.dump()? {
            self.groups.entry(key.group).or_default().chunks.insert(key);
            chunks.insert(key, chunk);
        }
        for (id, group) in &mut self.groups {
            let Some(entry) = group.entry else { continue };
            for (direction, tuples) in group.tuples.iter_mut().enumerate() {
                let count = entry.tuple_count[direction] as usize;
                for chunk in 0..count.div_ceil(TUPLE_CHUNK) {
                    let key = TupleKey {
                        group: *id,
                        generation: entry.generation,
                        direction: direction as u32,
                        chunk: chunk as u32,
                    };
                    // A missing chunk makes the list differ from any wanted one, so it is written anew.
                    let Some(chunk) = chunks.get(&key) else { break };
                    tuples.extend(chunk.tuples);
                }
                tuples.truncate(count);
            }
        }
        Ok(())
    }
}
