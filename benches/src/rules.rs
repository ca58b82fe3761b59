//! Configurations of the switch under test, and the thousand rules.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use sluice_policy::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Config, Direction, Hook, Policy, Switch,
    VlanMode, Vnic,
};
use sluice_policy::net::{IpPrefix, MacAddr, PortRange};

use crate::world::Guest;

const GROUP: &str = "rules";
/// Where the guests of the kernel engine live.
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);

/// Two vNICs on one switch; with `rules`, under a group of so many, half in each direction.
pub(crate) fn config(guests: &[Guest; 2], hook: Hook, rules: usize) -> Result<Config> {
    let groups = if rules == 0 { Vec::new() } else { vec![group(rules, prefix(NETWORK, 16)?)?] };
    let vnics = guests.iter().map(|guest| Vnic {
        name: guest.name.to_owned(),
        switch: "bench".to_owned(),
        attach: Attachment::Veth(guest.port.to_owned()),
        hook,
        full_checksums: hook == Hook::Xdp,
        mac: MacAddr(guest.mac),
        extra_macs: Vec::new(),
        up: true,
        policy: Policy {
            vlan: VlanMode::Untagged,
            ip_guard: vec![IpAddr::V4(guest.ip)],
            dhcp_guard: true,
            ra_guard: true,
            acl: if rules == 0 {
                Acl::default()
            } else {
                Acl {
                    groups: vec![GROUP.to_owned()],
                    default_from_vm: AclAction::Deny,
                    default_to_vm: AclAction::Deny,
                    ..Acl::default()
                }
            },
            ..Policy::default()
        },
        sriov: None,
    });
    Ok(Config {
        switches: vec![Switch {
            name: "bench".to_owned(),
            uplink: None,
            internal: None,
            ageing_seconds: 300,
        }],
        acl_groups: groups,
        vnics: vnics.collect(),
    })
}

/// Rules as security groups have them: services open to, or closed for, networks of various sizes, single ports and
/// ranges; half in each direction. The measured traffic matches none but the last two of each direction, ARP and everything of
/// the guests' own `network`, which have the lowest priorities.
pub(crate) fn group(count: usize, network: IpPrefix) -> Result<AclGroup> {
    const LENGTHS: [u8; 7] = [8, 12, 16, 20, 24, 28, 32];
    const PORTS: [&str; 6] = ["22", "80", "443", "8000-8080", "3306", "30000-32767"];
    let mut rules = Vec::with_capacity(count);
    for (index, direction) in [Direction::FromVm, Direction::ToVm].into_iter().enumerate() {
        let own = count / 2 - 2;
        for n in 0..own {
            let length = LENGTHS[n % LENGTHS.len()];
            // 11.0.0.0 and up, never 10.0.0.0/8, where the guests live.
            let bits =
                (11 << 24 | (n as u32).wrapping_mul(0x0002_6c81)) & (u32::MAX << (32 - u32::from(length)));
            let remote = Some(prefix(Ipv4Addr::from(bits | 11 << 24), length)?);
            let ip_proto = match n % 5 {
                4 => 1,
                3 => 17,
                _ => 6,
            };
            let mut matches = AclMatch { ip_proto: Some(ip_proto), ..AclMatch::default() };
            match direction {
                Direction::FromVm => matches.dst_ip = remote,
                Direction::ToVm => matches.src_ip = remote,
            }
            if ip_proto == 1 {
                matches.icmp_type = Some(8);
            } else {
                let ports = PORTS[n / 5 % PORTS.len()];
                matches.dst_ports = vec![ports.parse::<PortRange>().context("a port range")?];
            }
            let action = if n % 3 == 0 { AclAction::Deny } else { AclAction::Allow };
            rules.push(AclRule { priority: (10_000 - n * 2 + index) as u32, direction, matches, action });
        }
        let network = Some(network);
        let matches = AclMatch { src_ip: network, dst_ip: network, ..AclMatch::default() };
        rules.push(AclRule { priority: 20, direction, matches, action: AclAction::Allow });
        let matches = AclMatch { ethertype: Some(0x0806), ..AclMatch::default() };
        rules.push(AclRule { priority: 10, direction, matches, action: AclAction::Allow });
    }
    Ok(AclGroup { name: GROUP.to_owned(), rules })
}

fn prefix(address: Ipv4Addr, length: u8) -> Result<IpPrefix> {
    IpPrefix::new(IpAddr::V4(address), length).with_context(|| format!("prefix {address}/{length}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_thousand_rules_of_which_the_measured_traffic_meets_the_last() {
        let group = group(1000, prefix(NETWORK, 16).expect("a prefix")).expect("well-formed rules");
        assert_eq!(group.rules.iter().collect::<BTreeSet<_>>().len(), 1000, "all different");
        let (a, b) = (IpAddr::from([10, 77, 0, 1]), IpAddr::from([10, 77, 0, 2]));
        for direction in [Direction::FromVm, Direction::ToVm] {
            let rules: Vec<&AclRule> =
                group.rules.iter().filter(|rule| rule.direction == direction).collect();
            assert_eq!(rules.len(), 500);
            let meets = |rule: &&&AclRule| {
                let AclMatch { src_ip, dst_ip, ethertype, .. } = &rule.matches;
                ethertype.is_none()
                    && src_ip.is_none_or(|prefix| prefix.contains(a))
                    && dst_ip.is_none_or(|prefix| prefix.contains(b))
            };
            let met: Vec<u32> = rules.iter().filter(meets).map(|rule| rule.priority).collect();
            let before = rules.iter().filter(|rule| rule.priority > met[0]).count();
            assert_eq!((met.len(), before), (1, 498));
        }
    }
}
