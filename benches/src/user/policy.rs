//! What the switches enforce: the same guards and rules, as Sluice's configuration and as OpenFlow.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail, ensure};
use sluice_policy::config::{
    Acl, AclAction, AclGroup, AclRule, Attachment, Config, Direction, Hook, Policy, Switch, VhostMode,
    VhostUser, Vnic,
};
use sluice_policy::net::{IpPrefix, MacAddr};
use sluice_policy::validate::validate;

use super::{ADDRESSES, MACS, mac_text};
use crate::rules;

/// Guards and rules for two vNICs, `a` and `b`.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// None without rules.
    group: Option<AclGroup>,
}

impl Rules {
    /// So many rules, half of them in each direction.
    pub(crate) fn new(count: usize) -> Result<Rules> {
        // All that the guests of the bench use.
        let network = IpPrefix::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8).context("a prefix")?;
        let group = if count == 0 { None } else { Some(rules::group(count, network)?) };
        Ok(Rules { group })
    }

    /// The same for Open vSwitch: anti-spoofing, rules for what a vNIC sends, rules for what it receives, and a learning switch.
    pub(crate) fn openflow(&self) -> Result<String> {
        let mut flows = "table=0,priority=0,actions=drop\ntable=3,actions=NORMAL\n".to_owned();
        for ((port, mac), ip) in (1..).zip(MACS).zip(ADDRESSES) {
            let mac = mac_text(mac);
            writeln!(
                flows,
                "table=0,priority=10,in_port={port},ip,dl_src={mac},nw_src={ip},actions=resubmit(,1)"
            )?;
            writeln!(
                flows,
                "table=0,priority=10,in_port={port},arp,dl_src={mac},arp_sha={mac},arp_spa={ip},actions=resubmit(,1)"
            )?;
        }
        for direction in [Direction::FromVm, Direction::ToVm] {
            let (table, next) = (direction as u32 + 1, direction as u32 + 2);
            let rules = self.group.iter().flat_map(|group| &group.rules);
            for rule in rules.filter(|rule| rule.direction == direction) {
                writeln!(flows, "table={table},{}", openflow(rule, next)?)?;
            }
            let default = if self.group.is_some() { "drop".to_owned() } else { format!("resubmit(,{next})") };
            writeln!(flows, "table={table},priority=0,actions={default}")?;
        }
        Ok(flows)
    }
}

/// A rule as a flow, of those that the bench makes.
fn openflow(rule: &AclRule, next: u32) -> Result<String> {
    let matches = &rule.matches;
    let mut flow = format!("priority={}", rule.priority);
    match (matches.ethertype, matches.ip_proto) {
        (Some(0x0806), None) => flow.push_str(",arp"),
        (None, Some(1)) => flow.push_str(",icmp"),
        (None, Some(6)) => flow.push_str(",tcp"),
        (None, Some(17)) => flow.push_str(",udp"),
        (None, None) => flow.push_str(",ip"),
        _ => bail!("no flow for {rule:?}"),
    }
    for (field, prefix) in [("nw_src", matches.src_ip), ("nw_dst", matches.dst_ip)] {
        if let Some(prefix) = prefix {
            write!(flow, ",{field}={prefix}")?;
        }
    }
    if let Some(kind) = matches.icmp_type {
        write!(flow, ",icmp_type={kind}")?;
    }
    match matches.dst_ports[..] {
        [] => {}
        [range] if range.first() == range.last() => write!(flow, ",tp_dst={}", range.first())?,
        _ => bail!("a flow has one port: {rule:?}"),
    }
    ensure!(matches.src_ports.is_empty(), "no flow for {rule:?}");
    let action = match rule.action {
        AclAction::Allow => format!("resubmit(,{next})"),
        AclAction::Deny => "drop".to_owned(),
    };
    Ok(format!("{flow},actions={action}"))
}

/// Two vNICs on one switch.
pub(crate) fn config(rules: &Rules) -> Result<Config> {
    let acl = rules.group.as_ref().map_or_else(Acl::default, |group| Acl {
        groups: vec![group.name.clone()],
        default_from_vm: AclAction::Deny,
        default_to_vm: AclAction::Deny,
        ..Acl::default()
    });
    let vnics = ["a", "b"].into_iter().zip(MACS).zip(ADDRESSES).map(|((name, mac), ip)| Vnic {
        name: name.to_owned(),
        switch: "bench".to_owned(),
        // The engine is told of its ports by number: whose they are makes no difference to the tables.
        attach: Attachment::VhostUser(VhostUser {
            path: format!("/run/{name}.sock"),
            mode: VhostMode::Client,
            queues: 1,
        }),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr(mac),
        extra_macs: Vec::new(),
        up: true,
        policy: Policy {
            ip_guard: vec![IpAddr::V4(ip)],
            dhcp_guard: true,
            ra_guard: true,
            acl: acl.clone(),
            ..Policy::default()
        },
        sriov: None,
    });
    let config = Config {
        switches: vec![Switch {
            name: "bench".to_owned(),
            uplink: None,
            internal: None,
            ageing_seconds: 300,
        }],
        vnics: vnics.collect(),
        acl_groups: rules.group.iter().cloned().collect(),
    };
    if let Err(violations) = validate(&config) {
        bail!("the configuration is not valid: {violations:?}");
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_rules_are_ten_flows() {
        let rules = Rules::new(10).expect("rules");
        let flows = rules.openflow().expect("flows");
        let of = |table: &str| flows.lines().filter(|line| line.starts_with(table)).count();
        // Each table has one flow for what none matches.
        assert_eq!(["table=0", "table=1", "table=2", "table=3"].map(of), [5, 6, 6, 1], "{flows}");
        assert!(
            flows.contains("priority=20,ip,nw_src=10.0.0.0/8,nw_dst=10.0.0.0/8,actions=resubmit(,2)"),
            "{flows}"
        );
        assert_eq!(config(&rules).expect("valid").acl_groups[0].rules.len(), 10);
    }
}
