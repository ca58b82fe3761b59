//! Learnt addresses: one table for all workers, and a small copy of its hottest part in each.
//!
//! A worker answers most look-ups from its copy. Every address belongs to one of a few hundred generations, by its hash;
//! learning an address anew, moving it and forgetting it raise its generation, which outdates the copies of the others in
//! it. Refreshing does not: a copy is read again every second.
//!
//! The table is bounded ([`FDB_MAX`], and a limit per port). When it is full, frames flood and it is counted.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use foldhash::fast::FixedState;
use sluice_pipeline::tables::{FDB_MAX, FdbEntry, FdbKey, PORTS_MAX, Vlan};

const GENERATIONS: usize = 256;
/// Slots of a worker's copy. A power of two.
const COPIES: usize = 4096;

/// What became of an address to be learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learnt {
    /// It is in the table.
    Yes,
    /// The port has as many as it may.
    Limited,
    /// The table is full.
    Full,
}

/// The table of all workers.
#[derive(Debug)]
pub(super) struct Fdb {
    entries: DashMap<FdbKey, FdbEntry, FixedState>,
    count: AtomicUsize,
    /// How many are behind each port.
    of_port: Box<[AtomicU32]>,
    generations: Box<[AtomicU32]>,
}

fn hash(key: &FdbKey) -> u64 {
    FixedState::with_seed(0).hash_one(key)
}

impl Fdb {
    pub(super) fn new() -> Fdb {
        Fdb {
            entries: DashMap::with_hasher(FixedState::with_seed(0)),
            count: AtomicUsize::new(0),
            of_port: (0..PORTS_MAX).map(|_| AtomicU32::new(0)).collect(),
            // Copies begin at 0, which is no generation.
            generations: (0..GENERATIONS).map(|_| AtomicU32::new(1)).collect(),
        }
    }

    fn raise(&self, key: &FdbKey) {
        self.generations[hash(key) as usize % GENERATIONS].fetch_add(1, Ordering::Release);
    }

    /// Learns or refreshes an address.
    pub(super) fn learn(&self, key: &FdbKey, port: u32, limit: u32, now: u32) -> Learnt {
        let entry = FdbEntry { port, seen: now };
        match self.entries.entry(*key) {
            Entry::Occupied(mut known) => {
                let before = known.get().port;
                if before == port {
                    known.insert(entry);
                    return Learnt::Yes;
                }
                if !self.reserve(port, limit) {
                    return Learnt::Limited;
                }
                known.insert(entry);
                self.release(before);
            }
            Entry::Vacant(place) => {
                if !self.reserve(port, limit) {
                    return Learnt::Limited;
                }
                if self.count.fetch_add(1, Ordering::Relaxed) >= FDB_MAX as usize {
                    self.count.fetch_sub(1, Ordering::Relaxed);
                    self.release(port);
                    return Learnt::Full;
                }
                place.insert(entry);
            }
        }
        self.raise(key);
        Learnt::Yes
    }

    fn reserve(&self, port: u32, limit: u32) -> bool {
        let Some(count) = self.of_port.get(port as usize) else { return false };
        let more = |count| (count < limit).then_some(count + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn release(&self, port: u32) {
        if let Some(count) = self.of_port.get(port as usize) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Forgets every address for which `keep` says no.
    pub(super) fn retain(&self, mut keep: impl FnMut(&FdbKey, &FdbEntry) -> bool) {
        self.entries.retain(|key, entry| {
            let kept = keep(key, entry);
            if !kept {
                self.count.fetch_sub(1, Ordering::Relaxed);
                self.release(entry.port);
                self.raise(key);
            }
            kept
        });
    }

    /// Puts an entry in place whatever the limits are, as restored state.
    pub(super) fn put(&self, key: &FdbKey, entry: FdbEntry) {
        if let Some(before) = self.entries.insert(*key, entry) {
            self.release(before.port);
        } else {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        self.reserve(entry.port, u32::MAX);
        self.raise(key);
    }

    /// The copy of a worker that has just refreshed an address: its own sighting, without another look-up.
    #[inline]
    pub(super) fn refreshed(&self, copies: &mut FdbCopies, key: &FdbKey, entry: FdbEntry) {
        let hash = hash(key);
        let generation = self.generations[hash as usize % GENERATIONS].load(Ordering::Acquire);
        let slot = &mut copies.slots[(hash >> 8) as usize % COPIES];
        if slot.generation == generation && slot.key == *key && slot.entry.port == entry.port {
            slot.entry = entry;
        }
    }

    /// All of them.
    pub(super) fn entries(&self) -> Vec<(FdbKey, FdbEntry)> {
        self.entries.iter().map(|entry| (*entry.key(), *entry.value())).collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    key: FdbKey,
    generation: u32,
    /// When it was read, in seconds.
    read: u32,
    /// Port 0: the table does not have it.
    entry: FdbEntry,
}

/// A worker's copy.
#[derive(Debug)]
pub(super) struct FdbCopies {
    slots: Box<[Copy]>,
}

impl FdbCopies {
    pub(super) fn new() -> FdbCopies {
        let key = FdbKey { switch: 0, vlan: Vlan(0), mac: [0; 6] };
        let none = Copy { key, generation: 0, read: 0, entry: FdbEntry { port: 0, seen: 0 } };
        FdbCopies { slots: vec![none; COPIES].into() }
    }

    /// Looks an address up.
    #[inline]
    pub(super) fn get(&mut self, fdb: &Fdb, key: &FdbKey, now: u32) -> Option<FdbEntry> {
        let hash = hash(key);
        let generation = fdb.generations[hash as usize % GENERATIONS].load(Ordering::Acquire);
        let slot = &mut self.slots[(hash >> 8) as usize % COPIES];
        if slot.generation != generation || slot.key != *key || slot.read != now {
            let entry = fdb.entries.get(key).map_or(FdbEntry { port: 0, seen: 0 }, |entry| *entry);
            // The generation was read first: if the table changed meanwhile, this copy is outdated already.
            *slot = Copy { key: *key, generation, read: now, entry };
        }
        (slot.entry.port != 0).then_some(slot.entry)
    }
}
