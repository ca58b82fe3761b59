//! The data path with an honest driver: every layout of chains, both ways, bytes compared.

use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::setup::{BOTH, BUFFERS, FEATURES, FROM_GUEST, RAM, Rig, TO_GUEST, all_features, frame};
use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload};
use crate::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, WRITE};
use crate::vhost::error::FrameFault;
use crate::vhost::features::bit;
use crate::vhost::log::DirtyLog;
use crate::vhost::memory::{GuestMemory, Mapping, RegionAddress};
use crate::vhost::queue::QueueState;
use crate::vhost::ring::RingAddresses;

#[test]
fn frames_come_whole_however_they_are_cut() {
    for features in BOTH {
        let mut rig = Rig::new(FROM_GUEST, 64, features);
        let sent = frame(300, 7);
        let whole = [vec![0; 12], sent.clone()].concat();
        rig.ram.write(BUFFERS, &whole);
        // Header alone, header cut, data cut, an empty piece.
        let cuts: [&[u32]; 5] = [&[312], &[12, 300], &[5, 307], &[12, 100, 0, 200], &[1, 1, 10, 150, 150]];
        for (index, cut) in cuts.into_iter().enumerate() {
            let mut at = BUFFERS;
            let mut pieces = Vec::new();
            for len in cut {
                pieces.push((at, *len, 0));
                at += u64::from(*len);
            }
            let head = if index % 2 == 0 {
                rig.ring.post(&rig.ram, &pieces)
            } else {
                rig.ring.post_indirect(&rig.ram, BUFFERS + 0x1000, &pieces)
            };
            rig.ring.show(&rig.ram);
            let got = rig.receive();
            assert_eq!(got.len(), 1, "{cut:?}");
            assert_eq!(got[0].bytes(), sent, "{cut:?}");
            assert_eq!(rig.ring.reap(&rig.ram), Some((head, 0)), "{cut:?}");
        }
        assert_eq!(rig.counted().frames, 5);
        assert_eq!(rig.counted().bytes, 1500);
    }
}

#[test]
fn a_table_may_end_a_chain() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    let sent = frame(64, 1);
    rig.ram.write(BUFFERS, &[vec![0; 12], sent.clone()].concat());
    // Descriptor 0 is the header, 1 the table, whose one entry is the data.
    rig.ring.set_descriptor(&rig.ram, 0, (BUFFERS, 12, 1), 1);
    rig.ring.set_descriptor(&rig.ram, 1, (BUFFERS + 0x1000, 16, 4), 0);
    rig.ring.offer(&rig.ram, 0);
    rig.ram.write(
        BUFFERS + 0x1000,
        &[&(BUFFERS + 12).to_le_bytes()[..], &64_u32.to_le_bytes(), &[0; 4]].concat(),
    );
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive()[0].bytes(), sent);
}

#[test]
fn the_ring_goes_round_many_times_in_order() {
    for features in BOTH {
        let mut rig = Rig::new(FROM_GUEST, 8, features);
        for turn in 0..20_000_u32 {
            let bytes = [vec![2; 14], turn.to_le_bytes().to_vec()].concat();
            rig.send(BUFFERS + u64::from(turn % 8) * 64, [0; 12], &bytes);
            if turn % 3 == 2 {
                for (index, got) in rig.receive().iter().enumerate() {
                    assert_eq!(got.bytes()[14..], (turn - 2 + index as u32).to_le_bytes());
                    assert!(rig.ring.reap(&rig.ram).is_some());
                }
            }
        }
        assert_eq!(rig.counted().frames, 19_998);
    }
}

#[test]
fn a_batch_takes_no_more_than_there_is_room_for() {
    for features in BOTH {
        let mut rig = Rig::new(FROM_GUEST, 64, features);
        for turn in 0..50 {
            rig.send(BUFFERS + turn * 64, [0; 12], &frame(60, turn as u8));
        }
        assert_eq!(rig.receive().len(), 32);
        assert_eq!(rig.ring.device_index(&rig.ram), 32);
        assert_eq!(rig.receive().len(), 18);
    }
}

#[test]
fn frames_stay_with_the_guest_while_there_are_no_chunks() {
    for features in BOTH {
        let mut rig = Rig::new(FROM_GUEST, 8, features);
        let mut taken = Vec::new();
        while let Some(frame) = rig.pool.take(60) {
            taken.push(frame);
        }
        rig.send(BUFFERS, [0; 12], &frame(60, 1));
        assert!(rig.receive().is_empty());
        assert_eq!(rig.ring.device_index(&rig.ram), 0);
        rig.pool.give(taken.pop().unwrap());
        assert_eq!(rig.receive().len(), 1);
    }
}

/// One that lies in a cache line of its own is not written where it is right already.
#[test]
fn a_header_is_right_whatever_was_in_its_place() {
    const RIGHT: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    for features in [bit::VERSION_1 | bit::MRG_RXBUF, 0] {
        let len = if features == 0 { 10 } else { 12 };
        for offset in 0..64 {
            let mut rig = Rig::new(TO_GUEST, 64, features);
            let one_wrong = (0..len).map(|wrong| {
                let mut was = RIGHT;
                was[wrong] ^= 0x80;
                was
            });
            for was in one_wrong.chain([RIGHT, [0xff; 12]]) {
                let at = BUFFERS + offset;
                rig.ram.write(at, &was);
                rig.ring.post(&rig.ram, &[(at, 200, WRITE)]);
                rig.ring.show(&rig.ram);
                let sent = frame(60, was[0]);
                assert_eq!(rig.deliver(&[&sent]), Some(1));
                assert!(rig.ring.reap(&rig.ram).is_some());
                let expected = [&RIGHT[..len], &sent].concat();
                assert_eq!(rig.ram.read(at, len + 60), expected, "{was:x?} at {offset}");
            }
        }
    }
}

#[test]
fn frames_go_into_one_buffer_or_several() {
    for features in BOTH {
        for (buffer, header_apart) in [(2048, false), (2048, true), (100, false), (13, false)] {
            let mut rig = Rig::new(TO_GUEST, 256, features);
            let mut at = BUFFERS;
            for _ in 0..128 {
                let pieces = [(at, 12, WRITE), (at + 12, buffer - 12, WRITE)];
                let one = [(at, buffer, WRITE)];
                rig.ring.post(&rig.ram, if header_apart { &pieces } else { &one });
                at += u64::from(buffer);
            }
            rig.ring.show(&rig.ram);
            for seed in 0..3 {
                let sent = frame(333, seed);
                assert_eq!(rig.deliver(&[&sent]), Some(1));
                let count = (345_u32).div_ceil(buffer);
                let mut got = Vec::new();
                for _ in 0..count {
                    let (head, written) = rig.ring.reap(&rig.ram).unwrap();
                    let step = if header_apart { 2 } else { 1 };
                    let from = BUFFERS + u64::from(head) / step * u64::from(buffer);
                    got.extend(rig.ram.read(from, written as usize));
                }
                assert_eq!(rig.ring.reap(&rig.ram), None);
                assert_eq!(got[12..], sent, "buffers of {buffer}");
                assert_eq!(got[10..12], (count as u16).to_le_bytes(), "buffers of {buffer}");
            }
        }
    }
}

/// What is known to wait is enough for one short frame, so nobody looked at what came later.
#[test]
fn a_long_frame_finds_buffers_that_came_since_the_last_look() {
    for features in BOTH {
        let mut rig = Rig::new(TO_GUEST, 64, features);
        let post = |rig: &mut Rig, numbers: std::ops::Range<u64>| {
            for number in numbers {
                rig.ring.post(&rig.ram, &[(BUFFERS + number * 128, 128, WRITE)]);
            }
            rig.ring.show(&rig.ram);
        };
        post(&mut rig, 0..4);
        assert_eq!(rig.deliver(&[&frame(60, 0)]), Some(1));
        post(&mut rig, 4..24);
        let (long, short) = (frame(1400, 1), frame(60, 2));
        assert_eq!(rig.deliver(&[&long, &short]), Some(2));
        let mut got = Vec::new();
        while let Some((head, written)) = rig.ring.reap(&rig.ram) {
            got.extend(rig.ram.read(BUFFERS + u64::from(head) * 128, written as usize));
        }
        assert_eq!(got[72 + 12..][..1400], long);
        assert_eq!(got[72 + 12 + 1400 + 12..], short);
        assert_eq!(rig.counted().faults(FrameFault::NoBuffers), 0);
    }
}

#[test]
fn a_frame_too_long_for_the_buffers_is_counted() {
    for features in BOTH {
        let mut rig = Rig::new(TO_GUEST, 8, features & !bit::MRG_RXBUF);
        rig.ring.post(&rig.ram, &[(BUFFERS, 100, WRITE)]);
        rig.ring.show(&rig.ram);
        assert_eq!(rig.deliver(&[&frame(200, 0), &frame(60, 1)]), Some(1));
        assert_eq!(rig.counted().faults(FrameFault::BufferTooSmall), 1);
        assert_eq!(rig.ring.reap(&rig.ram), Some((0, 72)));
    }
}

#[test]
fn a_guest_without_buffers_costs_frames_and_nothing_else() {
    for features in BOTH {
        let mut rig = Rig::new(TO_GUEST, 8, features);
        rig.ring.post(&rig.ram, &[(BUFFERS, 100, WRITE)]);
        rig.ring.show(&rig.ram);
        // Two buffers would be needed: the one there stays.
        assert_eq!(rig.deliver(&[&frame(150, 0)]), Some(0));
        assert_eq!(rig.counted().faults(FrameFault::NoBuffers), 1);
        assert_eq!(rig.deliver(&[&frame(60, 0), &frame(60, 1), &frame(60, 2)]), Some(1));
        assert_eq!(rig.counted().faults(FrameFault::NoBuffers), 3);
        assert_eq!(rig.queue.sign().state(), QueueState::Running);
    }
}

#[test]
fn headers_of_guests_without_offloads_ask_for_nothing() {
    for features in BOTH {
        for apart in [false, true] {
            let mut rig = Rig::new(FROM_GUEST, 64, features);
            let sent = frame(60, 3);
            // Checksums and segments, in a header that would be refused of a guest with offloads.
            rig.ram.write(BUFFERS, &[1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0]);
            rig.ram.write(BUFFERS + 12, &sent);
            let (one, two) = ([(BUFFERS, 72, 0)], [(BUFFERS, 12, 0), (BUFFERS + 12, 60, 0)]);
            rig.ring.post(&rig.ram, if apart { &two } else { &one });
            rig.ring.show(&rig.ram);
            let got = rig.receive();
            assert_eq!(got.iter().map(Frame::bytes).collect::<Vec<_>>(), [&sent[..]]);
            assert!(got[0].offload().is_complete());
        }
    }
}

#[test]
fn old_drivers_have_shorter_headers() {
    let mut rig = Rig::new(FROM_GUEST, 8, 0);
    let sent = frame(60, 3);
    rig.ram.write(BUFFERS, &[vec![0; 10], sent.clone()].concat());
    rig.ring.post(&rig.ram, &[(BUFFERS, 10, 0), (BUFFERS + 10, 60, 0)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.receive()[0].bytes(), sent);
    let mut rig = Rig::new(TO_GUEST, 8, 0);
    rig.ring.post(&rig.ram, &[(BUFFERS, 10, WRITE), (BUFFERS + 10, 1526, WRITE)]);
    rig.ring.show(&rig.ram);
    assert_eq!(rig.deliver(&[&sent]), Some(1));
    assert_eq!(rig.ring.reap(&rig.ram), Some((0, 70)));
    assert_eq!(rig.ram.read(BUFFERS + 10, 60), sent);
}

#[test]
fn super_frames_pass_from_guest_to_guest() {
    let mut bytes = frame(20_000, 0);
    bytes[12..14].copy_from_slice(&[0x08, 0]);
    bytes[14] = 0x45;
    bytes[20..22].copy_from_slice(&[0x40, 0]);
    bytes[23] = 6;
    bytes[46] = 0x50;
    let header = [1, 1, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0];
    let mut from = Rig::new(FROM_GUEST, 8, all_features());
    from.send(BUFFERS, header, &bytes);
    let got = from.receive().remove(0);
    assert_eq!(got.bytes(), bytes);
    let gso = Gso { kind: GsoKind::TcpV4, size: 1448.try_into().unwrap(), ecn: false };
    let expected = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: Some(gso) };
    assert_eq!(got.offload(), expected);

    let mut to = Rig::new(TO_GUEST, 64, all_features());
    for index in 0..32 {
        to.ring.post(&to.ram, &[(BUFFERS + index * 1536, 1536, WRITE)]);
    }
    to.ring.show(&to.ram);
    assert_eq!(to.queue.deliver(&[got], &to.counters), Some(1));
    let told = to.ram.read(BUFFERS, 12);
    assert_eq!(told[..10], header[..10]);
    assert_eq!(told[10], 14, "buffers");
    assert_eq!(to.ram.read(BUFFERS + 12, 1524), bytes[..1524]);
    assert_eq!(to.ram.read(BUFFERS + 13 * 1536, 44), bytes[19_956..]);
}

#[test]
fn super_frames_of_many_segments_end_a_batch() {
    let mut bytes = frame(30_000, 0);
    bytes[12..14].copy_from_slice(&[0x08, 0]);
    bytes[14] = 0x45;
    bytes[20..22].copy_from_slice(&[0x40, 0]);
    bytes[23] = 6;
    bytes[46] = 0x50;
    for (size, batches) in [(48, [7, 1]), (1448, [8, 0])] {
        let mut from = Rig::new(FROM_GUEST, 16, all_features());
        let header = [1, 1, 54, 0, size as u8, (size >> 8) as u8, 34, 0, 16, 0, 0, 0];
        from.ram.write(BUFFERS, &[&header[..], &bytes].concat());
        for _ in 0..8 {
            from.ring.post(&from.ram, &[(BUFFERS, 30_012, 0)]);
        }
        from.ring.show(&from.ram);
        assert_eq!(batches.map(|_| from.receive().len()), batches, "segments of {size}");
        assert_eq!(from.queue.sign().state(), QueueState::Running);
    }
}

#[test]
fn interrupts_are_coalesced_and_asked_for() {
    for features in BOTH {
        let mut rig = Rig::new(TO_GUEST, 64, features);
        for index in 0..64 {
            rig.ring.post(&rig.ram, &[(BUFFERS + index * 2048, 2048, WRITE)]);
        }
        rig.ring.show(&rig.ram);
        let bytes = frame(60, 0);
        rig.deliver(&[&bytes[..]; 8]);
        assert_eq!(rig.calls(), 1, "one for a batch");
        rig.ring.set_flags(&rig.ram, 1);
        rig.deliver(&[&bytes[..]; 8]);
        assert_eq!(rig.calls(), 0, "none where none is wanted");
        assert_eq!(rig.counted().notifications, 1);
    }
}

#[test]
fn who_sends_is_notified_when_that_is_asked_for() {
    for features in BOTH {
        let mut rig = Rig::new(FROM_GUEST, 64, features);
        for number in 0..2 {
            for index in 0..8 {
                rig.send(BUFFERS + (number * 8 + index) * 2048, [0; 12], &frame(60, 0));
            }
            assert_eq!(rig.receive().len(), 8);
            assert_eq!(rig.calls(), 0, "a batch says nothing by itself");
        }
        rig.queue.notify(&rig.counters);
        assert_eq!(rig.calls(), 1, "one for both");
        rig.queue.notify(&rig.counters);
        assert_eq!(rig.calls(), 0, "and no more");
        rig.send(BUFFERS, [0; 12], &[0; 3]);
        assert_eq!(rig.receive().len(), 0);
        assert_eq!(rig.calls(), 1, "nobody but the queue knows of a frame that is none");
    }
}

#[test]
fn interrupts_by_index_come_when_the_index_is_passed() {
    let mut rig = Rig::new(TO_GUEST, 64, FEATURES | bit::EVENT_IDX);
    for index in 0..64 {
        rig.ring.post(&rig.ram, &[(BUFFERS + index * 2048, 2048, WRITE)]);
    }
    rig.ring.show(&rig.ram);
    let bytes = frame(60, 0);
    rig.deliver(&[&bytes]);
    assert_eq!(rig.calls(), 1, "the first");
    rig.ring.set_used_event(&rig.ram, 10);
    rig.deliver(&[&bytes[..]; 9]);
    assert_eq!(rig.calls(), 0, "index 10 is not passed yet");
    rig.deliver(&[&bytes]);
    assert_eq!(rig.calls(), 1, "now it is");
    rig.deliver(&[&bytes]);
    assert_eq!(rig.calls(), 0, "once");
}

#[test]
fn kicks_are_asked_for_before_sleeping_only() {
    use crate::vhost::notify::EventFd;
    use crate::vhost::queue::Kick;
    for features in [FEATURES, FEATURES | bit::EVENT_IDX] {
        let mut rig = Rig::new(FROM_GUEST, 8, features);
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let event = EventFd::from_peer(kick.try_clone().unwrap()).unwrap();
        rig.queue.set_kick(Kick::Event(event), &rig.counters).unwrap();
        let has_event = features & bit::EVENT_IDX != 0;
        rig.send(BUFFERS, [0; 12], &frame(60, 0));
        assert_eq!(rig.receive().len(), 1);
        assert!(rig.queue.arm(), "nothing is there");
        if has_event {
            assert_eq!(rig.ring.available_event(&rig.ram), 1);
        } else {
            assert_eq!(rig.ring.device_flags(&rig.ram), 0);
        }
        rig.queue.disarm();
        assert_eq!(rig.ring.device_flags(&rig.ram), u16::from(!has_event));
        rig.send(BUFFERS, [0; 12], &frame(60, 0));
        assert!(!rig.queue.arm(), "something came in between");
    }
}

#[test]
fn memory_in_several_regions_is_one() {
    // Two regions that follow each other in the guest, from two files.
    let mut memory = GuestMemory::default();
    for (index, user) in [0x10_0000_u64, 0x90_0000].into_iter().enumerate() {
        let file = memfd_create("part", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x3000).unwrap();
        let at = RegionAddress { guest: 0x1000 + 0x2000 * index as u64, size: 0x2000, user, offset: 0x800 };
        memory = memory.with(at, &file).unwrap();
    }
    let bytes = frame(0x1000, 9);
    memory.write(0x2800, &bytes).unwrap();
    let mut got = vec![0; 0x1000];
    memory.read(0x2800, &mut got).unwrap();
    assert_eq!(got, bytes);
    assert!(memory.read(0x4800, &mut got).is_err(), "past the end");
    assert!(memory.read(0x800, &mut got).is_err(), "before the beginning");
    assert!(memory.read(u64::MAX - 10, &mut got).is_err(), "round the corner");
    assert!(memory.guest_address(0x10_1ff0, 0x20).is_none(), "rings are in one region");
}

#[test]
fn huge_pages_are_mapped_and_may_be_missing() {
    // None may be reserved on this machine: then touching one is as if the file had shrunk.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags).unwrap();
    ftruncate(&file, 4 << 20).unwrap();
    let at = RegionAddress { guest: 0, size: 3 << 20, user: 0x1000, offset: 1 << 20 };
    let memory = GuestMemory::default().with(at, &file).unwrap();
    let mut bytes = [1; 64];
    memory.read((3 << 20) - 64, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64]);
    memory.write(0, &bytes).unwrap();
    assert!(memory.read((3 << 20) - 63, &mut bytes).is_err());
}

#[test]
fn everything_written_is_logged() {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    let first_page = GUEST_BASE >> 12;
    let bytes = (first_page + (RAM >> 12)) / 8 + 1;
    ftruncate(&file, bytes).unwrap();
    let log = Arc::new(DirtyLog::new(&file, 0, bytes).unwrap());
    let mut rig = Rig::with(TO_GUEST, 64, FEATURES, |mut common| {
        common.log = Some(log);
        common
    });
    let addresses = RingAddresses { log: Some(rig.ring.used), ..rig.addresses() };
    rig.queue.set_addresses(addresses, &rig.counters).unwrap();
    // One buffer over a page's end, a chain elsewhere.
    rig.ring.post(&rig.ram, &[(BUFFERS + 0xfc0, 200, WRITE)]);
    rig.ring.post(&rig.ram, &[(BUFFERS + 0x8000, 40, WRITE), (BUFFERS + 0xa000, 100, WRITE)]);
    rig.ring.show(&rig.ram);
    let bits = Mapping::new(&file, 0, bytes).unwrap();
    let dirty = || -> Vec<u64> {
        let is_set = |page: u64| {
            let byte = bits.atomic_u8((page / 8) as usize).unwrap();
            byte.load(std::sync::atomic::Ordering::Relaxed) & (1 << (page % 8)) != 0
        };
        (0..bytes * 8).filter(|page| is_set(*page)).map(|page| page - first_page).collect()
    };
    let used = (rig.ring.used - GUEST_BASE) >> 12;
    assert_eq!(rig.deliver(&[&frame(100, 0)]), Some(1));
    assert_eq!(dirty(), [used, 16, 17]);
    assert_eq!(rig.deliver(&[&frame(100, 0)]), Some(1));
    assert_eq!(dirty(), [used, 16, 17, 24, 26]);
}

#[test]
fn a_change_in_the_middle_loses_nothing() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
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
                assert_eq!(base, u32::from(turn));
                rig.queue.set_base(base, &rig.counters).unwrap();
                rig.queue.set_kick(crate::vhost::queue::Kick::Polled, &rig.counters).unwrap();
            }
        }
        let got = rig.receive();
        assert_eq!(got.len(), 1, "turn {turn}");
        assert_eq!(got[0].bytes(), frame(60, turn));
    }
}

#[test]
fn a_larger_ring_takes_the_place_of_a_smaller() {
    let mut rig = Rig::new(FROM_GUEST, 8, FEATURES);
    rig.send(BUFFERS, [0; 12], &frame(60, 1));
    assert_eq!(rig.receive().len(), 1);
    rig.queue.stop(&rig.counters);
    rig.ring = DriverRing::new(256, GUEST_BASE + 0x2000);
    rig.set_up();
    for turn in 0..30 {
        rig.send(BUFFERS + turn * 128, [0; 12], &frame(60, turn as u8));
    }
    assert_eq!(rig.receive().len(), 30);
}

#[test]
fn a_guest_has_memory_of_its_own() {
    let (one, other) = (GuestRam::new(4096).unwrap(), GuestRam::new(4096).unwrap());
    one.write(GUEST_BASE, b"secret");
    assert_eq!(other.read(GUEST_BASE, 6), [0; 6]);
}
