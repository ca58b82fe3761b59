//! Ports and what leads to them: slots, addresses, IP guard, flood lists, switches, devices.

use std::collections::{BTreeMap, BTreeSet};

use bytemuck::Zeroable;
use sluice_pipeline::REASONS_MAX;
use sluice_pipeline::tables::{FloodKey, IpGuardKey, SwitchConfig, port_flag};
use sluice_policy::image::PortImage;

use super::diff::difference;
use super::mirror::PortMirror;
use super::{Mirror, Pass};
use crate::maps::DevmapValue;
use crate::{EngineError, SyncReport, syscall};

/// A port may be another one under the same id, or the same on another switch: then nothing that was learnt or counted
/// for it may stay.
fn is_same(mirror: &Mirror, id: u32, have: &PortMirror, want: &PortImage) -> bool {
    let same_name = match mirror.names.get(&id) {
        Some(name) => *name == want.name,
        None => have.config.kind == want.config.kind && have.config.macs[0] == want.config.macs[0],
    };
    same_name && have.config.switch == want.config.switch
}

impl Pass<'_> {
    /// Takes ports out of service that are gone, or are not what they were: they become unreachable first, then
    /// absent, then forgotten. Says whether there were any, as their addresses are cached too.
    pub(super) fn retire(&mut self, report: &mut SyncReport) -> Result<bool, EngineError> {
        self.release_links(report)?;
        let retired: BTreeSet<u32> = self
            .mirror
            .ports
            .iter()
            .filter(|(id, have)| {
                self.image.ports.get(id).is_none_or(|want| !is_same(self.mirror, **id, have, want))
            })
            .map(|(id, _)| *id)
            .collect();
        if retired.is_empty() {
            return Ok(false);
        }
        let maps = &self.loaded.maps;
        let interfaces: Vec<u32> = keys_to(&self.mirror.port_of, &retired);
        maps.port_of.remove_all(&interfaces)?;
        self.writes.deleted(maps.port_of.name, interfaces.len());
        let devices: Vec<u32> =
            retired.iter().copied().filter(|id| self.mirror.devmap.contains_key(id)).collect();
        for port in &devices {
            maps.devmap.remove(port)?;
        }
        self.writes.deleted(maps.devmap.name, devices.len());
        let macs = keys_to(&self.mirror.macs, &retired);
        maps.vnic_macs.remove_all(&macs)?;
        self.writes.deleted(maps.vnic_macs.name, macs.len());
        let absent: Vec<(u32, u32)> = retired.iter().map(|id| (*id, 0)).collect();
        maps.port_live.set_all(&absent)?;
        self.writes.deleted(maps.port_live.name, absent.len());
        syscall::grace_period(); // a frame on its way may still be learnt behind a port that goes
        let learnt: Vec<_> = maps
            .fdb
            .dump()?
            .into_iter()
            .filter(|(_, entry)| retired.contains(&entry.port))
            .map(|(key, _)| key)
            .collect();
        maps.fdb.remove_all(&learnt)?;
        self.writes.deleted(maps.fdb.name, learnt.len());

        self.mirror.port_of.retain(|_, port| !retired.contains(port));
        self.mirror.devmap.retain(|port, _| !retired.contains(port));
        self.mirror.macs.retain(|_, port| !retired.contains(port));
        self.mirror.ports.retain(|port, _| !retired.contains(port));
        Ok(true)
    }

    /// Writes changed switches. Eight bytes each, which an array takes as one word.
    pub(super) fn write_switches(&mut self) -> Result<(), EngineError> {
        let difference = difference(&self.mirror.switches, &self.image.switches);
        let maps = &self.loaded.maps;
        let mut writes = difference.writes;
        self.writes.updated(maps.switches.name, writes.len());
        self.writes.deleted(maps.switches.name, difference.deletes.len());
        writes.extend(difference.deletes.iter().map(|id| (*id, SwitchConfig::zeroed())));
        maps.switches.set_all(&writes)?;
        self.mirror.switches.clone_from(&self.image.switches);
        Ok(())
    }

    /// Before the ports: a guard that is on finds its addresses.
    pub(super) fn add_ip_guard(&mut self) -> Result<(), EngineError> {
        let maps = &self.loaded.maps;
        let new: Vec<(IpGuardKey, u32)> =
            self.image.ip_guard.difference(&self.mirror.ip_guard).map(|key| (*key, 1)).collect();
        maps.ip_guard.set_all(&new)?;
        self.writes.updated(maps.ip_guard.name, new.len());
        self.mirror.ip_guard.extend(new.into_iter().map(|(key, _)| key));
        Ok(())
    }

    /// After the ports: a guard that is off needs no addresses.
    pub(super) fn remove_ip_guard(&mut self) -> Result<(), EngineError> {
        let maps = &self.loaded.maps;
        let old: Vec<IpGuardKey> = self.mirror.ip_guard.difference(&self.image.ip_guard).copied().collect();
        maps.ip_guard.remove_all(&old)?;
        self.writes.deleted(maps.ip_guard.name, old.len());
        for key in &old {
            self.mirror.ip_guard.remove(key);
        }
        Ok(())
    }

    /// Writes changed ports into their idle slots, then makes those live. Says whether there were any.
    pub(super) fn write_ports(&mut self) -> Result<bool, EngineError> {
        let mut changed: Vec<(u32, u32, &PortImage)> = Vec::new();
        let mut new = Vec::new();
        for (id, want) in &self.image.ports {
            let slot = match self.mirror.ports.get(id) {
                Some(have) if have.config == want.config && have.trunk == want.trunk => continue,
                Some(have) => have.slot ^ 1,
                None => {
                    new.push(*id);
                    id * 2
                }
            };
            changed.push((*id, slot, want));
        }
        if changed.is_empty() {
            return Ok(false);
        }
        if !self.mirror.fresh {
            self.reset_counters(&new)?;
        }
        let maps = &self.loaded.maps;
        let configs: Vec<_> = changed.iter().map(|(_, slot, want)| (*slot, want.config)).collect();
        maps.ports.set_all(&configs)?;
        self.writes.updated(maps.ports.name, configs.len());
        // The slot's old bitmap is not known, so it is written even if it is all zero, except in new maps.
        let trunks: Vec<_> = changed
            .iter()
            .filter(|(_, _, want)| !self.mirror.fresh || want.trunk != [0; 64])
            .map(|(_, slot, want)| (*slot, want.trunk))
            .collect();
        maps.trunks.set_all(&trunks)?;
        self.writes.updated(maps.trunks.name, trunks.len());
        let live: Vec<_> = changed.iter().map(|(id, slot, _)| (*id, *slot)).collect();
        maps.port_live.set_all(&live)?;
        self.writes.updated(maps.port_live.name, live.len());
        self.mirror.unsettled = true;
        for (id, slot, want) in changed {
            self.mirror.ports.insert(id, PortMirror { slot, config: want.config, trunk: want.trunk });
        }
        Ok(true)
    }

    /// A port that is new finds all its counters at zero and its buckets full.
    fn reset_counters(&mut self, ports: &[u32]) -> Result<(), EngineError> {
        let maps = &self.loaded.maps;
        maps.port_stats.reset(ports)?;
        let drops: Vec<u32> =
            ports.iter().flat_map(|port| port * REASONS_MAX..(port + 1) * REASONS_MAX).collect();
        maps.drops.reset(&drops)?;
        let buckets: Vec<(u32, [u64; 2])> = ports.iter().map(|port| (*port, [0; 2])).collect();
        maps.buckets.set_all(&buckets)?;
        let learnt: Vec<(u32, u32)> = ports.iter().map(|port| (*port, 0)).collect();
        maps.learnt.set_all(&learnt)?;
        self.writes.updated(maps.port_stats.name, ports.len());
        self.writes.updated(maps.drops.name, drops.len());
        self.writes.updated(maps.buckets.name, buckets.len());
        self.writes.updated(maps.learnt.name, learnt.len());
        Ok(())
    }

    /// Writes the static addresses. Says whether any changed, as they are cached too.
    pub(super) fn write_addresses(&mut self) -> Result<bool, EngineError> {
        let difference = difference(&self.mirror.macs, &self.image.macs);
        let table = &self.loaded.maps.vnic_macs;
        table.set_all(&difference.writes)?;
        table.remove_all(&difference.deletes)?;
        self.writes.updated(table.name, difference.writes.len());
        self.writes.deleted(table.name, difference.deletes.len());
        self.mirror.macs.clone_from(&self.image.macs);
        Ok(!difference.is_empty())
    }

    /// Writes the flood lists: growing ones from the end, shrinking ones from the start, so that a port that moves from
    /// one chunk to the next is for a moment in both rather than in none.
    pub(super) fn write_flood(&mut self) -> Result<(), EngineError> {
        let mut difference = difference(&self.mirror.flood, &self.image.flood);
        if difference.is_empty() {
            return Ok(());
        }
        let sizes = |lists: &BTreeMap<FloodKey, _>| -> BTreeMap<_, u32> {
            let mut sizes = BTreeMap::new();
            for (key, chunk) in lists {
                let chunk: &sluice_pipeline::tables::FloodChunk = chunk;
                *sizes.entry((key.switch, key.vlan)).or_default() += chunk.count;
            }
            sizes
        };
        let (old, new) = (sizes(&self.mirror.flood), sizes(&self.image.flood));
        difference.writes.sort_by_key(|(key, _)| {
            let list = (key.switch, key.vlan);
            let grows = new.get(&list) >= old.get(&list);
            let order = if grows { i32::from(u16::MAX) - i32::from(key.chunk) } else { i32::from(key.chunk) };
            (list, order)
        });
        let table = &self.loaded.maps.flood;
        table.set_all(&difference.writes)?;
        table.remove_all(&difference.deletes)?;
        self.writes.updated(table.name, difference.writes.len());
        self.writes.deleted(table.name, difference.deletes.len());
        self.mirror.flood.clone_from(&self.image.flood);
        Ok(())
    }

    /// Writes the device map. The kernel takes devices out by itself when they go, so what should be there is checked.
    /// Returns the ports whose device it refused.
    pub(super) fn write_devmap(&mut self) -> Result<BTreeMap<u32, String>, EngineError> {
        const WANTED: u32 = port_flag::XDP_TARGET | port_flag::ATTACHED;
        let table = &self.loaded.maps.devmap;
        let mut present = BTreeMap::new();
        for port in self.mirror.devmap.keys() {
            if let Some(value) = table.get(port)? {
                present.insert(*port, value.ifindex);
            }
        }
        let wanted: BTreeMap<u32, u32> = self
            .image
            .ports
            .iter()
            .filter(|(_, port)| port.config.flags & WANTED == WANTED)
            .map(|(id, port)| (*id, port.config.ifindex))
            .collect();
        let difference = difference(&present, &wanted);
        let mut refused = BTreeMap::new();
        for (port, ifindex) in difference.writes {
            match table.set(&port, &DevmapValue { ifindex, program: 0 }) {
                Ok(()) => {
                    present.insert(port, ifindex);
                    self.writes.updated(table.name, 1);
                }
                Err(error) => drop(refused.insert(port, error.to_string())),
            }
        }
        for port in difference.deletes {
            table.remove(&port)?;
            present.remove(&port);
            self.writes.deleted(table.name, 1);
        }
        self.mirror.devmap = present;
        Ok(refused)
    }

    /// Writes which interface is which port.
    pub(super) fn write_port_of(&mut self) -> Result<(), EngineError> {
        let difference = difference(&self.mirror.port_of, &self.image.ifindexes);
        let table = &self.loaded.maps.port_of;
        table.set_all(&difference.writes)?;
        table.remove_all(&difference.deletes)?;
        self.writes.updated(table.name, difference.writes.len());
        self.writes.deleted(table.name, difference.deletes.len());
        self.mirror.port_of.clone_from(&self.image.ifindexes);
        Ok(())
    }
}

/// Keys that lead to one of these ports.
fn keys_to<K: Copy>(table: &BTreeMap<K, u32>, ports: &BTreeSet<u32>) -> Vec<K> {
    table.iter().filter(|(_, port)| ports.contains(port)).map(|(key, _)| *key).collect()
}
