use std::net::IpAddr;

use super::*;
use crate::config::{
    AclAction, AclGroup, AclMatch, AclRule, Attachment, Direction, Hook, Internal, Masked, Policy, Rate,
    Switch, Uplink, VhostMode, VhostUser, VlanMode, Vnic,
};
use crate::net::VlanId;

fn base() -> Config {
    Config {
        switches: vec![Switch {
            name: "blue".into(),
            uplink: Some(Uplink {
                netdev: "up0".into(),
                hook: Hook::Auto,
                full_checksums: false,
                trunk: Vec::new(),
                native: None,
                learn_limit: 16_384,
                up: true,
                attest: Vec::new(),
            }),
            internal: Some(Internal { netdev: "host0".into(), mac: None, vlan: VlanMode::Untagged }),
            ageing_seconds: 300,
        }],
        acl_groups: vec![AclGroup { name: "web".into(), rules: vec![rule(AclMatch::default())] }],
        vnics: vec![vnic("vm1", 1), vnic("vm2", 2)],
    }
}

fn vnic(name: &str, number: u8) -> Vnic {
    Vnic {
        name: name.into(),
        switch: "blue".into(),
        attach: Attachment::Veth(format!("p{number}")),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr([2, 0, 0, 0, 0, number]),
        extra_macs: Vec::new(),
        up: true,
        policy: Policy::default(),
        sriov: None,
    }
}

fn rule(matches: AclMatch) -> AclRule {
    AclRule { priority: 1, direction: Direction::ToVm, matches, action: AclAction::Allow }
}

fn tcp() -> AclMatch {
    AclMatch { ip_proto: Some(6), ..AclMatch::default() }
}

/// Validates the base after a change and compares what is reported, as `resource field code`.
#[track_caller]
fn expect(change: impl FnOnce(&mut Config), wanted: &[(&str, &str, ViolationCode)]) {
    let mut config = base();
    change(&mut config);
    let violations = validate(&config).err().unwrap_or_default();
    let found: Vec<_> =
        violations.iter().map(|item| (item.resource.as_str(), item.field.as_str(), item.code)).collect();
    assert_eq!(found, wanted, "{violations:#?}");
    assert!(violations.iter().all(|item| !item.message.is_empty() && !item.to_string().is_empty()));
}

use ViolationCode::{Conflict, Duplicate, Invalid, Limit, Missing, NotFound, OutOfRange};

#[test]
fn a_good_configuration_passes() {
    expect(|_| {}, &[]);
    validate(&Config::default()).expect("nothing is wrong with nothing");
}

#[test]
fn names_are_unique_and_spelt_well() {
    expect(|config| config.vnics[1].name = "vm1".into(), &[("vnics/vm1", "name", Duplicate)]);
    expect(|config| config.vnics[1].name = String::new(), &[("vnics[1]", "name", Missing)]);
    expect(|config| config.vnics[1].name = "a/b".into(), &[("vnics/a/b", "name", Invalid)]);
    expect(|config| config.acl_groups[0].name = "-x".into(), &[("aclGroups/-x", "name", Invalid)]);
    let long = "x".repeat(64);
    expect(
        |config| config.acl_groups[0].name = long.clone(),
        &[(&format!("aclGroups/{long}"), "name", OutOfRange)],
    );
}

#[test]
fn references_must_lead_somewhere() {
    expect(|config| config.vnics[0].switch = "red".into(), &[("vnics/vm1", "switch", NotFound)]);
    expect(|config| config.vnics[0].switch.clear(), &[("vnics/vm1", "switch", Missing)]);
    expect(
        |config| config.vnics[0].policy.acl.groups = vec!["web".into(), "db".into(), "web".into()],
        &[("vnics/vm1", "policy.acl.groups[1]", NotFound), ("vnics/vm1", "policy.acl.groups[2]", Duplicate)],
    );
}

#[test]
fn addresses_are_unicast_and_unique_on_their_switch() {
    expect(|config| config.vnics[1].mac = config.vnics[0].mac, &[("vnics/vm2", "mac", Duplicate)]);
    expect(
        |config| config.vnics[0].extra_macs = vec![MacAddr([2, 0, 0, 0, 0, 2]), MacAddr([1; 6])],
        &[("vnics/vm1", "extraMacs[1]", Invalid), ("vnics/vm2", "mac", Duplicate)],
    );
    expect(|config| config.vnics[0].mac = MacAddr([0; 6]), &[("vnics/vm1", "mac", Invalid)]);
    expect(
        |config| config.switches[0].internal.as_mut().expect("one").mac = Some(MacAddr([2, 0, 0, 0, 0, 1])),
        &[("vnics/vm1", "mac", Duplicate)],
    );
    expect(
        |config| config.vnics[0].extra_macs = (10..14).map(|last| MacAddr([2, 0, 0, 0, 0, last])).collect(),
        &[("vnics/vm1", "extraMacs", Limit)],
    );
    // The same address on another switch is another port's.
    expect(
        |config| {
            config.switches.push(Switch {
                name: "red".into(),
                uplink: None,
                internal: None,
                ageing_seconds: 300,
            });
            config.vnics[1].switch = "red".into();
            config.vnics[1].mac = config.vnics[0].mac;
        },
        &[],
    );
}

#[test]
fn interfaces_are_named_well_and_used_once() {
    expect(
        |config| config.vnics[1].attach = Attachment::Tap("p1".into()),
        &[("vnics/vm2", "attach.tap", Duplicate)],
    );
    expect(
        |config| config.vnics[1].attach = Attachment::Veth("host0-sw".into()),
        &[("vnics/vm2", "attach.veth", Duplicate)],
    );
    for (name, code) in
        [("", Missing), ("a b", Invalid), ("..", Invalid), ("x:1", Invalid), ("0123456789abcdef", OutOfRange)]
    {
        expect(
            |config| config.vnics[0].attach = Attachment::Tap(name.into()),
            &[("vnics/vm1", "attach.tap", code)],
        );
    }
    expect(
        |config| config.switches[0].internal.as_mut().expect("one").netdev = "0123456789abc".into(),
        &[("switches/blue", "internal.netdev", OutOfRange)],
    );
    expect(
        |config| config.switches[0].uplink.as_mut().expect("one").netdev = "host0".into(),
        &[("switches/blue", "internal.netdev", Duplicate)],
    );
}

#[test]
fn rings_have_a_socket_of_their_own() {
    let rings = |path: &str, queues| {
        Attachment::VhostUser(VhostUser { path: path.into(), mode: VhostMode::Server, queues })
    };
    expect(
        |config| {
            config.vnics[0].attach = rings("/run/vm1", 1);
            config.vnics[1].attach = rings("/run/vm2", 16);
        },
        &[],
    );
    for (path, code) in [
        ("", Missing),
        ("run/vm1", Invalid),
        ("/run/", Invalid),
        ("/run/\0", Invalid),
        (&format!("/{}", "x".repeat(107)), OutOfRange),
    ] {
        expect(
            |config| config.vnics[0].attach = rings(path, 1),
            &[("vnics/vm1", "attach.vhostUser.path", code)],
        );
    }
    expect(|config| config.vnics[0].attach = rings(&format!("/{}", "x".repeat(106)), 1), &[]);
    for queues in [0, 17] {
        expect(
            |config| config.vnics[0].attach = rings("/run/vm1", queues),
            &[("vnics/vm1", "attach.vhostUser.queues", OutOfRange)],
        );
    }
    expect(
        |config| {
            config.vnics[0].attach = rings("/run/vm", 1);
            config.vnics[1].attach = rings("/run/vm", 1);
        },
        &[("vnics/vm2", "attach.vhostUser.path", Duplicate)],
    );
    expect(
        |config| {
            config.vnics[0].attach = rings("/run/vm1", 1);
            config.vnics[0].hook = Hook::Xdp;
            let attach = crate::config::VfAttachment::External { driver: None };
            config.vnics[0].sriov = Some(crate::config::Sriov { weight: 50, attach });
        },
        &[("vnics/vm1", "hook", Conflict), ("vnics/vm1", "sriov", Conflict)],
    );
    // The trunk is an interface too, and there is one for each switch.
    expect(
        |config| {
            config.vnics[0].attach = Attachment::Tap(lower::user_tap_netdev("blue"));
            config.vnics[1].attach = rings("/run/vm2", 1);
        },
        &[("vnics/vm2", "attach.vhostUser", Duplicate)],
    );
}

#[test]
fn trunks_name_vlans_and_each_once() {
    let trunk = |ranges: &[&str]| VlanMode::Trunk {
        allowed: ranges.iter().map(|text| text.parse().expect("a range")).collect(),
        native: VlanId::new(1).ok(),
    };
    expect(
        |config| config.vnics[0].policy.vlan = trunk(&[]),
        &[("vnics/vm1", "policy.vlan.trunk.allowed", Missing)],
    );
    expect(
        |config| config.vnics[0].policy.vlan = trunk(&["10-20", "30", "15-40"]),
        &[("vnics/vm1", "policy.vlan.trunk.allowed[2]", Conflict)],
    );
    expect(
        |config| {
            config.switches[0].uplink.as_mut().expect("one").trunk =
                vec!["7".parse().expect("a range"), "7".parse().expect("a range")];
        },
        &[("switches/blue", "uplink.trunk[1]", Conflict)],
    );
}

#[test]
fn bounds_hold() {
    let rate = |bits_per_second, burst_bytes| Some(Rate { bits_per_second, burst_bytes });
    expect(
        |config| config.vnics[0].policy.rate_to_vm = rate(7_999, 1_539),
        &[
            ("vnics/vm1", "policy.rate.toVm.bps", OutOfRange),
            ("vnics/vm1", "policy.rate.toVm.burstBytes", OutOfRange),
        ],
    );
    expect(|config| config.vnics[0].policy.rate_from_vm = rate(8_000, 1_540), &[]);
    expect(|config| config.switches[0].ageing_seconds = 0, &[("switches/blue", "ageingSeconds", OutOfRange)]);
    expect(
        |config| config.vnics[0].policy.learn_limit = Some(FDB_TOO_MANY),
        &[("vnics/vm1", "policy.learnLimit", OutOfRange)],
    );
    expect(
        |config| config.switches[0].uplink.as_mut().expect("one").learn_limit = FDB_TOO_MANY,
        &[("switches/blue", "uplink.learnLimit", OutOfRange)],
    );
}

const FDB_TOO_MANY: u32 = sluice_pipeline::tables::FDB_MAX + 1;

#[test]
fn ip_guard_addresses_can_be_sources() {
    let guard =
        |texts: &[&str]| texts.iter().map(|text| text.parse::<IpAddr>().expect("an address")).collect();
    expect(
        |config| {
            config.vnics[0].policy.ip_guard = guard(&[
                "10.0.0.1",
                "224.0.0.1",
                "0.0.0.0",
                "127.0.0.1",
                "::",
                "::1",
                "ff02::1",
                "::ffff:10.0.0.2",
                "255.255.255.255",
                "10.0.0.1",
                "2001:db8::1",
            ]);
        },
        &(1..9)
            .map(|index| (index, Invalid))
            .chain([(9, Duplicate)])
            .map(|(index, code)| ("vnics/vm1", &*format!("policy.ipGuard[{index}]").leak(), code))
            .collect::<Vec<_>>(),
    );
    let many = (0..65).map(|last| IpAddr::from([10, 0, 0, last])).collect();
    expect(|config| config.vnics[0].policy.ip_guard = many, &[("vnics/vm1", "policy.ipGuard", Limit)]);
}

#[test]
fn rules_must_be_able_to_match() {
    let ports = |text: &str| vec![text.parse().expect("a range")];
    let prefix = |text: &str| Some(text.parse().expect("a prefix"));
    let cases: Vec<(AclMatch, &[(&str, ViolationCode)])> = vec![
        (AclMatch { dst_ports: ports("80"), ..AclMatch::default() }, &[("dstPorts", Conflict)]),
        (
            AclMatch { src_ports: ports("80"), ip_proto: Some(1), ..AclMatch::default() },
            &[("srcPorts", Conflict)],
        ),
        (AclMatch { dst_ports: ports("80"), ip_proto: Some(132), ..AclMatch::default() }, &[]),
        (
            AclMatch {
                tcp_flags: Some(Masked { value: 2, mask: 2 }),
                ip_proto: Some(17),
                ..AclMatch::default()
            },
            &[("tcpFlags", Conflict)],
        ),
        (AclMatch { tcp_flags: Some(Masked { value: 3, mask: 2 }), ..tcp() }, &[("tcpFlags", Conflict)]),
        (AclMatch { icmp_type: Some(8), ..tcp() }, &[("icmpType", Conflict)]),
        (
            AclMatch { icmp_code: Some(0), ip_proto: Some(1), ..AclMatch::default() },
            &[("icmpCode", Conflict)],
        ),
        (
            AclMatch {
                icmp_type: Some(8),
                ip_proto: Some(1),
                src_ip: prefix("fe80::/10"),
                ..AclMatch::default()
            },
            &[("ipProto", Conflict)],
        ),
        (
            AclMatch { src_ip: prefix("10.0.0.0/8"), dst_ip: prefix("fe80::/10"), ..AclMatch::default() },
            &[("dstIp", Conflict)],
        ),
        (AclMatch { ethertype: Some(0x0806), ..tcp() }, &[("ethertype", Conflict)]),
        (AclMatch { ethertype: Some(0x86dd), ..tcp() }, &[]),
        (
            AclMatch { ethertype: Some(0x86dd), src_ip: prefix("10.0.0.0/8"), ..AclMatch::default() },
            &[("ethertype", Conflict)],
        ),
        (AclMatch { ethertype: Some(0x8100), ..AclMatch::default() }, &[("ethertype", Conflict)]),
        (
            AclMatch {
                dst_mac: Some(Masked {
                    value: MacAddr([1, 2, 0, 0, 0, 0]),
                    mask: MacAddr([1, 0, 0, 0, 0, 0]),
                }),
                ..AclMatch::default()
            },
            &[("dstMac", Conflict)],
        ),
    ];
    for (matches, wanted) in cases {
        let wanted: Vec<_> =
            wanted.iter().map(|(field, code)| (format!("rules[1].match.{field}"), *code)).collect();
        let wanted: Vec<_> =
            wanted.iter().map(|(field, code)| ("aclGroups/web", field.as_str(), *code)).collect();
        expect(|config| config.acl_groups[0].rules.push(rule(matches)), &wanted);
    }
    expect(
        |config| {
            let mut high = rule(tcp());
            high.priority = 65_536;
            config.vnics[1].policy.acl.rules = vec![high];
        },
        &[("vnics/vm2", "policy.acl.rules[0].priority", OutOfRange)],
    );
}

#[test]
fn rules_say_each_thing_once_and_briefly() {
    let ports = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a range")).collect();
    expect(
        |config| {
            let mut deny = rule(AclMatch { dst_ports: ports(&["90", "80"]), ..tcp() });
            deny.action = AclAction::Deny;
            config.acl_groups[0].rules =
                vec![rule(AclMatch { dst_ports: ports(&["80", "90"]), ..tcp() }), rule(tcp()), deny];
        },
        &[("aclGroups/web", "rules[2]", Duplicate)],
    );
    expect(
        |config| {
            let wide = |first| ports(&[first, "4097-8190", "10001-20001"]);
            let matches = AclMatch { src_ports: wide("1-4095"), dst_ports: wide("3-4094"), ..tcp() };
            config.acl_groups[0].rules.push(rule(matches));
        },
        &[("aclGroups/web", "rules[1].match", Limit)],
    );
}

#[test]
fn a_host_has_room_for_so_many_and_no_more() {
    expect(
        |config| {
            config.switches.extend((0..1023).map(|number| Switch {
                name: format!("s{number}"),
                uplink: None,
                internal: None,
                ageing_seconds: 300,
            }))
        },
        &[("switches", "", Limit)],
    );
    expect(
        |config| {
            config
                .acl_groups
                .extend((0..32).map(|number| AclGroup { name: format!("g{number}"), rules: Vec::new() }));
            config.vnics[0].policy.acl.groups = (0..32).map(|number| format!("g{number}")).collect();
            config.vnics[1].policy.acl.groups = config.vnics[0].policy.acl.groups.clone();
            config.vnics[1].policy.acl.rules = vec![rule(tcp())];
        },
        &[("vnics/vm2", "policy.acl.groups", Limit)],
    );
}
