use sluice_pipeline::{Frame, HEADER_WINDOW, Tag, ethertype};

use super::*;
use crate::config::{AclAction, AclMatch, AclRule, Attachment, Config, Hook, Policy, Rate, Switch, Vnic};
use crate::ids::Ids;
use crate::image::{Binding, Bindings};
use crate::lower::{assign_ids, lower, ports};
use crate::net::MacAddr;

const ONE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TWO: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn vnic(name: &str, mac: [u8; 6], policy: Policy) -> Vnic {
    Vnic {
        name: name.into(),
        switch: "blue".into(),
        attach: Attachment::Tap(name.into()),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr(mac),
        extra_macs: Vec::new(),
        up: true,
        policy,
        sriov: None,
    }
}

/// Two vNICs, the first with `policy`; and the ids of their ports.
fn two(policy: Policy) -> (Simulator, u32, u32) {
    let config = Config {
        switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
        acl_groups: Vec::new(),
        vnics: vec![vnic("vm1", ONE, policy), vnic("vm2", TWO, Policy::default())],
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let bindings: Bindings = (100..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| {
            (spec.name, Binding { ifindex, peer_redirect: true, xdp_target: spec.netdev == "vm2" })
        })
        .collect();
    let image = lower(&config, &ids, &bindings).expect("an image");
    let id = |name| ids.ports.get(name).expect("a number");
    (Simulator::new(image), id("vnic/vm1"), id("vnic/vm2"))
}

fn frame(dst: [u8; 6], src: [u8; 6]) -> Vec<u8> {
    [&dst[..], &src, &[0x12, 0x34], &[7; 50]].concat()
}

#[test]
fn known_unicast_goes_to_its_port_and_broadcast_to_all_others() {
    let (mut simulator, one, two) = two(Policy::default());
    let unicast = frame(TWO, ONE);
    let run = simulator.run(one, &unicast, TagPlace::Inline);
    assert_eq!(run.frames, [(two, unicast)]);
    assert_eq!(run.stages.first(), Some(&Stage::Parse));
    assert_eq!(run.stages.last(), Some(&Stage::RateToVm));
    let broadcast = frame([0xff; 6], TWO);
    let run = simulator.run(two, &broadcast, TagPlace::Inline);
    assert_eq!(run.frames, [(one, broadcast)]);
    assert_eq!(simulator.state().ports[&one].tx_packets, 1);
    assert_eq!(simulator.state().ports[&two].flooded, 1);
    let run = simulator.run(one, &frame(TWO, TWO), TagPlace::Inline);
    assert_eq!(run.drops, [(one, DropReason::MacGuard)]);
    assert_eq!(simulator.state().drops[&(one, DropReason::MacGuard)], 1);
}

#[test]
fn the_partial_view_defers_what_it_cannot_send_without_counting() {
    let (mut simulator, one, two) = two(Policy::default());
    assert_eq!(simulator.run_partial(one, &frame(TWO, ONE)).frames.len(), 1);
    for (ingress, frame) in [(two, frame(ONE, TWO)), (one, frame([0xff; 6], ONE)), (one, frame([4; 6], ONE))]
    {
        let before = simulator.state().ports.clone();
        let run = simulator.run_partial(ingress, &frame);
        assert_eq!(run.verdict, Verdict::Defer);
        assert_eq!((run.frames, run.drops), (vec![], vec![]));
        assert_eq!(simulator.state().ports, before);
    }
}

#[test]
fn an_empty_bucket_stops_and_time_refills_it() {
    let rate = Some(Rate { bits_per_second: 8_000_000, burst_bytes: 2_000 });
    let (mut simulator, one, _) = two(Policy { rate_from_vm: rate, ..Policy::default() });
    simulator.empty_bucket(one, Direction::FromVm);
    let frame = frame(TWO, ONE);
    assert_eq!(simulator.run(one, &frame, TagPlace::Inline).drops, [(one, DropReason::RateFromVm)]);
    simulator.state_mut().now += frame.len() as u64 * 1_000;
    assert_eq!(simulator.run(one, &frame, TagPlace::Inline).drops, []);
    assert_eq!(simulator.run(one, &frame, TagPlace::Inline).drops, [(one, DropReason::RateFromVm)]);
}

#[test]
fn the_cache_answers_until_the_epoch_changes() {
    let mut policy = Policy::default();
    policy.acl.rules = vec![AclRule {
        priority: 1,
        direction: Direction::FromVm,
        matches: AclMatch { ethertype: Some(0x1234), ..AclMatch::default() },
        action: AclAction::Deny,
    }];
    let (mut simulator, one, _) = two(policy);
    let frame = frame(TWO, ONE);
    let mut misses = Vec::new();
    for round in 0..4 {
        if round == 2 {
            simulator.state_mut().epoch += 1;
        }
        let run = simulator.run(one, &frame, TagPlace::Inline);
        assert_eq!(run.drops, [(one, DropReason::AclFromVm)]);
        assert_eq!(run.rules.len(), 1);
        misses.push(simulator.state().ports[&one].cache_misses);
    }
    assert_eq!(misses, [1, 1, 2, 2]);
    let mut simulator = simulator.without_cache();
    simulator.run(one, &frame, TagPlace::Inline);
    simulator.run(one, &frame, TagPlace::Inline);
    assert_eq!(simulator.state().ports[&one].cache_misses, 4);
}

#[test]
fn frames_read_within_the_window_and_their_tags_move() {
    let bytes: Vec<u8> = (0..=255).cycle().take(400).collect();
    let frame = SliceFrame::new(&bytes);
    assert_eq!(frame.load::<2>(HEADER_WINDOW - 2), Some([252, 253]));
    assert_eq!(frame.load::<2>(HEADER_WINDOW - 1), None);
    assert_eq!(SliceFrame::new(&bytes[..10]).load::<4>(7), None);
    assert_eq!(frame.load::<1>(u32::MAX), None);

    let tag = Tag { tpid: ethertype::STAG, tci: 0x6005 };
    let tagged = rewrite(&bytes, false, tag);
    assert_eq!(tagged[..18], [&bytes[..12], &[0x88, 0xa8, 0x60, 5], &bytes[12..14]].concat());
    assert_eq!(take_tag_out(&tagged), Some((bytes.clone(), tag)));
    assert_eq!(take_tag_out(&bytes), None);
    assert_eq!(take_tag_out(&tagged[..17]), None);
    assert_eq!(rewrite(&tagged, true, Tag::NONE), bytes);
}
