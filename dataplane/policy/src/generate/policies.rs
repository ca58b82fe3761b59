//! Configurations and states.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Rng, Scenario};
use crate::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Config, Direction, Hook, Internal, Masked,
    Policy, Rate, Switch, Uplink, VlanMode, Vnic,
};
use crate::image::Backing;
use crate::lower;
use crate::net::{IpPrefix, MacAddr, PortRange, VlanId, VlanRange};
use crate::oracle::{Domain, Sighting, State, Station};

/// VLANs that occur.
pub(super) const VLANS: [u16; 7] = [1, 5, 10, 11, 20, 100, 4094];
/// Transport ports that occur.
pub(super) const PORTS: [u16; 13] = [0, 22, 53, 67, 68, 80, 443, 546, 547, 1023, 1024, 8080, 65_535];

/// The main address of the vNIC with this number.
pub(super) const fn vnic_mac(number: usize) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, 0, number as u8])
}

/// An address that is no port's.
pub(super) const fn station_mac(number: usize) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, 0xf0, number as u8])
}

/// How many [`station_mac`]s occur.
pub(super) const STATIONS: usize = 4;

/// An IPv4 address; vNICs' guards use those below 12.
pub(super) fn ip4(number: usize) -> IpAddr {
    IpAddr::from([10, 0, 0, number as u8])
}

/// An IPv6 address, likewise.
pub(super) fn ip6(number: usize) -> IpAddr {
    IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, number as u16])
}

/// One of the VLANs, the first one most often: so ports meet.
fn vid(rng: &mut Rng) -> VlanId {
    let vid = if rng.chance(70) { VLANS[0] } else { *rng.pick(&VLANS) };
    VlanId::new(u32::from(vid)).expect("all are between 1 and 4094")
}

/// A configuration of 1–3 switches and 2–8 vNICs, with a state.
pub fn scenario(rng: &mut Rng) -> Scenario {
    let switches: Vec<Switch> = (0..*rng.pick(&[1, 1, 1, 2, 3])).map(|number| switch(rng, number)).collect();
    let acl_groups: Vec<AclGroup> = (0..rng.below(4))
        .map(|number| AclGroup { name: format!("g{number}"), rules: rules(rng, 12) })
        .collect();
    let groups: Vec<&str> = acl_groups.iter().map(|group| group.name.as_str()).collect();
    let vnics =
        (1..=*rng.pick(&[2, 4, 6, 8, 8])).map(|number| vnic(rng, number, &switches, &groups)).collect();
    let config = Config { switches, acl_groups, vnics };
    let state = state(rng, &config);
    Scenario { config, state }
}

fn switch(rng: &mut Rng, number: usize) -> Switch {
    let uplink = rng.chance(75).then(|| Uplink {
        netdev: format!("up{number}"),
        hook: Hook::Auto,
        full_checksums: false,
        trunk: if rng.chance(30) { ranges(rng) } else { Vec::new() },
        native: rng.chance(40).then(|| vid(rng)),
        learn_limit: *rng.pick(&[0, 2, 16_384, 16_384]),
        up: rng.chance(96),
        attest: Vec::new(),
    });
    let internal = rng.chance(30).then(|| Internal {
        netdev: format!("host{number}"),
        mac: rng.chance(50).then_some(MacAddr([0x02, 0, 0, 0, 0xee, number as u8])),
        vlan: vlan_mode(rng),
    });
    Switch { name: format!("s{number}"), uplink, internal, ageing_seconds: *rng.pick(&[1, 300, 1_000_000]) }
}

fn ranges(rng: &mut Rng) -> Vec<VlanRange> {
    let mut ranges: Vec<VlanRange> = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let (a, b) = (vid(rng), vid(rng));
        let last = if rng.chance(60) { a } else { a.max(b) };
        let range = VlanRange::new(a.min(last), last).expect("the lower end comes first");
        if ranges.iter().all(|other| other.last() < range.first() || range.last() < other.first()) {
            ranges.push(range);
        }
    }
    ranges
}

fn vlan_mode(rng: &mut Rng) -> VlanMode {
    match rng.below(10) {
        0 => VlanMode::Untagged,
        1..=5 => VlanMode::Access(vid(rng)),
        6..=8 => VlanMode::Trunk { allowed: ranges(rng), native: rng.chance(50).then(|| vid(rng)) },
        _ => VlanMode::Tunnel(vid(rng)),
    }
}

fn vnic(rng: &mut Rng, number: usize, switches: &[Switch], groups: &[&str]) -> Vnic {
    let mut ip_guard = Vec::new();
    if rng.chance(45) {
        if rng.chance(85) {
            ip_guard.push(ip4(number));
        }
        if ip_guard.is_empty() || rng.chance(85) {
            ip_guard.push(ip6(number));
        }
    }
    let rate = |rng: &mut Rng| {
        rng.chance(20).then(|| Rate {
            bits_per_second: *rng.pick(&[8_000, 1_000_000, 10_000_000_000]),
            burst_bytes: *rng.pick(&[1_540, 65_536]),
        })
    };
    let mut acl =
        Acl { default_from_vm: default_action(rng), default_to_vm: default_action(rng), ..Acl::default() };
    if rng.chance(50) {
        acl.groups = groups.iter().filter(|_| rng.chance(60)).map(|name| (*name).to_owned()).collect();
    }
    if rng.chance(25) {
        acl.rules = rules(rng, 6);
    }
    let name = format!("vm{number}");
    let netdev = format!("p{number}");
    Vnic {
        name,
        switch: rng.pick(switches).name.clone(),
        attach: if rng.chance(50) { Attachment::Veth(netdev) } else { Attachment::Tap(netdev) },
        hook: Hook::Auto,
        full_checksums: false,
        mac: vnic_mac(number),
        extra_macs: (0..rng.below(4))
            .filter(|_| number.is_multiple_of(3))
            .map(|extra| MacAddr([0x02, 0, 0, 0, 1 + extra as u8, number as u8]))
            .collect(),
        up: rng.chance(97),
        policy: Policy {
            vlan: vlan_mode(rng),
            allow_spoofing: rng.chance(35),
            ip_guard,
            dhcp_guard: rng.chance(50),
            ra_guard: rng.chance(50),
            unknown_unicast: rng.chance(30),
            learn_limit: rng.chance(30).then(|| rng.below(4) as u32),
            acl,
            rate_from_vm: rate(rng),
            rate_to_vm: rate(rng),
        },
        sriov: None,
    }
}

fn default_action(rng: &mut Rng) -> AclAction {
    if rng.chance(15) { AclAction::Deny } else { AclAction::Allow }
}

/// Rules that overlap and tie, no two the same.
fn rules(rng: &mut Rng, most: usize) -> Vec<AclRule> {
    let mut seen = BTreeSet::new();
    let mut rules = Vec::new();
    for _ in 0..rng.below(most + 1) {
        let rule = AclRule {
            priority: *rng.pick(&[0, 1, 1, 2, 100, 65_535]),
            direction: if rng.chance(50) { Direction::FromVm } else { Direction::ToVm },
            matches: matches(rng),
            action: if rng.chance(40) { AclAction::Deny } else { AclAction::Allow },
        };
        if seen.insert((rule.priority, rule.direction, rule.matches.clone())) {
            rules.push(rule);
        }
    }
    rules
}

fn matches(rng: &mut Rng) -> AclMatch {
    let mut matches = AclMatch::default();
    if rng.chance(15) {
        matches.src_mac = Some(masked_mac(rng));
    }
    if rng.chance(15) {
        matches.dst_mac = Some(masked_mac(rng));
    }
    if rng.chance(12) {
        matches.vlan = Some(vid(rng));
    }
    if rng.chance(30) {
        // Layer 2 only.
        if rng.chance(85) {
            matches.ethertype = Some(*rng.pick(&[0x0800, 0x0806, 0x86dd, 0x88cc, 0x0026]));
        }
        return matches;
    }
    let is_ipv4 = rng.chance(50);
    if rng.chance(35) {
        matches.src_ip = Some(prefix(rng, is_ipv4));
    }
    if rng.chance(35) {
        matches.dst_ip = Some(prefix(rng, is_ipv4));
    }
    match rng.below(8) {
        0 | 1 => {
            matches.ip_proto = Some(6);
            if rng.chance(40) {
                let mask = *rng.pick(&[0x02, 0x12, 0x17, 0xff]);
                matches.tcp_flags = Some(Masked { value: *rng.pick(&[0, 0x02, 0x10, 0x12]) & mask, mask });
            }
        }
        2 | 3 => matches.ip_proto = Some(17),
        4 => matches.ip_proto = Some(132),
        5 => {
            matches.ip_proto = Some(if is_ipv4 { 1 } else { 58 });
            if rng.chance(70) {
                matches.icmp_type = Some(*rng.pick(if is_ipv4 { &[0, 3, 8] } else { &[1, 128, 135] }));
                matches.icmp_code = rng.chance(40).then(|| rng.below(2) as u8);
            }
        }
        6 => matches.ip_proto = Some(*rng.pick(&[0, 1, 47, 50, 58, 59, 60, 255])),
        _ => {}
    }
    if matches!(matches.ip_proto, Some(6 | 17 | 132)) {
        matches.src_ports = port_ranges(rng, 25);
        matches.dst_ports = port_ranges(rng, 60);
    }
    if rng.chance(10) {
        matches.ethertype = Some(if is_ipv4 { 0x0800 } else { 0x86dd });
    }
    matches
}

fn masked_mac(rng: &mut Rng) -> Masked<MacAddr> {
    let mask = *rng.pick(&[
        [0xff; 6],
        [0xff, 0xff, 0xff, 0xff, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0; 6],
    ]);
    let value = match rng.below(3) {
        0 => [0xff; 6],
        1 => vnic_mac(1 + rng.below(8)).0,
        _ => station_mac(rng.below(STATIONS)).0,
    };
    let value = std::array::from_fn(|i| value[i] & mask[i]);
    Masked { value: MacAddr(value), mask: MacAddr(mask) }
}

fn prefix(rng: &mut Rng, is_ipv4: bool) -> IpPrefix {
    let (address, length): (IpAddr, u8) = if is_ipv4 {
        (ip4(rng.below(12)), *rng.pick(&[0, 8, 28, 30, 31, 32, 32]))
    } else {
        let address =
            if rng.chance(20) { IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0]) } else { ip6(rng.below(12)) };
        (address, *rng.pick(&[0, 10, 32, 64, 125, 127, 128, 128]))
    };
    let network = match address {
        IpAddr::V4(ip) => IpAddr::from(
            (ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)).to_be_bytes(),
        ),
        IpAddr::V6(ip) => IpAddr::from(
            (ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)).to_be_bytes(),
        ),
    };
    IpPrefix::new(network, length).expect("bits beyond the length are zero")
}

fn port_ranges(rng: &mut Rng, percent: usize) -> Vec<PortRange> {
    let mut ranges = Vec::new();
    if rng.chance(percent) {
        for _ in 0..1 + rng.below(2) {
            let (a, b) = (*rng.pick(&PORTS), *rng.pick(&PORTS));
            let (first, last) = if rng.chance(60) { (a, a) } else { (a.min(b), a.max(b)) };
            ranges.push(PortRange::new(first, last).expect("the lower end comes first"));
        }
    }
    ranges
}

fn state(rng: &mut Rng, config: &Config) -> State {
    let mut state = State::default();
    let ports = lower::ports(config);
    for spec in &ports {
        if rng.chance(6) {
            state.unattached.insert(spec.name.clone());
        }
        for direction in [Direction::FromVm, Direction::ToVm] {
            if rng.chance(30) {
                state.empty_buckets.insert((spec.name.clone(), direction));
            }
        }
    }
    for switch in config.switches.iter().filter(|switch| switch.uplink.is_some()) {
        if rng.chance(50) {
            state.backings.filtered_uplinks.insert(switch.name.clone());
        }
        for vnic in config.vnics.iter().filter(|vnic| vnic.switch == switch.name) {
            if rng.chance(15) {
                let backing = Backing { representor: None, in_use: rng.chance(60) };
                state.backings.vnics.insert(vnic.name.clone(), backing);
            }
        }
    }
    for switch in &config.switches {
        let here: Vec<String> = ports
            .iter()
            .filter(|spec| {
                let vnic = config.vnics.iter().find(|vnic| lower::vnic_port(&vnic.name) == spec.name);
                match vnic {
                    Some(vnic) => vnic.switch == switch.name,
                    None => spec.name.ends_with(&format!("/{}", switch.name)),
                }
            })
            .map(|spec| spec.name.clone())
            .collect();
        if here.is_empty() {
            continue;
        }
        for _ in 0..rng.below(10) {
            let number = vid(rng);
            let domain = match rng.below(6) {
                0 | 1 => Domain::Untagged,
                2 => Domain::Service(number),
                _ => Domain::Customer(number),
            };
            let mac = station_mac(rng.below(STATIONS));
            let port = if rng.chance(12) { "vnic/gone".to_owned() } else { rng.pick(&here).clone() };
            let age = switch.ageing_seconds;
            let age_seconds = *rng.pick(&[0, 0, 1, age, age, age.saturating_add(1), age * 2]);
            let station = Station { switch: switch.name.clone(), domain, mac };
            state.fdb.insert(station, Sighting { port, age_seconds });
        }
    }
    state
}
