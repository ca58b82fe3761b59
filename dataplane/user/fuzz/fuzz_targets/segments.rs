#![no_main]
//! Offloads in software: the input is what a guest says of a frame, and the frame, which is cut, or whose checksum is filled in.

use std::cell::RefCell;
use std::num::NonZeroU16;

use libfuzzer_sys::fuzz_target;
use sluice_user::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool, Region, RegionLayout};
use sluice_user::offload::{SEGMENTS_MAX, Unfit, fill_checksum, segment};

thread_local!(static POOL: RefCell<Pool> = RefCell::new(pool()));

fn pool() -> Pool {
    Pool::new(&Region::new(RegionLayout { small: 2 * SEGMENTS_MAX as u32, large: 8 }).expect("memory"))
}

fuzz_target!(|bytes: &[u8]| {
    let [kind, start, offset, size_low, size_high, repeat, rest @ ..] = bytes else { return };
    POOL.with_borrow_mut(|pool| {
        // A few bytes can be a long frame.
        let Some(mut frame) = pool.take(rest.len() * (1 + usize::from(repeat % 64))) else { return };
        for _ in 0..=repeat % 64 {
            assert!(frame.append(rest), "there is room");
        }
        let checksum = Checksum::Partial { start: u16::from(*start), offset: u16::from(*offset) };
        let kinds = [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::Udp];
        let size = NonZeroU16::new(u16::from_le_bytes([*size_low, *size_high]));
        let gso = size.map(|size| Gso { kind: kinds[usize::from(kind % 3)], size, ecn: kind & 128 != 0 });
        if frame.set_offload(Offload { checksum, gso }).is_ok() {
            match gso {
                Some(gso) => cut(pool, &frame, gso),
                None => {
                    let length = frame.len();
                    fill_checksum(&mut frame);
                    assert!(frame.offload().is_complete() && frame.len() == length);
                }
            }
        }
        pool.give(frame);
        assert_eq!(pool.region().outstanding(), 0);
    });
});

/// Segments are complete, no longer than was asked for, and have the payload between them, in order.
fn cut(pool: &mut Pool, frame: &Frame, gso: Gso) {
    let mut segments = Vec::new();
    match segment(pool, frame, &mut |_, segment| segments.push(segment)) {
        Ok(()) => {
            let size = usize::from(gso.size.get());
            assert!(!segments.is_empty() && segments.len() <= SEGMENTS_MAX);
            let total: usize = segments.iter().map(Frame::len).sum();
            // Each has a copy of the headers.
            let headers = (total - frame.len()).checked_div(segments.len() - 1);
            let headers = headers.unwrap_or_else(|| frame.len().saturating_sub(size));
            let mut at = headers;
            for (index, segment) in segments.iter().enumerate() {
                assert!(segment.offload().is_complete());
                if segments.len() > 1 {
                    let payload = &segment.bytes()[headers..];
                    assert!(payload.len() == size || index + 1 == segments.len(), "only the last is short");
                    assert_eq!(payload, &frame.bytes()[at..at + payload.len()]);
                    at += payload.len();
                }
            }
            assert!(segments.len() == 1 || at == frame.len());
        }
        Err(error) => assert!(segments.is_empty() || error == Unfit::Memory),
    }
    segments.into_iter().for_each(|segment| pool.give(segment));
}
