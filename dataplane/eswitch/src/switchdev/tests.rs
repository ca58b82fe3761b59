use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_policy::config::{Masked, Rate};
use sluice_policy::net::{IpPrefix, MacAddr, VlanId};
use sluice_policy::placement::{
    FlowerAction, FlowerMatch, FlowerRule, RulePort, Target, VlanMatch, VlanProtocol,
};

use super::actions::{self, Scope};
use super::cookie::Cookie;
use super::filter::{self, Where};
use super::keys;
use super::layout::Layout;
use crate::contract::{ErrorClass, VfIndex};
use crate::netlink::Refusal;
use crate::netlink::attr::Read;

fn scope(port: RulePort) -> Scope {
    Scope {
        uplink: 20,
        vfs: BTreeMap::from([(VfIndex(0), 21), (VfIndex(1), 22)]),
        cookie: Cookie { vf: VfIndex(1), hash: 0x0102_0304_0506_0708 },
        own: 22,
        port,
        layout: Layout::new(port, VfIndex(1)),
    }
}

fn vid(vid: u32) -> VlanId {
    VlanId::new(vid).expect("a VLAN")
}

fn prefix(text: &str) -> IpPrefix {
    text.parse().expect("a prefix")
}

fn rate() -> Rate {
    Rate { bits_per_second: 8_000_000, burst_bytes: 64_000 }
}

/// Attribute: its length, its kind, its value, and zeros up to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [&(4 + value.len() as u16).to_le_bytes()[..], &kind.to_le_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(target_endian = "little")]
#[test]
fn a_rule_is_the_message_that_the_kernel_wants() {
    let rule = FlowerRule {
        port: RulePort::Own,
        chain: 3,
        priority: 7,
        matches: FlowerMatch {
            ethertype: Some(0x8100),
            vlan: Some(VlanMatch { vid: Some(100), ethertype: Some(0x0800) }),
            src_mac: Some(Masked { value: MacAddr([2, 0, 0, 0, 0, 0]), mask: MacAddr([0xff; 6]) }),
            dst_ip: Some(prefix("10.1.0.0/16")),
            ip_proto: Some(17),
            fragment: Some(false),
            dst_port: Some(Masked { value: 0x1f00, mask: 0xff00 }),
            ..FlowerMatch::default()
        },
        actions: vec![
            FlowerAction::VlanPush { protocol: VlanProtocol::Dot1ad, vid: vid(0x321), priority: 5 },
            FlowerAction::Redirect(Target::Vf(VfIndex(0))),
        ],
    };
    let cookie = attribute(6, b"sluice\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08");
    let push = [
        attribute(2, &[0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]),
        attribute(3, &[0x21, 3]),
        attribute(4, &[0x88, 0xa8]),
        attribute(6, &[5]),
    ]
    .concat();
    let redirect =
        attribute(2, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 21, 0, 0, 0]);
    let list = [
        attribute(1, &[attribute(1, b"vlan\0"), attribute(2, &push), cookie.clone()].concat()),
        attribute(2, &[attribute(1, b"mirred\0"), attribute(2, &redirect), cookie].concat()),
    ];
    let options = [
        attribute(8, &[0x81, 0]),
        attribute(23, &[100, 0]),
        attribute(25, &[8, 0]),
        attribute(6, &[2, 0, 0, 0, 0, 0]),
        attribute(7, &[0xff; 6]),
        attribute(12, &[10, 1, 0, 0]),
        attribute(13, &[255, 255, 0, 0]),
        attribute(9, &[17]),
        attribute(47, &[0, 0, 0, 0]),
        attribute(48, &[0, 0, 0, 1]),
        attribute(21, &[0x1f, 0]),
        attribute(38, &[0xff, 0]),
        attribute(3, &list.concat()),
        // skip_sw and verbose.
        attribute(22, &[0x12, 0, 0, 0]),
    ];
    let golden = [
        // struct tcmsg: interface 22, no handle, clsact's ingress side, protocol 0x8100 and priority 7.
        vec![0, 0, 0, 0, 22, 0, 0, 0, 0, 0, 0, 0, 0xf2, 0xff, 0xff, 0xff, 0x81, 0, 7, 0],
        attribute(1, b"flower\0"),
        attribute(11, &[3, 0, 0, 0]),
        attribute(2, &options.concat()),
    ]
    .concat();
    assert_eq!(filter::encode(&rule, 22, &scope(RulePort::Own), Where::Hardware), Ok(golden));
}

#[cfg(target_endian = "little")]
#[test]
fn a_police_action_is_what_nics_take() {
    let list =
        actions::encode(&[FlowerAction::Police(rate()), FlowerAction::Goto(2)], &scope(RulePort::Uplink))
            .expect("actions")
            .into_bytes();
    // 8 Mbit/s are 1 000 000 bytes/s, and 64 000 bytes take 64 ms, 1 000 000 ticks.
    let million = [0x40, 0x42, 0x0f, 0];
    let parms = [
        &scope(RulePort::Uplink).bucket(rate()).to_le_bytes()[..],
        &[2, 0, 0, 0, 0, 0, 0, 0],
        &million,
        &[0, 0, 0, 0],
        &[16, 1, 0, 0, 0, 0, 0, 0],
        &million,
        &[0; 24],
    ]
    .concat();
    let options = [attribute(1, &parms), attribute(2, &[0; 1024]), attribute(5, &[3, 0, 0, 0])].concat();
    let asked = [0, 0, 0, 0, 0, 0x7a, 0x12, 0, 0, 0, 0, 0, 0, 0, 0xfa, 0];
    let police = [attribute(1, b"police\0"), attribute(2, &options), attribute(6, &asked)].concat();
    // VF 1 has the chains from 512 on.
    let goto = attribute(2, &[0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0]);
    let cookie = attribute(6, b"sluice\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08");
    let goto = [attribute(1, b"gact\0"), attribute(2, &goto), cookie].concat();
    assert_eq!(list, [attribute(1, &police), attribute(2, &goto)].concat());
}

#[test]
fn buckets_are_shared_by_the_rules_of_one_vf_and_rate_only() {
    let slower = Rate { bits_per_second: 7_999_999, ..rate() };
    let (own, uplink) = (scope(RulePort::Own), scope(RulePort::Uplink));
    let other = Scope { own: 21, ..own.clone() };
    let numbers = [own.bucket(rate()), own.bucket(slower), uplink.bucket(rate()), other.bucket(rate())];
    assert_eq!(std::collections::BTreeSet::from(numbers).len(), numbers.len(), "{numbers:x?}");
    assert!(numbers.iter().all(|number| *number >= 1 << 31), "the kernel numbers from 1 up");
}

fn matches() -> Vec<FlowerMatch> {
    let mac = |last: u8, mask: u8| {
        Some(Masked { value: MacAddr([2, 0, 0, 0, 0, last & mask]), mask: MacAddr([0xff, 0, 0, 0, 0, mask]) })
    };
    let ipv4 = FlowerMatch { ethertype: Some(0x0800), ..FlowerMatch::default() };
    let ipv6 = FlowerMatch { ethertype: Some(0x86dd), ..FlowerMatch::default() };
    let port = Some(Masked { value: 0x0050, mask: 0xfff0 });
    let mut all = vec![
        FlowerMatch::default(),
        FlowerMatch { src_mac: mac(1, 0xff), dst_mac: mac(8, 0xf8), ..FlowerMatch::default() },
        FlowerMatch { ethertype: Some(0x0806), ..FlowerMatch::default() },
        FlowerMatch { ethertype: Some(0x8100), ..FlowerMatch::default() },
        FlowerMatch {
            ethertype: Some(0x88a8),
            vlan: Some(VlanMatch { vid: Some(0), ethertype: None }),
            ..FlowerMatch::default()
        },
        FlowerMatch {
            src_ip: Some(prefix("10.0.0.0/31")),
            dst_ip: Some(prefix("10.0.0.1/32")),
            ..ipv4.clone()
        },
        FlowerMatch { src_ip: Some(prefix("fc00::/7")), dst_ip: Some(prefix("::1/128")), ..ipv6.clone() },
        FlowerMatch { fragment: Some(true), ..ipv6.clone() },
        FlowerMatch {
            ip_proto: Some(6),
            fragment: Some(false),
            tcp_flags: Some(Masked { value: 2, mask: 0x12 }),
            ..ipv4.clone()
        },
        FlowerMatch { ip_proto: Some(1), icmp_type: Some(8), ..ipv4.clone() },
        FlowerMatch { ip_proto: Some(58), icmp_type: Some(134), icmp_code: Some(0), ..ipv6 },
    ];
    for ip_proto in [6, 17, 132] {
        all.push(FlowerMatch { ip_proto: Some(ip_proto), src_port: port, ..ipv4.clone() });
        all.push(FlowerMatch { ip_proto: Some(ip_proto), dst_port: port, ..ipv4.clone() });
    }
    all
}

#[test]
fn matches_are_read_as_they_were_written() {
    for wanted in matches() {
        let bytes = keys::encode(&wanted).expect("a match").into_bytes();
        assert_eq!(keys::decode(keys::protocol(&wanted), &bytes), Some(wanted));
    }
}

#[test]
fn a_match_with_keys_that_we_never_write_is_none_of_ours() {
    for (wanted, kind) in [(FlowerMatch::default(), 73), (matches()[5].clone(), 2)] {
        let bytes = [keys::encode(&wanted).expect("a match").into_bytes(), attribute(kind, &[1])].concat();
        assert_eq!(keys::decode(keys::protocol(&wanted), &bytes), None);
    }
    // A mask with holes is no prefix.
    let bytes = [attribute(12, &[10, 0, 0, 1]), attribute(13, &[255, 0, 0, 255])].concat();
    assert_eq!(keys::decode(0x0800, &bytes), None);
}

#[test]
fn a_match_that_the_kernel_would_ignore_in_part_is_refused() {
    let port = Some(Masked { value: 80, mask: 0xffff });
    let address: IpAddr = [10, 0, 0, 1].into();
    let host = IpPrefix::new(address, 32).ok();
    for bad in [
        FlowerMatch { vlan: Some(VlanMatch::default()), ..FlowerMatch::default() },
        FlowerMatch { src_ip: host, ..FlowerMatch::default() },
        FlowerMatch { ethertype: Some(0x86dd), src_ip: host, ..FlowerMatch::default() },
        FlowerMatch { ethertype: Some(0x8100), src_ip: host, ..FlowerMatch::default() },
        FlowerMatch { ip_proto: Some(6), ..FlowerMatch::default() },
        FlowerMatch { ethertype: Some(0x0800), src_port: port, ..FlowerMatch::default() },
        FlowerMatch {
            ethertype: Some(0x0800),
            icmp_type: Some(8),
            ip_proto: Some(17),
            ..FlowerMatch::default()
        },
    ] {
        keys::encode(&bad).expect_err("it misses what it needs");
    }
}

#[test]
fn actions_are_read_as_they_were_written_and_no_others() {
    let lists = [
        vec![FlowerAction::Drop],
        vec![FlowerAction::Trap],
        vec![FlowerAction::Goto(13)],
        vec![FlowerAction::Police(rate()), FlowerAction::Redirect(Target::Uplink)],
        vec![
            FlowerAction::Police(Rate { bits_per_second: 100_000_000_001, burst_bytes: 1_000_000 }),
            FlowerAction::VlanPop,
            FlowerAction::VlanPush { protocol: VlanProtocol::Dot1q, vid: vid(4094), priority: 0 },
            FlowerAction::Redirect(Target::Vf(VfIndex(1))),
        ],
    ];
    for port in [RulePort::Own, RulePort::Uplink] {
        let scope = scope(port);
        for wanted in &lists {
            let bytes = actions::encode(wanted, &scope).expect("actions").into_bytes();
            assert_eq!(actions::decode(&Read::new(&bytes), &scope).as_ref(), Some(wanted));
            assert_eq!(actions::cookie(&Read::new(&bytes)), Some(scope.cookie));
            // Redirects and buckets of another eSwitch are not ours.
            let other = Scope { uplink: 30, vfs: BTreeMap::new(), own: 1, ..scope.clone() };
            let names_something =
                |action: &FlowerAction| matches!(action, FlowerAction::Redirect(_) | FlowerAction::Police(_));
            if wanted.iter().any(names_something) {
                assert_eq!(actions::decode(&Read::new(&bytes), &other), None);
            }
        }
        assert!(actions::encode(&[FlowerAction::Redirect(Target::Vf(VfIndex(9)))], &scope).is_none());
    }
    assert!(actions::encode(&[FlowerAction::Goto(256)], &scope(RulePort::Uplink)).is_none());
}

#[test]
fn refusals_mean_what_the_contract_says() {
    let rule = FlowerRule {
        port: RulePort::Own,
        chain: 0,
        priority: 1,
        matches: FlowerMatch::default(),
        actions: vec![FlowerAction::Drop],
    };
    use nix::errno::Errno;
    for (errno, class) in [
        (Errno::EOPNOTSUPP, ErrorClass::Uncovered),
        (Errno::EINVAL, ErrorClass::Uncovered),
        (Errno::ENOSPC, ErrorClass::Uncovered),
        (Errno::EBUSY, ErrorClass::Passing),
        (Errno::ENODEV, ErrorClass::Gone),
        (Errno::EPERM, ErrorClass::Broken),
        (Errno::EIO, ErrorClass::Broken),
    ] {
        let refused = Refusal {
            error: std::io::Error::from_raw_os_error(errno as i32),
            extack: Some("the driver's words".to_owned()),
        };
        let error = super::refusal::of_rule(&rule, &refused);
        assert_eq!(error.class(), class, "{errno}");
        assert!(error.to_string().contains("the driver's words"), "{error}");
    }
}
