//! The [`Tables`] that the pipeline sees while one frame passes.

use std::cell::RefCell;
use std::collections::HashMap;

use bytemuck::Zeroable;
use sluice_pipeline::tables::{
    AclGroup, CACHE_SLOTS, CacheSlot, Direction, FDB_MAX, FdbEntry, FdbKey, FloodChunk, FloodKey, IpGuardKey,
    MacKey, PortConfig, PortStats, RateConfig, RuleEntry, RuleKey, SwitchConfig, TupleChunk, TupleKey,
    port_flag,
};
use sluice_pipeline::{Context, DropReason, LoopBody, Stage, Tables, conform};

use super::{Log, State};
use crate::image::Image;

/// The verdict cache, lent out without unsafe code: whoever asks for a slot gets a copy of it, and after the frame the
/// copies go back in the order in which they were lent.
#[derive(Debug)]
pub(super) struct Cache {
    slots: Vec<CacheSlot>,
    copies: Vec<CacheSlot>,
}

impl Cache {
    /// Copies for one frame; a flood that needs more goes without the cache from there on.
    const COPIES: usize = 128;

    pub(super) fn new() -> Self {
        Cache {
            slots: vec![CacheSlot::zeroed(); CACHE_SLOTS as usize],
            copies: vec![CacheSlot::zeroed(); Self::COPIES],
        }
    }

    /// Takes back the copies of these slots.
    pub(super) fn take_back(&mut self, lent: &[u32]) {
        for (slot, copy) in lent.iter().zip(&self.copies) {
            self.slots[*slot as usize] = *copy;
        }
    }
}

/// Tables and state, borrowed for one frame.
#[derive(Debug)]
pub struct View<'a, const COMPLETE: bool> {
    image: &'a Image,
    groups: &'a HashMap<u32, AclGroup>,
    tuples: &'a HashMap<TupleKey, TupleChunk>,
    rules: &'a HashMap<RuleKey, RuleEntry>,
    cache: Option<(&'a [CacheSlot], RefCell<&'a mut [CacheSlot]>)>,
    state: RefCell<&'a mut State>,
    log: RefCell<Log>,
    epoch: u64,
    now: u64,
}

impl<'a, const COMPLETE: bool> View<'a, COMPLETE> {
    pub(super) fn new(
        image: &'a Image,
        groups: &'a HashMap<u32, AclGroup>,
        tuples: &'a HashMap<TupleKey, TupleChunk>,
        rules: &'a HashMap<RuleKey, RuleEntry>,
        cache: Option<&'a mut Cache>,
        state: &'a mut State,
    ) -> Self {
        let (epoch, now) = (state.epoch, state.now);
        View {
            image,
            groups,
            tuples,
            rules,
            cache: cache.map(|cache| (cache.slots.as_slice(), RefCell::new(cache.copies.as_mut_slice()))),
            state: RefCell::new(state),
            log: RefCell::default(),
            epoch,
            now,
        }
    }

    pub(super) fn finish(self) -> Log {
        self.log.into_inner()
    }

    fn with_stats(&self, port: u32, change: impl FnOnce(&mut PortStats)) {
        change(self.state.borrow_mut().ports.entry(port).or_default());
    }
}

impl<const COMPLETE: bool> Tables for View<'_, COMPLETE> {
    const COMPLETE: bool = COMPLETE;

    fn port(&self, port: u32) -> Option<(&PortConfig, u32)> {
        self.image.ports.get(&port).map(|image| (&image.config, port * 2))
    }

    fn trunk_allows(&self, slot: u32, vid: u16) -> bool {
        let Some(port) = self.image.ports.get(&(slot / 2)) else {
            return false;
        };
        port.trunk[usize::from(vid / 64) % 64] >> (vid % 64) & 1 != 0
    }

    fn switch(&self, switch: u32) -> Option<&SwitchConfig> {
        self.image.switches.get(&switch)
    }

    fn vnic_mac(&self, key: &MacKey) -> Option<u32> {
        self.image.macs.get(key).copied()
    }

    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry> {
        self.state.borrow().fdb.get(key).copied()
    }

    fn ip_allowed(&self, key: &IpGuardKey) -> bool {
        self.image.ip_guard.contains(key)
    }

    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk> {
        self.image.flood.get(key)
    }

    fn acl_group(&self, group: u32) -> Option<&AclGroup> {
        self.groups.get(&group)
    }

    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk> {
        self.tuples.get(key)
    }

    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry> {
        self.rules.get(key)
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn cache(&self, slot: u32) -> Option<&mut CacheSlot> {
        let (slots, copies) = self.cache.as_ref()?;
        let mut left = copies.borrow_mut();
        let (copy, rest) = std::mem::take(&mut *left).split_first_mut()?;
        *left = rest;
        *copy = *slots.get(slot as usize)?;
        self.log.borrow_mut().lent.push(slot);
        Some(copy)
    }

    fn now(&self) -> u64 {
        self.now
    }

    fn now_seconds(&self) -> u32 {
        (self.now / 1_000_000_000) as u32
    }

    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool {
        let mut state = self.state.borrow_mut();
        let arrival = state.buckets.get(&(port, direction)).copied().unwrap_or(0);
        match conform(rate, arrival, self.now, bytes) {
            Some(next) => {
                state.buckets.insert((port, direction), next);
                true
            }
            None => false,
        }
    }

    fn learn(&self, key: &FdbKey, port: u32, limit: u32) {
        let mut state = self.state.borrow_mut();
        let known = state.fdb.get(key).is_some_and(|entry| entry.port == port);
        if !known {
            let learnt = state.fdb.values().filter(|entry| entry.port == port).count();
            if learnt >= limit as usize {
                state.ports.entry(port).or_default().learn_limited += 1;
                return;
            }
            if !state.fdb.contains_key(key) && state.fdb.len() >= FDB_MAX as usize {
                state.ports.entry(port).or_default().fdb_full += 1;
                return;
            }
        }
        state.fdb.insert(*key, FdbEntry { port, seen: self.now_seconds() });
        self.log.borrow_mut().learnt.push((*key, port));
    }

    fn count_rx(&self, port: u32, bytes: u32) {
        self.with_stats(port, |stats| {
            stats.rx_packets += 1;
            stats.rx_bytes += u64::from(bytes);
        });
    }

    fn count_flood(&self, port: u32) {
        self.with_stats(port, |stats| stats.flooded += 1);
    }

    fn count_cache_miss(&self, port: u32) {
        self.with_stats(port, |stats| stats.cache_misses += 1);
    }

    fn count_rule(&self, counter: u32, bytes: u32) {
        self.log.borrow_mut().rules.push(counter);
        let mut state = self.state.borrow_mut();
        let stats = state.rules.entry(counter).or_default();
        stats.packets += 1;
        stats.bytes += u64::from(bytes);
    }

    fn count_drop(&self, port: u32, reason: DropReason) {
        self.log.borrow_mut().drops.push((port, reason));
        *self.state.borrow_mut().drops.entry((port, reason)).or_default() += 1;
    }

    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B) {
        for round in 0..rounds {
            if !body.step(round) {
                return;
            }
        }
    }

    fn way(&self, context: &Context, port: u32) -> u32 {
        let is_attached = |id: &u32| {
            self.image.ports.get(id).is_some_and(|port| port.config.flags & port_flag::ATTACHED != 0)
        };
        let short_cut = self.image.short_cut(port).filter(|_| context.ingress != port);
        short_cut.filter(is_attached).unwrap_or(port)
    }

    fn stage(&self, stage: Stage) {
        self.log.borrow_mut().stages.push(stage);
    }
}
