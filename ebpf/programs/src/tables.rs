//! [`Tables`] over the BPF maps.

use core::ffi::c_void;

use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_loop};
use sluice_pipeline::tables::{
    AclGroup, CacheSlot, Direction, FdbEntry, FdbKey, FloodChunk, FloodKey, IFINDEX_LOW, IpGuardKey, MacKey,
    PortConfig, PortStats, RateConfig, RouteSlot, RuleEntry, RuleKey, SwitchConfig, TupleChunk, TupleKey,
};
use sluice_pipeline::{Context, DropReason, LoopBody, REASONS_MAX, Tables, acl_verdicts, conform};

use crate::{atomic, maps};

/// Attempts to update a token bucket that other CPUs are updating too.
const BUCKET_ATTEMPTS: u32 = 8;
/// `BPF_NOEXIST`
const NO_EXIST: u64 = 1;
/// `-EEXIST`
const EXISTS: i32 = -17;

/// The maps; `COMPLETE` as in [`Tables::COMPLETE`].
pub struct Maps<const COMPLETE: bool>;

/// The port bound to an interface, or 0.
#[inline(always)]
pub fn port_of(ifindex: u32) -> u32 {
    if ifindex < IFINDEX_LOW {
        return maps::PORT_OF.get(ifindex).copied().unwrap_or(0);
    }
    // SAFETY: one word.
    unsafe { maps::PORT_OF_HIGH.get(ifindex) }.copied().unwrap_or(0)
}

/// This CPU's counters of a port.
#[inline(always)]
pub fn port_stats(port: u32, update: impl FnOnce(&mut PortStats)) {
    if let Some(stats) = maps::PORT_STATS.get_ptr_mut(port) {
        // SAFETY: per-CPU element, and the programs run with softirqs off: nobody else touches it meanwhile.
        update(unsafe { &mut *stats });
    }
}

/// Counts a frame sent to a port.
#[inline(always)]
pub fn count_tx(port: u32, bytes: u32) {
    port_stats(port, |stats| {
        stats.tx_packets += 1;
        stats.tx_bytes += bytes as u64;
    });
}

impl<const COMPLETE: bool> Tables for Maps<COMPLETE> {
    const COMPLETE: bool = COMPLETE;

    #[inline(always)]
    fn port(&self, port: u32) -> Option<(&PortConfig, u32)> {
        let slot = *maps::PORT_LIVE.get(port)?;
        if slot == 0 {
            return None;
        }
        Some((maps::PORTS.get(slot)?, slot))
    }

    #[inline(always)]
    fn trunk_allows(&self, slot: u32, vid: u16) -> bool {
        match maps::TRUNKS.get(slot) {
            Some(bitmap) => bitmap[(vid as usize >> 6) & 63] >> (vid & 63) & 1 != 0,
            None => false,
        }
    }

    #[inline(always)]
    fn switch(&self, switch: u32) -> Option<&SwitchConfig> {
        maps::SWITCHES.get(switch)
    }

    #[inline(always)]
    fn vnic_mac(&self, key: &MacKey) -> Option<u32> {
        // SAFETY: values are one word; elements are replaced, never changed in place.
        unsafe { maps::VNIC_MACS.get(key) }.copied()
    }

    #[inline(always)]
    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry> {
        let entry = maps::FDB.get_ptr(key)?;
        // SAFETY: a map value; both halves are written by one 8-byte store, and read by one load.
        let word = unsafe { atomic::load(entry.cast::<u64>()) };
        Some(FdbEntry { port: word as u32, seen: (word >> 32) as u32 })
    }

    #[inline(always)]
    fn ip_allowed(&self, key: &IpGuardKey) -> bool {
        maps::IP_GUARD.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk> {
        // SAFETY: elements are replaced, never changed in place, and live until the program ends (RCU).
        unsafe { maps::FLOOD.get(key) }
    }

    #[inline(always)]
    fn acl_group(&self, group: u32) -> Option<&AclGroup> {
        // SAFETY: as for `flood`.
        unsafe { maps::ACL_GROUPS.get(group) }
    }

    #[inline(always)]
    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk> {
        // SAFETY: as for `flood`.
        unsafe { maps::ACL_TUPLES.get(key) }
    }

    #[inline(always)]
    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry> {
        // SAFETY: as for `flood`.
        unsafe { maps::ACL_RULES.get(key) }
    }

    #[inline(always)]
    fn epoch(&self) -> u64 {
        match maps::GLOBALS.get(0) {
            Some(globals) => globals.epoch,
            None => 0,
        }
    }

    #[inline(always)]
    fn cache(&self, slot: u32) -> Option<&mut CacheSlot> {
        // SAFETY: per-CPU element, and the programs run with softirqs off: nobody else touches it meanwhile.
        maps::CACHE.get_ptr_mut(slot).map(|slot| unsafe { &mut *slot })
    }

    #[inline(always)]
    fn route_cache(&self, slot: u32) -> Option<&mut RouteSlot> {
        // SAFETY: as for `cache`.
        maps::ROUTES.get_ptr_mut(slot).map(|slot| unsafe { &mut *slot })
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn now_seconds(&self) -> u32 {
        // SAFETY: no arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool {
        let Some(bucket) = maps::BUCKETS.get_ptr_mut(port) else {
            return false;
        };
        // SAFETY: a map value of two words; `direction` is 0 or 1.
        let arrival = unsafe { bucket.cast::<u64>().add(direction as usize) };
        let now = self.now();
        let mut attempt = 0;
        while attempt < BUCKET_ATTEMPTS {
            // SAFETY: a word of a map value.
            let current = unsafe { atomic::load(arrival) };
            let Some(next) = conform(rate, current, now, bytes) else {
                return false;
            };
            // SAFETY: a word of a map value.
            if unsafe { atomic::swap_if(arrival, current, next) } {
                return true;
            }
            attempt += 1;
        }
        false
    }

    #[inline(always)]
    fn learn(&self, key: &FdbKey, port: u32, limit: u32) {
        let Some(learnt) = maps::LEARNT.get_ptr_mut(port) else {
            return;
        };
        let entry = FdbEntry { port, seen: self.now_seconds() };
        let word = entry.port as u64 | (entry.seen as u64) << 32;
        let known = maps::FDB.get_ptr_mut(key);
        if let Some(known) = known {
            // SAFETY: a map value of one word.
            let previous = unsafe { atomic::load(known.cast::<u64>()) } as u32;
            if previous == port {
                // SAFETY: likewise.
                unsafe { atomic::store(known.cast(), word) };
                return;
            }
        }
        // SAFETY: a map value of one word.
        if unsafe { atomic::load(learnt) } >= limit {
            port_stats(port, |stats| stats.learn_limited += 1);
            return;
        }
        if let Some(known) = known {
            // A station that moved.
            // SAFETY: map values of one word each.
            unsafe {
                let previous = atomic::load(known.cast::<u64>()) as u32;
                atomic::store(known.cast(), word);
                if let Some(left) = maps::LEARNT.get_ptr_mut(previous) {
                    atomic::add(left, u32::MAX);
                }
            }
        } else if let Err(error) = maps::FDB.insert(key, &entry, NO_EXIST) {
            if error != EXISTS {
                port_stats(port, |stats| stats.fdb_full += 1);
            }
            return; // or another CPU was faster
        }
        // SAFETY: a map value of one word.
        unsafe { atomic::add(learnt, 1) };
    }

    #[inline(always)]
    fn count_rx(&self, port: u32, bytes: u32) {
        port_stats(port, |stats| {
            stats.rx_packets += 1;
            stats.rx_bytes += bytes as u64;
        });
    }

    #[inline(always)]
    fn count_flood(&self, port: u32) {
        port_stats(port, |stats| stats.flooded += 1);
    }

    #[inline(always)]
    fn count_cache_miss(&self, port: u32) {
        port_stats(port, |stats| stats.cache_misses += 1);
    }

    #[inline(always)]
    fn count_rule(&self, counter: u32, bytes: u32) {
        if let Some(stats) = maps::RULE_STATS.get_ptr_mut(counter) {
            // SAFETY: per-CPU element; see `port_stats`.
            let stats = unsafe { &mut *stats };
            stats.packets += 1;
            stats.bytes += bytes as u64;
        }
    }

    #[inline(always)]
    fn count_drop(&self, port: u32, reason: DropReason) {
        if let Some(count) = maps::DROPS.get_ptr_mut(port * REASONS_MAX + reason as u32) {
            // SAFETY: per-CPU element; see `port_stats`.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn acl_verdicts(&self, context: &mut Context, ingress: u32, egress: u32) {
        // SAFETY: the pointer is valid while the program runs.
        unsafe { sluice_acl(context, ingress, egress) };
    }

    #[inline(always)]
    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B) {
        // SAFETY: the callback has the signature that bpf_loop calls, and gets back the pointer given here.
        unsafe {
            bpf_loop(rounds, round::<B> as *mut c_void, core::ptr::from_mut(body).cast(), 0);
        }
    }
}

/// `bpf_loop`'s callback.
unsafe extern "C" fn round<B: LoopBody>(index: u64, body: *mut c_void) -> i64 {
    // SAFETY: `repeat` passes a `B` that outlives the loop.
    let body = unsafe { &mut *body.cast::<B>() };
    if body.step(index as u32) { 0 } else { 1 }
}

/// Sub-program: the ACL verdicts of a packet; see [`acl_verdicts`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_acl(context: *mut Context, ingress: u32, egress: u32) -> u32 {
    if context.is_null() {
        return 0;
    }
    // SAFETY: memory that the verifier knows to be a `Context`.
    acl_verdicts(&Maps::<true>, unsafe { &mut *context }, ingress, egress);
    1
}
