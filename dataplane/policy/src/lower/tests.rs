use std::net::IpAddr;

use sluice_pipeline::tables::{
    FLOOD_CHUNK, FLOOD_TRUNKS, FLOOD_UNKNOWN, FloodKey, IpGuardKey, MacKey, PORT_GROUPS_MAX, RATE_SHIFT,
    Vlan, port_flag, vlan_mode,
};

use super::*;
use crate::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Direction, Policy, Rate, Uplink, VlanMode, Vnic,
};
use crate::image::Binding;
use crate::net::{VlanId, VlanRange};

fn vid(vid: u32) -> VlanId {
    VlanId::new(vid).expect("in range")
}

fn range(text: &str) -> VlanRange {
    text.parse().expect("a range")
}

fn switch(name: &str) -> Switch {
    Switch {
        name: name.to_owned(),
        uplink: Some(Uplink {
            netdev: format!("up-{name}"),
            hook: Hook::Auto,
            full_checksums: false,
            trunk: Vec::new(),
            native: None,
            learn_limit: 1000,
            up: true,
            attest: Vec::new(),
        }),
        internal: None,
        ageing_seconds: 300,
    }
}

fn vnic(number: u32, policy: Policy) -> Vnic {
    let [_, a, b, c] = number.to_be_bytes();
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".to_owned(),
        attach: Attachment::Tap(format!("tap{number}")),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr([2, 0, 0, a, b, c]),
        extra_macs: Vec::new(),
        up: true,
        policy,
        sriov: None,
    }
}

fn rule(priority: u32, direction: Direction, port: u16) -> AclRule {
    AclRule {
        priority,
        direction,
        matches: AclMatch {
            ip_proto: Some(6),
            dst_ports: vec![crate::net::PortRange::new(port, port).expect("a range")],
            ..AclMatch::default()
        },
        action: AclAction::Allow,
    }
}

fn lowered(config: &Config) -> (Ids, Image) {
    let mut ids = Ids::default();
    assign_ids(config, &mut ids).expect("numbers");
    let image = lower(config, &ids, &Bindings::new()).expect("an image");
    (ids, image)
}

#[test]
fn numbers_survive_edits_and_names_without_one_are_refused() {
    let mut config = Config {
        switches: vec![switch("blue")],
        acl_groups: vec![AclGroup { name: "web".into(), rules: vec![rule(1, Direction::ToVm, 80)] }],
        vnics: vec![vnic(1, Policy::default()), vnic(2, Policy::default())],
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let before = ids.clone();
    config.vnics.remove(0);
    config.vnics.push(vnic(0, Policy::default()));
    config.acl_groups[0].rules.insert(0, rule(2, Direction::ToVm, 81));
    let error = lower(&config, &ids, &Bindings::new()).expect_err("vm0 has no number");
    assert_eq!(error, LowerError::Unnumbered { kind: "port", name: "vnic/vm0".into() });
    assign_ids(&config, &mut ids).expect("numbers");
    assert_eq!(ids.ports.get("vnic/vm2"), before.ports.get("vnic/vm2"));
    assert_eq!(ids.ports.get("vnic/vm1"), None);
    let old_rule = rule_name("group/web", &config.acl_groups[0].rules[1]);
    assert!(before.rules.get(&old_rule).is_some());
    assert_eq!(ids.rules.get(&old_rule), before.rules.get(&old_rule));
    lower(&config, &ids, &Bindings::new()).expect("an image");
    config.vnics[0].policy.acl.groups.push("absent".into());
    lower(&config, &ids, &Bindings::new()).expect_err("an unknown group must not be ignored");
}

#[test]
fn pending_ports_keep_their_addresses_and_bound_ones_their_interface() {
    let config = Config {
        switches: vec![switch("blue")],
        vnics: vec![vnic(1, Policy::default()), vnic(2, Policy::default())],
        ..Config::default()
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let binding = Binding { ifindex: 77, peer_redirect: true, xdp_target: false };
    let bindings = Bindings::from([("vnic/vm2".to_owned(), binding)]);
    let image = lower(&config, &ids, &bindings).expect("an image");
    let [one, two] = ["vnic/vm1", "vnic/vm2"].map(|name| ids.ports.get(name).expect("a number"));
    assert_eq!(image.ifindexes.iter().collect::<Vec<_>>(), [(&77, &two)]);
    assert_eq!(image.ports[&one].config.flags, port_flag::UP | port_flag::MAC_GUARD);
    assert_eq!(
        image.ports[&two].config.flags,
        port_flag::UP | port_flag::MAC_GUARD | port_flag::ATTACHED | port_flag::PEER_REDIRECT
    );
    let switch = ids.switches.get("blue").expect("a number") as u16;
    assert_eq!(image.macs.get(&MacKey { switch, mac: [2, 0, 0, 0, 0, 1] }), Some(&one));
    assert_eq!(image.macs.len(), 2);
}

#[test]
fn vlan_modes_become_what_the_tables_say() {
    let mut trunk_uplink = switch("red");
    let uplink = trunk_uplink.uplink.as_mut().expect("an uplink");
    uplink.trunk = vec![range("10-12"), range("64")];
    let modes = [
        VlanMode::Untagged,
        VlanMode::Access(vid(10)),
        VlanMode::Trunk { allowed: vec![range("1-2"), range("4094")], native: Some(vid(7)) },
        VlanMode::Tunnel(vid(5)),
    ];
    let vnics = modes
        .into_iter()
        .zip(1..)
        .map(|(vlan, number)| vnic(number, Policy { vlan, ..Policy::default() }))
        .collect();
    let config = Config { switches: vec![switch("blue"), trunk_uplink], vnics, ..Config::default() };
    let (ids, image) = lowered(&config);
    let port = |name: &str| &image.ports[&ids.ports.get(name).expect("a number")];
    let shape = |name: &str| {
        let config = &port(name).config;
        (config.vlan_mode, config.vlan.0, config.flags & port_flag::NATIVE != 0, config.native.0)
    };
    assert_eq!(shape("vnic/vm1"), (vlan_mode::ACCESS, 0, false, 0));
    assert_eq!(shape("vnic/vm2"), (vlan_mode::ACCESS, 10, false, 0));
    assert_eq!(shape("vnic/vm3"), (vlan_mode::TRUNK, 0, true, 7));
    assert_eq!(shape("vnic/vm4"), (vlan_mode::TUNNEL, 0x8005, false, 0));
    assert_eq!(shape("uplink/blue"), (vlan_mode::ALL, 0, false, 0));
    assert_eq!(shape("uplink/red"), (vlan_mode::TRUNK, 0, true, 0));
    let mut bits = [0u64; 64];
    (bits[0], bits[63]) = (0b1000_0110, 1 << 62);
    assert_eq!(port("vnic/vm3").trunk, bits);
    assert_eq!(port("uplink/red").trunk[..3], [0b1_1100 << 8, 1, 0]);
}

#[test]
fn flood_lists_end_and_hold_each_member_once() {
    for members in [FLOOD_CHUNK - 1, FLOOD_CHUNK, FLOOD_CHUNK + 1, FLOOD_CHUNK * 2] {
        let vlan = VlanMode::Access(vid(10));
        let policy = Policy { vlan, unknown_unicast: true, ..Policy::default() };
        let vnics = (0..members as u32).map(|number| vnic(number, policy.clone())).collect();
        let config = Config { switches: vec![switch("blue")], vnics, ..Config::default() };
        let (ids, image) = lowered(&config);
        let switch = ids.switches.get("blue").expect("a number");
        let read = |vlan: Vlan| {
            let mut ports = Vec::new();
            for chunk in 0.. {
                let chunk = &image.flood[&FloodKey { switch, vlan, chunk }];
                ports.extend_from_slice(&chunk.ports[..chunk.count as usize]);
                if (chunk.count as usize) < FLOOD_CHUNK {
                    return ports;
                }
            }
            unreachable!("the loop has no other end")
        };
        let uplink = ids.ports.get("uplink/blue").expect("a number");
        let vnics: Vec<u32> = image.ports.keys().copied().filter(|id| *id != uplink).collect();
        assert_eq!(read(Vlan(10)), vnics);
        assert_eq!(read(FLOOD_TRUNKS), [uplink]);
        assert_eq!(read(FLOOD_UNKNOWN), image.ports.keys().copied().collect::<Vec<_>>());
    }
}

#[test]
fn ip_guard_holds_link_local_addresses_only_with_ipv6() {
    let guard = |addresses: &[&str]| Policy {
        ip_guard: addresses.iter().map(|text| text.parse::<IpAddr>().expect("an address")).collect(),
        ..Policy::default()
    };
    let vnics = vec![vnic(1, guard(&["10.0.0.1"])), vnic(2, guard(&["2001:db8::1"])), vnic(3, guard(&[]))];
    let config = Config { switches: vec![switch("blue")], vnics, ..Config::default() };
    let (ids, image) = lowered(&config);
    let key = |name: &str, address: &str| IpGuardKey {
        port: ids.ports.get(name).expect("a number"),
        ip: address.parse::<std::net::Ipv6Addr>().expect("an address").octets(),
    };
    let wanted = [
        key("vnic/vm1", "::ffff:10.0.0.1"),
        key("vnic/vm2", "2001:db8::1"),
        key("vnic/vm2", "fe80::ff:fe00:2"),
    ];
    assert_eq!(image.ip_guard, wanted.into_iter().collect());
    let flags = |name: &str| image.ports[&ids.ports.get(name).expect("a number")].config.flags;
    assert_ne!(flags("vnic/vm1") & port_flag::IP_GUARD, 0);
    assert_eq!(flags("vnic/vm3") & port_flag::IP_GUARD, 0);
}

#[test]
fn groups_appear_only_in_directions_in_which_they_have_rules() {
    let groups =
        |names: &[&str]| Acl { groups: names.iter().map(|name| (*name).into()).collect(), ..Acl::default() };
    let mut own = Policy { acl: groups(&["in", "out", "empty"]), ..Policy::default() };
    own.acl.rules = vec![rule(5, Direction::FromVm, 22)];
    let config = Config {
        switches: vec![switch("blue")],
        acl_groups: vec![
            AclGroup { name: "in".into(), rules: vec![rule(1, Direction::ToVm, 80)] },
            AclGroup { name: "out".into(), rules: vec![rule(1, Direction::FromVm, 80)] },
            AclGroup { name: "empty".into(), rules: Vec::new() },
            AclGroup { name: "unused".into(), rules: vec![rule(1, Direction::ToVm, 80)] },
        ],
        vnics: vec![vnic(1, own), vnic(2, Policy { acl: groups(&["in"]), ..Policy::default() })],
    };
    let (ids, image) = lowered(&config);
    let id = |key: &str| ids.groups.get(key).expect("a number");
    let acl = |name: &str| image.ports[&ids.ports.get(name).expect("a number")].config.acl;
    let list = |acl: &sluice_pipeline::tables::AclConfig| acl.groups[..acl.group_count as usize].to_vec();
    let [from_vm, to_vm] = acl("vnic/vm1");
    assert_eq!(list(&from_vm), [id("group/out"), id("vnic/vm1")]);
    assert_eq!(list(&to_vm), [id("group/in")]);
    assert_eq!(acl("vnic/vm2")[0].group_count, 0);
    assert_eq!(from_vm.groups.len(), PORT_GROUPS_MAX);
    let wanted = ["group/in", "group/out", "vnic/vm1"].map(id);
    assert_eq!(image.groups.keys().copied().collect::<Vec<_>>(), {
        let mut sorted = wanted.to_vec();
        sorted.sort_unstable();
        sorted
    });
}

#[test]
fn rates_are_exact_enough_and_cannot_overflow() {
    let lowered_rate = |bits_per_second, burst_bytes| {
        let rate = Some(Rate { bits_per_second, burst_bytes });
        let vnics = vec![vnic(1, Policy { rate_from_vm: rate, ..Policy::default() })];
        let config = Config { switches: vec![switch("blue")], vnics, ..Config::default() };
        let (ids, image) = lowered(&config);
        image.ports[&ids.ports.get("vnic/vm1").expect("a number")].config.rate[0]
    };
    let rate = lowered_rate(8_000_000, 1_000);
    assert_eq!((rate.ns_per_byte, rate.burst_ns), (1_000 << RATE_SHIFT, 1_000_000));
    for bits_per_second in [8_000, 1_000_000, 10_000_000_000, 1_000_000_000_000, 100_000_000_000_000] {
        for burst in [1_540, 65_536, u64::from(u32::MAX)] {
            let rate = lowered_rate(bits_per_second, burst);
            assert!(rate.ns_per_byte > 0 && rate.burst_ns > 0);
            assert!(rate.ns_per_byte.checked_mul(262_144).is_some(), "{bits_per_second}");
            let cost = (rate.ns_per_byte * 262_144) >> RATE_SHIFT;
            assert!((cost + rate.burst_ns).checked_mul(2).is_some(), "{bits_per_second} {burst}");
        }
    }
}

#[test]
fn the_better_of_two_rules_under_one_key_is_kept() {
    let mut deny = rule(5, Direction::FromVm, 22);
    deny.action = AclAction::Deny;
    let rules = vec![rule(5, Direction::FromVm, 22), deny.clone(), rule(4, Direction::FromVm, 22)];
    let mut policy = Policy::default();
    policy.acl.rules = rules;
    let config = Config { switches: vec![switch("blue")], vnics: vec![vnic(1, policy)], ..Config::default() };
    let (ids, image) = lowered(&config);
    let group = &image.groups[&ids.groups.get("vnic/vm1").expect("a number")];
    assert_eq!(group.rules.len(), 1);
    let kept = group.rules.values().next().expect("one rule");
    assert_eq!(kept.rank, 13);
    assert_eq!(Some(kept.counter), ids.rules.get(&rule_name("vnic/vm1", &deny)));
    assert_eq!(group.tuples[0].len(), 1);
    assert_eq!(group.tuples[0][0].max_rank, 13);
}

#[test]
fn tuples_are_sorted_by_their_best_rank() {
    let mut policy = Policy::default();
    for (priority, first, last) in [(1, 0, 1023), (9, 22, 22), (5, 8000, 8080), (9, 100, 131)] {
        let mut rule = rule(priority, Direction::ToVm, 0);
        rule.matches.dst_ports = vec![crate::net::PortRange::new(first, last).expect("a range")];
        policy.acl.rules.push(rule);
    }
    let config = Config { switches: vec![switch("blue")], vnics: vec![vnic(1, policy)], ..Config::default() };
    let (ids, image) = lowered(&config);
    let group = &image.groups[&ids.groups.get("vnic/vm1").expect("a number")];
    let order: Vec<_> =
        group.tuples[1].iter().map(|tuple| (std::cmp::Reverse(tuple.max_rank), tuple.id)).collect();
    assert!(order.is_sorted() && order.len() > 3);
    for (key, rule) in &group.rules {
        let tuple = group.tuples[1].iter().find(|tuple| tuple.id == key.tuple).expect("its tuple");
        assert!(rule.rank <= tuple.max_rank);
        assert_eq!(key.key.masked(&tuple.mask), key.key);
    }
    for tuple in &group.tuples[1] {
        assert!(group.rules.iter().any(|(key, rule)| key.tuple == tuple.id && rule.rank == tuple.max_rank));
    }
}

/// Two vNICs, the first with a claim to a VF; ids of the uplink, of both vNICs and of the VF's port.
fn with_a_claim() -> (Config, Ids, [u32; 4]) {
    let mut first =
        vnic(1, Policy { ip_guard: vec!["10.0.0.1".parse().expect("an address")], ..Policy::default() });
    first.sriov = Some(crate::config::Sriov {
        weight: 50,
        attach: crate::config::VfAttachment::External { driver: None },
    });
    let config = Config {
        switches: vec![switch("blue")],
        vnics: vec![first, vnic(2, Policy::default())],
        ..Config::default()
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let of = |name: &str| ids.ports.get(name).expect("a number");
    let numbers = [of("uplink/blue"), of("vnic/vm1"), of("vnic/vm2"), of("vf/vm1")];
    assert_eq!(ids.ports.get("vf/vm2"), None, "it asks for none");
    (config, ids, numbers)
}

fn flooded(image: &Image, vlan: Vlan) -> Vec<u32> {
    let chunk =
        &image.flood[&FloodKey { switch: *image.switches.keys().next().expect("one"), vlan, chunk: 0 }];
    chunk.ports[..chunk.count as usize].to_vec()
}

#[test]
fn a_vf_in_legacy_mode_is_behind_the_uplink() {
    let (config, ids, [uplink, vm1, vm2, vf]) = with_a_claim();
    let mut backings = Backings { filtered_uplinks: ["blue".into()].into(), ..Backings::default() };
    for (in_use, owner, members) in [(false, vm1, vec![vm1, vm2]), (true, uplink, vec![vm2])] {
        backings.vnics.insert("vm1".into(), crate::image::Backing { representor: None, in_use });
        let image = lower_with(&config, &ids, &Bindings::new(), &backings).expect("an image");
        let key = MacKey::from_word(image.ports[&vm1].config.switch, image.ports[&vm1].config.macs[0]);
        assert_eq!((image.macs[&key], flooded(&image, Vlan::UNTAGGED)), (owner, members), "in use: {in_use}");
        assert!(image.ports[&uplink].is_filtered);
        assert!(!image.ports.contains_key(&vf), "it has no representor");
        assert_eq!(ports_with(&config, &backings), ports(&config));
    }
}

#[test]
fn a_representor_is_a_second_port_under_the_same_policy() {
    let (config, ids, [_, vm1, vm2, vf]) = with_a_claim();
    let mut backings = Backings::default();
    let bindings = [("vf/vm1", 9), ("vnic/vm1", 8)]
        .map(|(name, ifindex)| (name.to_owned(), Binding { ifindex, ..Binding::default() }));
    for (in_use, owner, members) in [(false, vm1, vec![vm1, vm2]), (true, vf, vec![vf, vm2])] {
        let representor = Some("pf0vf3".to_owned());
        backings.vnics.insert("vm1".into(), crate::image::Backing { representor, in_use });
        let image = lower_with(&config, &ids, &bindings.clone().into(), &backings).expect("an image");
        let (software, hardware) = (&image.ports[&vm1].config, &image.ports[&vf].config);
        let key = MacKey::from_word(software.switch, software.macs[0]);
        assert_eq!((image.macs[&key], flooded(&image, Vlan::UNTAGGED)), (owner, members), "in use: {in_use}");
        assert_eq!((software.ifindex, hardware.ifindex), (8, 9));
        assert_eq!(&sluice_pipeline::tables::PortConfig { ifindex: 8, ..*hardware }, software);
        let guards: Vec<u32> = image.ip_guard.iter().map(|key| key.port).collect();
        assert!(guards.contains(&vm1) && guards.contains(&vf));
        let names: Vec<String> = ports_with(&config, &backings).into_iter().map(|spec| spec.name).collect();
        assert_eq!(names, ["uplink/blue", "vnic/vm1", "vf/vm1", "vnic/vm2"]);
    }
}
