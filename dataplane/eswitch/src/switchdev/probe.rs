//! What an eSwitch's rules can do, found out by writing rules that no frame reaches and reading them back.

use sluice_policy::config::{Masked, Rate};
use sluice_policy::net::{IpPrefix, MacAddr, VlanId};
use sluice_policy::placement::{
    Evidence, FlowerAction, FlowerActions, FlowerKeys, FlowerMatch, FlowerRule, FlowerSupport, RulePort,
    Target, VfIndex, VlanMatch, VlanProtocol,
};

use super::representors::Representors;
use super::rules::Rules;
use crate::contract::EswitchError;

/// A chain that no program uses and no rule leads to; and one that a rule in it may lead to.
const CHAIN: u32 = 254;
const NEXT: u32 = 255;
/// The kernel has as many priorities; no NIC says how many rules it has room for until it is full.
const RULES_MAX: u32 = 16_384;

const TAG: u16 = 0x8100;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const ICMP: u8 = 1;

/// Asks the driver on the representor of `vf`.
pub(super) fn flower(
    rules: &mut Rules,
    ports: &Representors,
    vf: VfIndex,
) -> Result<FlowerSupport, EswitchError> {
    let drop = |matches: FlowerMatch| rule(1, matches, vec![FlowerAction::Drop]);
    let act = |actions: Vec<FlowerAction>| rule(1, to_station(), actions);
    let redirect = FlowerAction::Redirect(Target::Uplink);
    let mut takes = |list: &[FlowerRule]| rules.takes(ports, vf, list);

    // What all programs need: drop and redirect by destination.
    if !takes(&[drop(to_station()), rule(2, to_station(), vec![redirect.clone()])])? {
        return Ok(FlowerSupport::default());
    }
    let ipv4 = || FlowerMatch { ethertype: Some(IPV4), ..FlowerMatch::default() };
    let tcp = || FlowerMatch { ip_proto: Some(TCP), fragment: Some(false), ..ipv4() };
    let icmp = || FlowerMatch { ip_proto: Some(ICMP), fragment: Some(false), ..ipv4() };
    let group = MacAddr([1, 0, 0, 0, 0, 0]);
    let tag = VlanMatch { vid: Some(5), ethertype: Some(IPV4) };
    let ports_mask = Some(Masked { value: 0x1f00, mask: 0xff00 });
    let keys = FlowerKeys {
        mac_masks: takes(&[drop(FlowerMatch {
            src_mac: Some(Masked { value: group, mask: group }),
            ..FlowerMatch::default()
        })])?,
        vlan: takes(&[drop(FlowerMatch {
            ethertype: Some(TAG),
            vlan: Some(tag),
            ..FlowerMatch::default()
        })])?,
        ip: takes(&[
            drop(FlowerMatch { src_ip: prefix("192.0.2.0/24"), ..ipv4() }),
            rule(
                2,
                FlowerMatch {
                    ethertype: Some(IPV6),
                    dst_ip: prefix("2001:db8::/32"),
                    ..FlowerMatch::default()
                },
                vec![FlowerAction::Drop],
            ),
        ])?,
        ip_proto: takes(&[drop(FlowerMatch { ip_proto: Some(TCP), ..ipv4() })])?,
        fragment: takes(&[drop(FlowerMatch { fragment: Some(true), ..ipv4() })])?,
        ports: takes(&[drop(FlowerMatch { src_port: ports_mask, dst_port: ports_mask, ..tcp() })])?,
        tcp_flags: takes(&[drop(FlowerMatch { tcp_flags: Some(Masked { value: 2, mask: 0x12 }), ..tcp() })])?,
        icmp: takes(&[drop(FlowerMatch { icmp_type: Some(8), icmp_code: Some(0), ..icmp() })])?,
    };
    let push = || {
        VlanId::new(5).map(|vid| FlowerAction::VlanPush { protocol: VlanProtocol::Dot1q, vid, priority: 0 })
    };
    let push = push().into_iter().chain([redirect.clone()]).collect();
    let pop = rule(
        2,
        FlowerMatch { ethertype: Some(TAG), vlan: Some(tag), ..FlowerMatch::default() },
        vec![FlowerAction::VlanPop, redirect.clone()],
    );
    let police = FlowerAction::Police(Rate { bits_per_second: 100_000_000, burst_bytes: 125_000 });
    let actions = FlowerActions {
        chains: takes(&[act(vec![FlowerAction::Goto(NEXT)])])?,
        trap: takes(&[act(vec![FlowerAction::Trap])])?,
        vlan: takes(&[act(push), pop])?,
        police: takes(&[
            act(vec![police.clone(), redirect.clone()]),
            rule(2, to_station(), vec![police, redirect]),
        ])?,
    };
    Ok(FlowerSupport { offload: Evidence::ReadBack, rules_max: RULES_MAX, keys, actions })
}

fn rule(priority: u16, matches: FlowerMatch, actions: Vec<FlowerAction>) -> FlowerRule {
    FlowerRule { port: RulePort::Own, chain: CHAIN, priority, matches, actions }
}

/// A match on one destination, as every program has.
fn to_station() -> FlowerMatch {
    let station = Masked { value: MacAddr([2, 0, 0, 0, 0, 1]), mask: MacAddr([0xff; 6]) };
    FlowerMatch { dst_mac: Some(station), ..FlowerMatch::default() }
}

fn prefix(text: &str) -> Option<IpPrefix> {
    text.parse().ok()
}
