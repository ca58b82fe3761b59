//! Counters: a set per worker, written by it alone and read by anybody.
//!
//! The values are atomics only so that others may read them; a worker adds by a load and a store, which cost what plain
//! memory costs. Sums are made by whoever asks.

use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Zeroable;
use sluice_pipeline::tables::{PORTS_MAX, PortStats, RULES_MAX, RuleStats};
use sluice_pipeline::{DropReason, REASONS_MAX};

/// [`PortStats`], in a cache line of its own.
#[derive(Debug, Zeroable)]
#[repr(C, align(64))]
pub(super) struct PortCounters {
    pub(super) rx_packets: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) flooded: AtomicU64,
    pub(super) learn_limited: AtomicU64,
    pub(super) fdb_full: AtomicU64,
    pub(super) cache_misses: AtomicU64,
}

/// One worker's counters.
#[derive(Debug)]
pub(super) struct Counters {
    ports: Box<[PortCounters]>,
    drops: Box<[AtomicU64]>,
    rules: Box<[[AtomicU64; 2]]>,
}

/// Adds to a counter that this thread alone writes.
#[inline(always)]
pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Counters {
    /// All zero, and no memory touched.
    pub(super) fn new() -> Counters {
        use bytemuck::allocation::zeroed_slice_box;
        Counters {
            // One more: frames of a port that does not exist are counted there.
            ports: zeroed_slice_box(PORTS_MAX as usize + 1),
            drops: zeroed_slice_box((PORTS_MAX as usize + 1) * REASONS_MAX as usize),
            rules: zeroed_slice_box(RULES_MAX as usize),
        }
    }

    #[inline(always)]
    pub(super) fn port(&self, port: u32) -> &PortCounters {
        &self.ports[port.min(PORTS_MAX) as usize]
    }

    #[inline(always)]
    pub(super) fn count_drops(&self, port: u32, reason: DropReason, amount: u64) {
        let index = port.min(PORTS_MAX) * REASONS_MAX + reason as u32;
        add(&self.drops[index as usize], amount);
    }

    #[inline(always)]
    pub(super) fn count_rule(&self, counter: u32, packets: u64, bytes: u64) {
        if let Some(rule) = self.rules.get(counter as usize) {
            add(&rule[0], packets);
            add(&rule[1], bytes);
        }
    }

    pub(super) fn add_port_to(&self, port: u32, sum: &mut PortStats) {
        let own = self.port(port);
        sum.rx_packets += get(&own.rx_packets);
        sum.rx_bytes += get(&own.rx_bytes);
        sum.tx_packets += get(&own.tx_packets);
        sum.tx_bytes += get(&own.tx_bytes);
        sum.flooded += get(&own.flooded);
        sum.learn_limited += get(&own.learn_limited);
        sum.fdb_full += get(&own.fdb_full);
        sum.cache_misses += get(&own.cache_misses);
    }

    pub(super) fn drops(&self, port: u32, reason: DropReason) -> u64 {
        get(&self.drops[(port.min(PORTS_MAX) * REASONS_MAX + reason as u32) as usize])
    }

    pub(super) fn add_rule_to(&self, counter: u32, sum: &mut RuleStats) {
        if let Some(rule) = self.rules.get(counter as usize) {
            sum.packets += get(&rule[0]);
            sum.bytes += get(&rule[1]);
        }
    }

    /// Adds all of a worker's counters that works no more; the caller has the only right to write here.
    pub(super) fn absorb(&self, other: &Counters) {
        for (own, its) in self.ports.iter().zip(&other.ports) {
            for (own, its) in [
                (&own.rx_packets, &its.rx_packets),
                (&own.rx_bytes, &its.rx_bytes),
                (&own.tx_packets, &its.tx_packets),
                (&own.tx_bytes, &its.tx_bytes),
                (&own.flooded, &its.flooded),
                (&own.learn_limited, &its.learn_limited),
                (&own.fdb_full, &its.fdb_full),
                (&own.cache_misses, &its.cache_misses),
            ] {
                add_if_any(own, its);
            }
        }
        let own = self.drops.iter().chain(self.rules.iter().flatten());
        for (own, its) in own.zip(other.drops.iter().chain(other.rules.iter().flatten())) {
            add_if_any(own, its);
        }
    }
}

fn add_if_any(own: &AtomicU64, its: &AtomicU64) {
    let amount = get(its);
    if amount != 0 {
        add(own, amount);
    }
}
