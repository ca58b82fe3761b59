//! The [`Tables`](sluice_pipeline::Tables) that the pipeline sees in a worker: the published configuration, what all
//! workers share, and what is this worker's own.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_pipeline::tables::{
    AclGroup, CacheSlot, Direction, FdbEntry, FdbKey, FloodChunk, FloodKey, IpGuardKey, MacKey, PortConfig,
    RateConfig, RuleEntry, RuleKey, SwitchConfig, TupleChunk, TupleKey,
};
use sluice_pipeline::{
    Context, DropReason, Frame, HEADER_WINDOW, LoopBody, Tables as PipelineTables, Tag, classify, conform,
    ip_proto,
};

use super::bulk::BulkSenders;
use super::counters::{Counters, add};
use super::fdb::{Fdb, FdbCopies, Learnt};
use super::tables::Tables;
use super::verdicts::{Question, Verdicts};

/// A frame's headers as the pipeline reads them. All tags are in the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header<'a> {
    window: &'a [u8],
    length: u32,
}

impl<'a> Header<'a> {
    #[inline(always)]
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        let window = &bytes[..bytes.len().min(HEADER_WINDOW as usize)];
        Header { window, length: bytes.len() as u32 }
    }
}

impl Frame for Header<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.window.get(offset as usize..)?.first_chunk().copied()
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let bytes = self.window.get(offset as usize..offset as usize + 4 * N)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*bytes);
        }
        Some(words)
    }

    #[inline(always)]
    fn tag(&self) -> Tag {
        Tag::NONE
    }
}

/// Theoretical arrival times of a port's buckets, by direction.
pub(super) type Buckets = [AtomicU64; 2];

/// What a worker has for itself.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) verdicts: RefCell<Verdicts>,
    pub(super) copies: RefCell<FdbCopies>,
    pub(super) bulk: RefCell<BulkSenders>,
}

/// Everything that the pipeline may look at while one batch passes.
pub(super) struct View<'a> {
    pub(super) tables: &'a Tables,
    pub(super) fdb: &'a Fdb,
    pub(super) buckets: &'a [Buckets],
    pub(super) counters: &'a Counters,
    pub(super) own: &'a Own,
    /// Nanoseconds.
    pub(super) now: u64,
    pub(super) seconds: u32,
}

impl PipelineTables for View<'_> {
    const COMPLETE: bool = true;

    #[inline(always)]
    fn port(&self, port: u32) -> Option<(&PortConfig, u32)> {
        self.tables.port(port).map(|entry| (&entry.config, port))
    }

    #[inline(always)]
    fn trunk_allows(&self, slot: u32, vid: u16) -> bool {
        self.tables
            .port(slot)
            .is_some_and(|port| port.trunk[usize::from(vid / 64) % 64] >> (vid % 64) & 1 != 0)
    }

    #[inline(always)]
    fn switch(&self, switch: u32) -> Option<&SwitchConfig> {
        self.tables.switches.get(switch as usize)?.as_ref()
    }

    #[inline(always)]
    fn vnic_mac(&self, key: &MacKey) -> Option<u32> {
        self.tables.owner(key)
    }

    #[inline(always)]
    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry> {
        self.own.copies.borrow_mut().get(self.fdb, key, self.seconds)
    }

    fn ip_allowed(&self, key: &IpGuardKey) -> bool {
        self.tables.ip_guard.contains(key)
    }

    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk> {
        self.tables.flood.get(key)
    }

    fn acl_group(&self, group: u32) -> Option<&AclGroup> {
        Some(&self.tables.groups.get(&group)?.entry)
    }

    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk> {
        self.tables.groups.get(&key.group)?.tuples.get(key.direction as usize)?.get(key.chunk as usize)
    }

    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry> {
        self.tables.groups.get(&(key.group_direction / 2))?.rules.get(key)
    }

    #[inline(always)]
    fn epoch(&self) -> u64 {
        self.tables.epoch
    }

    /// Not asked: see [`acl_verdicts`](Self::acl_verdicts).
    #[inline(always)]
    fn cache(&self, _slot: u32) -> Option<&mut CacheSlot> {
        None
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        self.now
    }

    #[inline(always)]
    fn now_seconds(&self) -> u32 {
        self.seconds
    }

    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool {
        let Some(bucket) = self.buckets.get(port as usize) else { return false };
        let take = |arrival| conform(rate, arrival, self.now, bytes);
        bucket[direction as usize].fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn learn(&self, key: &FdbKey, port: u32, limit: u32) {
        let counters = self.counters.port(port);
        match self.fdb.learn(key, port, limit, self.seconds) {
            Learnt::Yes => {
                let entry = FdbEntry { port, seen: self.seconds };
                self.fdb.refreshed(&mut self.own.copies.borrow_mut(), key, entry);
            }
            Learnt::Limited => add(&counters.learn_limited, 1),
            Learnt::Full => add(&counters.fdb_full, 1),
        }
    }

    #[inline(always)]
    fn count_rx(&self, port: u32, bytes: u32) {
        let counters = self.counters.port(port);
        add(&counters.rx_packets, 1);
        add(&counters.rx_bytes, u64::from(bytes));
    }

    fn count_flood(&self, port: u32) {
        add(&self.counters.port(port).flooded, 1);
    }

    fn count_cache_miss(&self, port: u32) {
        add(&self.counters.port(port).cache_misses, 1);
    }

    #[inline(always)]
    fn count_rule(&self, counter: u32, bytes: u32) {
        self.counters.count_rule(counter, 1, bytes.into());
    }

    fn count_drop(&self, port: u32, reason: DropReason) {
        self.counters.count_drops(port, reason, 1);
    }

    #[inline]
    fn way(&self, context: &Context, port: u32) -> u32 {
        match self.tables.port(port).and_then(|trunk| trunk.short_cut) {
            Some(uplink) if port != context.ingress && !self.is_bulk(context) => uplink,
            _ => port,
        }
    }

    #[inline(always)]
    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B) {
        for round in 0..rounds {
            if !body.step(round) {
                return;
            }
        }
    }

    #[inline(always)]
    fn acl_verdicts(&self, context: &mut Context, ingress: u32, egress: u32) {
        let question = Question { key: context.headers.key, ingress, egress };
        let place = question.place();
        if let Some(answer) = self.own.verdicts.borrow().get(place, &question, self.tables.epoch) {
            if ingress != 0 {
                context.from_vm = answer[0];
            }
            if egress != 0 {
                context.to_vm = answer[1];
            }
            return;
        }
        self.classify(context, ingress, egress);
        let answer = [context.from_vm, context.to_vm];
        self.own.verdicts.borrow_mut().put(place, question, self.tables.epoch, answer);
    }
}

impl View<'_> {
    fn is_bulk(&self, context: &Context) -> bool {
        context.headers.key.proto == ip_proto::TCP
            && self.own.bulk.borrow().has(context.ingress, self.seconds)
    }

    /// What the rules say, by asking them.
    #[cold]
    fn classify(&self, context: &mut Context, ingress: u32, egress: u32) {
        self.count_cache_miss(if ingress != 0 { ingress } else { egress });
        let key = context.headers.key;
        let ask = |port, direction| {
            let (config, _) = self.port(port)?;
            Some(classify(self, &config.acl[direction as usize], direction, &key))
        };
        if ingress != 0 {
            context.from_vm = ask(ingress, Direction::FromVm).unwrap_or(context.from_vm);
        }
        if egress != 0 {
            context.to_vm = ask(egress, Direction::ToVm).unwrap_or(context.to_vm);
        }
    }
}
