use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{FDB_MAX, FdbKey, Vlan};
use sluice_policy::config::{
    AclAction, AclMatch, AclRule, Attachment, Config, Hook, Policy, Rate, Switch, Vnic,
};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings, Image};
use sluice_policy::lower::{assign_ids, lower, ports};
use sluice_policy::net::MacAddr;

mod flows;

use super::fdb::{Fdb, FdbCopies, Learnt};
use super::*;
use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool, Region, RegionLayout};
use crate::memory::{MemoryPort, link};
use crate::port::{Accepts, BATCH, Batch, Receive as _};

const SECOND: u64 = 1_000_000_000;

pub(crate) fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

fn vnic(number: u8, policy: Policy) -> Vnic {
    let name = format!("vm{number}");
    Vnic {
        attach: Attachment::Tap(name.clone()),
        name,
        switch: "blue".into(),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr(mac(number)),
        extra_macs: Vec::new(),
        sriov: None,
        up: true,
        policy,
    }
}

/// vNICs on one switch, from number 1 on; and their ports' ids.
pub(crate) fn image(policies: Vec<Policy>) -> (Image, Vec<u32>) {
    let vnics: Vec<Vnic> = (1..).zip(policies).map(|(number, policy)| vnic(number, policy)).collect();
    let config = Config {
        switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
        acl_groups: Vec::new(),
        vnics,
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let bindings: Bindings = (100..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false }))
        .collect();
    let image = lower(&config, &ids, &bindings).expect("an image");
    let numbers =
        (1..=config.vnics.len()).map(|number| ids.ports.get(&format!("vnic/vm{number}")).expect("a number"));
    (image, numbers.collect())
}

/// An engine, its processor, and what is at the far ends of its ports.
struct Bench {
    engine: Engine,
    processor: Processor,
    region: Arc<Region>,
    ports: Vec<u32>,
    ends: BTreeMap<u32, MemoryPort>,
}

impl Bench {
    fn new(policies: Vec<Policy>, accepts: &[Accepts]) -> Bench {
        Bench::with_memory(policies, accepts, RegionLayout { small: 512, large: 16 })
    }

    fn with_memory(policies: Vec<Policy>, accepts: &[Accepts], layout: RegionLayout) -> Bench {
        let region = Region::new(layout).expect("memory");
        let engine = Engine::new();
        let processor = Processor::new(&engine, &region);
        let (image, ports) = image(policies);
        engine.apply(image);
        let mut ends = BTreeMap::new();
        for (port, accepts) in ports.iter().zip(accepts) {
            let (near, far) = link(64, [Accepts::ALL, *accepts]).expect("a link");
            engine.attach(*port, vec![Box::new(near.transmit)]);
            ends.insert(*port, far);
        }
        Bench { engine, processor, region, ports, ends }
    }

    fn pool(&mut self) -> &mut Pool {
        self.processor.pool()
    }

    fn frame(&mut self, to: [u8; 6], from: [u8; 6]) -> Frame {
        self.pool().copy(&plain(to, from)).expect("memory")
    }

    fn process(&mut self, ingress: u32, frames: Vec<Frame>, now: u64) {
        let mut batch = Batch::new();
        frames.into_iter().for_each(|frame| batch.push(frame));
        self.processor.process(ingress, &mut batch, now);
        assert!(batch.is_empty());
    }

    fn received(&mut self, port: u32) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut batch = Batch::new();
        loop {
            self.ends.get_mut(&port).expect("an end").receive.receive(self.processor.pool(), &mut batch);
            if batch.is_empty() {
                return frames;
            }
            frames.extend(batch.drain());
        }
    }
}

pub(crate) fn plain(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    [&to[..], &from, &[0x12, 0x34], &[7; 50]].concat()
}

/// 5 000 bytes of TCP over IPv4 as one frame, to be cut to 1 000.
pub(crate) fn super_frame(pool: &mut Pool, to: [u8; 6], from: [u8; 6]) -> Option<Frame> {
    let mut bytes = [&to[..], &from, &[8, 0, 0x45, 0]].concat();
    bytes.extend((5040u16).to_be_bytes());
    bytes.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    bytes.extend([9; 5000]);
    let mut frame = pool.copy(&bytes)?;
    let gso = Gso { kind: GsoKind::TcpV4, size: NonZeroU16::new(1000).expect("not 0"), ecn: false };
    let checksum = Checksum::Partial { start: 34, offset: 16 };
    frame.set_offload(Offload { checksum, gso: Some(gso) }).expect("it fits");
    Some(frame)
}

#[test]
fn super_frames_go_whole_where_they_are_taken_and_are_cut_elsewhere() {
    let policies = vec![Policy::default(); 3];
    let mut bench = Bench::new(policies, &[Accepts::ALL, Accepts::ALL, Accepts::default()]);
    let [one, two, three] = bench.ports[..] else { panic!("three ports") };
    let frame = super_frame(bench.pool(), mac(2), mac(1)).expect("memory");
    let offload = frame.offload();
    bench.process(one, vec![frame], SECOND);
    let received = bench.received(two);
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].len(), received[0].offload()), (5054, offload));
    drop(received);
    // One before and one behind, which keep their places.
    let frames = vec![
        bench.frame(mac(3), mac(1)),
        super_frame(bench.pool(), mac(3), mac(1)).expect("memory"),
        bench.frame(mac(3), mac(1)),
    ];
    bench.process(one, frames, SECOND);
    let received = bench.received(three);
    let lengths: Vec<usize> = received.iter().map(Frame::len).collect();
    assert_eq!(lengths, [64, 1054, 1054, 1054, 1054, 1054, 64]);
    assert!(received.iter().all(|frame| frame.offload().is_complete()));
    drop(received);
    let stats = bench.engine.port_stats(three);
    assert_eq!((stats.tx_packets, stats.tx_bytes), (3, 64 + 5054 + 64), "a super-frame counts as one");
    // Flooded, each gets what it takes.
    let frame = super_frame(bench.pool(), [0xff; 6], mac(1)).expect("memory");
    bench.process(one, vec![frame], SECOND);
    assert_eq!((bench.received(two).len(), bench.received(three).len()), (1, 5));
    assert_eq!(bench.region.outstanding(), 0);
}

/// 50 bytes of an IPv4 packet of this protocol, behind as many tags; zeros where nothing else must be.
fn ipv4(to: [u8; 6], from: [u8; 6], tags: usize, proto: u8) -> Vec<u8> {
    let mut bytes = [&to[..], &from].concat();
    bytes.extend([0x81, 0, 0, 0].repeat(tags));
    bytes.extend([8, 0, 0x45, 0, 0, 70, 0, 1, 0, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    match proto {
        6 => bytes.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]),
        17 => bytes.extend([0, 80, 0, 81, 0, 50, 0, 0]),
        _ => bytes.extend([0; 8]),
    }
    bytes.resize(14 + 4 * tags + 70, 7);
    bytes
}

#[test]
fn a_partial_checksum_is_filled_in_only_where_it_must_be() {
    let mut bench = Bench::new(vec![Policy::default(); 3], &[Accepts::ALL, Accepts::ALL, Accepts::default()]);
    let [one, two, three] = bench.ports[..] else { panic!("three ports") };
    for (to, port, is_complete) in [(mac(2), two, false), (mac(3), three, true)] {
        let mut frame = bench.pool().copy(&ipv4(to, mac(1), 0, 17)).expect("memory");
        let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, gso: None };
        frame.set_offload(offload).expect("it fits");
        bench.process(one, vec![frame], SECOND);
        let received = bench.received(port);
        assert_eq!(received[0].offload().is_complete(), is_complete);
        assert_eq!(received[0].bytes()[40..42] != [0, 0], is_complete);
    }
}

#[test]
fn a_checksum_that_would_change_what_was_decided_on_is_refused() {
    let cases: [(&str, usize, u8, u16, u16, bool); 19] = [
        ("the source address", 0, 17, 14, 12, false),
        ("the destination address", 0, 17, 14, 16, false),
        ("the protocol", 0, 17, 14, 9, false),
        ("a tag", 1, 17, 14, 0, false),
        ("ports of UDP", 0, 17, 34, 0, false),
        ("the length of UDP", 0, 17, 34, 4, false),
        ("half of the checksum of UDP", 0, 17, 34, 7, false),
        ("the checksum of UDP", 0, 17, 34, 6, true),
        ("the checksum of UDP behind a tag", 1, 17, 38, 6, true),
        ("a checksum in a tunnel", 0, 17, 64, 10, true),
        ("just behind UDP", 0, 17, 34, 8, true),
        ("ports of TCP", 0, 6, 34, 2, false),
        ("flags of TCP", 0, 6, 34, 13, false),
        ("the checksum of TCP", 0, 6, 34, 16, true),
        ("the checksum of TCP, summed from elsewhere", 0, 6, 14, 36, true),
        ("half of the checksum of TCP", 0, 6, 34, 17, false),
        ("behind the header of TCP", 0, 6, 34, 20, true),
        ("ICMP", 0, 1, 34, 2, false),
        ("some protocol's first bytes", 0, 47, 34, 6, false),
    ];
    let mut bench = Bench::new(vec![Policy::default(); 3], &[Accepts::default(); 3]);
    let [one, two, three] = bench.ports[..] else { panic!("three ports") };
    let mut refused = 0;
    for (what, tags, proto, start, offset, may) in cases {
        for to in [mac(2), [0xff; 6]] {
            let bytes = ipv4(to, mac(1), tags, proto);
            let mut frame = bench.pool().copy(&bytes).expect("memory");
            let offload = Offload { checksum: Checksum::Partial { start, offset }, gso: None };
            frame.set_offload(offload).expect("it fits");
            bench.process(one, vec![frame], SECOND);
            bench.received(three);
            assert_eq!(bench.received(two).len(), usize::from(may), "{what}");
            refused += u64::from(!may);
            assert_eq!(bench.engine.drops(one, DropReason::MalformedLength), refused, "{what}");
        }
    }
    // Without IP, and in a later fragment, nothing says where a transport header is.
    let mut fragment = ipv4(mac(2), mac(1), 0, 17);
    fragment[21] = 9;
    for bytes in [plain(mac(2), mac(1)), fragment] {
        let mut frame = bench.pool().copy(&bytes).expect("memory");
        let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, gso: None };
        frame.set_offload(offload).expect("it fits");
        bench.process(one, vec![frame], SECOND);
        assert!(bench.received(two).is_empty());
    }
    assert_eq!(bench.engine.drops(one, DropReason::MalformedLength), refused + 2);
    assert_eq!(bench.region.outstanding(), 0);
}

#[test]
fn a_super_frame_is_cut_only_at_the_headers_that_were_decided_on() {
    let mut bench = Bench::new(vec![Policy::default(); 2], &[Accepts::ALL; 2]);
    let [one, two] = bench.ports[..] else { panic!("two ports") };
    let honest = super_frame(bench.pool(), mac(2), mac(1)).expect("memory");
    let gso = honest.offload().gso;
    let mut elsewhere = bench.pool().copy(honest.bytes()).expect("memory");
    let checksum = Checksum::Partial { start: 60, offset: 16 };
    elsewhere.set_offload(Offload { checksum, gso }).expect("it fits");
    bench.process(one, vec![elsewhere, honest], SECOND);
    assert_eq!(bench.received(two).len(), 1);
    assert_eq!(bench.engine.drops(one, DropReason::MalformedLength), 1);
}

/// Takes nothing but plain frames, and counts them.
#[derive(Debug)]
struct Counting(Arc<AtomicUsize>);

impl Transmit for Counting {
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let sent = batch.len();
        self.0.fetch_add(sent, Ordering::Relaxed);
        batch.give(pool);
        sent
    }

    fn accepts(&self) -> Accepts {
        Accepts::default()
    }
}

#[test]
fn a_flood_of_super_frames_is_cut_for_so_many_ports_only() {
    let copies = RegionLayout { small: 512, large: 8 * BATCH as u32 };
    let mut bench = Bench::with_memory(vec![Policy::default(); 9], &[], copies);
    let made = Arc::new(AtomicUsize::new(0));
    for port in &bench.ports {
        bench.engine.attach(*port, vec![Box::new(Counting(Arc::clone(&made)))]);
    }
    let frame = |bench: &mut Bench, to| {
        let mut frame = super_frame(bench.pool(), to, mac(1)).expect("memory");
        let offload = frame.offload();
        let gso = offload.gso.map(|gso| Gso { size: NonZeroU16::new(48).expect("not 0"), ..gso });
        frame.set_offload(Offload { gso, ..offload }).expect("it fits");
        frame
    };
    let one = bench.ports[0];
    let frames = (0..BATCH).map(|_| frame(&mut bench, [0xff; 6])).collect();
    bench.process(one, frames, SECOND);
    let flooded = made.swap(0, Ordering::Relaxed);
    assert!((15_000..=16_384).contains(&flooded), "{flooded} segments");
    let failed = |bench: &Bench| -> u64 {
        bench.ports.iter().map(|port| bench.engine.drops(*port, DropReason::EgressFailed)).sum()
    };
    assert_eq!(flooded / 105 + failed(&bench) as usize, 8 * BATCH, "each copy is sent or counted");
    // For one port there is room.
    let before = failed(&bench);
    let frames = (0..BATCH).map(|_| frame(&mut bench, mac(2))).collect();
    bench.process(one, frames, SECOND);
    assert_eq!((made.load(Ordering::Relaxed), failed(&bench)), (105 * BATCH, before));
    assert_eq!(bench.region.outstanding(), 0);
}

#[test]
fn what_a_full_queue_refuses_is_counted_and_not_lost_from_the_books() {
    let mut bench = Bench::new(vec![Policy::default(); 2], &[Accepts::ALL; 2]);
    let [one, two] = bench.ports[..] else { panic!("two ports") };
    for _ in 0..4 {
        let frames = (0..BATCH).map(|_| bench.frame(mac(2), mac(1))).collect();
        bench.process(one, frames, SECOND);
    }
    assert_eq!(bench.engine.drops(two, DropReason::EgressFailed), 4 * BATCH as u64 - 64);
    let stats = bench.engine.port_stats(two);
    assert_eq!((stats.tx_packets, stats.tx_bytes), (64, 64 * 64));
    assert_eq!(bench.engine.port_stats(one).rx_packets, 4 * BATCH as u64);
    assert_eq!(bench.region.outstanding(), 64);
    bench.engine.detach(two);
    let frame = bench.frame(mac(2), mac(1));
    bench.process(one, vec![frame], SECOND);
    assert_eq!(bench.engine.drops(two, DropReason::DestinationDown), 1);
    assert_eq!(bench.received(two).len(), 64, "what was sent before arrives");
    bench.ends.clear();
    assert_eq!(bench.region.outstanding(), 0);
}

#[test]
fn a_detached_port_is_let_go_of_by_those_who_have_nothing_to_do() {
    for rests in [false, true] {
        let mut bench = Bench::new(vec![Policy::default(); 2], &[Accepts::ALL; 2]);
        let [one, two] = bench.ports[..] else { panic!("two ports") };
        let frame = bench.frame(mac(2), mac(1));
        bench.process(one, vec![frame], SECOND);
        if rests {
            bench.processor.rest();
        }
        bench.engine.detach(two);
        if !rests {
            bench.processor.idle();
        }
        assert!(bench.ends[&two].receive.is_abandoned());
        assert!(!bench.ends[&one].receive.is_abandoned());
    }
}

#[test]
fn a_new_policy_holds_from_the_next_batch_on() {
    let mut bench = Bench::new(vec![Policy::default(); 2], &[Accepts::ALL; 2]);
    let [one, two] = bench.ports[..] else { panic!("two ports") };
    let mut deny = Policy::default();
    deny.acl.rules = vec![AclRule {
        priority: 1,
        direction: Direction::FromVm,
        matches: AclMatch { ethertype: Some(0x1234), ..AclMatch::default() },
        action: AclAction::Deny,
    }];
    let mut allow = deny.clone();
    allow.acl.rules[0].action = AclAction::Allow;
    for round in 0..6 {
        let policy = if round % 2 == 0 { &deny } else { &allow };
        bench.engine.apply(image(vec![policy.clone(), Policy::default()]).0);
        for _ in 0..2 {
            let frame = bench.frame(mac(2), mac(1));
            bench.process(one, vec![frame], SECOND);
        }
        assert_eq!(bench.received(two).len(), 2 * (round % 2), "round {round}");
    }
    assert_eq!(bench.engine.drops(one, DropReason::AclFromVm), 6);
    assert_eq!(bench.engine.port_stats(one).cache_misses, 6, "one for each epoch");
}

#[test]
fn workers_share_a_bucket_and_their_counters_outlive_them() {
    let rate = Some(Rate { bits_per_second: 8_000_000, burst_bytes: 6_400 });
    let policies = vec![Policy { rate_from_vm: rate, ..Policy::default() }, Policy::default()];
    let mut bench = Bench::new(policies, &[Accepts::ALL; 2]);
    let [one, two] = bench.ports[..] else { panic!("two ports") };
    let mut other = Processor::new(&bench.engine, &bench.region);
    let mut batch = Batch::new();
    for _ in 0..3 {
        let frames = (0..BATCH).map(|_| bench.frame(mac(2), mac(1))).collect();
        bench.process(one, frames, SECOND);
        for _ in 0..BATCH {
            batch.push(other.pool().copy(&plain(mac(2), mac(1))).expect("memory"));
        }
        other.process(one, &mut batch, SECOND);
        bench.received(two);
    }
    assert_eq!(bench.engine.port_stats(two).tx_packets, 100, "6 400 bytes of 64 each");
    drop(other);
    assert_eq!(bench.engine.port_stats(two).tx_packets, 100);
    assert_eq!(bench.engine.port_stats(one).rx_packets, 6 * BATCH as u64);
    assert_eq!(bench.engine.drops(one, DropReason::RateFromVm), 6 * BATCH as u64 - 100);
}

fn station(number: u32) -> FdbKey {
    let [a, b, c, d] = number.to_be_bytes();
    FdbKey { switch: 1, vlan: Vlan(0), mac: [2, 9, a, b, c, d] }
}

#[test]
fn the_fdb_is_bounded_and_its_copies_follow() {
    let fdb = Fdb::new();
    let (mut one, mut two) = (FdbCopies::new(), FdbCopies::new());
    assert_eq!(one.get(&fdb, &station(1), 10), None);
    assert_eq!(fdb.learn(&station(1), 5, 2, 10), Learnt::Yes);
    for copies in [&mut one, &mut two] {
        assert_eq!(copies.get(&fdb, &station(1), 10).map(|entry| entry.port), Some(5));
    }
    // Moved: all copies know at once.
    assert_eq!(fdb.learn(&station(1), 6, 2, 10), Learnt::Yes);
    assert_eq!(two.get(&fdb, &station(1), 10).map(|entry| entry.port), Some(6));
    // Refreshed: within a second.
    assert_eq!(fdb.learn(&station(1), 6, 2, 11), Learnt::Yes);
    assert_eq!(two.get(&fdb, &station(1), 11).map(|entry| entry.seen), Some(11));
    // The limit of a port, which the moved address does not count against any more.
    assert_eq!(fdb.learn(&station(2), 5, 2, 11), Learnt::Yes);
    assert_eq!(fdb.learn(&station(3), 5, 2, 11), Learnt::Yes);
    assert_eq!(fdb.learn(&station(4), 5, 2, 11), Learnt::Limited);
    assert_eq!(fdb.learn(&station(2), 5, 2, 12), Learnt::Yes, "known already");
    // Forgotten: all copies know at once.
    fdb.retain(|key, _| *key != station(1));
    assert_eq!(two.get(&fdb, &station(1), 11), None);
    assert_eq!(fdb.learn(&station(5), 6, 1, 11), Learnt::Yes);
    let mut number = 100;
    while fdb.learn(&station(number), 7, u32::MAX, 11) == Learnt::Yes {
        number += 1;
    }
    assert_eq!(fdb.learn(&station(number), 7, u32::MAX, 11), Learnt::Full);
    assert_eq!(fdb.entries().len(), FDB_MAX as usize);
    fdb.retain(|_, entry| entry.port != 7);
    let left: BTreeSet<u32> = fdb.entries().into_iter().map(|(_, entry)| entry.port).collect();
    assert_eq!(left, BTreeSet::from([5, 6]));
    assert_eq!(fdb.learn(&station(100), 7, 1, 11), Learnt::Yes);
}

#[test]
fn the_verdict_cache_holds_what_was_put_and_nothing_of_another_epoch() {
    use super::verdicts::{Question, Verdicts};
    use sluice_pipeline::tables::{AclKey, AclVerdict};
    let mut cache = Verdicts::new();
    let question = |number: u32| {
        let key = AclKey { src_port: number as u16, tcp_flags: (number >> 16) as u8, ..AclKey::default() };
        Question { key, ingress: 1, egress: 2 }
    };
    let answer = |number| [AclVerdict { counter: number, action: 1 }; 2];
    for number in 0..100_000 {
        let question = question(number);
        cache.put(question.place(), question, 7, answer(number));
        assert_eq!(cache.get(question.place(), &question, 7), Some(&answer(number)));
        assert_eq!(cache.get(question.place(), &question, 8), None);
    }
    let mut held = 0;
    for number in 0..100_000 {
        let question = question(number);
        if let Some(found) = cache.get(question.place(), &question, 7) {
            assert_eq!(*found, answer(number));
            held += 1;
        }
        for other in [Question { ingress: 3, ..question }, Question { egress: 3, ..question }] {
            assert_eq!(cache.get(other.place(), &other, 7), None);
        }
    }
    assert!(held > 16_000, "only {held} of 16 384 places are in use: the hash is poor");
    let new = question(1);
    cache.put(new.place(), new, 8, answer(1));
    assert_eq!(
        (0..100_000).filter(|&n| cache.get(question(n).place(), &question(n), 8).is_some()).count(),
        1
    );
}
