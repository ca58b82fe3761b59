//! The oracle's text, case by case: what the design says, said once more by hand.

use super::*;
use crate::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Hook, Policy, Rate, Switch, Uplink, VlanMode,
    Vnic,
};
use crate::net::VlanRange;

const VM1: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VM2: [u8; 6] = [2, 0, 0, 0, 0, 2];
const FAR: [u8; 6] = [2, 0, 0, 0, 0xf, 1];
const ALL: [u8; 6] = [0xff; 6];

fn vid(vid: u32) -> VlanId {
    VlanId::new(vid).expect("in range")
}

fn vnic(number: u8, policy: Policy) -> Vnic {
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach: Attachment::Tap(format!("tap{number}")),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr([2, 0, 0, 0, 0, number]),
        extra_macs: Vec::new(),
        up: true,
        policy,
        sriov: None,
    }
}

/// A switch with an uplink, and vNICs vm1, vm2 … with these policies.
fn config(policies: impl IntoIterator<Item = Policy>) -> Config {
    let uplink = Uplink {
        netdev: "up0".into(),
        hook: Hook::Auto,
        full_checksums: false,
        trunk: Vec::new(),
        native: None,
        learn_limit: 2,
        up: true,
        attest: Vec::new(),
    };
    let switch = Switch { name: "blue".into(), uplink: Some(uplink), internal: None, ageing_seconds: 300 };
    let vnics = (1..).zip(policies).map(|(number, policy)| vnic(number, policy)).collect();
    Config { switches: vec![switch], acl_groups: Vec::new(), vnics }
}

fn open() -> Policy {
    Policy::default()
}

fn on(vlan: VlanMode) -> Policy {
    Policy { vlan, ..Policy::default() }
}

fn trunk(ranges: &[&str], native: Option<u32>) -> VlanMode {
    let allowed: Vec<VlanRange> = ranges.iter().map(|text| text.parse().expect("a range")).collect();
    VlanMode::Trunk { allowed, native: native.map(vid) }
}

fn guarded() -> Policy {
    let ip_guard = ["10.0.0.1", "2001:db8::1"].map(|text| text.parse().expect("an address")).to_vec();
    Policy { ip_guard, dhcp_guard: true, ra_guard: true, ..Policy::default() }
}

fn ethernet(dst: [u8; 6], src: [u8; 6], tags: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [dst, src].concat();
    for (tpid, tci) in tags {
        bytes.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
    }
    bytes.extend(ethertype.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn ipv4(src: &str, proto: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let ip = |text: &str| text.parse::<std::net::Ipv4Addr>().expect("an address").octets();
    let mut bytes = vec![0x45, 0];
    bytes.extend((20 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, proto, 0, 0]);
    bytes.extend([ip(src), ip("10.0.0.2")].concat());
    bytes.extend(payload);
    bytes
}

fn ipv6(src: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let ip = |text: &str| text.parse::<std::net::Ipv6Addr>().expect("an address").octets();
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend((payload.len() as u16).to_be_bytes());
    bytes.extend([next, 255]);
    bytes.extend([ip(src), ip("2001:db8::2")].concat());
    bytes.extend(payload);
    bytes
}

fn udp(src: u16, dst: u16) -> Vec<u8> {
    [src.to_be_bytes(), dst.to_be_bytes(), [0, 12], [0, 0], [1, 2], [3, 4]].concat()
}

fn tcp(dst: u16, flags: u8) -> Vec<u8> {
    let mut bytes = [1024u16.to_be_bytes(), dst.to_be_bytes()].concat();
    bytes.extend([0; 8]);
    bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes
}

/// Neighbour discovery: fixed part with `target` at 8, then options of one unit with an address.
fn discovery(kind: u8, fixed: usize, target: &str, options: &[(u8, [u8; 6])]) -> Vec<u8> {
    let mut bytes = vec![0; fixed];
    bytes[0] = kind;
    if fixed >= 24 {
        bytes[8..24].copy_from_slice(&target.parse::<std::net::Ipv6Addr>().expect("an address").octets());
    }
    for (option, mac) in options {
        bytes.extend([*option, 1]);
        bytes.extend(mac);
    }
    bytes
}

fn run(config: &Config, ingress: &str, frame: &[u8]) -> Outcome {
    evaluate(config, &State::default(), ingress, frame)
}

/// From vm1 with its address to vm2.
fn send(config: &Config, ethertype: u16, payload: &[u8]) -> Outcome {
    run(config, "vnic/vm1", &ethernet(VM2, VM1, &[], ethertype, payload))
}

fn delivered(outcome: &Outcome) -> Vec<&str> {
    outcome.deliveries.iter().filter(|(_, result)| result.is_ok()).map(|(name, _)| name.as_str()).collect()
}

#[test]
fn guards_let_honest_frames_pass_and_stop_the_others() {
    use DropReason::{DhcpGuard, IpGuardArp, IpGuardIpv4, IpGuardIpv6, IpGuardNd, RaGuard};
    let config = config([guarded(), open()]);
    let arp = |mac: [u8; 6], ip: [u8; 4]| {
        [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &ip, &[0; 6], &[10, 0, 0, 2]].concat()
    };
    let own6 = "2001:db8::1";
    let cases: Vec<(&str, u16, Vec<u8>, Option<DropReason>)> = vec![
        ("own IPv4", 0x0800, ipv4("10.0.0.1", 17, 0, &udp(1, 2)), None),
        ("other IPv4", 0x0800, ipv4("10.0.0.9", 17, 0, &udp(1, 2)), Some(IpGuardIpv4)),
        ("later fragment of another", 0x0800, ipv4("10.0.0.9", 17, 0x20, &[0; 8]), Some(IpGuardIpv4)),
        ("DHCP discover", 0x0800, ipv4("0.0.0.0", 17, 0, &udp(68, 67)), None),
        ("no address, not DHCP", 0x0800, ipv4("0.0.0.0", 17, 0, &udp(68, 69)), Some(IpGuardIpv4)),
        ("DHCP offer", 0x0800, ipv4("10.0.0.1", 17, 0, &udp(67, 68)), Some(DhcpGuard)),
        ("DHCP offer from elsewhere", 0x0800, ipv4("10.0.0.1", 17, 0, &udp(1067, 68)), Some(DhcpGuard)),
        ("DHCPv6 reply", 0x86dd, ipv6(own6, 17, &udp(547, 546)), Some(DhcpGuard)),
        ("DHCPv6 request", 0x86dd, ipv6("fe80::ff:fe00:1", 17, &udp(546, 547)), None),
        ("ARP", 0x0806, arp(VM1, [10, 0, 0, 1]), None),
        ("ARP probe", 0x0806, arp(VM1, [0; 4]), None),
        ("ARP for another", 0x0806, arp(VM1, [10, 0, 0, 2]), Some(IpGuardArp)),
        ("ARP with another MAC", 0x0806, arp(VM2, [10, 0, 0, 1]), Some(IpGuardArp)),
        (
            "ARP for Token Ring",
            0x0806,
            [&[0, 6][..], &arp(VM1, [10, 0, 0, 1])[2..]].concat(),
            Some(IpGuardArp),
        ),
        ("own IPv6", 0x86dd, ipv6(own6, 59, &[]), None),
        ("own link-local", 0x86dd, ipv6("fe80::ff:fe00:1", 59, &[]), None),
        ("another's link-local", 0x86dd, ipv6("fe80::ff:fe00:2", 59, &[]), Some(IpGuardIpv6)),
        ("own IPv4 in IPv6", 0x86dd, ipv6("::ffff:10.0.0.1", 59, &[]), Some(IpGuardIpv6)),
        ("DAD", 0x86dd, ipv6("::", 58, &discovery(135, 24, own6, &[])), None),
        ("no IPv6 source, not DAD", 0x86dd, ipv6("::", 58, &discovery(133, 8, own6, &[])), Some(IpGuardIpv6)),
        ("advertises itself", 0x86dd, ipv6(own6, 58, &discovery(136, 24, own6, &[(2, VM1)])), None),
        (
            "advertises another",
            0x86dd,
            ipv6(own6, 58, &discovery(136, 24, "2001:db8::2", &[(2, VM1)])),
            Some(IpGuardNd),
        ),
        ("claims a MAC", 0x86dd, ipv6(own6, 58, &discovery(136, 24, own6, &[(2, VM2)])), Some(IpGuardNd)),
        (
            "solicits with another MAC",
            0x86dd,
            ipv6(own6, 58, &discovery(135, 24, own6, &[(1, VM2)])),
            Some(IpGuardNd),
        ),
        (
            "target option of a solicitation",
            0x86dd,
            ipv6(own6, 58, &discovery(135, 24, own6, &[(2, VM2)])),
            None,
        ),
        ("nine options", 0x86dd, ipv6(own6, 58, &discovery(135, 24, own6, &[(1, VM1); 9])), Some(IpGuardNd)),
        ("eight options", 0x86dd, ipv6(own6, 58, &discovery(135, 24, own6, &[(1, VM1); 8])), None),
        (
            "router advertisement",
            0x86dd,
            ipv6(own6, 58, &discovery(134, 16, own6, &[(1, VM1)])),
            Some(RaGuard),
        ),
        ("not IP", 0x88cc, vec![0; 40], None),
    ];
    for (name, ethertype, payload, wanted) in cases {
        let outcome = send(&config, ethertype, &payload);
        assert_eq!(outcome.dropped, wanted, "{name}: {:#?}", outcome.steps);
        assert_eq!(delivered(&outcome).len(), usize::from(wanted.is_none()), "{name}");
    }
}

#[test]
fn headers_that_lie_or_nest_too_deep_are_malformed() {
    use DropReason::*;
    let config = config([open(), open()]);
    let options = |count: usize| {
        let mut chain: Vec<u8> = (1..count).flat_map(|_| [60, 0, 0, 0, 0, 0, 0, 0]).collect();
        chain.extend([59, 0, 0, 0, 0, 0, 0, 0]);
        chain
    };
    let mut long = ipv4("10.0.0.1", 17, 0, &udp(1, 2));
    long[3] += 1;
    let mut offset = tcp(80, 2);
    offset[12] = 0x60;
    let mut short = udp(1, 2);
    short[5] = 7;
    let fragment = |offset: u16| [&[6, 0][..], &offset.to_be_bytes(), &[0; 4], &tcp(80, 2)[..8]].concat();
    let cases: Vec<(&str, u16, Vec<u8>, Option<DropReason>)> = vec![
        ("IPv4 cut off", 0x0800, vec![0x45; 19], Some(MalformedIpv4)),
        ("IPv4 longer than the frame", 0x0800, long, Some(MalformedLength)),
        ("IPv4 with padding", 0x0800, [ipv4("10.0.0.1", 17, 0, &udp(1, 2)), vec![0; 9]].concat(), None),
        ("TCP data offset past the end", 0x0800, ipv4("10.0.0.1", 6, 0, &offset), Some(MalformedTcp)),
        ("the same, with more to come", 0x0800, ipv4("10.0.0.1", 6, 0x2000, &offset), Some(TinyFragment)),
        ("first fragment without ports", 0x0800, ipv4("10.0.0.1", 17, 0x2000, &[0; 7]), Some(TinyFragment)),
        ("second fragment over the flags", 0x0800, ipv4("10.0.0.1", 6, 0x0001, &[0; 8]), Some(TinyFragment)),
        ("second fragment of UDP", 0x0800, ipv4("10.0.0.1", 17, 0x0001, &[0; 8]), None),
        ("UDP length below its header", 0x0800, ipv4("10.0.0.1", 17, 0, &short), Some(MalformedUdp)),
        ("SCTP cut off", 0x0800, ipv4("10.0.0.1", 132, 0, &[0; 11]), Some(MalformedSctp)),
        ("ICMP cut off", 0x0800, ipv4("10.0.0.1", 1, 0, &[0; 7]), Some(MalformedIcmp)),
        ("unknown protocol", 0x0800, ipv4("10.0.0.1", 253, 0, &[]), None),
        ("eight extension headers", 0x86dd, ipv6("fe80::1", 60, &options(8)), None),
        ("nine", 0x86dd, ipv6("fe80::1", 60, &options(9)), Some(MalformedIpv6Extension)),
        (
            "an extension header of 200 bytes",
            0x86dd,
            ipv6("fe80::1", 60, &[&[59, 23][..], &[0; 190]].concat()),
            None,
        ),
        (
            "of 208",
            0x86dd,
            ipv6("fe80::1", 60, &[&[59, 24][..], &[0; 198]].concat()),
            Some(MalformedIpv6Extension),
        ),
        ("a first fragment too small", 0x86dd, ipv6("fe80::1", 44, &fragment(1)), Some(TinyFragment)),
        ("a whole one cut off", 0x86dd, ipv6("fe80::1", 44, &fragment(0)), Some(MalformedTcp)),
        ("a later one", 0x86dd, ipv6("fe80::1", 44, &fragment(8)), None),
        ("ARP with other lengths", 0x0806, [&[0, 1, 8, 0, 6, 16][..], &[0; 30]].concat(), Some(MalformedArp)),
        ("802.3 length", 0x0026, vec![0; 38], None),
    ];
    for (name, ethertype, payload, wanted) in cases {
        let outcome = send(&config, ethertype, &payload);
        assert_eq!(outcome.dropped, wanted, "{name}: {:#?}", outcome.steps);
    }
    let tag = (0x8100, 0);
    let tagged = |tags: &[(u16, u16)]| ethernet(VM2, VM1, tags, 0x88cc, &[]);
    for (frame, wanted) in [
        (tagged(&[])[..13].to_vec(), MalformedEthernet),
        (tagged(&[tag])[..17].to_vec(), MalformedVlan),
        (tagged(&[tag; 3]), VlanDepth),
    ] {
        assert_eq!(run(&config, "vnic/vm1", &frame).dropped, Some(wanted));
    }
    assert_eq!(run(&config, "vnic/vm9", &tagged(&[])).dropped, Some(PortUnknown));
}

#[test]
fn tags_say_the_vlan_and_are_rewritten_on_the_way_out() {
    let c = |vid: u16| (0x8100, vid);
    let s = |vid: u16| (0x88a8, vid);
    let config = config([
        on(VlanMode::Access(vid(10))),
        on(VlanMode::Access(vid(10))),
        on(trunk(&["10-12"], Some(20))),
        on(VlanMode::Tunnel(vid(10))),
    ]);
    let vm = |number: u8| ([2, 0, 0, 0, 0, number], format!("vnic/vm{number}"));
    // From vNIC, tags in, to vNIC (0: the uplink), tags out or the reason.
    let cases: Vec<(u8, Vec<_>, u8, Result<Vec<_>, DropReason>)> = vec![
        (1, vec![], 2, Ok(vec![])),
        (1, vec![c(0xe000)], 2, Ok(vec![])),
        (1, vec![c(0xe000)], 0, Ok(vec![c(0xe00a)])),
        (1, vec![c(10)], 2, Err(DropReason::VlanTagged)),
        (1, vec![c(0), c(5)], 2, Err(DropReason::VlanTagged)),
        (1, vec![], 3, Ok(vec![c(10)])),
        (1, vec![], 4, Err(DropReason::VlanEgress)),
        (3, vec![c(0x600a)], 1, Ok(vec![])),
        (3, vec![c(0x600a)], 0, Ok(vec![c(0x600a)])),
        (3, vec![c(10), c(99)], 1, Ok(vec![c(99)])),
        (3, vec![c(9)], 1, Err(DropReason::VlanNotAllowed)),
        (3, vec![s(10)], 1, Err(DropReason::VlanNotAllowed)),
        (3, vec![c(4095)], 1, Err(DropReason::VlanNotAllowed)),
        (3, vec![], 0, Ok(vec![c(20)])),
        (3, vec![c(20)], 0, Ok(vec![c(20)])),
        (4, vec![], 0, Ok(vec![s(10)])),
        (4, vec![c(7)], 0, Ok(vec![s(10), c(7)])),
        (4, vec![c(7), c(8)], 0, Err(DropReason::VlanDepth)),
    ];
    for (from, tags, to, wanted) in cases {
        let (src, ingress) = vm(from);
        let (dst, egress) = if to == 0 { (FAR, "uplink/blue".to_owned()) } else { vm(to) };
        let outcome = run(&config, &ingress, &ethernet(dst, src, &tags, 0x88cc, &[1, 2, 3]));
        let wanted = wanted.map(|tags| ethernet(dst, src, &tags, 0x88cc, &[1, 2, 3]));
        let found = match outcome.dropped {
            Some(reason) => Err(reason),
            None => outcome.deliveries.get(&egress).cloned().unwrap_or(Err(DropReason::NoDestination)),
        };
        assert_eq!(found, wanted, "from {from} with {tags:x?} to {to}");
    }
    // From the uplink, service and customer VLANs are apart.
    let from_uplink = |dst, tags: &[_]| run(&config, "uplink/blue", &ethernet(dst, FAR, tags, 0x88cc, &[]));
    assert_eq!(delivered(&from_uplink(vm(4).0, &[s(10), c(7)])), ["vnic/vm4"]);
    assert_eq!(delivered(&from_uplink(vm(1).0, &[s(10)])), [""; 0]);
    assert_eq!(delivered(&from_uplink(ALL, &[c(10)])), ["vnic/vm1", "vnic/vm2", "vnic/vm3"]);
    assert_eq!(from_uplink(ALL, &[]).dropped, Some(DropReason::NoDestination));
}

/// The inner tag of a frame that leaves untagged would be taken for its VLAN.
#[test]
fn frames_do_not_hop_between_vlans() {
    let mut config = config([on(trunk(&["10"], None)), on(trunk(&["11"], Some(10)))]);
    let hop = ethernet(FAR, VM1, &[(0x8100, 10), (0x8100, 99)], 0x88cc, &[]);
    let bytes = run(&config, "vnic/vm1", &hop).deliveries.remove("uplink/blue");
    assert_eq!(bytes, Some(Ok(hop.clone())));
    config.switches[0].uplink.as_mut().expect("one").native = Some(vid(10));
    assert_eq!(run(&config, "vnic/vm1", &hop).dropped, Some(DropReason::NoDestination));
    let to_trunk = ethernet(VM2, VM1, &[(0x8100, 10), (0x8100, 99)], 0x88cc, &[]);
    let outcome = run(&config, "vnic/vm1", &to_trunk);
    assert_eq!(outcome.deliveries["vnic/vm2"], Err(DropReason::VlanEgress));
}

fn rule(priority: u32, matches: AclMatch, action: AclAction) -> AclRule {
    AclRule { priority, direction: Direction::FromVm, matches, action }
}

#[test]
fn the_best_rule_decides_and_among_equals_a_deny() {
    let web = AclMatch {
        ip_proto: Some(6),
        dst_ports: vec!["80-90".parse().expect("a range")],
        ..AclMatch::default()
    };
    let tcp_only = AclMatch { ip_proto: Some(6), ..AclMatch::default() };
    let from = |rules: Vec<AclRule>, default_from_vm| {
        let acl = Acl { groups: vec!["g".into()], rules, default_from_vm, ..Acl::default() };
        let mut config = config([Policy { acl, ..open() }, open()]);
        config.acl_groups =
            vec![AclGroup { name: "g".into(), rules: vec![rule(5, web.clone(), AclAction::Allow)] }];
        config
    };
    let ask = |config: &Config, payload: &[u8], fragment| {
        let outcome = send(config, 0x0800, &ipv4("10.0.0.1", 6, fragment, payload));
        let decision = outcome.from_vm.expect("the ACL was asked");
        let rules: Vec<_> = decision.rules.into_iter().map(|rule| (rule.group, rule.index)).collect();
        assert_eq!(outcome.dropped.is_none(), decision.action == AclAction::Allow);
        (decision.action, rules)
    };
    let shared = ("group/g".to_owned(), 0);
    let own = |index| ("vnic/vm1".to_owned(), index);

    let config = from(vec![rule(4, tcp_only.clone(), AclAction::Deny)], AclAction::Deny);
    assert_eq!(ask(&config, &tcp(80, 2), 0), (AclAction::Allow, vec![shared.clone()]));
    assert_eq!(ask(&config, &tcp(91, 2), 0), (AclAction::Deny, vec![own(0)]));
    // A later fragment has no ports, but it is TCP.
    assert_eq!(ask(&config, &[0; 24], 0x0010), (AclAction::Deny, vec![own(0)]));

    let config = from(vec![rule(5, tcp_only.clone(), AclAction::Deny)], AclAction::Allow);
    assert_eq!(ask(&config, &tcp(80, 2), 0), (AclAction::Deny, vec![own(0)]));

    let config = from(vec![rule(5, tcp_only, AclAction::Allow)], AclAction::Deny);
    assert_eq!(ask(&config, &tcp(80, 2), 0), (AclAction::Allow, vec![shared, own(0)]));

    let config = from(vec![], AclAction::Deny);
    assert_eq!(ask(&config, &tcp(443, 2), 0), (AclAction::Deny, vec![]));
    // The other direction has a default of its own.
    let back = run(&config, "vnic/vm2", &ethernet(VM1, VM2, &[], 0x88cc, &[]));
    assert_eq!(delivered(&back), ["vnic/vm1"]);
}

#[test]
fn learnt_addresses_lead_until_they_are_too_old() {
    let config = config([open(), open(), Policy { unknown_unicast: true, ..open() }]);
    let station = Station { switch: "blue".into(), domain: Domain::Untagged, mac: MacAddr(FAR) };
    let to_far = ethernet(FAR, VM1, &[], 0x88cc, &[]);
    let with_age = |age_seconds| {
        let sighting = Sighting { port: "vnic/vm2".into(), age_seconds };
        let state = State { fdb: [(station.clone(), sighting)].into(), ..State::default() };
        evaluate(&config, &state, "vnic/vm1", &to_far)
    };
    assert_eq!(delivered(&with_age(300)), ["vnic/vm2"]);
    assert_eq!(delivered(&with_age(301)), ["uplink/blue", "vnic/vm3"]);
    assert_eq!(delivered(&run(&config, "vnic/vm1", &to_far)), ["uplink/blue", "vnic/vm3"]);
    assert_eq!(run(&config, "vnic/vm1", &to_far).learnt, None);

    // The uplink learns others' addresses up to its limit, and moves them, but never our own.
    let learnt = |src, state: &State| {
        evaluate(&config, state, "uplink/blue", &ethernet(VM1, src, &[], 0x88cc, &[])).learnt
    };
    assert_eq!(learnt(FAR, &State::default()), Some(station.clone()));
    assert_eq!(learnt(VM2, &State::default()), None);
    let full = |port: &str, age_seconds| State {
        fdb: (1..=2)
            .map(|last| {
                let mac = MacAddr([2, 0, 0, 0, 0xf, last]);
                (Station { mac, ..station.clone() }, Sighting { port: port.into(), age_seconds })
            })
            .collect(),
        ..State::default()
    };
    assert_eq!(learnt([2, 0, 0, 0, 0xf, 9], &full("uplink/blue", 5)), None);
    assert_eq!(learnt(FAR, &full("uplink/blue", 5)), Some(station.clone()));
    assert_eq!(learnt(FAR, &full("uplink/blue", 0)), None);
    assert_eq!(learnt(FAR, &full("vnic/vm1", 0)), Some(station));
}

#[test]
fn ports_that_are_down_absent_or_over_their_rate_get_nothing() {
    let rate = Some(Rate { bits_per_second: 1_000_000, burst_bytes: 2_000 });
    let mut config =
        config([Policy { rate_from_vm: rate, ..open() }, Policy { rate_to_vm: rate, ..open() }, open()]);
    let frame = ethernet(VM2, VM1, &[], 0x88cc, &[]);
    let empty = |port: &str, direction| State {
        empty_buckets: [(port.to_owned(), direction)].into(),
        ..State::default()
    };
    let from = evaluate(&config, &empty("vnic/vm1", Direction::FromVm), "vnic/vm1", &frame);
    assert_eq!(from.dropped, Some(DropReason::RateFromVm));
    let to = evaluate(&config, &empty("vnic/vm2", Direction::ToVm), "vnic/vm1", &frame);
    assert_eq!((to.dropped, &to.deliveries["vnic/vm2"]), (None, &Err(DropReason::RateToVm)));
    // No limit, no bucket.
    let other = evaluate(
        &config,
        &empty("vnic/vm2", Direction::FromVm),
        "vnic/vm2",
        &ethernet(VM1, VM2, &[], 0x88cc, &[]),
    );
    assert_eq!(delivered(&other), ["vnic/vm1"]);

    let state = State { unattached: ["vnic/vm2".to_owned()].into(), ..State::default() };
    let absent = evaluate(&config, &state, "vnic/vm1", &frame);
    assert_eq!(absent.deliveries["vnic/vm2"], Err(DropReason::DestinationDown));
    let flooded = evaluate(&config, &state, "vnic/vm1", &ethernet(ALL, VM1, &[], 0x88cc, &[]));
    assert_eq!(flooded.deliveries.keys().collect::<Vec<_>>(), ["uplink/blue", "vnic/vm3"]);
    config.vnics[0].up = false;
    assert_eq!(run(&config, "vnic/vm1", &frame).dropped, Some(DropReason::PortDown));
}

#[test]
fn some_destinations_are_none() {
    let config = config([open(), open()]);
    let to = |dst| run(&config, "vnic/vm1", &ethernet(dst, VM1, &[], 0x88cc, &[]));
    assert_eq!(to([1, 0x80, 0xc2, 0, 0, 15]).dropped, Some(DropReason::ReservedMulticast));
    assert_eq!(delivered(&to([1, 0x80, 0xc2, 0, 0, 16])), ["uplink/blue", "vnic/vm2"]);
    assert_eq!(to(VM1).dropped, Some(DropReason::SourcePort));
    let forged = |src| run(&config, "vnic/vm1", &ethernet(VM2, src, &[], 0x88cc, &[])).dropped;
    assert_eq!(forged([3, 0, 0, 0, 0, 1]), Some(DropReason::MulticastSource));
    assert_eq!(forged(VM2), Some(DropReason::MacGuard));
    let names: Vec<_> = to(VM2).steps.iter().map(|step| (step.stage, step.port.clone())).collect();
    assert_eq!(names.len(), 12);
    assert_eq!(names.last(), Some(&(Stage::RateToVm, "vnic/vm2".to_owned())));
}
