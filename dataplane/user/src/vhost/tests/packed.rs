//! Packed rings: what is theirs alone, with honest drivers and with others. What all rings have in common is tried with both kinds
//! elsewhere.

use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::setup::{BUFFERS, FEATURES, FROM_GUEST, RAM, Rig, TO_GUEST, frame};
use crate::vhost::driver::{self, DriverRing, GUEST_BASE, INDIRECT, NEXT, USER_BASE, WRITE, available};
use crate::vhost::error::{QueueError, RequestError, SetupError};
use crate::vhost::features::bit;
use crate::vhost::log::DirtyLog;
use crate::vhost::memory::Mapping;
use crate::vhost::notify::EventFd;
use crate::vhost::queue::{Kick, QueueState};
use crate::vhost::ring::RingAddresses;

const PACKED: u64 = FEATURES | bit::RING_PACKED;

fn rig(index: usize, size: u16) -> Rig {
    Rig::new(index, size, PACKED)
}

/// Has the queue look at its ring.
fn turn(rig: &mut Rig) -> usize {
    match rig.index {
        TO_GUEST => rig.deliver(&[&frame(60, 1)]).unwrap_or_default(),
        _ => rig.receive().len(),
    }
}

/// The driver kicks, from now on.
fn kicked(rig: &mut Rig) {
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    rig.queue.set_kick(Kick::Event(EventFd::from_peer(kick).unwrap()), &rig.counters).unwrap();
}

/// The queue stops with this error, and is served again once it is set up anew.
fn assert_stops(mut rig: Rig, expected: QueueError) {
    turn(&mut rig);
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(expected));
    assert_eq!(rig.counted().stops, 1);
    assert_eq!(turn(&mut rig), 0);
    assert!(rig.queue.arm(), "a stopped queue keeps nobody awake");
    rig.queue.stop(&rig.counters);
    rig.ring = rig.ring.afresh(GUEST_BASE);
    rig.ram.write(GUEST_BASE, &vec![0; 0x1_0100]);
    rig.set_up();
    let flags = if rig.index == TO_GUEST { WRITE } else { 0 };
    rig.ring.post(&rig.ram, &[(BUFFERS, 100, flags)]);
    rig.ring.show(&rig.ram);
    assert_eq!(turn(&mut rig), 1);
    assert_eq!(rig.pool.region().outstanding(), 0, "no frame is lost");
}

/// A rig whose ring has these slots, all available, the first last.
fn slots(index: usize, slots: &[(u64, u32, u16)]) -> Rig {
    let rig = rig(index, 8);
    for (at, (address, len, flags)) in slots.iter().enumerate().rev() {
        rig.ring.set_slot(&rig.ram, at as u16, (*address, *len, flags | available(true)), at as u16);
    }
    rig
}

#[test]
fn chains_without_an_end() {
    // Every slot goes on to the next: the whole ring, round and round.
    for (index, flags) in [(FROM_GUEST, NEXT), (TO_GUEST, NEXT | WRITE)] {
        for len in [0, 1, 100] {
            assert_stops(slots(index, &[(BUFFERS, len, flags); 8]), QueueError::ChainTooLong(8));
        }
    }
    // Longer than any driver's.
    let mut long = rig(FROM_GUEST, 2048);
    long.ring.post(&long.ram, &vec![(BUFFERS, 1, 0); 1025]);
    long.ring.show(&long.ram);
    assert_stops(long, QueueError::ChainTooLong(1024));
    let mut long = rig(FROM_GUEST, 8);
    long.ring.post_indirect(&long.ram, BUFFERS, &vec![(BUFFERS, 1, 0); 1025]);
    long.ring.show(&long.ram);
    assert_stops(long, QueueError::ChainTooLong(1024));
}

#[test]
fn buffers_of_nothing_do_not_keep_a_worker() {
    let mut rig = rig(TO_GUEST, 4096);
    for _ in 0..4096 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 0, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    assert_stops(rig, QueueError::ChainTooLong(1024));
    // In a small ring they are all there are.
    let mut rig = self::rig(TO_GUEST, 8);
    for _ in 0..8 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 0, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    assert_eq!(turn(&mut rig), 0);
    assert_eq!(rig.queue.sign().state(), QueueState::Running);
}

#[test]
fn a_batch_of_long_chains_ends_early() {
    let mut rig = rig(FROM_GUEST, 64);
    let mut pieces = vec![(BUFFERS, 0, 0); 1000];
    pieces.push((BUFFERS, 72, 0));
    for index in 0..32 {
        rig.ring.post_indirect(&rig.ram, BUFFERS + 0x1000 + index * 0x4000, &pieces);
    }
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive().len(), 5);
    assert_eq!(rig.receive().len(), 5, "the rest is not lost");
}

#[test]
fn identifiers_that_are_none() {
    for id in [8, 9, 0x8000, u16::MAX] {
        for (index, flags) in [(FROM_GUEST, 0), (TO_GUEST, WRITE)] {
            let expected = QueueError::NoSuchDescriptor { index: id, size: 8 };
            let one = rig(index, 8);
            one.ring.set_slot(&one.ram, 0, (BUFFERS, 200, flags | available(true)), id);
            assert_stops(one, expected);
            // At the end of a chain.
            let two = rig(index, 8);
            two.ring.set_slot(&two.ram, 1, (BUFFERS + 12, 200, flags | available(true)), id);
            two.ring.set_slot(&two.ram, 0, (BUFFERS, 12, flags | NEXT | available(true)), 0);
            assert_stops(two, expected);
        }
    }
    // Before the end, nobody looks at it.
    let mut two = rig(FROM_GUEST, 8);
    two.ring.set_slot(&two.ram, 1, (BUFFERS + 12, 60, available(true)), 5);
    two.ring.set_slot(&two.ram, 0, (BUFFERS, 12, NEXT | available(true)), 0xffff);
    assert_eq!(turn(&mut two), 1);
}

#[test]
fn slots_that_lie_about_their_round() {
    // Given back already, of the next round, of the round before: none of them is there.
    for flags in [driver::used(true), driver::used(false), available(false)] {
        for index in [FROM_GUEST, TO_GUEST] {
            let mut rig = rig(index, 8);
            for at in 0..8 {
                let write = if index == TO_GUEST { WRITE } else { 0 };
                rig.ring.set_slot(&rig.ram, at, (BUFFERS, 100, write | flags), at);
            }
            assert_eq!(turn(&mut rig), 0);
            assert_eq!(rig.queue.sign().state(), QueueState::Running);
            kicked(&mut rig);
            assert!(rig.queue.arm(), "nothing is there");
        }
    }
}

#[test]
fn a_driver_that_makes_slots_available_that_are_not_its_own() {
    // Each batch is bounded, whatever the driver does meanwhile; and what it is told is what it asked for.
    let mut rig = rig(FROM_GUEST, 8);
    for round in 0..100 {
        for at in 0..8 {
            let flags = available(round % 2 == 0);
            rig.ring.set_slot(&rig.ram, at, (BUFFERS, 100, flags), at);
        }
        assert_eq!(rig.receive().len(), 8, "round {round}");
    }
}

#[test]
fn directions_mixed_up() {
    let wrong = QueueError::WrongDirection;
    assert_stops(slots(FROM_GUEST, &[(BUFFERS, 100, WRITE)]), wrong);
    assert_stops(slots(FROM_GUEST, &[(BUFFERS, 12, NEXT), (BUFFERS, 100, WRITE)]), wrong);
    assert_stops(slots(TO_GUEST, &[(BUFFERS, 2000, 0)]), wrong);
    assert_stops(slots(TO_GUEST, &[(BUFFERS, 12, NEXT | WRITE), (BUFFERS, 2000, 0)]), wrong);
}

#[test]
fn tables_that_are_none() {
    for len in [0, 8, 24, u32::MAX] {
        assert_stops(slots(FROM_GUEST, &[(BUFFERS, len, INDIRECT)]), QueueError::BadIndirect);
    }
    // Lists are of one kind.
    let bad = QueueError::BadIndirect;
    assert_stops(slots(FROM_GUEST, &[(BUFFERS, 16, INDIRECT | NEXT), (BUFFERS, 16, 0)]), bad);
    assert_stops(slots(FROM_GUEST, &[(BUFFERS, 12, NEXT), (BUFFERS, 16, INDIRECT)]), bad);
    for address in [0, GUEST_BASE + RAM - 8, u64::MAX - 7, !0xf] {
        let outside = QueueError::Outside { address, len: 32 };
        assert_stops(slots(FROM_GUEST, &[(address, 32, INDIRECT)]), outside);
    }
    let mut rig = Rig::new(FROM_GUEST, 8, PACKED & !bit::INDIRECT_DESC);
    rig.ring.post_indirect(&rig.ram, BUFFERS, &[(BUFFERS + 0x100, 100, 0)]);
    rig.ring.show(&rig.ram);
    assert_stops(rig, bad);
}

#[test]
fn of_tables_only_the_direction_counts() {
    // All entries are the chain, whatever their other flags and their identifiers say; the direction of the table itself says
    // nothing, and to read what is writable does no harm.
    let mut rig = rig(FROM_GUEST, 8);
    let sent = frame(100, 3);
    rig.ram.write(BUFFERS, &[vec![0; 12], sent.clone()].concat());
    let entry = |address: u64, len: u32, flags: u16| {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &[0xff, 0xff], &flags.to_le_bytes()].concat()
    };
    let table = [
        entry(BUFFERS, 12, WRITE),
        entry(BUFFERS + 12, 50, INDIRECT | available(false)),
        entry(BUFFERS + 62, 50, NEXT),
    ];
    rig.ram.write(BUFFERS + 0x1000, &table.concat());
    rig.ring.post(&rig.ram, &[(BUFFERS + 0x1000, 48, INDIRECT | WRITE)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive()[0].bytes(), sent);
    // To write what is only readable is another thing.
    let mut rig = self::rig(TO_GUEST, 8);
    rig.ram.write(BUFFERS + 0x1000, &entry(BUFFERS, 2000, 0));
    rig.ring.post(&rig.ram, &[(BUFFERS + 0x1000, 16, INDIRECT | WRITE)]);
    rig.ring.show(&rig.ram);
    assert_stops(rig, QueueError::WrongDirection);
}

#[test]
fn buffers_outside_memory() {
    let end = GUEST_BASE + RAM;
    for (address, len) in [(0, 100), (GUEST_BASE - 1, 100), (end - 99, 100), (end, 100), (u64::MAX - 10, 100)]
    {
        let outside = QueueError::Outside { address, len };
        assert_stops(slots(FROM_GUEST, &[(address, len, 0)]), outside);
        assert_stops(slots(FROM_GUEST, &[(BUFFERS, 12, NEXT), (address, len, 0)]), outside);
        if address != end - 99 {
            assert_stops(slots(TO_GUEST, &[(address, len, WRITE)]), outside);
        }
    }
}

#[test]
fn what_came_before_the_fault_is_kept() {
    let mut rig = rig(FROM_GUEST, 8);
    for turn in 0..3 {
        rig.send(BUFFERS + turn * 128, [0; 12], &frame(60, turn as u8));
    }
    rig.ring.post(&rig.ram, &[(0, 100, 0)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive().len(), 3);
    assert_eq!(rig.ring.device_index(&rig.ram), 3);
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::Outside { address: 0, len: 100 }));
}

#[test]
fn memory_that_shrinks() {
    for (index, flags) in [(FROM_GUEST, 0), (TO_GUEST, WRITE)] {
        for left in [0x1_0000, 0] {
            let mut rig = rig(index, 8);
            rig.ring.post(&rig.ram, &[(BUFFERS, 1000, flags)]);
            rig.ring.show(&rig.ram);
            rig.ram.truncate(left).unwrap();
            turn(&mut rig);
            assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::MemoryLost));
        }
    }
}

#[test]
fn rings_that_cannot_be() {
    let mut rig = rig(FROM_GUEST, 8);
    let good = rig.addresses();
    let cases = [
        ("nowhere", RingAddresses { descriptors: 0, ..good }),
        ("over the end", RingAddresses { descriptors: USER_BASE + RAM - 64, ..good }),
        ("over the end", RingAddresses { used: USER_BASE + RAM, ..good }),
        ("round the corner", RingAddresses { available: u64::MAX - 3, ..good }),
        ("askew", RingAddresses { descriptors: good.descriptors + 8, ..good }),
        ("askew", RingAddresses { available: good.available + 2, ..good }),
        ("askew", RingAddresses { used: good.used + 1, ..good }),
    ];
    for (what, addresses) in cases {
        assert!(rig.queue.set_addresses(addresses, &rig.counters).is_err(), "{what}");
        assert_eq!(rig.queue.sign().state(), QueueState::Idle, "{what}");
    }
    for size in [0, 32769, 65536, u32::MAX] {
        assert!(matches!(
            rig.queue.set_size(size, &rig.counters),
            Err(RequestError::Setup(SetupError::Size(_)))
        ));
    }
    // A base that the ring does not have.
    rig.set_up();
    rig.queue.stop(&rig.counters);
    rig.queue.set_base(0x8008_8008, &rig.counters).unwrap();
    let result = rig.queue.set_kick(Kick::Polled, &rig.counters);
    assert!(matches!(result, Err(RequestError::Setup(SetupError::Base { base: 8, size: 8 }))));
    rig.set_up();
    // Resized while it runs, to where it does not fit; and to where it does.
    assert!(rig.queue.set_size(32768, &rig.counters).is_ok(), "half a MiB is there");
    assert!(
        rig.queue
            .set_addresses(RingAddresses { descriptors: USER_BASE + RAM - 128, ..good }, &rig.counters)
            .is_err()
    );
    rig.ram.write(GUEST_BASE, &[0; 512]);
    rig.ring = rig.ring.afresh(GUEST_BASE);
    rig.set_up();
    rig.send(BUFFERS, [0; 12], &frame(60, 9));
    assert_eq!(rig.receive().len(), 1);
}

#[test]
fn rings_of_any_size_go_round_in_order() {
    for size in [1, 2, 3, 7, 100, 255] {
        let mut rig = rig(FROM_GUEST, size);
        for turn in 0..3000_u32 {
            let bytes = [vec![2; 14], turn.to_le_bytes().to_vec()].concat();
            rig.ram.write(BUFFERS, &[vec![0; 12], bytes.clone()].concat());
            // As many pieces as the ring has room for, up to three.
            let pieces = [(BUFFERS, 6, 0), (BUFFERS + 6, 6, 0), (BUFFERS + 12, 18, 0)];
            let whole = [(BUFFERS, 30, 0)];
            let chain = if size >= 3 && turn % 3 == 0 { &pieces[..] } else { &whole[..] };
            let id = rig.ring.post(&rig.ram, chain);
            rig.ring.show(&rig.ram);
            let got = rig.receive();
            assert_eq!(got.len(), 1, "size {size}, turn {turn}");
            assert_eq!(got[0].bytes(), bytes);
            for frame in got {
                rig.pool.give(frame);
            }
            assert_eq!(rig.ring.reap(&rig.ram), Some((id, 0)));
            assert_eq!(rig.ring.reap(&rig.ram), None);
        }
    }
}

#[test]
fn the_largest_ring_goes_round() {
    let ram = (32768 * 16 + 0x1_0000).max(RAM as usize);
    assert_eq!(ram as u64, RAM, "the ring and a buffer fit");
    let mut rig = rig(FROM_GUEST, 32768);
    let buffer = GUEST_BASE + RAM - 0x1000;
    for _ in 0..2100 {
        for _ in 0..32 {
            rig.ring.post(&rig.ram, &[(buffer, 72, 0)]);
        }
        rig.ring.show(&rig.ram);
        for frame in rig.receive() {
            rig.pool.give(frame);
        }
        for _ in 0..32 {
            assert!(rig.ring.reap(&rig.ram).is_some());
        }
    }
    assert_eq!(rig.counted().frames, 2100 * 32);
}

#[test]
fn a_driver_never_sees_part_of_a_batch() {
    // All but the first slot of a frame in several buffers are marked before the first is. Which slot is marked when cannot be seen
    // from here, but that each has its own length and identifier can.
    let mut rig = rig(TO_GUEST, 8);
    for index in 0..8 {
        rig.ring.post(&rig.ram, &[(BUFFERS + index * 100, 100, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    assert_eq!(rig.deliver(&[&frame(250, 0)]), Some(1));
    let got: Vec<_> = std::iter::from_fn(|| rig.ring.reap(&rig.ram)).collect();
    assert_eq!(got, [(0, 100), (1, 100), (2, 62)]);
}

#[test]
fn interrupts_come_when_the_place_is_passed() {
    // The place and its wrap counter, over the end of the ring.
    let mut rig = Rig::new(TO_GUEST, 16, PACKED | bit::EVENT_IDX);
    let bytes = frame(60, 0);
    let mut calls = Vec::new();
    let places = [0x8000 | 12, 3, 9, 0x8000 | 2];
    let mut place = places.into_iter();
    rig.ring.set_used_event(&rig.ram, place.next().unwrap());
    for index in 0..36 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 2048, WRITE)]);
        rig.ring.show(&rig.ram);
        rig.deliver(&[&bytes]);
        if rig.calls() > 0 {
            calls.push(index);
            if index > 0
                && let Some(next) = place.next()
            {
                rig.ring.set_used_event(&rig.ram, next);
            }
        }
        assert!(rig.ring.reap(&rig.ram).is_some());
    }
    assert_eq!(calls, [0, 12, 16 + 3, 16 + 9, 32 + 2], "the first, and where one was asked for");
    // In one batch over the place.
    rig.ring.set_used_event(&rig.ram, 0x8000 | 8);
    for _ in 0..10 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 2048, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    rig.deliver(&[&bytes[..]; 4]);
    assert_eq!(rig.calls(), 0);
    rig.deliver(&[&bytes[..]; 4]);
    assert_eq!(rig.calls(), 1);
    // A place that there is not: rather once too often.
    rig.ring.set_used_event(&rig.ram, 16);
    rig.deliver(&[&bytes]);
    assert_eq!(rig.calls(), 1);
    // Not negotiated, it is no place at all.
    let mut rig = self::rig(TO_GUEST, 16);
    rig.ring.set_used_event(&rig.ram, 9);
    for _ in 0..2 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 2048, WRITE)]);
        rig.ring.show(&rig.ram);
        rig.deliver(&[&bytes]);
        assert_eq!(rig.calls(), 1);
    }
}

#[test]
fn kicks_are_asked_for_before_sleeping_only() {
    for (features, flags) in [(PACKED, 0), (PACKED | bit::EVENT_IDX, 2)] {
        let mut rig = Rig::new(FROM_GUEST, 8, features);
        kicked(&mut rig);
        assert_eq!(rig.ring.device_flags(&rig.ram), 1, "whoever polls needs no kicks");
        for turn in 1..20_u16 {
            rig.send(BUFFERS, [0; 12], &frame(60, 0));
            assert!(!rig.queue.arm(), "a frame is there");
            rig.queue.disarm();
            assert_eq!(rig.receive().len(), 1);
            assert!(rig.queue.arm(), "nothing is there");
            assert_eq!(rig.ring.device_flags(&rig.ram), flags);
            let wrap = if turn / 8 % 2 == 0 { 0x8000 } else { 0 };
            assert_eq!(rig.ring.available_event(&rig.ram), (turn % 8) | wrap);
            rig.queue.disarm();
            assert_eq!(rig.ring.device_flags(&rig.ram), 1);
        }
    }
}

#[test]
fn everything_written_is_logged() {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    let first_page = GUEST_BASE >> 12;
    let bytes = (first_page + (RAM >> 12)) / 8 + 1;
    ftruncate(&file, bytes).unwrap();
    let log = Arc::new(DirtyLog::new(&file, 0, bytes).unwrap());
    let mut rig = Rig::with(TO_GUEST, 512, PACKED, |mut common| {
        common.log = Some(log);
        common
    });
    // The ring is two pages; the device's area on the third.
    assert_eq!((rig.ring.used - GUEST_BASE) >> 12, 2);
    rig.queue.set_addresses(RingAddresses { log: Some(0), ..rig.addresses() }, &rig.counters).unwrap();
    let bits = Mapping::new(&file, 0, bytes).unwrap();
    let dirty = || -> Vec<u64> {
        let take = |page: &u64| {
            let byte = bits.atomic_u8((page / 8) as usize).unwrap();
            byte.fetch_and(!(1 << (page % 8)), std::sync::atomic::Ordering::Relaxed) & (1 << (page % 8)) != 0
        };
        (0..bytes * 8).filter(take).map(|page| page - first_page).collect()
    };
    assert_eq!(dirty(), [0, 1, 2], "whoever takes a ring over may have written anywhere in it");
    for index in 0..512 {
        rig.ring.post(&rig.ram, &[(BUFFERS + 0xfc0 + index % 2 * 0x8000, 200, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    assert_eq!(rig.deliver(&[&frame(100, 0)]), Some(1));
    assert_eq!(dirty(), [0, 2, 16, 17], "the slot, the area, and the buffer over a page's end");
    assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
    assert_eq!(dirty(), [0, 2, 24], "the slot, the area, and the other buffer");
    for _ in 0..254 {
        assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
    }
    dirty();
    assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
    assert_eq!(dirty(), [1, 2, 16], "a slot of the other page");
    kicked(&mut rig);
    dirty();
    rig.queue.arm();
    assert_eq!(dirty(), [2], "a wish for a kick");
    // Without the flag, buffers alone.
    rig.queue.set_addresses(rig.addresses(), &rig.counters).unwrap();
    assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
    assert_eq!(dirty(), [24]);
}

#[test]
fn a_change_in_the_middle_loses_nothing() {
    let mut rig = rig(FROM_GUEST, 8);
    for turn in 0..100_u8 {
        rig.send(BUFFERS, [0; 12], &frame(60, turn));
        match turn % 4 {
            0 => rig.queue.set_common(rig.common.clone(), &rig.counters).unwrap(),
            1 => rig.queue.set_addresses(rig.addresses(), &rig.counters).unwrap(),
            2 => {
                rig.queue.set_enabled(false, &rig.counters).unwrap();
                assert!(rig.receive().is_empty());
                rig.queue.set_enabled(true, &rig.counters).unwrap();
            }
            _ => {
                let base = rig.queue.stop(&rig.counters);
                let spot = u32::from(turn % 8) | if turn / 8 % 2 == 0 { 0x8000 } else { 0 };
                assert_eq!(base, spot | spot << 16);
                rig.queue.set_base(base, &rig.counters).unwrap();
                rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
            }
        }
        let got = rig.receive();
        assert_eq!(got.len(), 1, "turn {turn}");
        assert_eq!(got[0].bytes(), frame(60, turn));
    }
    // A guest that boots again with a ring of the other kind begins anew.
    rig.common.features = crate::vhost::features::Features(FEATURES);
    rig.ram.write(GUEST_BASE, &[0; 0x1000]);
    rig.ring = DriverRing::new(8, GUEST_BASE);
    rig.set_up();
    rig.send(BUFFERS, [0; 12], &frame(60, 1));
    assert_eq!(rig.receive().len(), 1);
}
