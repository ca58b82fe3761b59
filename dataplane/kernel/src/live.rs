//! The live maps as [`Tables`], read-only, over system calls: what `sluice trace` asks.
//!
//! Look-ups return references, so what was read is kept as long as the view lives; make one view per packet. Nothing is
//! counted, learnt or taken: a rate is asked whether the frame would conform.

use std::cell::{Cell, RefCell};

use bytemuck::Pod;
use sluice_pipeline::tables::{
    AclGroup, CacheSlot, Direction, FdbEntry, FdbKey, FloodChunk, FloodKey, IpGuardKey, LoopBody, MacKey,
    PortConfig, RateConfig, RuleEntry, RuleKey, SwitchConfig, Tables, TupleChunk, TupleKey,
};
use sluice_pipeline::{DropReason, Stage, conform};
use typed_arena::Arena;

use crate::maps::{Maps, Table};
use crate::{EngineError, syscall};

/// A read-only view of the live maps.
pub struct LiveTables<'a> {
    maps: &'a Maps,
    ports: Arena<PortConfig>,
    switches: Arena<SwitchConfig>,
    floods: Arena<FloodChunk>,
    groups: Arena<AclGroup>,
    tuples: Arena<TupleChunk>,
    rules: Arena<RuleEntry>,
    stages: RefCell<Vec<Stage>>,
    counters: RefCell<Vec<u32>>,
    error: Cell<Option<EngineError>>,
}

impl std::fmt::Debug for LiveTables<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveTables").field("stages", &self.stages).finish_non_exhaustive()
    }
}

impl<'a> LiveTables<'a> {
    pub(crate) fn new(maps: &'a Maps) -> Self {
        LiveTables {
            maps,
            ports: Arena::new(),
            switches: Arena::new(),
            floods: Arena::new(),
            groups: Arena::new(),
            tuples: Arena::new(),
            rules: Arena::new(),
            stages: RefCell::default(),
            counters: RefCell::default(),
            error: Cell::default(),
        }
    }

    /// The stages entered so far, in order; a stage of every destination of a flood.
    pub fn stages(&self) -> Vec<Stage> {
        self.stages.borrow().clone()
    }

    /// Counters of the rules that decided so far, in order.
    pub fn rules_hit(&self) -> Vec<u32> {
        self.counters.borrow().clone()
    }

    /// The first look-up that failed, if any: then nothing that was found is to be trusted.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<(), EngineError> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn get<K: Pod, V: Pod>(&self, table: &Table<K, V>, key: &K) -> Option<V> {
        match table.get(key) {
            Ok(value) => value,
            Err(error) => {
                let first = self.error.take().unwrap_or(error);
                self.error.set(Some(first));
                None
            }
        }
    }
}

impl Tables for LiveTables<'_> {
    const COMPLETE: bool = true;

    fn port(&self, port: u32) -> Option<(&PortConfig, u32)> {
        let slot = self.get(&self.maps.port_live, &port).filter(|slot| *slot != 0)?;
        Some((self.ports.alloc(self.get(&self.maps.ports, &slot)?), slot))
    }

    fn trunk_allows(&self, slot: u32, vid: u16) -> bool {
        self.get(&self.maps.trunks, &slot)
            .and_then(|words| words.get(usize::from(vid / 64)).copied())
            .is_some_and(|word| word >> (vid % 64) & 1 != 0)
    }

    fn switch(&self, switch: u32) -> Option<&SwitchConfig> {
        Some(self.switches.alloc(self.get(&self.maps.switches, &switch)?))
    }

    fn vnic_mac(&self, key: &MacKey) -> Option<u32> {
        self.get(&self.maps.vnic_macs, key)
    }

    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry> {
        self.get(&self.maps.fdb, key)
    }

    fn ip_allowed(&self, key: &IpGuardKey) -> bool {
        self.get(&self.maps.ip_guard, key).is_some()
    }

    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk> {
        Some(self.floods.alloc(self.get(&self.maps.flood, key)?))
    }

    fn acl_group(&self, group: u32) -> Option<&AclGroup> {
        Some(self.groups.alloc(self.get(&self.maps.acl_groups, &group)?))
    }

    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk> {
        Some(self.tuples.alloc(self.get(&self.maps.acl_tuples, key)?))
    }

    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry> {
        Some(self.rules.alloc(self.get(&self.maps.acl_rules, key)?))
    }

    fn epoch(&self) -> u64 {
        self.get(&self.maps.globals, &0).map_or(0, |globals| globals.epoch)
    }

    fn cache(&self, _slot: u32) -> Option<&mut CacheSlot> {
        None
    }

    fn now(&self) -> u64 {
        syscall::monotonic_nanoseconds()
    }

    fn now_seconds(&self) -> u32 {
        (self.now() / 1_000_000_000) as u32
    }

    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool {
        let arrivals = self.get(&self.maps.buckets, &port).unwrap_or_default();
        conform(rate, arrivals[direction as usize], self.now(), bytes).is_some()
    }

    fn learn(&self, _key: &FdbKey, _port: u32, _limit: u32) {}

    fn count_rx(&self, _port: u32, _bytes: u32) {}

    fn count_flood(&self, _port: u32) {}

    fn count_cache_miss(&self, _port: u32) {}

    fn count_rule(&self, counter: u32, _bytes: u32) {
        self.counters.borrow_mut().push(counter);
    }

    fn count_drop(&self, _port: u32, _reason: DropReason) {}

    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B) {
        for round in 0..rounds {
            if !body.step(round) {
                break;
            }
        }
    }

    fn stage(&self, stage: Stage) {
        self.stages.borrow_mut().push(stage);
    }
}
