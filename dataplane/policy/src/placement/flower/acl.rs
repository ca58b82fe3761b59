//! Stage 7: the ACL on what the VM sends, in the order in which its rules win.

use super::build::Builder;
use super::guards::{IPV4, IPV6, goto, trap_extensions, trap_fragments, trap_short_icmp};
use super::rule::{FlowerAction, FlowerMatch, VlanMatch};
use super::{Framing, Stage, Subject};
use crate::config::{AclAction, AclMatch, AclRule, Direction, Masked};
use crate::net::PortRange;
use crate::oracle::Domain;
use crate::placement::{Feature, Uncovered, acl_allows_all, acl_rules};

/// Below this an ethertype is a length (IEEE 802.3), which tc does not show to rules.
const ETHERTYPE_MIN: u16 = 0x0600;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The chain.
pub(super) fn from_vm(subject: &Subject<'_>, framing: Framing, builder: &mut Builder<'_>) {
    let (chain, next) = (framing.chain(Stage::Acl), framing.chain(Stage::Forward));
    let (config, vnic, feature) = (subject.config, subject.vnic, Feature::AclFromVm);
    let act = |action| match action {
        AclAction::Allow => goto(next),
        AclAction::Deny => vec![FlowerAction::Drop],
    };
    if !acl_allows_all(config, vnic, Direction::FromVm) {
        let mut rules: Vec<&AclRule> = acl_rules(config, vnic, Direction::FromVm).collect();
        rules.sort_by_key(|rule| (std::cmp::Reverse(rule.priority), rule.action == AclAction::Allow));
        if let Some(length) =
            rules.iter().filter_map(|rule| rule.matches.ethertype).find(|e| *e < ETHERTYPE_MIN)
        {
            builder.refuse(Uncovered::new(
                feature,
                format!("a rule matches {length:#06x} as ethertype; below 0x0600 that is a length, which tc does not show"),
                "match a protocol, or MAC addresses",
            ));
        }
        if rules.iter().any(|rule| needs_transport(&rule.matches)) {
            trap_fragments(feature, framing, IPV4, chain, builder);
        }
        if rules.iter().any(|rule| rule.matches.ip_proto.is_some()) {
            trap_extensions(feature, framing, chain, builder);
            trap_fragments(feature, framing, IPV6, chain, builder);
        }
        if rules.iter().any(|rule| rule.matches.icmp_type.is_some() && rule.matches.ip_proto != Some(ICMP)) {
            trap_short_icmp(feature, framing, chain, builder);
        }
        for rule in rules {
            for matches in translate(&rule.matches, framing) {
                builder.add(feature, chain, matches, act(rule.action));
            }
        }
    }
    builder.add(feature, chain, FlowerMatch::default(), act(vnic.policy.acl.default_from_vm));
}

fn needs_transport(matches: &AclMatch) -> bool {
    !matches.src_ports.is_empty()
        || !matches.dst_ports.is_empty()
        || matches.tcp_flags.is_some()
        || matches.icmp_type.is_some()
}

/// The flower matches whose union is the ACL's; none if no frame of this framing can match.
fn translate(matches: &AclMatch, framing: Framing) -> Vec<FlowerMatch> {
    let mut expanded = Vec::new();
    for ethertype in ethertypes(matches) {
        let mut base = framing.frames(ethertype);
        if let Some(wanted) = matches.vlan {
            match framing {
                Framing::Untagged(domain) if domain != Domain::Customer(wanted) => return Vec::new(),
                Framing::Untagged(_) => {}
                Framing::Tagged => {
                    base.vlan = Some(VlanMatch { vid: Some(wanted.get()), ..base.vlan.unwrap_or_default() });
                }
            }
        }
        base.src_mac = matches.src_mac;
        base.dst_mac = matches.dst_mac;
        base.src_ip = matches.src_ip;
        base.dst_ip = matches.dst_ip;
        base.ip_proto = matches.ip_proto;
        base.tcp_flags = matches.tcp_flags;
        base.icmp_type = matches.icmp_type;
        base.icmp_code = matches.icmp_code;
        for src_port in port_masks(&matches.src_ports) {
            for dst_port in port_masks(&matches.dst_ports) {
                expanded.push(FlowerMatch { src_port, dst_port, ..base.clone() });
            }
        }
    }
    expanded
}

/// The ethertypes behind all tags for which the match can hold; `None` stands for any.
fn ethertypes(matches: &AclMatch) -> Vec<Option<u16>> {
    let prefixes = [matches.src_ip, matches.dst_ip];
    let is_ip = matches.ip_proto.is_some() || prefixes.iter().any(Option::is_some);
    if !is_ip {
        return vec![matches.ethertype];
    }
    let fits = |ethertype: u16, is_ipv4: bool, other_icmp: u8| {
        matches.ethertype.is_none_or(|wanted| wanted == ethertype)
            && prefixes.iter().flatten().all(|prefix| prefix.address().is_ipv4() == is_ipv4)
            && !(matches.icmp_type.is_some() && matches.ip_proto == Some(other_icmp))
    };
    let mut ethertypes = Vec::new();
    if fits(IPV4, true, ICMPV6) {
        ethertypes.push(Some(IPV4));
    }
    if fits(IPV6, false, ICMP) {
        ethertypes.push(Some(IPV6));
    }
    ethertypes
}

/// Ports as values under masks; `None` stands for any.
fn port_masks(ranges: &[PortRange]) -> Vec<Option<Masked<u16>>> {
    if ranges.is_empty() {
        return vec![None];
    }
    ranges.iter().flat_map(|range| expand(range.first(), range.last())).map(Some).collect()
}

/// The fewest aligned blocks that make up a range: at most 30.
pub(super) fn expand(first: u16, last: u16) -> Vec<Masked<u16>> {
    let (mut first, last) = (u32::from(first), u32::from(last));
    let mut blocks = Vec::new();
    while first <= last {
        // The largest power of two that `first` is a multiple of, and that does not reach past the end.
        let aligned = if first == 0 { 1 << 16 } else { first & first.wrapping_neg() };
        let room = 1 << (last - first + 1).ilog2();
        let size = aligned.min(room);
        blocks.push(Masked { value: first as u16, mask: !(size - 1) as u16 });
        first += size;
    }
    blocks
}
