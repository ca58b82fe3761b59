use std::num::NonZeroU16;

use proptest::prelude::*;

use super::*;
use crate::frame::{Region, RegionLayout};

/// RFC 1071, word by word.
fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Whether an IP packet's checksums are right, found the slow way.
fn is_valid(packet: &[u8]) -> bool {
    let v6 = packet[0] >> 4 == 6;
    let (header, protocol, addresses) = if v6 {
        (40, packet[6], &packet[8..40])
    } else {
        let header = usize::from(packet[0] & 15) * 4;
        if slow_checksum(&packet[..header]) != 0 {
            return false;
        }
        (header, packet[9], &packet[12..20])
    };
    let rest = &packet[header..];
    let mut covered = addresses.to_vec();
    covered.extend((rest.len() as u32).to_be_bytes());
    covered.extend([0, 0, 0, protocol]);
    covered.extend(rest);
    slow_checksum(&covered) == 0
}

/// A super-frame, and where its network and transport headers are.
fn super_frame(v6: bool, tcp: bool, tags: usize, options: usize, payload: &[u8]) -> (Vec<u8>, usize, usize) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for _ in 0..tags {
        frame.extend([0x81, 0, 0, 5]);
    }
    frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let l3 = frame.len();
    let l4_header = if tcp { 20 + options * 4 } else { 8 };
    let l4_length = l4_header + payload.len();
    let protocol = if tcp { 6 } else { 17 };
    if v6 {
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((l4_length as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfc; 16]);
    } else {
        frame.extend([0x45, 0]);
        frame.extend(((20 + l4_length) as u16).to_be_bytes());
        frame.extend([0xff, 0xff, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let l4 = frame.len();
    if tcp {
        frame.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0, 0, 0, 0, 9]);
        frame.extend([((5 + options) << 4) as u8, 0x99, 1, 0, 0, 0, 0, 0]);
        frame.extend(vec![1; options * 4]);
    } else {
        frame.extend([0x12, 0x34, 0, 53]);
        frame.extend((l4_length as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(payload);
    (frame, l3, l4)
}

fn pool() -> Pool {
    Pool::new(&Region::new(RegionLayout { small: 1024, large: 64 }).expect("memory"))
}

fn offload(v6: bool, tcp: bool, l4: usize, size: u16) -> Offload {
    let kind = match (tcp, v6) {
        (true, false) => GsoKind::TcpV4,
        (true, true) => GsoKind::TcpV6,
        (false, _) => GsoKind::Udp,
    };
    let size = NonZeroU16::new(size).expect("a size");
    Offload {
        checksum: Checksum::Partial { start: l4 as u16, offset: if tcp { 16 } else { 6 } },
        gso: Some(Gso { kind, size, ecn: false }),
    }
}

proptest! {
    #[test]
    fn the_checksum_is_the_slow_one(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert_eq!(internet_checksum(&bytes), slow_checksum(&bytes).to_be_bytes());
    }

    #[test]
    fn segments_are_what_a_sender_without_offloads_would_have_sent(
        v6: bool,
        tcp: bool,
        tags in 0..3usize,
        options in 0..11usize,
        payload in proptest::collection::vec(any::<u8>(), 1..20_000),
        size in 100..9000u16,
    ) {
        let mut pool = pool();
        let (bytes, l3, l4) = super_frame(v6, tcp, tags, options, &payload);
        let mut frame = pool.copy(&bytes).expect("memory");
        frame.set_offload(offload(v6, tcp, l4, size)).expect("it fits");
        let mut segments = Vec::new();
        segment(&mut pool, &frame, &mut |_, segment| segments.push(segment)).expect("it can be cut");
        prop_assert_eq!(segments.len(), payload.len().div_ceil(usize::from(size)));
        let header = if tcp { 20 + options * 4 } else { 8 };
        let mut rest = &payload[..];
        for (index, segment) in segments.iter().enumerate() {
            let bytes = segment.bytes();
            let is_last = index + 1 == segments.len();
            prop_assert!(segment.offload().is_complete());
            prop_assert!(is_valid(&bytes[l3..]), "segment {} of {}", index, segments.len());
            let (part, after) = rest.split_at(rest.len().min(usize::from(size)));
            prop_assert_eq!(&bytes[l4 + header..], part);
            prop_assert_eq!(&bytes[..l3], &frame.bytes()[..l3]);
            let length = usize::from(be16(bytes, l3 + if v6 { 4 } else { 2 }).expect("a length"));
            prop_assert_eq!(length, bytes.len() - l3 - if v6 { 40 } else { 0 });
            if tcp {
                let sequence = u32::from_be_bytes(*bytes[l4 + 4..].first_chunk().expect("a number"));
                let before = payload.len() - rest.len();
                prop_assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(before as u32));
                let flags = 0x10 | if is_last { 0x09 } else { 0 } | if index == 0 { 0x80 } else { 0 };
                prop_assert_eq!(bytes[l4 + 13], flags);
                prop_assert_eq!(&bytes[l4 + 20..l4 + header], vec![1u8; options * 4]);
            } else {
                prop_assert_eq!(usize::from(be16(bytes, l4 + 4).expect("a length")), bytes.len() - l4);
            }
            if !v6 {
                prop_assert_eq!(be16(bytes, l3 + 4), Some(0xffffu16.wrapping_add(index as u16)));
            }
            rest = after;
        }
        prop_assert!(rest.is_empty());
        prop_assert_eq!(frame.bytes(), bytes);
    }

    /// Whatever a guest says, it is cut or refused; nothing is read or written outside, nothing panics.
    #[test]
    fn lies_are_refused(
        mut bytes in proptest::collection::vec(any::<u8>(), 14..300),
        start in 0..300u16,
        offset in 0..40u16,
        size in 1..2000u16,
        kind in 0..3,
        ethertype in 0..4,
        version in 0..3,
    ) {
        let ethertype: [u8; 2] = [[8, 0], [0x86, 0xdd], [0x81, 0], [0, 0]][ethertype as usize];
        bytes[12..14].copy_from_slice(&ethertype);
        if bytes.len() > 14 {
            bytes[14] = [0x45, 0x60, bytes[14]][version as usize];
        }
        let mut pool = pool();
        let mut frame = pool.copy(&bytes).expect("memory");
        let kind = [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::Udp][kind as usize];
        let gso = Some(Gso { kind, size: NonZeroU16::new(size).expect("not 0"), ecn: true });
        let checksum = Checksum::Partial { start, offset };
        if frame.set_offload(Offload { checksum, gso }).is_ok() {
            let _ = segment(&mut pool, &frame, &mut |pool, segment| pool.give(segment));
            if frame.set_offload(Offload { checksum, gso: None }).is_ok() {
                fill_checksum(&mut frame);
                prop_assert!(frame.offload().is_complete());
            }
        }
        drop(frame);
        prop_assert_eq!(pool.region().outstanding(), 0);
    }

    #[test]
    fn a_partial_checksum_is_filled_in(
        v6: bool,
        tcp: bool,
        tags in 0..3usize,
        payload in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut pool = pool();
        let (mut bytes, l3, l4) = super_frame(v6, tcp, tags, 0, &payload);
        let (protocol, offset) = if tcp { (6, 16) } else { (17, 6) };
        let addresses = if v6 { l3 + 8..l3 + 40 } else { l3 + 12..l3 + 20 };
        let mut pseudo = bytes[addresses].to_vec();
        pseudo.extend(((bytes.len() - l4) as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        bytes[l4 + offset..l4 + offset + 2].copy_from_slice(&(!slow_checksum(&pseudo)).to_be_bytes());
        if !v6 {
            let header = slow_checksum(&bytes[l3..l4]);
            bytes[l3 + 10..l3 + 12].copy_from_slice(&header.to_be_bytes());
        }
        let mut frame = pool.copy(&bytes).expect("memory");
        let checksum = Checksum::Partial { start: l4 as u16, offset: offset as u16 };
        frame.set_offload(Offload { checksum, gso: None }).expect("it fits");
        fill_checksum(&mut frame);
        prop_assert!(is_valid(&frame.bytes()[l3..]));
        prop_assert!(frame.offload().is_complete());
    }
}

#[test]
fn a_guest_cannot_ask_for_a_flood_of_segments() {
    let mut pool = pool();
    let (bytes, _, l4) = super_frame(false, true, 0, 0, &[0; 60_000]);
    let mut frame = pool.copy(&bytes).expect("memory");
    frame.set_offload(offload(false, true, l4, 1)).expect("it fits");
    let cut = segment(&mut pool, &frame, &mut |_, _| panic!("a segment was made"));
    assert_eq!(cut, Err(Unfit::Segments));
}

#[test]
fn a_guest_cannot_have_long_headers_copied_into_each_segment() {
    let mut pool = pool();
    for (between, may) in [(168, true), (176, false), (40_000, false)] {
        let (mut bytes, l3, l4) = super_frame(true, true, 0, 0, &[0; 9000]);
        bytes[l3 + 6] = 60;
        bytes.splice(l4..l4, vec![0; between]);
        let mut frame = pool.copy(&bytes).expect("memory");
        frame.set_offload(offload(true, true, l4 + between, 1000)).expect("it fits");
        let cut = segment(&mut pool, &frame, &mut |pool, segment| pool.give(segment));
        assert_eq!(cut, if may { Ok(()) } else { Err(Unfit::Headers) }, "{between} bytes between");
    }
}

#[test]
fn only_what_the_other_end_takes_is_sent_as_it_is() {
    let whole = Offload::default();
    let partial = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: None };
    let tso = offload(false, true, 34, 1448);
    let nothing = Accepts::default();
    let checksum = Accepts { checksum: true, ..nothing };
    let v6 = Accepts { tcp_v6: true, ..checksum };
    let v4 = Accepts { tcp_v4: true, ..checksum };
    for (accepts, wanted) in [
        (nothing, [true, false, false]),
        (checksum, [true, true, false]),
        (v6, [true, true, false]),
        (v4, [true, true, true]),
    ] {
        assert_eq!([whole, partial, tso].map(|offload| accepts.takes(&offload)), wanted, "{accepts:?}");
    }
    let with_ecn = Offload { gso: tso.gso.map(|gso| Gso { ecn: true, ..gso }), ..tso };
    assert!(!v4.takes(&with_ecn));
    assert!(Accepts::ALL.takes(&with_ecn));
}
