//! Random garbage in rings, descriptors and headers: whatever it is, nothing panics, and no frame is lost.
//!
//! That nothing outside the guest's memory is touched is held by the pages around each mapping, which nobody may touch.

use std::sync::Arc;

use super::setup::{BUFFERS, FROM_GUEST, RAM, Rig, TO_GUEST, all_features, frame};
use crate::vhost::driver::{DriverRing, GUEST_BASE};
use crate::vhost::features::bit;
use crate::vhost::queue::{Queue, QueueState};

/// Rings full of garbage, each served once, where `SLUICE_CASES` says nothing else.
const ROUNDS: u64 = 1_000_000;

/// A generator that is good enough to be different each time (splitmix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Mostly plausible, so that the garbage gets far.
fn descriptor(random: &mut Random) -> [u8; 16] {
    let address = match random.below(16) {
        0 => random.next(),
        1 => GUEST_BASE + RAM - random.below(64),
        2 => u64::MAX - random.below(64),
        3 => GUEST_BASE + random.below(256),
        _ => BUFFERS + random.below(0x1_0000),
    };
    let len = match random.below(12) {
        0 => random.next() as u32,
        1 => 0,
        2 => 12,
        3 => 16 * random.below(8) as u32,
        _ => random.below(2000) as u32,
    };
    let flags = match random.below(8) {
        0 => random.next() as u16,
        1 | 2 => 1,
        3 => 4,
        4 | 5 => 2,
        6 => 3,
        _ => 0,
    };
    let next = if random.below(8) == 0 { random.next() as u16 } else { random.below(8) as u16 };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn storm(index: usize, seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let mut rig = Rig::new(index, 8, all_features() | bit::EVENT_IDX);
    let frames = [frame(60, 0), frame(1500, 1), frame(300, 2)];
    // Of what happened, everything is to have happened.
    let (mut served, mut stops) = (0, std::collections::HashMap::new());
    let mut available = 0_u16;
    for _ in 0..rounds {
        for entry in 0..8 {
            rig.ram.write(rig.ring.descriptors + 16 * entry, &descriptor(&mut random));
            let head = if random.below(32) == 0 { random.next() as u16 } else { random.below(8) as u16 };
            rig.ram.write(rig.ring.available + 4 + 2 * entry, &head.to_le_bytes());
        }
        // Headers, and tables where descriptors may find them.
        let at = BUFFERS + random.below(0x1_0000);
        rig.ram.write(at, &descriptor(&mut random));
        let more = if random.below(64) == 0 { random.next() as u16 } else { random.below(9) as u16 };
        available = available.wrapping_add(more);
        rig.ring.show_index(&rig.ram, available);
        let before = rig.counted().frames;
        if index == FROM_GUEST {
            for got in rig.receive() {
                rig.pool.give(got);
            }
        } else {
            let some = random.below(4) as usize;
            let list: Vec<&[u8]> = frames.iter().take(some).map(Vec::as_slice).collect();
            rig.deliver(&list);
            // Buffers may have been where the ring is.
        }
        served += rig.counted().frames - before;
        if let QueueState::Stopped(error) = rig.queue.sign().state() {
            *stops.entry(error.name()).or_insert(0) += 1;
            rig.queue.stop(&rig.counters);
            rig.ring = DriverRing::new(8, GUEST_BASE);
            rig.ram.write(GUEST_BASE, &[0; 512]);
            available = 0;
            rig.set_up();
        } else {
            // The driver is where the device says it is.
            available = rig.ring.device_index(&rig.ram);
        }
        assert_eq!(rig.pool.region().outstanding(), 0);
    }
    let kinds: Vec<_> = stops.keys().copied().collect();
    assert!(served > rounds / 100, "seed {seed}: too few frames got through: {served}");
    for kind in [
        "index_jump",
        "no_such_descriptor",
        "chain_too_long",
        "wrong_direction",
        "bad_indirect",
        "outside_memory",
    ] {
        assert!(kinds.contains(&kind), "seed {seed}: never stopped for {kind}: {stops:?}");
    }
}

/// The same with packed rings: slots that are mostly the driver's, in the right round and the wrong one.
fn packed_storm(index: usize, seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let mut rig = Rig::new(index, 8, all_features() | bit::EVENT_IDX | bit::RING_PACKED);
    let frames = [frame(60, 0), frame(1500, 1), frame(300, 2)];
    let (mut served, mut stops) = (0, std::collections::HashMap::new());
    for _ in 0..rounds {
        // Now and then all slots go on to the next.
        let is_loop = random.below(64) == 0;
        for entry in 0..8 {
            let [address @ .., _, _, _, _] = descriptor(&mut random);
            let id = if random.below(32) == 0 { random.next() as u16 } else { random.below(8) as u16 };
            let marks = [0x80, 0x80, 0x8000, 0x8000, 0, 0x8080][random.below(6) as usize];
            let flags = match random.below(8) {
                _ if is_loop => 1 | if index == TO_GUEST { 2 } else { 0 },
                0 => random.next() as u16,
                1 | 2 => 1,
                3 => 4,
                4 => 2,
                5 => 3,
                _ if index == TO_GUEST => 2,
                _ => 0,
            };
            let slot = [&address[..], &id.to_le_bytes(), &(flags | marks).to_le_bytes()].concat();
            rig.ram.write(rig.ring.descriptors + 16 * entry, &slot);
        }
        rig.ram.write(BUFFERS + random.below(0x1_0000), &descriptor(&mut random));
        rig.ram.write(rig.ring.available, &random.next().to_le_bytes()[..4]);
        let before = rig.counted().frames;
        if index == FROM_GUEST {
            for got in rig.receive() {
                rig.pool.give(got);
            }
        } else {
            let some = random.below(4) as usize;
            let list: Vec<&[u8]> = frames.iter().take(some).map(Vec::as_slice).collect();
            rig.deliver(&list);
        }
        served += rig.counted().frames - before;
        // A new process finds its place in this, whatever it is.
        let is_new = random.below(16) == 0;
        if is_new {
            rig.queue = Queue::new(index, 1522, Arc::default()).unwrap();
        }
        if let QueueState::Stopped(error) = rig.queue.sign().state() {
            *stops.entry(error.name()).or_insert(0) += 1;
        }
        if is_new || rig.queue.sign().state() != QueueState::Running {
            rig.set_up();
        }
        assert_eq!(rig.pool.region().outstanding(), 0);
    }
    assert!(served > rounds / 100, "seed {seed}: too few frames got through: {served}");
    for kind in ["no_such_descriptor", "chain_too_long", "wrong_direction", "bad_indirect", "outside_memory"]
    {
        assert!(stops.contains_key(kind), "seed {seed}: never stopped for {kind}: {stops:?}");
    }
}

/// A number that may be given.
fn given(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The seed, to be had again by `SLUICE_SEED`.
fn seed() -> u64 {
    let fresh = || std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
    given("SLUICE_SEED").unwrap_or_else(fresh)
}

fn rounds() -> u64 {
    given("SLUICE_CASES").unwrap_or(ROUNDS)
}

#[test]
fn garbage_from_the_guest() {
    storm(FROM_GUEST, seed(), rounds() / 2);
}

#[test]
fn garbage_to_the_guest() {
    storm(TO_GUEST, seed(), rounds() / 2);
}

#[test]
fn garbage_from_a_guest_with_packed_rings() {
    packed_storm(FROM_GUEST, seed(), rounds() / 4);
}

#[test]
fn garbage_to_a_guest_with_packed_rings() {
    packed_storm(TO_GUEST, seed(), rounds() / 4);
}
