use std::num::NonZeroU16;
use std::sync::Arc;

use super::*;

fn region() -> Arc<Region> {
    Region::new(RegionLayout { small: 300, large: 6 }).expect("memory")
}

#[test]
fn every_chunk_is_given_out_once_and_comes_home() {
    let region = region();
    let mut pool = Pool::new(&region);
    let mut frames = Vec::new();
    for number in 0u32.. {
        let Some(mut frame) = pool.take(100) else { break };
        assert!(frame.append(&number.to_le_bytes()));
        frames.push(frame);
    }
    assert_eq!(frames.len(), 300);
    assert_eq!(region.outstanding(), 300);
    for (number, frame) in (0u32..).zip(&frames) {
        assert_eq!(frame.bytes(), number.to_le_bytes(), "two frames share their bytes");
    }
    // By any pool of the region, on any thread, or dropped.
    let rest = frames.split_off(100);
    let other = Arc::clone(&region);
    std::thread::spawn(move || {
        let mut pool = Pool::new(&other);
        rest.into_iter().for_each(|frame| pool.give(frame));
    })
    .join()
    .expect("it gives all back");
    assert_eq!(region.outstanding(), 100);
    frames.truncate(50);
    assert_eq!(region.outstanding(), 50);
    frames.into_iter().for_each(|frame| pool.give(frame));
    assert_eq!(region.outstanding(), 0);
    drop(pool);
    assert_eq!(region.outstanding(), 0);
    let mut pool = Pool::new(&region);
    let all: Vec<_> = std::iter::from_fn(|| pool.take(1)).take(1_000).collect();
    assert_eq!(all.len(), 300);
}

#[test]
fn a_frame_of_another_region_goes_home() {
    let (one, two) = (region(), region());
    let (mut pool, mut other) = (Pool::new(&one), Pool::new(&two));
    let frame = pool.take(1).expect("a chunk");
    other.give(frame);
    assert_eq!((one.outstanding(), two.outstanding()), (0, 0));
}

#[test]
fn super_frames_fit_and_longer_ones_do_not() {
    let region = region();
    let mut pool = Pool::new(&region);
    let frame = pool.copy(&[7; 65_535 + 14 + 8]).expect("a large chunk");
    assert_eq!(frame.bytes(), [7; 65_557]);
    assert!(pool.take(LARGE_CHUNK).is_none());
    let held: Vec<_> = std::iter::from_fn(|| pool.take(40_000)).take(10).collect();
    assert_eq!(held.len(), 5, "the sixth is in use");
}

#[test]
fn bytes_are_inserted_and_removed_behind_the_addresses() {
    let region = region();
    let mut pool = Pool::new(&region);
    let bytes: Vec<u8> = (0..40).collect();
    let mut frame = pool.copy(&bytes).expect("a chunk");
    let partial = |start| Offload { checksum: Checksum::Partial { start, offset: 2 }, gso: None };
    frame.set_offload(partial(20)).expect("it fits");
    assert!(frame.insert(12, [0xaa, 0xbb, 0xcc, 0xdd]));
    assert_eq!(frame.bytes(), [&bytes[..12], &[0xaa, 0xbb, 0xcc, 0xdd], &bytes[12..]].concat());
    assert_eq!(frame.offload(), partial(24));
    assert!(frame.remove::<4>(12));
    assert_eq!(frame.bytes(), bytes);
    assert_eq!(frame.offload(), partial(20));
    assert!(!frame.remove::<4>(38));
    assert!(!frame.insert(41, [0; 4]));
    assert_eq!(frame.bytes(), bytes);
    // As many tags as there is headroom for, and not one more.
    assert_eq!((0..100).take_while(|_| frame.insert(12, [1; 4])).count(), HEADROOM / 4);
    assert_eq!(frame.len(), 40 + HEADROOM);
}

#[test]
fn the_room_ends_with_the_chunk() {
    let region = region();
    let mut pool = Pool::new(&region);
    let mut frame = pool.take(1).expect("a chunk");
    assert_eq!(frame.room(), SMALL_CHUNK - HEADROOM);
    assert!(!frame.append(&[0; SMALL_CHUNK]));
    assert!(frame.is_empty());
    frame.spare_mut().fill(9);
    frame.advance(usize::MAX / 2);
    assert_eq!(frame.len(), SMALL_CHUNK - HEADROOM);
    assert_eq!(frame.room(), 0);
    frame.truncate(3);
    assert_eq!(frame.bytes(), [9; 3]);
}

#[test]
fn lies_about_offloads_are_refused() {
    let region = region();
    let mut pool = Pool::new(&region);
    let mut frame = pool.copy(&[0; 60]).expect("a chunk");
    let gso = Some(Gso { kind: GsoKind::TcpV4, size: NonZeroU16::MIN, ecn: false });
    let partial = Checksum::Partial { start: 34, offset: 16 };
    for checksum in [
        Checksum::Partial { start: 34, offset: 25 },
        Checksum::Partial { start: 60, offset: 0 },
        Checksum::Partial { start: u16::MAX, offset: u16::MAX },
    ] {
        assert!(matches!(
            frame.set_offload(Offload { checksum, gso: None }),
            Err(OffloadError::ChecksumOutside { length: 60, .. })
        ));
    }
    for checksum in [Checksum::Unverified, Checksum::Valid] {
        assert_eq!(frame.set_offload(Offload { checksum, gso }), Err(OffloadError::GsoWithoutChecksum));
    }
    assert_eq!(frame.offload(), Offload::default());
    frame.set_offload(Offload { checksum: partial, gso }).expect("it fits");
    assert!(!frame.offload().is_complete());
}

#[test]
fn what_is_lent_comes_back_once() {
    let region = region();
    let mut pool = Pool::new(&region);
    let mut lent = Lent::new(&region);
    let frame = pool.copy(&[1, 2, 3]).expect("a chunk");
    let address = lent.lend_frame(frame).expect("it is of the region");
    assert_eq!(address as usize % SMALL_CHUNK, HEADROOM);
    assert_eq!((lent.count(), region.outstanding()), (1, 1));
    assert!(lent.redeem_frame(address + SMALL_CHUNK as u64, 3).is_none(), "another was not lent");
    assert!(lent.redeem_frame(u64::MAX, 3).is_none());
    assert!(lent.redeem_frame(address, SMALL_CHUNK as u32).is_none(), "too long");
    let frame = lent.redeem_frame(address, 3).expect("it was lent");
    assert_eq!(frame.bytes(), [1, 2, 3]);
    assert!(lent.redeem_frame(address, 3).is_none(), "a second token");
    pool.give(frame);
    let large = pool.take(10_000).expect("a chunk");
    assert!(lent.lend_frame(large).is_err());
    let other = Region::new(RegionLayout { small: 10, large: 0 }).expect("memory");
    assert!(lent.lend_frame(Pool::new(&other).take(1).expect("a chunk")).is_err());
    for _ in 0..100 {
        lent.lend_frame(pool.take(1).expect("a chunk")).expect("it is of the region");
    }
    assert_eq!(region.outstanding(), 100);
    drop(lent);
    assert_eq!(region.outstanding(), 0);
    let weak = Arc::downgrade(&region);
    drop((region, pool));
    assert!(weak.upgrade().is_none(), "every share in the region has come back");
}
