//! Drivers that break the rules, each in its own way: a typed error, counted, and nothing else.

use super::setup::{BUFFERS, FEATURES, FROM_GUEST, RAM, Rig, TO_GUEST, all_features, frame};
use crate::vhost::driver::{GUEST_BASE, INDIRECT, NEXT, WRITE};
use crate::vhost::error::{FrameFault, QueueError, SetupError};
use crate::vhost::features::bit;
use crate::vhost::queue::{Kick, QueueState};
use crate::vhost::ring::RingAddresses;

/// The queue stopped with this error; nothing more is served until it is set up anew, and then everything is.
fn assert_stopped(rig: &mut Rig, expected: QueueError) {
    let sent = frame(60, 1);
    if rig.queue.sign().state() == QueueState::Running {
        match rig.index {
            TO_GUEST => drop(rig.deliver(&[&sent])),
            _ => drop(rig.receive()),
        }
    }
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(expected));
    assert_eq!(rig.counted().stops, 1);
    assert!(rig.receive().is_empty());
    assert_eq!(rig.deliver(&[&sent]), None);
    assert!(rig.queue.arm(), "a stopped queue keeps nobody awake");
    rig.queue.stop(&rig.counters);
    rig.ring = crate::vhost::driver::DriverRing::new(rig.ring.size, GUEST_BASE);
    rig.ram.write(GUEST_BASE, &vec![0; 0x4000]);
    rig.set_up();
}

/// Serves one good frame from the guest.
fn assert_serves(rig: &mut Rig) {
    rig.send(BUFFERS, [0; 12], &frame(60, 9));
    assert_eq!(rig.receive().len(), 1);
}

#[test]
fn an_index_that_jumps() {
    for to in [9, 100, 0x8000, u16::MAX] {
        for index in [FROM_GUEST, TO_GUEST] {
            let mut rig = Rig::new(index, 8, FEATURES);
            rig.ring.show_index(&rig.ram, to);
            assert_stopped(&mut rig, QueueError::IndexJump { by: to, size: 8 });
        }
    }
}

#[test]
fn a_head_that_is_no_descriptor() {
    for index in [FROM_GUEST, TO_GUEST] {
        let mut rig = Rig::new(index, 8, FEATURES);
        rig.ring.offer(&rig.ram, 8);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, QueueError::NoSuchDescriptor { index: 8, size: 8 });
    }
}

#[test]
fn a_chain_to_nowhere() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ring.set_descriptor(&rig.ram, 0, (BUFFERS, 12, NEXT), 4000);
    rig.ring.offer(&rig.ram, 0);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::NoSuchDescriptor { index: 4000, size: 8 });
    assert_serves(&mut rig);
}

#[test]
fn loops() {
    for len in [0, 1, 100] {
        let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
        for index in 0..4 {
            rig.ring.set_descriptor(&rig.ram, index, (BUFFERS, len, NEXT), (index + 1) % 4);
        }
        rig.ring.offer(&rig.ram, 0);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, QueueError::ChainTooLong(8));
    }
    let mut rig = Rig::new(TO_GUEST, 8, FEATURES);
    rig.ring.set_descriptor(&rig.ram, 0, (BUFFERS, 1, NEXT | WRITE), 0);
    rig.ring.offer(&rig.ram, 0);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::ChainTooLong(8));
}

#[test]
fn a_loop_in_a_table() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    let entry = |next: u16| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&BUFFERS.to_le_bytes());
        bytes[8] = 20;
        bytes[12] = NEXT as u8;
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    };
    rig.ram.write(BUFFERS, &[entry(1), entry(0)].concat());
    rig.ring.post(&rig.ram, &[(BUFFERS, 32, INDIRECT)]);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::ChainTooLong(2));
}

#[test]
fn chains_longer_than_any_drivers() {
    let mut rig = Rig::new(FROM_GUEST, 2048, FEATURES);
    let pieces = vec![(BUFFERS, 1, 0); 1025];
    rig.ring.post(&rig.ram, &pieces);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::ChainTooLong(1024));
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ring.post_indirect(&rig.ram, BUFFERS, &pieces);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::ChainTooLong(1024));
}

#[test]
fn buffers_of_nothing_do_not_keep_a_worker() {
    // For one frame, the chains of mergeable buffers are looked at one after the other.
    let mut rig = Rig::new(TO_GUEST, 4096, FEATURES);
    for _ in 0..4096 {
        rig.ring.post(&rig.ram, &[(BUFFERS, 0, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::ChainTooLong(1024));
}

#[test]
fn a_batch_of_long_chains_ends_early() {
    let mut rig = Rig::new(FROM_GUEST, 64, FEATURES);
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
fn tables_that_are_none() {
    for (what, len) in [("empty", 0), ("half a descriptor", 8), ("one and a half", 24), ("endless", u32::MAX)]
    {
        let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, &[(BUFFERS, len, INDIRECT)]);
        rig.ring.show(&rig.ram);
        rig.receive();
        assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::BadIndirect), "{what}");
    }
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ring.set_descriptor(&rig.ram, 0, (BUFFERS, 16, INDIRECT | NEXT), 1);
    rig.ring.offer(&rig.ram, 0);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::BadIndirect);
    // A table in a table.
    rig.ring.post_indirect(&rig.ram, BUFFERS, &[(BUFFERS + 0x100, 16, INDIRECT)]);
    rig.ring.show(&rig.ram);
    rig.receive();
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::BadIndirect));
    // Not negotiated.
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES & !bit::INDIRECT_DESC);
    rig.ring.post_indirect(&rig.ram, BUFFERS, &[(BUFFERS + 0x100, 100, 0)]);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::BadIndirect);
}

#[test]
fn a_table_outside_memory() {
    for address in [0, GUEST_BASE + RAM - 8, u64::MAX - 7, !0xf] {
        let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, &[(address, 32, INDIRECT)]);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, QueueError::Outside { address, len: 32 });
    }
}

#[test]
fn buffers_outside_memory() {
    let end = GUEST_BASE + RAM;
    let places = [(0, 100), (GUEST_BASE - 1, 100), (end - 99, 100), (end, 100), (u64::MAX - 10, 100)];
    for (address, len) in places {
        let outside = QueueError::Outside { address, len };
        let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, &[(address, len, 0)]);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, outside);
        let mut rig = Rig::new(TO_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, &[(address, len, WRITE)]);
        rig.ring.show(&rig.ram);
        if len - 1 > 72 || address != end - 99 {
            rig.deliver(&[&frame(88, 0)]);
            assert_stopped(&mut rig, outside);
        }
        // The same, behind a header that is good.
        let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, &[(BUFFERS, 12, 0), (address, len, 0)]);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, outside);
    }
}

#[test]
fn lengths_past_all_memory() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ring.post(&rig.ram, &[(BUFFERS, u32::MAX, 0), (BUFFERS, u32::MAX, 0)]);
    rig.ring.post(&rig.ram, &[(BUFFERS, 65_600, 0)]);
    rig.ring.post(&rig.ram, &[(BUFFERS, 25, 0)]);
    rig.ring.post(&rig.ram, &[(BUFFERS, 0, 0)]);
    rig.ring.show(&rig.ram);
    assert!(rig.receive().is_empty());
    assert_eq!(rig.counted().faults(FrameFault::Oversize), 2);
    assert_eq!(rig.counted().faults(FrameFault::Runt), 2);
    assert_eq!(rig.ring.device_index(&rig.ram), 4, "the buffers are given back");
    assert_serves(&mut rig);
    // To the guest: what it says is there is not looked at where it is not needed.
    let mut rig = Rig::new(TO_GUEST, 8, FEATURES);
    rig.ring.post(&rig.ram, &[(GUEST_BASE + RAM - 100, u32::MAX, WRITE)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.deliver(&[&frame(60, 1)]), Some(1));
}

#[test]
fn directions_mixed_up() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ring.post(&rig.ram, &[(BUFFERS, 12, 0), (BUFFERS, 100, WRITE)]);
    rig.ring.show(&rig.ram);
    assert_stopped(&mut rig, QueueError::WrongDirection);
    rig.ring.post(&rig.ram, &[(BUFFERS, 100, WRITE)]);
    rig.ring.show(&rig.ram);
    rig.receive();
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::WrongDirection));
    for pieces in [&[(BUFFERS, 2000, 0)][..], &[(BUFFERS, 12, WRITE), (BUFFERS + 12, 2000, 0)]] {
        let mut rig = Rig::new(TO_GUEST, 8, FEATURES);
        rig.ring.post(&rig.ram, pieces);
        rig.ring.show(&rig.ram);
        assert_stopped(&mut rig, QueueError::WrongDirection);
    }
}

#[test]
fn what_came_before_the_fault_is_kept() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    for turn in 0..3 {
        rig.send(BUFFERS + turn * 128, [0; 12], &frame(60, turn as u8));
    }
    rig.ring.post(&rig.ram, &[(0, 100, 0)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive().len(), 3);
    assert_eq!(rig.ring.device_index(&rig.ram), 3);
    assert_stopped(&mut rig, QueueError::Outside { address: 0, len: 100 });
}

#[test]
fn headers_that_lie() {
    use FrameFault::*;
    let bytes = frame(1000, 0);
    let cases: [(&str, [u8; 12], FrameFault); 6] = [
        ("a checksum past the end", [1, 0, 0, 0, 0, 0, 0xff, 0x7f, 0, 0, 0, 0], ChecksumOutside),
        ("offsets that wrap", [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], ChecksumOutside),
        ("segments of nothing", [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], SegmentSize),
        ("segments of a byte", [1, 1, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0], SegmentSize),
        ("TCP that is not", [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], Mismatch),
        ("no such kind", [1, 0x42, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], NotNegotiated),
    ];
    let mut rig = Rig::new(FROM_GUEST, 8, all_features());
    for (what, header, fault) in cases {
        let before = rig.counted().faults(fault);
        rig.send(BUFFERS, header, &bytes);
        assert!(rig.receive().is_empty(), "{what}");
        assert_eq!(rig.counted().faults(fault), before + 1, "{what}");
    }
    assert_serves(&mut rig);
    assert_eq!(rig.pool.region().outstanding(), 0, "no frame is lost");
    // What was not negotiated is not done.
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES | bit::CSUM);
    rig.send(BUFFERS, [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], &bytes);
    assert!(rig.receive().is_empty());
    assert_eq!(rig.counted().faults(NotNegotiated), 1);
}

#[test]
fn frames_longer_than_the_mtu() {
    let mut rig = Rig::new(FROM_GUEST, 8, all_features());
    rig.send(BUFFERS, [0; 12], &frame(1522, 0));
    assert_eq!(rig.receive().len(), 1);
    rig.send(BUFFERS, [0; 12], &frame(1523, 0));
    assert!(rig.receive().is_empty());
    assert_eq!(rig.counted().faults(FrameFault::Oversize), 1);
}

#[test]
fn memory_that_shrinks() {
    for index in [FROM_GUEST, TO_GUEST] {
        let mut rig = Rig::new(index, 8, FEATURES);
        let flags = if index == TO_GUEST { WRITE } else { 0 };
        rig.ring.post(&rig.ram, &[(BUFFERS, 1000, flags)]);
        rig.ring.show(&rig.ram);
        // The ring stays, the buffers go.
        rig.ram.truncate(0x1_0000).unwrap();
        match index {
            TO_GUEST => drop(rig.deliver(&[&frame(500, 0)])),
            _ => assert!(rig.receive().is_empty()),
        }
        assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::MemoryLost));
        assert_eq!(rig.counted().stops, 1);
    }
    // All of it goes, the ring too: what is read of it is zeros, and nothing comes of it.
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.send(BUFFERS, [0; 12], &frame(60, 0));
    rig.ram.truncate(0).unwrap();
    assert!(rig.receive().is_empty());
    assert!(rig.receive().is_empty());
    assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::MemoryLost));
    // Another guest, at the same time, is not touched.
    assert_serves(&mut Rig::new(FROM_GUEST, 8, FEATURES));
}

#[test]
fn nothing_is_served_from_memory_that_is_gone() {
    for index in [FROM_GUEST, TO_GUEST] {
        let mut rig = Rig::new(index, 8, FEATURES);
        // Somebody else finds out, and what looks like a ring is written to the pages that are there now.
        rig.ram.truncate(0).unwrap();
        assert_eq!(rig.ram.read(BUFFERS, 1), [0]);
        let flags = if index == TO_GUEST { WRITE } else { 0 };
        rig.ring.post(&rig.ram, &[(BUFFERS, 1000, flags)]);
        rig.ring.show(&rig.ram);
        match index {
            TO_GUEST => assert_eq!(rig.deliver(&[&frame(500, 1)]), Some(0)),
            _ => assert!(rig.receive().is_empty()),
        }
        assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::MemoryLost));
        assert_eq!(rig.ram.read(BUFFERS, 500), [0; 500]);
        assert_eq!(rig.ring.device_index(&rig.ram), 0, "not even that something was done is written");
        // It does not start on it either, whatever the front-end says.
        rig.queue.stop(&rig.counters);
        rig.queue.set_kick(Kick::Polled, &rig.counters).unwrap();
        assert_eq!(rig.queue.sign().state(), QueueState::Stopped(QueueError::MemoryLost));
        assert_eq!(rig.deliver(&[&frame(500, 1)]), None);
    }
}

#[test]
fn a_stray_write_to_memory_that_is_gone_costs_no_huge_page() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        // There is nothing to be told of.
        return;
    }
    let rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.ram.truncate(0).unwrap();
    assert_eq!(rig.ram.read(BUFFERS, 1), [0]);
    let address = rig.ram.memory().locate(GUEST_BASE, 1).unwrap().as_ptr() as usize;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let begins = format!("{address:x}-");
    let mut of_mapping = smaps.lines().skip_while(|line| !line.starts_with(&begins));
    let flags = of_mapping.find(|line| line.starts_with("VmFlags:")).expect("the mapping is there");
    assert!(flags.split_whitespace().any(|flag| flag == "nh"), "{flags}");
}

#[test]
fn rings_that_cannot_be() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    let good = rig.addresses();
    let part = RAM - 64;
    let user = crate::vhost::driver::USER_BASE;
    let cases = [
        ("nowhere", RingAddresses { descriptors: 0, ..good }),
        ("over the end", RingAddresses { descriptors: user + part, ..good }),
        ("round the corner", RingAddresses { used: u64::MAX - 3, ..good }),
        ("before the beginning", RingAddresses { available: user - 2, ..good }),
        ("askew", RingAddresses { descriptors: good.descriptors + 8, ..good }),
        ("askew", RingAddresses { available: good.available + 1, ..good }),
        ("askew", RingAddresses { used: good.used + 2, ..good }),
    ];
    for (what, addresses) in cases {
        assert!(rig.queue.set_addresses(addresses, &rig.counters).is_err(), "{what}");
        assert_eq!(rig.queue.sign().state(), QueueState::Idle, "{what}");
        assert!(rig.receive().is_empty());
    }
    for size in [0, 3, 12, 65536, u32::MAX] {
        assert!(matches!(
            rig.queue.set_size(size, &rig.counters),
            Err(crate::vhost::error::RequestError::Setup(SetupError::Size(_)))
        ));
    }
    // A ring resized while running, to where it does not fit.
    rig.set_up();
    rig.queue.set_addresses(RingAddresses { used: user + RAM - 128, ..good }, &rig.counters).unwrap();
    assert!(rig.queue.set_size(1024, &rig.counters).is_err());
    rig.ring = crate::vhost::driver::DriverRing::new(8, GUEST_BASE);
    rig.ram.write(GUEST_BASE, &[0; 512]);
    rig.set_up();
    assert_serves(&mut rig);
}
