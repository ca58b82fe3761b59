//! Stage 7 and its to-vm twin: all rules, one after another.

use sluice_pipeline::DropReason;

use super::Domain;
use super::packet::{Ip, Packet, Transport};
use super::ports::Port;
use crate::config::{AclAction, AclMatch, AclRule, Config, Direction, Masked};
use crate::net::{MacAddr, PortRange};

/// A rule, by place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleRef {
    /// `group/NAME`, or `vnic/NAME` for a vNIC's own rules, as in [`Ids::groups`](crate::ids::Ids::groups).
    pub group: String,
    /// Index in the group.
    pub index: usize,
}

/// What an ACL said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Pass or drop.
    pub action: AclAction,
    /// The rules of the best rank that match; empty if the default decided. If there are several, they all say the
    /// same, and an engine may count any one of them.
    pub rules: Vec<RuleRef>,
    /// Whether the port has an ACL at all.
    pub asked: bool,
}

impl Decision {
    pub(super) fn finding(&self, reason: DropReason) -> Result<String, (DropReason, String)> {
        let by = match self.rules.first() {
            _ if !self.asked => "not a vNIC".to_owned(),
            Some(rule) => format!("rule {} of {}", rule.index, rule.group),
            None => "no rule matches: the default".to_owned(),
        };
        match self.action {
            AclAction::Allow => Ok(format!("{by} allows")),
            AclAction::Deny => Err((reason, format!("{by} denies"))),
        }
    }
}

/// Asks one direction of a port's ACL.
pub(super) fn decide(
    config: &Config,
    port: &Port<'_>,
    direction: Direction,
    packet: &Packet<'_>,
    domain: Domain,
) -> Decision {
    let Some(vnic) = port.vnic else {
        return Decision { action: AclAction::Allow, rules: Vec::new(), asked: false };
    };
    let acl = &vnic.policy.acl;
    let mut lists: Vec<(String, &[AclRule])> = Vec::new();
    for name in &acl.groups {
        if let Some(group) = config.acl_groups.iter().find(|group| group.name == *name) {
            lists.push((format!("group/{name}"), &group.rules));
        }
    }
    lists.push((format!("vnic/{}", vnic.name), &acl.rules));

    let mut best: Option<(u32, bool)> = None;
    let mut rules = Vec::new();
    for (group, list) in lists {
        for (index, rule) in list.iter().enumerate() {
            if rule.direction != direction || !matches(&rule.matches, packet, domain) {
                continue;
            }
            let rank = (rule.priority, rule.action == AclAction::Deny);
            if best.is_none_or(|best| rank > best) {
                best = Some(rank);
                rules.clear();
            }
            if best == Some(rank) {
                rules.push(RuleRef { group: group.clone(), index });
            }
        }
    }
    let action = match (best, direction) {
        (Some((_, true)), _) => AclAction::Deny,
        (Some((_, false)), _) => AclAction::Allow,
        (None, Direction::FromVm) => acl.default_from_vm,
        (None, Direction::ToVm) => acl.default_to_vm,
    };
    Decision { action, rules, asked: true }
}

fn matches(wanted: &AclMatch, packet: &Packet<'_>, domain: Domain) -> bool {
    let AclMatch {
        src_mac,
        dst_mac,
        ethertype,
        vlan,
        src_ip,
        dst_ip,
        ip_proto,
        src_ports,
        dst_ports,
        tcp_flags,
        icmp_type,
        icmp_code,
    } = wanted;
    let ip = packet.ip();
    mac_matches(*src_mac, packet.src)
        && mac_matches(*dst_mac, packet.dst)
        && ethertype.is_none_or(|wanted| packet.ethertype == wanted)
        && vlan.is_none_or(|vid| domain == Domain::Customer(vid))
        && src_ip.is_none_or(|prefix| ip.is_some_and(|ip| prefix.contains(ip.src)))
        && dst_ip.is_none_or(|prefix| ip.is_some_and(|ip| prefix.contains(ip.dst)))
        && ip_proto.is_none_or(|proto| ip.is_some_and(|ip| ip.proto == proto))
        && ports_match(src_ports, ip, |(src, _)| src)
        && ports_match(dst_ports, ip, |(_, dst)| dst)
        && tcp_flags.is_none_or(|wanted| match ip.and_then(|ip| ip.transport.as_ref()) {
            Some(Transport::Tcp { flags, .. }) => flags & wanted.mask == wanted.value,
            _ => false,
        })
        && icmp_type.is_none_or(|wanted| icmp(ip).is_some_and(|(kind, _)| kind == wanted))
        && icmp_code.is_none_or(|wanted| icmp(ip).is_some_and(|(_, code)| code == wanted))
}

fn mac_matches(wanted: Option<Masked<MacAddr>>, mac: MacAddr) -> bool {
    wanted.is_none_or(|wanted| (0..6).all(|i| mac.0[i] & wanted.mask.0[i] == wanted.value.0[i]))
}

fn ports_match(ranges: &[PortRange], ip: Option<&Ip<'_>>, which: impl Fn((u16, u16)) -> u16) -> bool {
    if ranges.is_empty() {
        return true;
    }
    let ports = match ip.and_then(|ip| ip.transport.as_ref()) {
        Some(
            Transport::Tcp { src_port, dst_port, .. }
            | Transport::Udp { src_port, dst_port }
            | Transport::Sctp { src_port, dst_port },
        ) => (*src_port, *dst_port),
        _ => return false,
    };
    ranges.iter().any(|range| range.contains(which(ports)))
}

fn icmp(ip: Option<&Ip<'_>>) -> Option<(u8, u8)> {
    match ip?.transport {
        Some(Transport::Icmp { kind, code, .. }) => Some((kind, code)),
        _ => None,
    }
}
