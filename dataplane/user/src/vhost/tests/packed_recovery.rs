//! A process that served a packed ring dies, and the next one goes on: without an in-flight area, and with one.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::garbage::Random;
use super::setup::{BUFFERS, FEATURES, FROM_GUEST, Rig, TO_GUEST, frame};
use crate::vhost::driver::{GUEST_BASE, NEXT, WRITE, available, used};
use crate::vhost::error::{RequestError, SetupError};
use crate::vhost::features::bit;
use crate::vhost::inflight::{InflightArea, PackedInflight};
use crate::vhost::packed::ring::{PackedRing, Spot};
use crate::vhost::queue::{Kick, Queue, QueueState};

const PACKED: u64 = FEATURES | bit::RING_PACKED;

/// The process dies, and the next one is told the base where the ring began.
fn dies(rig: &mut Rig) {
    rig.queue = Queue::new(rig.index, 1522, Arc::default()).unwrap();
    rig.set_up();
}

/// What a frame is known by.
fn mark(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[14], bytes[15], bytes[16], bytes[17]])
}

fn marked(number: u32) -> Vec<u8> {
    [vec![2; 14], number.to_le_bytes().to_vec(), vec![0; 46]].concat()
}

/// Frames from a driver that never has more chains waiting than fit, of up to `longest` slots; the process dies time and again.
fn from_guest(size: u16, longest: u16, seed: u64) {
    let mut random = Random(seed);
    let mut rig = Rig::new(FROM_GUEST, size, PACKED);
    let (mut sent, mut got, mut free) = (0_u32, 0_u32, size);
    let mut chains = VecDeque::new();
    for _ in 0..400 {
        for _ in 0..random.below(40) {
            let slots = 1 + random.below(longest.into()) as u16;
            if slots > free {
                break;
            }
            let at = BUFFERS + u64::from(sent % 512) * 128;
            rig.ram.write(at, &[vec![0; 12], marked(sent)].concat());
            let step = 76 / u32::from(slots);
            let pieces: Vec<_> = (0..u32::from(slots))
                .map(|piece| {
                    let len = if piece + 1 == u32::from(slots) { 76 - piece * step } else { step };
                    (at + u64::from(piece * step), len, 0)
                })
                .collect();
            chains.push_back((rig.ring.post(&rig.ram, &pieces), slots));
            free -= slots;
            sent += 1;
        }
        rig.ring.show(&rig.ram);
        if random.below(3) > 0 {
            for frame in rig.receive() {
                assert_eq!(mark(frame.bytes()), got, "size {size}, seed {seed}");
                got += 1;
                rig.pool.give(frame);
            }
        }
        // The driver may have looked or not when the process dies.
        if random.below(2) == 0 {
            while let Some((id, _)) = rig.ring.reap(&rig.ram) {
                let (posted, slots) = chains.pop_front().unwrap();
                assert_eq!(id, posted, "size {size}, seed {seed}");
                free += slots;
            }
        }
        if random.below(4) == 0 {
            dies(&mut rig);
        }
    }
    while got < sent {
        for frame in rig.receive() {
            assert_eq!(mark(frame.bytes()), got, "size {size}, seed {seed}");
            got += 1;
            rig.pool.give(frame);
        }
        assert_eq!(rig.queue.sign().state(), QueueState::Running, "size {size}, seed {seed}");
    }
    assert!(sent > 100, "the test does something");
}

#[test]
fn no_frame_from_the_guest_is_lost_or_doubled() {
    for seed in 0..40 {
        for (size, longest) in [(8, 1), (64, 1), (7, 3), (64, 3), (256, 5)] {
            from_guest(size, longest, seed);
        }
    }
}

#[test]
fn the_buffers_of_a_full_ring_are_gone_on_with() {
    // As drivers keep their receive rings: nothing in the ring is of the device, wherever it stands.
    for size in [8, 64, 100] {
        let mut random = Random(size.into());
        let mut rig = Rig::new(TO_GUEST, size, PACKED);
        let mut slots = VecDeque::new();
        for slot in 0..u64::from(size) {
            slots.push_back(slot);
            rig.ring.post(&rig.ram, &[(BUFFERS + slot * 2048, 2048, WRITE)]);
        }
        rig.ring.show(&rig.ram);
        for number in 0..500 {
            let count = 1 + random.below(4) as usize;
            let frames = vec![marked(number); count];
            let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            assert_eq!(rig.deliver(&frames), Some(count), "size {size}, frame {number}");
            for _ in 0..count {
                let (_, written) = rig.ring.reap(&rig.ram).expect("given back");
                assert_eq!(written, 76);
                let slot = slots.pop_front().unwrap();
                assert_eq!(mark(&rig.ram.read(BUFFERS + slot * 2048 + 12, 64)), number);
                slots.push_back(slot);
                rig.ring.post(&rig.ram, &[(BUFFERS + slot * 2048, 2048, WRITE)]);
            }
            rig.ring.show(&rig.ram);
            if random.below(3) == 0 {
                dies(&mut rig);
            }
        }
    }
}

#[test]
fn the_base_counts_where_another_back_end_was() {
    // It leaves whatever it likes in the device's area.
    for area in [0_u32, 1 << 16, 0x8003, 0x8005 | 2 << 16, 0xffff_ffff] {
        for full in [false, true] {
            let mut rig = Rig::new(FROM_GUEST, 8, PACKED);
            for turn in 0..50_u32 {
                let mut waiting = 0;
                while waiting < if full { 8 } else { 3 } {
                    let at = BUFFERS + 128 * waiting;
                    rig.ram.write(at, &[vec![0; 12], marked(turn)].concat());
                    rig.ring.post(&rig.ram, &[(at, 76, 0)]);
                    waiting += 1;
                }
                let base = rig.queue.stop(&rig.counters);
                rig.ring.show(&rig.ram);
                rig.ram.write(rig.ring.used, &area.to_le_bytes());
                rig.queue.set_base(base, &rig.counters).unwrap();
                rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
                let got = rig.receive();
                assert_eq!(got.len() as u64, waiting, "area {area:#x}, turn {turn}");
                for frame in got {
                    assert_eq!(mark(frame.bytes()), turn);
                    rig.pool.give(frame);
                }
                while rig.ring.reap(&rig.ram).is_some() {}
            }
        }
    }
}

#[test]
fn a_batch_that_was_shown_in_part_is_shown_whole() {
    for first in 0..20 {
        let mut rig = Rig::new(TO_GUEST, 8, PACKED);
        for index in 0..8 {
            rig.ring.post(&rig.ram, &[(BUFFERS + index * 100, 100, WRITE)]);
        }
        rig.ring.show(&rig.ram);
        for _ in 0..first {
            assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
            assert!(rig.ring.reap(&rig.ram).is_some());
            rig.ring.post(&rig.ram, &[(BUFFERS, 100, WRITE)]);
            rig.ring.show(&rig.ram);
        }
        // The process dies when the last two of a batch of four are marked.
        for ahead in [2, 3] {
            let at: u16 = first + ahead;
            let round = (at / 8).is_multiple_of(2);
            rig.ring.set_slot(&rig.ram, at % 8, (BUFFERS, 62, WRITE | used(round)), at % 8);
        }
        dies(&mut rig);
        let got: Vec<_> = std::iter::from_fn(|| rig.ring.reap(&rig.ram)).collect();
        let ids = [0, 1, 2, 3].map(|ahead| (first + ahead) % 8);
        assert_eq!(got.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids, "from {first}");
        assert_eq!(got.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [100, 100, 62, 62]);
        assert_eq!(rig.deliver(&[&frame(20, 0)]), Some(1));
        assert_eq!(rig.ring.reap(&rig.ram), Some(((first + 4) % 8, 32)));
    }
}

#[test]
fn whatever_is_in_the_ring_recovery_ends_in_it() {
    let mut random = Random(7);
    for round in 0..3000 {
        let size = 1 + random.below(70) as u16;
        let mut rig = Rig::new(FROM_GUEST, size, PACKED);
        for at in 0..size {
            let flags = random.next() as u16;
            rig.ring.set_slot(&rig.ram, at, (BUFFERS, 100, flags), random.below(size.into()) as u16);
        }
        rig.ram.write(rig.ring.used, &random.next().to_le_bytes()[..4]);
        let base = random.below(size.into()) as u32 | (random.next() as u32 & 0x8000);
        rig.queue = Queue::new(FROM_GUEST, 1522, Arc::default()).unwrap();
        rig.set_up();
        rig.queue.stop(&rig.counters);
        rig.queue.set_base(base, &rig.counters).unwrap();
        rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
        for frame in rig.receive() {
            rig.pool.give(frame);
        }
        let end = rig.queue.stop(&rig.counters);
        assert!((end & 0x7fff) < u32::from(size), "round {round}");
        assert_eq!(end >> 16, end & 0xffff, "round {round}");
    }
}

// With an in-flight area.

fn file(queues: u16, entries: u16) -> (OwnedFd, u64) {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    let len = InflightArea::bytes_of_any(queues, entries);
    ftruncate(&file, len).unwrap();
    (file, len)
}

fn area(queues: u16, entries: u16) -> InflightArea {
    let (file, len) = file(queues, entries);
    InflightArea::new(&file, 0, len, queues, entries).unwrap()
}

/// The ring of a rig, as another process has it.
fn ring(rig: &Rig) -> PackedRing {
    PackedRing::new(&rig.common.memory, &rig.addresses(), rig.ring.size).unwrap()
}

fn queue(area: &InflightArea) -> PackedInflight {
    area.packed_queue(FROM_GUEST, 8).unwrap().unwrap()
}

/// Four frames wait, of which the second is in two pieces.
fn four() -> Rig {
    let mut rig = Rig::new(FROM_GUEST, 8, PACKED);
    for turn in 0..4 {
        let at = BUFFERS + 128 * turn;
        rig.ram.write(at, &[vec![0; 12], marked(turn as u32)].concat());
        let whole = [(at, 76, 0)];
        let apart = [(at, 12, 0), (at + 12, 64, 0)];
        rig.ring.post(&rig.ram, if turn == 1 { &apart } else { &whole });
    }
    rig.ring.show(&rig.ram);
    rig
}

fn marks(rig: &mut Rig) -> Vec<u32> {
    rig.receive().iter().map(|frame| mark(frame.bytes())).collect()
}

#[test]
fn chains_of_a_dead_process_are_served_first_and_in_order() {
    let area = area(2, 8);
    let mut rig = four();
    // The dead process took the first two, and gave neither back; a driver that is wrong overwrites one.
    let ring = ring(&rig);
    let mut dead = queue(&area);
    assert!(dead.recover(&ring).unwrap().is_none(), "there is nothing yet");
    dead.begin(Spot::FIRST);
    dead.take(0, [ring.slot(0)].into_iter());
    dead.take(1, [ring.slot(1), ring.slot(2)].into_iter());
    drop(dead);
    rig.ring.set_slot(&rig.ram, 1, (0, 0xffff, NEXT | available(false)), 9);
    rig.common.inflight = Some(area.clone());
    dies(&mut rig);
    assert_eq!(marks(&mut rig), [0, 1, 2, 3]);
    let ids: Vec<_> = std::iter::from_fn(|| rig.ring.reap(&rig.ram)).map(|(id, _)| id).collect();
    assert_eq!(ids, [0, 1, 3, 4]);
    // Nothing is in flight any more.
    dies(&mut rig);
    assert!(rig.receive().is_empty());
    rig.send(BUFFERS, [0; 12], &marked(9));
    assert_eq!(marks(&mut rig), [9]);
}

#[test]
fn a_batch_that_the_driver_has_seen_is_not_served_again() {
    for is_seen in [false, true] {
        for torn in [false, true] {
            let area = area(2, 8);
            let mut rig = four();
            let ring = ring(&rig);
            let mut dead = queue(&area);
            dead.begin(Spot::FIRST);
            dead.take(0, [ring.slot(0)].into_iter());
            dead.take(1, [ring.slot(1), ring.slot(2)].into_iter());
            dead.before_publish(Spot::FIRST.after(3, 8));
            if is_seen || torn {
                ring.set_used(Spot::FIRST.after(1, 8), 1, 0, false);
            }
            if is_seen {
                // It died before it could write that it was done.
                ring.set_used(Spot::FIRST, 0, 0, false);
            }
            drop(dead);
            rig.common.inflight = Some(area.clone());
            dies(&mut rig);
            let expected = if is_seen { &[2, 3][..] } else { &[0, 1, 2, 3] };
            assert_eq!(marks(&mut rig), expected, "seen: {is_seen}, in part: {torn}");
            let ids: Vec<_> = std::iter::from_fn(|| rig.ring.reap(&rig.ram)).map(|(id, _)| id).collect();
            assert_eq!(ids, [0, 1, 3, 4], "seen: {is_seen}, in part: {torn}");
        }
    }
}

#[test]
fn nothing_stays_in_flight_in_ordinary_service() {
    let area = area(2, 8);
    let mut rig = Rig::with(FROM_GUEST, 8, PACKED, |mut common| {
        common.inflight = Some(area.clone());
        common
    });
    let mut got = 0;
    for turn in 0..200_u32 {
        let at = BUFFERS + u64::from(turn % 4 * 128);
        rig.ram.write(at, &[vec![0; 12], marked(turn)].concat());
        rig.ring.post(&rig.ram, &[(at, 12, 0), (at + 12, 64, 0)]);
        rig.ring.show(&rig.ram);
        if turn % 4 == 3 {
            for mark in marks(&mut rig) {
                assert_eq!(mark, got);
                got += 1;
            }
            while rig.ring.reap(&rig.ram).is_some() {}
        }
        if turn % 7 == 0 {
            dies(&mut rig);
        }
    }
    assert_eq!(got, 200);
    let (used, left) = queue(&area).recover(&ring(&rig)).unwrap().unwrap();
    // Four hundred slots are fifty rounds.
    assert_eq!((used, left.len()), (Spot::FIRST, 0));
}

#[test]
fn an_area_that_does_not_fit_is_refused() {
    let mut rig = Rig::new(FROM_GUEST, 8, PACKED);
    rig.common.inflight = Some(area(2, 4));
    let result = rig.queue.set_common(rig.common.clone(), &rig.counters);
    assert!(matches!(result, Err(RequestError::Setup(SetupError::Inflight(8)))));
    assert_eq!(rig.queue.sign().state(), QueueState::Idle);
    // Long enough for split rings, but not for these.
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    let len = InflightArea::bytes(2, 8);
    ftruncate(&file, len).unwrap();
    rig.common.inflight = Some(InflightArea::new(&file, 0, len, 2, 8).unwrap());
    let result = rig.queue.set_common(rig.common.clone(), &rig.counters);
    assert!(matches!(result, Err(RequestError::Setup(SetupError::Inflight(8)))));
}

#[test]
fn scribbling_in_the_area_harms_nobody() {
    let mut random = Random(11);
    let (mut refused, mut served) = (0, 0);
    for _ in 0..4000 {
        let (file, len) = file(2, 8);
        let area = InflightArea::new(&file, 0, len, 2, 8).unwrap();
        let mut bytes = vec![0; len as usize];
        let mut plausible = || match random.below(8) {
            0 => random.next() as u8,
            _ => random.below(9) as u8,
        };
        for (at, byte) in bytes.iter_mut().enumerate() {
            // Words of two bytes, mostly small.
            *byte = if at % 2 == 0 { plausible() } else { u8::from(plausible() == 200) };
        }
        for part in [0, len as usize / 2] {
            bytes[part + 8..part + 12].copy_from_slice(&[1, 0, 8, 0]);
        }
        rustix::io::pwrite(&file, &bytes, 0).unwrap();
        let mut rig = four();
        rig.common.inflight = Some(area);
        rig.queue = Queue::new(FROM_GUEST, 1522, Arc::default()).unwrap();
        let counters = &rig.counters;
        let setting = [
            rig.queue.set_common(rig.common.clone(), counters),
            rig.queue.set_size(8, counters),
            rig.queue.set_addresses(rig.addresses(), counters),
            rig.queue.set_base(rig.ring.base(), counters),
            rig.queue.set_enabled(true, counters),
            rig.queue.set_kick(Kick::Polled, counters),
        ];
        if setting.iter().any(Result::is_err) {
            refused += 1;
            continue;
        }
        for _ in 0..4 {
            for frame in rig.receive() {
                served += 1;
                rig.pool.give(frame);
            }
        }
    }
    assert!(refused > 100 && served > 100, "{refused} refused, {served} frames served");
    // The other side scribbles while it is in use.
    let (file, len) = file(2, 8);
    let area = Some(InflightArea::new(&file, 0, len, 2, 8).unwrap());
    let mut rig = Rig::with(FROM_GUEST, 8, PACKED, |mut common| {
        common.inflight = area;
        common
    });
    for round in 0..500_u32 {
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        rustix::io::pwrite(&file, &bytes, 0).unwrap();
        rig.send(BUFFERS, [0; 12], &marked(round));
        assert_eq!(marks(&mut rig), [round], "its own frames are served");
    }
}

#[test]
fn memory_of_a_ring_is_all_that_recovery_needs() {
    // The same ring in another process's mapping.
    let mut rig = four();
    assert_eq!(marks(&mut rig), [0, 1, 2, 3]);
    let memory = Arc::new(rig.ram.memory().clone());
    let ring = PackedRing::new(&memory, &rig.addresses(), 8).unwrap();
    let stands = crate::vhost::packed::recovery::recover(&ring, Spot::FIRST);
    assert_eq!(stands, Spot::FIRST.after(5, 8));
    assert_eq!(rig.ring.descriptors, GUEST_BASE);
}
