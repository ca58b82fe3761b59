//! The engine: frames from ports through the pipeline to ports.
//!
//! [`Engine`] is the shared handle: it takes a new [`Image`] and publishes tables made from it in one step, and it answers
//! questions about counters and addresses; any thread may use it. A [`Processor`] is what one worker has: it takes batches
//! through the pipeline, with caches and counters of its own. No step of a frame waits for another worker but at a port's
//! transmit queue and at an FDB shard, both held for moments.

mod bulk;
mod counters;
mod egress;
mod fdb;
mod flows;
mod honest;
mod outgoing;
mod processor;
mod tables;
#[cfg(test)]
pub(crate) mod tests;
mod verdicts;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{Direction, FdbEntry, FdbKey, PORTS_MAX, PortStats, RuleStats};
use sluice_policy::image::Image;

use crate::port::Transmit;
use counters::Counters;
use egress::Egress;
use fdb::Fdb;
pub use processor::Processor;
use tables::Tables;
use view::Buckets;

/// What all workers share.
#[derive(Debug)]
struct Shared {
    published: Arc<ArcSwap<Tables>>,
    fdb: Fdb,
    /// By port.
    buckets: Box<[Buckets]>,
    counters: Mutex<AllCounters>,
}

/// Counters of everybody.
#[derive(Debug)]
struct AllCounters {
    working: Vec<Arc<Counters>>,
    /// The sums of those that work no more.
    retired: Counters,
}

/// What is wanted: the image, and which ports have something attached.
#[derive(Debug, Default)]
struct Wanted {
    image: Image,
    attached: BTreeMap<u32, Arc<Egress>>,
    epoch: u64,
}

/// The engine's handle.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    wanted: Arc<Mutex<Wanted>>,
}

impl Engine {
    /// An engine without configuration: it drops everything.
    pub fn new() -> Engine {
        let bucket = || [AtomicU64::new(0), AtomicU64::new(0)];
        let shared = Shared {
            published: Arc::new(ArcSwap::from_pointee(Tables::default())),
            fdb: Fdb::new(),
            buckets: (0..PORTS_MAX).map(|_| bucket()).collect(),
            counters: Mutex::new(AllCounters { working: Vec::new(), retired: Counters::new() }),
        };
        Engine { shared: Arc::new(shared), wanted: Arc::default() }
    }

    /// Makes the tables those of `image`. Batches that are under way finish under the old ones.
    ///
    /// Learnt addresses behind ports that are gone, or in another switch now, are forgotten; and those behind a trunk to
    /// which there is a short cut as of now, since they may have come from elsewhere.
    pub fn apply(&self, image: Image) {
        let mut wanted = self.wanted.lock();
        let before = std::mem::replace(&mut wanted.image, image);
        self.publish(&mut wanted, &before);
        let image = &wanted.image;
        let trunks = image.ports.keys().filter(|id| image.short_cut(**id) != before.short_cut(**id));
        let trunks: BTreeSet<u32> = trunks.copied().collect();
        self.shared.fdb.retain(|key, entry| {
            let port = image.ports.get(&entry.port);
            port.is_some_and(|port| port.config.switch == key.switch) && !trunks.contains(&entry.port)
        });
    }

    /// Attaches the ways out of a port, in place of those that it had: frames for it go there from now on.
    /// Without any, this is [`detach`](Self::detach).
    pub fn attach(&self, port: u32, queues: Vec<Box<dyn Transmit>>) {
        let mut wanted = self.wanted.lock();
        match Egress::new(queues) {
            Some(egress) => wanted.attached.insert(port, Arc::new(egress)),
            None => wanted.attached.remove(&port),
        };
        let image = wanted.image.clone();
        self.publish(&mut wanted, &image);
    }

    /// Takes a port's ways out away: frames for it are dropped, as of a port that is down. Its queues are dropped a moment
    /// later, when the last worker has finished its batch ([`Processor::idle`] and [`rest`](Processor::rest) see to it).
    pub fn detach(&self, port: u32) {
        self.attach(port, Vec::new());
    }

    fn publish(&self, wanted: &mut Wanted, before: &Image) {
        wanted.epoch += 1;
        let known = self.shared.published.load();
        let tables = Tables::new(&wanted.image, &wanted.attached, (before, &known), wanted.epoch);
        self.shared.published.store(Arc::new(tables));
    }

    /// Forgets addresses that have aged, `now` being seconds of the clock that processors are told. (They count as absent
    /// anyway; this makes room.)
    pub fn forget_aged(&self, now: u32) {
        let tables = self.shared.published.load();
        self.shared.fdb.retain(|key, entry| {
            let switch = tables.switches.get(key.switch as usize).and_then(Option::as_ref);
            switch.is_some_and(|switch| now.wrapping_sub(entry.seen) <= switch.ageing_seconds)
        });
    }

    /// All learnt addresses, in no order.
    pub fn fdb(&self) -> Vec<(FdbKey, FdbEntry)> {
        self.shared.fdb.entries()
    }

    /// Puts learnt addresses in place of those that are known, as taken over from elsewhere.
    pub fn restore_fdb(&self, entries: impl IntoIterator<Item = (FdbKey, FdbEntry)>) {
        self.shared.fdb.retain(|_, _| false);
        for (key, entry) in entries {
            self.shared.fdb.put(&key, entry);
        }
    }

    /// Sets when the next frame of a port is due, in nanoseconds: its bucket is full if that is in the past.
    pub fn set_bucket(&self, port: u32, direction: Direction, arrival: u64) {
        if let Some(bucket) = self.shared.buckets.get(port as usize) {
            bucket[direction as usize].store(arrival, Ordering::Relaxed);
        }
    }

    /// A port's counters.
    pub fn port_stats(&self, port: u32) -> PortStats {
        let mut sum = PortStats::default();
        self.each_counters(|counters| counters.add_port_to(port, &mut sum));
        sum
    }

    /// Drops counted on a port.
    pub fn drops(&self, port: u32, reason: DropReason) -> u64 {
        let mut sum = 0;
        self.each_counters(|counters| sum += counters.drops(port, reason));
        sum
    }

    /// A rule's counters, by their index.
    pub fn rule_stats(&self, counter: u32) -> RuleStats {
        let mut sum = RuleStats::default();
        self.each_counters(|counters| counters.add_rule_to(counter, &mut sum));
        sum
    }

    fn each_counters(&self, mut look: impl FnMut(&Counters)) {
        let all = self.shared.counters.lock();
        look(&all.retired);
        all.working.iter().for_each(|counters| look(counters));
    }
}

impl Default for Engine {
    fn default() -> Self {
        Engine::new()
    }
}
