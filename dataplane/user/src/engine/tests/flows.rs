//! Frames of known flows fare as the first did, and no others do.

use sluice_policy::config::Masked;

use super::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Where the protocol and TCP's flags are in [`ipv4`].
const PROTO: usize = 23;
const FLAGS: usize = 47;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;

fn deny(matches: AclMatch) -> AclRule {
    AclRule { priority: 1, direction: Direction::FromVm, matches, action: AclAction::Deny }
}

fn policy(rules: Vec<AclRule>) -> Policy {
    let mut policy = Policy::default();
    policy.acl.rules = rules;
    policy
}

impl Bench {
    fn two(policies: [Policy; 2]) -> (Bench, u32, u32) {
        let bench = Bench::new(policies.to_vec(), &[Accepts::ALL; 2]);
        let [one, two] = bench.ports[..] else { panic!("two ports") };
        (bench, one, two)
    }

    /// Sends a frame so many times, in a batch each; how many arrive at `port`.
    fn repeat(&mut self, ingress: u32, bytes: &[u8], times: usize, port: u32) -> usize {
        for _ in 0..times {
            let frame = self.pool().copy(bytes).expect("memory");
            self.process(ingress, vec![frame], SECOND);
        }
        self.received(port).len()
    }
}

#[test]
fn flags_and_protocols_are_told_apart() {
    let syn = Masked { value: SYN, mask: SYN };
    let no_syn = deny(AclMatch { ip_proto: Some(TCP), tcp_flags: Some(syn), ..AclMatch::default() });
    let no_udp = deny(AclMatch { ip_proto: Some(UDP), ..AclMatch::default() });
    let (mut bench, one, two) = Bench::two([policy(vec![no_syn, no_udp]), Policy::default()]);
    let mut bytes = ipv4(mac(2), mac(1), 0, TCP);
    // Good as the length of a UDP datagram, too.
    bytes[39] = 50;
    assert_eq!(bytes[FLAGS], ACK);
    assert_eq!(bench.repeat(one, &bytes, 3, two), 3);
    for (at, value) in [(FLAGS, ACK | SYN), (PROTO, UDP)] {
        let mut other = bytes.clone();
        other[at] = value;
        assert_eq!(bench.repeat(one, &other, 3, two), 0, "byte {at}");
    }
    assert_eq!(bench.repeat(one, &bytes, 3, two), 3);
    assert_eq!(bench.engine.drops(one, DropReason::AclFromVm), 6);
}

#[test]
fn ports_and_policies_have_flows_of_their_own() {
    let spoofing = Policy { allow_spoofing: true, ..Policy::default() };
    let denied = Policy { allow_spoofing: true, ..policy(vec![deny(AclMatch::default())]) };
    let policies = vec![spoofing.clone(), denied.clone(), Policy::default()];
    let mut bench = Bench::new(policies, &[Accepts::ALL; 3]);
    let [one, two, three] = bench.ports[..] else { panic!("three ports") };
    let bytes = ipv4(mac(3), mac(9), 0, UDP);
    assert_eq!(bench.repeat(one, &bytes, 2, three), 2);
    assert_eq!(bench.repeat(two, &bytes, 2, three), 0, "another port under another policy");
    bench.engine.apply(image(vec![denied, spoofing, Policy::default()]).0);
    assert_eq!(bench.repeat(one, &bytes, 2, three), 0, "it was allowed before");
    assert_eq!(bench.repeat(two, &bytes, 2, three), 2);
}

#[test]
fn known_flows_pay_what_others_pay() {
    // Ten frames of 84 bytes.
    let rate = Some(Rate { bits_per_second: 8_000, burst_bytes: 840 });
    let plain = policy(vec![deny(AclMatch { ip_proto: Some(TCP), ..AclMatch::default() })]);
    let sends = Policy { rate_from_vm: rate, ..plain.clone() };
    let receives = Policy { rate_to_vm: rate, ..plain.clone() };
    let bytes = ipv4(mac(2), mac(1), 0, UDP);
    for (policies, reason) in
        [([sends, plain.clone()], DropReason::RateFromVm), ([plain, receives], DropReason::RateToVm)]
    {
        let (mut bench, one, two) = Bench::two(policies);
        assert_eq!(bench.repeat(one, &bytes, 15, two), 10);
        let limited = if reason == DropReason::RateFromVm { one } else { two };
        assert_eq!(bench.engine.drops(limited, reason), 5);
    }
}

#[test]
fn known_flows_are_counted_and_not_classified_again() {
    let mut allow = deny(AclMatch { ip_proto: Some(UDP), ..AclMatch::default() });
    allow.action = AclAction::Allow;
    let (mut bench, one, two) = Bench::two([policy(vec![allow]), Policy::default()]);
    let rule = bench.image_rule();
    let bytes = ipv4(mac(2), mac(1), 0, UDP);
    assert_eq!(bench.repeat(one, &bytes, 9, two), 9);
    let (sent, received) = (bench.engine.port_stats(one), bench.engine.port_stats(two));
    assert_eq!((sent.rx_packets, sent.rx_bytes), (9, 9 * 84));
    assert_eq!((received.tx_packets, received.tx_bytes), (9, 9 * 84));
    assert_eq!(sent.cache_misses, 1);
    let rule = bench.engine.rule_stats(rule);
    assert_eq!((rule.packets, rule.bytes), (9, 9 * 84));
}

#[test]
fn a_guests_unfinished_checksum_is_of_a_flow_where_it_is_honest() {
    let rules = vec![deny(AclMatch { ip_proto: Some(1), ..AclMatch::default() })];
    let (mut bench, one, two) = Bench::two([policy(rules), Policy::default()]);
    for _ in 0..2 {
        for (start, offset, passes) in [(34, 6, true), (26, 0, false), (34, 2, false)] {
            let mut frame = bench.pool().copy(&ipv4(mac(2), mac(1), 0, UDP)).expect("memory");
            let checksum = Checksum::Partial { start, offset };
            frame.set_offload(Offload { checksum, gso: None }).expect("it fits");
            bench.process(one, vec![frame], SECOND);
            assert_eq!(bench.received(two).len(), usize::from(passes), "{start} {offset}");
        }
        let frame = super_frame(bench.pool(), mac(2), mac(1)).expect("memory");
        bench.process(one, vec![frame], SECOND);
        assert_eq!(bench.received(two).len(), 1);
    }
    assert_eq!(bench.engine.drops(one, DropReason::MalformedLength), 4);
}

impl Bench {
    /// The counter of the only rule.
    fn image_rule(&self) -> u32 {
        let wanted = self.engine.wanted.lock();
        let mut rules = wanted.image.groups.values().flat_map(|group| group.rules.values());
        rules.next().expect("a rule").counter
    }
}
