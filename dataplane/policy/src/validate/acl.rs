//! Checks of ACL rules: each field by itself, fields against each other, and rules against each other.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use sluice_pipeline::tables::TUPLES_MAX;
use sluice_pipeline::{ethertype, ip_proto};

use super::{Check, PRIORITY_MAX, RULE_EXPANSION_MAX, ViolationCode};
use crate::config::{AclMatch, AclRule, Direction};
use crate::lower;
use crate::net::{IpPrefix, MacAddr, PortRange};

impl Check<'_> {
    /// The rules of one group, at `path` inside `resource`.
    pub(super) fn rules(&mut self, resource: &str, path: &str, rules: &[AclRule]) {
        let mut seen: HashMap<(u32, Direction, AclMatch), usize> = HashMap::with_capacity(rules.len());
        let mut masks = [BTreeSet::new(), BTreeSet::new()];
        for (index, rule) in rules.iter().enumerate() {
            let field = format!("{path}[{index}]");
            if rule.priority > PRIORITY_MAX {
                let message = format!("{} is out of range; use 0 to {PRIORITY_MAX}", rule.priority);
                self.report(ViolationCode::OutOfRange, resource, format!("{field}.priority"), message);
            }
            self.matches(resource, &format!("{field}.match"), &rule.matches);
            let mut matches = rule.matches.clone();
            matches.src_ports.sort_unstable();
            matches.dst_ports.sort_unstable();
            let first = *seen.entry((rule.priority, rule.direction, matches)).or_insert(index);
            if first != index {
                let message = format!(
                    "matches the same as {path}[{first}], with the same priority and direction; \
                     remove one, or give them different priorities"
                );
                self.report(ViolationCode::Duplicate, resource, field.clone(), message);
            }
            let expansion = lower::expand(&rule.matches);
            if expansion.count() > RULE_EXPANSION_MAX {
                let message = format!(
                    "its port ranges become {} table entries, but a rule may take {RULE_EXPANSION_MAX}; \
                     align ranges to powers of two, or split the rule",
                    expansion.count()
                );
                self.report(ViolationCode::Limit, resource, format!("{field}.match"), message);
                continue;
            }
            masks[rule.direction as usize].extend(expansion.entries().map(|(_, mask)| mask));
        }
        for (masks, direction) in masks.iter().zip(["FROM_VM", "TO_VM"]) {
            if masks.len() > TUPLES_MAX as usize {
                let message = format!(
                    "its {direction} rules look at {} different combinations of bits, but a group has room for \
                     {TUPLES_MAX}; use fewer prefix lengths or port ranges, or split the group",
                    masks.len()
                );
                self.report(ViolationCode::Limit, resource, path, message);
            }
        }
    }

    fn matches(&mut self, resource: &str, path: &str, matches: &AclMatch) {
        let mut conflict = |field: &str, message: String| {
            self.report(ViolationCode::Conflict, resource, format!("{path}.{field}"), message);
        };
        if let Some(message) = frame_conflict(matches) {
            conflict("ethertype", message);
        }
        for (field, mac) in [("srcMac", matches.src_mac), ("dstMac", matches.dst_mac)] {
            if let Some(mac) = mac
                && mac.value.0.iter().zip(mac.mask.0).any(|(value, mask)| value & !mask != 0)
            {
                let masked: Vec<u8> =
                    mac.value.0.iter().zip(mac.mask.0).map(|(value, mask)| value & mask).collect();
                let wanted = <[u8; 6]>::try_from(masked).map_or(mac.value, MacAddr);
                conflict(
                    field,
                    format!(
                        "{}/{} has bits set outside its mask; did you mean {wanted}?",
                        mac.value, mac.mask
                    ),
                );
            }
        }
        if let (Some(src), Some(dst)) = (matches.src_ip, matches.dst_ip)
            && is_ipv4(src) != is_ipv4(dst)
        {
            conflict(
                "dstIp",
                format!("{dst} is not of the same IP version as srcIp {src}; make two rules of it"),
            );
        }
        if let Some(message) = proto_conflict(matches) {
            conflict("ipProto", message);
        }
        for (field, ports) in [("srcPorts", &matches.src_ports), ("dstPorts", &matches.dst_ports)] {
            if let Some(message) = ports_conflict(ports, matches.ip_proto) {
                conflict(field, message);
            }
        }
        if let Some(flags) = matches.tcp_flags {
            if matches.ip_proto != Some(ip_proto::TCP) {
                conflict("tcpFlags", "only TCP has flags; set ipProto to tcp".to_owned());
            }
            if flags.value & !flags.mask != 0 {
                conflict(
                    "tcpFlags",
                    format!(
                        "flags {:#04x} are wanted but not compared; add them to the mask {:#04x}",
                        flags.value & !flags.mask,
                        flags.mask
                    ),
                );
            }
        }
        let is_icmp = matches!(matches.ip_proto, Some(ip_proto::ICMP | ip_proto::ICMPV6));
        if matches.icmp_type.is_some() && !is_icmp {
            conflict("icmpType", "only ICMP has types; set ipProto to icmp or icmpv6".to_owned());
        }
        if matches.icmp_code.is_some() && matches.icmp_type.is_none() {
            conflict("icmpCode", "a code means nothing without its type; set icmpType too".to_owned());
        }
    }
}

fn is_ipv4(prefix: IpPrefix) -> bool {
    matches!(prefix.address(), IpAddr::V4(_))
}

/// What is wrong with the ethertype, given the rest.
fn frame_conflict(matches: &AclMatch) -> Option<String> {
    let ethertype = matches.ethertype?;
    if matches!(ethertype, ethertype::CTAG | ethertype::STAG) {
        return Some(format!(
            "{ethertype:#06x} is a VLAN tag, and the ethertype is compared after all tags; match vlan instead"
        ));
    }
    let wants_ip = matches.src_ip.is_some()
        || matches.dst_ip.is_some()
        || matches.ip_proto.is_some()
        || !matches.src_ports.is_empty()
        || !matches.dst_ports.is_empty()
        || matches.tcp_flags.is_some()
        || matches.icmp_type.is_some();
    let family = [matches.src_ip, matches.dst_ip].into_iter().flatten().map(is_ipv4).next();
    let fits = match family {
        Some(true) => ethertype == ethertype::IPV4,
        Some(false) => ethertype == ethertype::IPV6,
        None => !wants_ip || matches!(ethertype, ethertype::IPV4 | ethertype::IPV6),
    };
    (!fits).then(|| {
        format!(
            "{ethertype:#06x} excludes the IP fields of the same rule; leave the ethertype out, they imply it"
        )
    })
}

/// What is wrong with the protocol: ICMP types are of one IP version only.
fn proto_conflict(matches: &AclMatch) -> Option<String> {
    matches.icmp_type?;
    let by_prefix = [matches.src_ip, matches.dst_ip].into_iter().flatten().map(is_ipv4).next();
    let by_ethertype = match matches.ethertype {
        Some(ethertype::IPV4) => Some(true),
        Some(ethertype::IPV6) => Some(false),
        _ => None,
    };
    match (matches.ip_proto, by_prefix.or(by_ethertype)) {
        (Some(ip_proto::ICMP), Some(false)) => {
            Some("icmp is of IPv4, the rule is of IPv6; use icmpv6".to_owned())
        }
        (Some(ip_proto::ICMPV6), Some(true)) => {
            Some("icmpv6 is of IPv6, the rule is of IPv4; use icmp".to_owned())
        }
        _ => None,
    }
}

fn ports_conflict(ports: &[PortRange], proto: Option<u8>) -> Option<String> {
    let has_ports = matches!(proto, Some(ip_proto::TCP | ip_proto::UDP | ip_proto::SCTP));
    (!ports.is_empty() && !has_ports)
        .then(|| "only TCP, UDP and SCTP have ports; set ipProto to tcp, udp or sctp".to_owned())
}
