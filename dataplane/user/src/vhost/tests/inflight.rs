//! What a process leaves behind when it dies in the middle, and what the next one makes of it.

use crate::vhost::ring::SplitRing;
use crate::vhost::split::Split;
use crate::vhost::virtqueue::{Position, Virtqueue};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::setup::{BUFFERS, FEATURES, FROM_GUEST, Rig, frame};
use crate::vhost::error::{QueueError, RequestError, SetupError};
use crate::vhost::inflight::InflightArea;
use crate::vhost::queue::{Kick, QueueState};

fn area(queues: u16, entries: u16) -> InflightArea {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    let len = InflightArea::bytes(queues, entries);
    ftruncate(&file, len).unwrap();
    InflightArea::new(&file, 0, len, queues, entries).unwrap()
}

#[test]
fn chains_of_a_dead_process_are_served_first_and_in_order() {
    let area = area(2, 8);
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    for turn in 0..4 {
        rig.send(BUFFERS + turn * 128, [0; 12], &frame(60, turn as u8));
    }
    // The dead process took 2, then 0, and had given neither back.
    let mut dead = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    assert_eq!(dead.recover(0).unwrap(), Vec::<u16>::new());
    dead.take(2);
    dead.take(0);
    drop(dead);
    rig.queue.stop(&rig.counters);
    rig.common.inflight = Some(area);
    rig.set_up();
    let got = rig.receive();
    let firsts: Vec<u8> = got.iter().map(|frame| frame.bytes()[0]).collect();
    // 2 and 0 again, then what the available ring has behind the two that were taken from it: 2 and 3.
    assert_eq!(firsts, [2, 0, 2, 3]);
    assert_eq!(rig.ring.device_index(&rig.ram), 4);
    assert!(rig.receive().is_empty());
}

/// A driver that has its buffers used in order counts on it.
#[test]
fn chains_that_are_left_keep_their_order_when_the_next_process_dies_too() {
    let area = area(2, 8);
    let rig = Rig::new(FROM_GUEST, 8, FEATURES);
    let mut dead = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    dead.recover(0).unwrap();
    dead.take(2);
    dead.take(0);
    let mut next = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    let left = next.recover(0).unwrap();
    let ring = SplitRing::new(&rig.common.memory, &rig.addresses(), 8).unwrap();
    let mut split = Split::new(ring, false, Position { available: 2, used: 0 }, left, Some(next), None);
    let (first, _) = split.first().unwrap().unwrap();
    assert_eq!(first, 2);
    // It has taken the first, and dies before it shows it.
    split.complete(first, 0);
    drop(split);
    let mut third = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    assert_eq!(third.recover(0).unwrap(), [2, 0]);
}

#[test]
fn a_batch_that_the_driver_has_seen_is_not_served_again() {
    let area = area(2, 8);
    let mut dead = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    dead.recover(0).unwrap();
    dead.take(5);
    dead.take(6);
    dead.before_publish(&[5, 6]);
    // It died after the used index moved to 2, before it unmarked them.
    let mut next = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    assert_eq!(next.recover(2).unwrap(), Vec::<u16>::new());
    // Had the index not moved, they would be.
    next.take(5);
    next.take(6);
    next.before_publish(&[5, 6]);
    let mut third = area.queue(FROM_GUEST, 8).unwrap().unwrap();
    assert_eq!(third.recover(2).unwrap(), [5, 6]);
}

#[test]
fn nothing_stays_marked_in_ordinary_service() {
    let area = area(2, 8);
    let mut rig = Rig::with(FROM_GUEST, 8, FEATURES, |mut common| {
        common.inflight = Some(area.clone());
        common
    });
    for turn in 0..40 {
        rig.send(BUFFERS + turn % 8 * 128, [0; 12], &frame(60, turn as u8));
        if turn % 3 == 0 {
            rig.receive();
        }
    }
    rig.receive();
    assert_eq!(rig.counted().frames, 40);
    rig.queue.stop(&rig.counters);
    assert_eq!(area.queue(FROM_GUEST, 8).unwrap().unwrap().recover(40).unwrap(), Vec::<u16>::new());
    // And a service that goes on counts on.
    rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
    rig.send(BUFFERS, [0; 12], &frame(60, 41));
    assert_eq!(rig.receive().len(), 1);
}

#[test]
fn an_area_that_does_not_fit_is_refused() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.common.inflight = Some(area(2, 4));
    let result = rig.queue.set_common(rig.common.clone(), &rig.counters);
    assert!(matches!(result, Err(RequestError::Setup(SetupError::Inflight(8)))));
    assert_eq!(rig.queue.sign().state(), QueueState::Idle);
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 64).unwrap();
    assert!(InflightArea::new(&file, 0, 64, 2, 8).is_err(), "too small");
    assert!(InflightArea::new(&file, 0, 1 << 20, 2, 8).is_err(), "larger than its file");
}

#[test]
fn scribbling_in_the_area_harms_nobody() {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    let len = InflightArea::bytes(2, 8);
    ftruncate(&file, len).unwrap();
    let area = InflightArea::new(&file, 0, len, 2, 8).unwrap();
    let mut rig = Rig::with(FROM_GUEST, 8, FEATURES, |mut common| {
        common.inflight = Some(area);
        common
    });
    // Every chain in flight, links in a circle, heads past the end, the version kept.
    let mut bytes = vec![0xff; len as usize];
    for part in [0, len as usize / 2] {
        bytes[part + 8..part + 12].copy_from_slice(&[1, 0, 8, 0]);
        for entry in 0..8 {
            bytes[part + 16 + 16 * entry] = 1;
        }
    }
    rustix::io::pwrite(&file, &bytes, 0).unwrap();
    rig.queue.stop(&rig.counters);
    rig.send(BUFFERS, [0; 12], &frame(60, 1));
    rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
    for _ in 0..10 {
        rig.receive();
    }
    // By the area, eight chains were taken of a ring in which one was made available.
    let jump = QueueError::IndexJump { by: 1_u16.wrapping_sub(8), size: 8 };
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(jump));
}
