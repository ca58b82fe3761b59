//! Big configurations lower to what they should, and the same again.

use std::time::Instant;

use sluice_policy::config::{
    AclAction, AclGroup, AclMatch, AclRule, Attachment, Config, Direction, Hook, Policy, Switch, Vnic,
};
use sluice_policy::ids::Ids;
use sluice_policy::image::Bindings;
use sluice_policy::lower::{assign_ids, lower};
use sluice_policy::net::{IpPrefix, MacAddr};
use sluice_policy::validate::validate;

fn big(vnics: u32, rules: u32) -> Config {
    let rule = |number: u32| AclRule {
        priority: number % 1000,
        direction: if number.is_multiple_of(2) { Direction::FromVm } else { Direction::ToVm },
        matches: AclMatch {
            src_ip: IpPrefix::new(std::net::Ipv4Addr::from_bits(0x0a00_0000 | number << 4).into(), 28).ok(),
            ip_proto: Some(6),
            dst_ports: vec!["80".parse().expect("a range"), "8000-8080".parse().expect("a range")],
            ..AclMatch::default()
        },
        action: if number.is_multiple_of(3) { AclAction::Deny } else { AclAction::Allow },
    };
    let vnic = |number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        let mut policy = Policy { ip_guard: vec![[10, a, b, c].into()], ..Policy::default() };
        policy.acl.groups = vec!["shared".into()];
        Vnic {
            name: format!("vm{number}"),
            switch: "blue".into(),
            attach: Attachment::Tap(format!("tap{number}")),
            hook: Hook::Auto,
            full_checksums: false,
            mac: MacAddr([2, 0, 0, a, b, c]),
            extra_macs: Vec::new(),
            up: true,
            policy,
            sriov: None,
        }
    };
    Config {
        switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
        acl_groups: vec![AclGroup { name: "shared".into(), rules: (0..rules).map(rule).collect() }],
        vnics: (1..=vnics).map(vnic).collect(),
    }
}

#[test]
#[allow(clippy::print_stderr)] // figures for whoever asks for them
fn a_thousand_vnics_share_ten_thousand_rules() {
    let mut config = big(1_000, 10_000);
    let start = Instant::now();
    validate(&config).expect("nothing is wrong");
    let validated = start.elapsed();
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("there are numbers enough");
    let assigned = start.elapsed() - validated;
    let image = lower(&config, &ids, &Bindings::new()).expect("an image");
    let lowered = start.elapsed() - validated - assigned;
    eprintln!("validate {validated:?}, assign {assigned:?}, lower {lowered:?}");

    assert_eq!((image.ports.len(), image.groups.len()), (1_000, 1));
    let group = image.groups.values().next().expect("the shared one");
    // 80, and 8000-8080 as 8000/26, 8064/28, 8080.
    assert_eq!(group.rules.len(), 10_000 * 4);
    assert_eq!(group.tuples[0].len(), 3);
    assert_eq!(lower(&config, &ids, &Bindings::new()).as_ref(), Ok(&image));

    // One rule edited: its entries and its counter change, and nothing else.
    config.acl_groups[0].rules[5_000].matches.dst_ports.pop();
    let counters = ids.rules.clone();
    assign_ids(&config, &mut ids).expect("there are numbers enough");
    let moved = ids.rules.by_name.iter().filter(|(name, id)| counters.get(name) != Some(**id)).count();
    assert_eq!(moved, 1);
    let edited = lower(&config, &ids, &Bindings::new()).expect("an image");
    assert_eq!(edited.ports, image.ports);
    let edited_group = edited.groups.values().next().expect("the shared one");
    let kept = edited_group.rules.iter().filter(|(key, rule)| group.rules.get(key) == Some(rule)).count();
    assert_eq!((edited_group.rules.len(), kept), (39_997, 39_996));
}
