//! Stages 3 to 6: who the VM says it is, its tags, and the services it may offer.

use std::net::IpAddr;

use super::build::Builder;
use super::rule::{FlowerAction, FlowerMatch, VlanMatch};
use super::{Framing, SOFTWARE, START, Stage, Subject, trunk_vids};
use crate::config::{Masked, VlanMode};
use crate::lower::link_local;
use crate::net::{IpPrefix, MacAddr};
use crate::placement::Feature;

pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
const ARP: u16 = 0x0806;
const CTAG: u16 = 0x8100;
const STAG: u16 = 0x88a8;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// IPv6 extension headers that the pipeline walks through; parsers in hardware stop at some or all of them.
const EXTENSIONS: [u8; 8] = [0, 43, 44, 51, 60, 135, 139, 140];

pub(super) const fn exactly(mac: MacAddr) -> Option<Masked<MacAddr>> {
    Some(Masked { value: mac, mask: MacAddr([0xff; 6]) })
}

pub(super) fn goto(chain: u32) -> Vec<FlowerAction> {
    vec![FlowerAction::Goto(chain)]
}

fn drop() -> Vec<FlowerAction> {
    vec![FlowerAction::Drop]
}

/// Between the MAC guard and the tags' chain.
const TAGS: u32 = 2;

/// MAC guard, then from the outermost tag to the chains of its framing.
pub(super) fn sources_and_tags(subject: &Subject<'_>, builder: &mut Builder<'_>) {
    for mac in subject.macs() {
        let own = FlowerMatch { src_mac: exactly(mac), ..FlowerMatch::default() };
        builder.add(Feature::MacGuard, START, own, goto(TAGS));
    }
    // Other addresses, where they are allowed, may have to be learnt.
    let others = if subject.vnic.policy.allow_spoofing { goto(SOFTWARE) } else { drop() };
    builder.add(Feature::MacGuard, START, FlowerMatch::default(), others);

    let (feature, allowed, native) = match &subject.vnic.policy.vlan {
        VlanMode::Trunk { allowed, native } => {
            (Feature::TrunkVlan, trunk_vids(allowed, *native), native.is_some())
        }
        _ => (Feature::AccessVlan, Vec::new(), true),
    };
    let tagged = |tpid, vlan| FlowerMatch { ethertype: Some(tpid), vlan, ..FlowerMatch::default() };
    let vid = |vid| Some(VlanMatch { vid: Some(vid), ethertype: None });
    for inner in [CTAG, STAG] {
        // A second tag: rules see no further. On an access port all but a priority tag is dropped anyway.
        if !allowed.is_empty() {
            let inner = Some(VlanMatch { vid: None, ethertype: Some(inner) });
            builder.add(feature, TAGS, tagged(CTAG, inner), goto(SOFTWARE));
        }
    }
    for id in allowed {
        let chain = Framing::Tagged.chain(Stage::IpGuard);
        builder.add(feature, TAGS, tagged(CTAG, vid(id.get())), goto(chain));
    }
    for tpid in [CTAG, STAG] {
        // A priority tag counts as none. Where the NIC cannot tell it apart, software does.
        if builder.support().keys.vlan {
            builder.add(feature, TAGS, tagged(tpid, vid(0)), goto(SOFTWARE));
            builder.add(feature, TAGS, tagged(tpid, None), drop());
        } else {
            builder.add(feature, TAGS, tagged(tpid, None), goto(SOFTWARE));
        }
    }
    let untagged = subject.framings().into_iter().find(|framing| *framing != Framing::Tagged);
    let actions = match untagged.filter(|_| native) {
        Some(framing) => goto(framing.chain(Stage::IpGuard)),
        None => drop(),
    };
    builder.add(feature, TAGS, FlowerMatch::default(), actions);
}

/// Traps IPv6 packets whose last header a NIC may not find.
pub(super) fn trap_extensions(feature: Feature, framing: Framing, chain: u32, builder: &mut Builder<'_>) {
    for proto in EXTENSIONS {
        let matches = FlowerMatch { ip_proto: Some(proto), ..framing.frames(Some(IPV6)) };
        builder.add(feature, chain, matches, goto(SOFTWARE));
    }
}

/// Traps fragments, which do not show their transport header to rules.
pub(super) fn trap_fragments(
    feature: Feature,
    framing: Framing,
    ethertype: u16,
    chain: u32,
    builder: &mut Builder<'_>,
) {
    let matches = FlowerMatch { fragment: Some(true), ..framing.frames(Some(ethertype)) };
    builder.add(feature, chain, matches, goto(SOFTWARE));
}

/// Traps ICMPv6 messages of less than eight bytes, whose type parsers do not show: it reads as zero, which no message has.
pub(super) fn trap_short_icmp(feature: Feature, framing: Framing, chain: u32, builder: &mut Builder<'_>) {
    let matches = FlowerMatch { ip_proto: Some(ICMPV6), icmp_type: Some(0), ..framing.frames(Some(IPV6)) };
    builder.add(feature, chain, matches, goto(SOFTWARE));
}

/// IP guard: the sources that are its own pass; what needs a closer look is trapped; the rest is dropped.
pub(super) fn ip(subject: &Subject<'_>, framing: Framing, builder: &mut Builder<'_>) {
    let (chain, next) = (framing.chain(Stage::IpGuard), framing.chain(Stage::Services));
    let feature = Feature::IpGuard;
    let guarded = &subject.vnic.policy.ip_guard;
    if !guarded.is_empty() {
        let from = |ip: IpAddr| {
            let (ethertype, length) = if ip.is_ipv4() { (IPV4, 32) } else { (IPV6, 128) };
            let prefix = IpPrefix::new(ip, length).expect("the whole address is a prefix");
            FlowerMatch { src_ip: Some(prefix), ..framing.frames(Some(ethertype)) }
        };
        builder.add(feature, chain, framing.frames(Some(ARP)), goto(SOFTWARE));
        trap_extensions(feature, framing, chain, builder);
        trap_fragments(feature, framing, IPV6, chain, builder);
        // Neighbour discovery says more about its sender than the source address.
        let icmp = FlowerMatch { ip_proto: Some(ICMPV6), ..framing.frames(Some(IPV6)) };
        builder.add(feature, chain, icmp, goto(SOFTWARE));
        for ip in guarded {
            builder.add(feature, chain, from(*ip), goto(next));
        }
        if guarded.iter().any(IpAddr::is_ipv6) {
            for mac in subject.macs() {
                builder.add(feature, chain, from(link_local(mac).into()), goto(next));
            }
        }
        for unspecified in [IpAddr::from([0; 4]), IpAddr::from([0_u8; 16])] {
            builder.add(feature, chain, from(unspecified), goto(SOFTWARE));
        }
        for ethertype in [IPV4, IPV6] {
            builder.add(feature, chain, framing.frames(Some(ethertype)), drop());
        }
    }
    builder.add(feature, chain, FlowerMatch::default(), goto(next));
}

/// DHCP and RA guard.
pub(super) fn services(subject: &Subject<'_>, framing: Framing, builder: &mut Builder<'_>) {
    let (chain, next) = (framing.chain(Stage::Services), framing.chain(Stage::Acl));
    let policy = &subject.vnic.policy;
    let port = |number| Some(Masked { value: number, mask: u16::MAX });
    if policy.dhcp_guard {
        trap_fragments(Feature::DhcpGuard, framing, IPV4, chain, builder);
    }
    if policy.dhcp_guard || policy.ra_guard {
        let feature = if policy.dhcp_guard { Feature::DhcpGuard } else { Feature::RaGuard };
        trap_extensions(feature, framing, chain, builder);
        trap_fragments(feature, framing, IPV6, chain, builder);
    }
    if policy.dhcp_guard {
        for (ethertype, server, client) in [(IPV4, 67, 68), (IPV6, 547, 546)] {
            let udp = || FlowerMatch { ip_proto: Some(UDP), ..framing.frames(Some(ethertype)) };
            let from_server = FlowerMatch { src_port: port(server), ..udp() };
            let to_client = FlowerMatch { dst_port: port(client), ..udp() };
            builder.add(Feature::DhcpGuard, chain, from_server, drop());
            builder.add(Feature::DhcpGuard, chain, to_client, drop());
        }
    }
    if policy.ra_guard {
        trap_short_icmp(Feature::RaGuard, framing, chain, builder);
        let advertisement =
            FlowerMatch { ip_proto: Some(ICMPV6), icmp_type: Some(134), ..framing.frames(Some(IPV6)) };
        builder.add(Feature::RaGuard, chain, advertisement, drop());
    }
    builder.add(Feature::DhcpGuard, chain, FlowerMatch::default(), goto(next));
}
