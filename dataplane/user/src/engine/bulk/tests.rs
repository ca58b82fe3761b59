use std::collections::BTreeMap;
use std::sync::Arc;

use sluice_pipeline::DropReason;
use sluice_policy::config::{Attachment, Config, Hook, Policy, Switch, Uplink, VhostMode, VhostUser, Vnic};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings, Image};
use sluice_policy::lower::{assign_ids, lower, ports, split};
use sluice_policy::net::MacAddr;

use super::super::tests::{mac, plain, super_frame};
use super::super::{Engine, Processor};
use super::BulkSenders;
use crate::frame::{Frame, Region, RegionLayout};
use crate::memory::{MemoryPort, link};
use crate::port::{Accepts, Batch, Receive as _};

const SECOND: u64 = 1_000_000_000;
/// Somebody outside.
const STATION: u8 = 99;

fn vnic(number: u8, attach: Attachment) -> Vnic {
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach,
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr(mac(number)),
        extra_macs: Vec::new(),
        sriov: None,
        up: true,
        policy: Policy::default(),
    }
}

/// The userspace engine's part of a host with an uplink, a guest with rings and one without, which may have others behind it if
/// there is to be no short cut.
fn image(has_short_cut: bool) -> (Image, Ids) {
    let uplink = Uplink {
        netdev: "up0".into(),
        hook: Hook::Xdp,
        full_checksums: true,
        trunk: Vec::new(),
        native: None,
        learn_limit: 100,
        up: true,
        attest: Vec::new(),
    };
    let rings = VhostUser { path: "/run/vm1".into(), mode: VhostMode::Server, queues: 1 };
    let mut other = vnic(2, Attachment::Tap("tap2".into()));
    other.policy.allow_spoofing = !has_short_cut;
    let config = Config {
        switches: vec![Switch {
            name: "blue".into(),
            uplink: Some(uplink),
            internal: None,
            ageing_seconds: 300,
        }],
        acl_groups: Vec::new(),
        vnics: vec![vnic(1, Attachment::VhostUser(rings)), other],
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let bindings: Bindings = (100..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, ..Binding::default() }))
        .collect();
    (split(&lower(&config, &ids, &bindings).expect("an image")).user, ids)
}

/// An engine with a guest, the trunk and, once attached, the uplink.
struct Bench {
    engine: Engine,
    processor: Processor,
    ids: Ids,
    ends: BTreeMap<u32, MemoryPort>,
    _region: Arc<Region>,
}

impl Bench {
    fn new() -> Bench {
        let region = Region::new(RegionLayout { small: 512, large: 16 }).expect("memory");
        let engine = Engine::new();
        let processor = Processor::new(&engine, &region);
        let (image, ids) = image(true);
        engine.apply(image);
        let mut bench = Bench { engine, processor, ids, ends: BTreeMap::new(), _region: region };
        bench.attach("vnic/vm1", Accepts::ALL);
        bench.attach("user/blue", Accepts::ALL);
        bench
    }

    fn id(&self, port: &str) -> u32 {
        self.ids.ports.get(port).expect("it has a number")
    }

    fn attach(&mut self, port: &str, accepts: Accepts) {
        let (near, far) = link(64, [Accepts::ALL, accepts]).expect("a link");
        self.engine.attach(self.id(port), vec![Box::new(near.transmit)]);
        self.ends.insert(self.id(port), far);
    }

    fn frame(&mut self, to: u8, from: u8) -> Frame {
        self.processor.pool().copy(&plain(mac(to), mac(from))).expect("memory")
    }

    /// A frame of TCP that is none of the long ones.
    fn segment(&mut self, to: u8, from: u8) -> Frame {
        let whole = super_frame(self.processor.pool(), mac(to), mac(from)).expect("memory");
        let mut bytes = whole.bytes()[..74].to_vec();
        bytes[16..18].copy_from_slice(&60u16.to_be_bytes());
        self.processor.pool().copy(&bytes).expect("memory")
    }

    /// Takes a frame from a port; answers how many left by the guest's port, the trunk and the uplink.
    fn pass(&mut self, port: &str, frame: Frame, now: u64) -> [usize; 3] {
        let mut batch = Batch::new();
        batch.push(frame);
        self.processor.process(self.id(port), &mut batch, now);
        ["vnic/vm1", "user/blue", "uplink/blue"].map(|port| {
            let id = self.id(port);
            let Some(end) = self.ends.get_mut(&id) else { return 0 };
            let mut batch = Batch::new();
            end.receive.receive(self.processor.pool(), &mut batch);
            let count = batch.len();
            batch.give(self.processor.pool());
            count
        })
    }

    fn hear_station(&mut self, now: u64) {
        let frame = self.frame(1, STATION);
        assert_eq!(self.pass("user/blue", frame, now), [1, 0, 0]);
    }
}

#[test]
fn what_was_learnt_behind_the_trunk_is_reached_by_the_uplink() {
    let mut bench = Bench::new();
    bench.hear_station(SECOND);
    let frame = bench.frame(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", frame, SECOND), [0, 1, 0], "there is no other way yet");
    bench.attach("uplink/blue", Accepts::default());
    let frame = bench.frame(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", frame, SECOND), [0, 0, 1]);
    // What has a place of its own, is not known, or is for many takes the trunk.
    for to in [2, 98] {
        let frame = bench.frame(to, 1);
        assert_eq!(bench.pass("vnic/vm1", frame, SECOND), [0, 1, 0], "to {to}");
    }
    let frame = bench.processor.pool().copy(&plain([0xff; 6], mac(1))).expect("memory");
    assert_eq!(bench.pass("vnic/vm1", frame, SECOND), [0, 1, 0]);
    // Nothing goes back to where it came from.
    let frame = bench.frame(STATION, 98);
    assert_eq!(bench.pass("user/blue", frame, SECOND), [0, 0, 0]);
    assert_eq!(bench.engine.drops(bench.id("user/blue"), DropReason::SourcePort), 1);
    bench.engine.detach(bench.id("uplink/blue"));
    let frame = bench.frame(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", frame, SECOND), [0, 1, 0]);
}

#[test]
fn tcp_of_those_who_send_super_frames_keeps_to_the_trunk() {
    let mut bench = Bench::new();
    bench.attach("uplink/blue", Accepts::default());
    let mut now = SECOND;
    bench.hear_station(now);
    let segment = bench.segment(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", segment, now), [0, 0, 1]);
    let whole = super_frame(bench.processor.pool(), mac(STATION), mac(1)).expect("memory");
    assert_eq!(bench.pass("vnic/vm1", whole, now), [0, 1, 0], "whole");
    let segment = bench.segment(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", segment, now), [0, 1, 0]);
    let other = bench.frame(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", other, now), [0, 0, 1], "it is no TCP");
    now += u64::from(BulkSenders::LULL) * SECOND;
    let segment = bench.segment(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", segment, now), [0, 1, 0]);
    now += SECOND;
    let segment = bench.segment(STATION, 1);
    assert_eq!(bench.pass("vnic/vm1", segment, now), [0, 0, 1], "nothing is on its way any more");
}

#[test]
fn what_was_learnt_before_there_was_a_short_cut_is_learnt_anew() {
    let mut bench = Bench::new();
    bench.engine.apply(image(false).0);
    bench.hear_station(SECOND);
    assert_eq!(bench.engine.fdb().len(), 1);
    bench.engine.apply(image(false).0);
    assert_eq!(bench.engine.fdb().len(), 1);
    bench.engine.apply(image(true).0);
    assert_eq!(bench.engine.fdb(), [], "it may have been behind others");
    bench.hear_station(SECOND);
    bench.engine.apply(image(true).0);
    assert_eq!(bench.engine.fdb().len(), 1);
}
