//! Collects rules, numbers them, and notes what the hardware does not have for them.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::{FlowerAction, FlowerMatch, FlowerProgram, FlowerRule, RulePort};
use crate::net::MacAddr;
use crate::placement::{Feature, FlowerSupport, Uncovered};

pub(super) struct Builder<'a> {
    support: &'a FlowerSupport,
    rules: Vec<FlowerRule>,
    priorities: BTreeMap<(RulePort, u32), u32>,
    missing: BTreeSet<(Feature, &'static str)>,
    uncovered: Vec<Uncovered>,
}

impl<'a> Builder<'a> {
    pub(super) const fn new(support: &'a FlowerSupport) -> Self {
        Builder {
            support,
            rules: Vec::new(),
            priorities: BTreeMap::new(),
            missing: BTreeSet::new(),
            uncovered: Vec::new(),
        }
    }

    pub(super) const fn support(&self) -> &FlowerSupport {
        self.support
    }

    /// A rule for what the VM sends, after those that its chain has. It serves `feature`.
    pub(super) fn add(
        &mut self,
        feature: Feature,
        chain: u32,
        matches: FlowerMatch,
        actions: Vec<FlowerAction>,
    ) {
        self.put(feature, RulePort::Own, chain, matches, actions);
    }

    /// A rule for what comes from the uplink.
    pub(super) fn add_uplink(&mut self, chain: u32, matches: FlowerMatch, actions: Vec<FlowerAction>) {
        self.put(Feature::Uplink, RulePort::Uplink, chain, matches, actions);
    }

    fn put(
        &mut self,
        feature: Feature,
        port: RulePort,
        chain: u32,
        matches: FlowerMatch,
        actions: Vec<FlowerAction>,
    ) {
        for what in lacking(self.support, &matches, &actions) {
            self.missing.insert((feature, what));
        }
        let next = self.priorities.entry((port, chain)).or_default();
        *next += 1;
        if let Ok(priority) = u16::try_from(*next) {
            self.rules.push(FlowerRule { port, chain, priority, matches, actions });
        }
    }

    pub(super) fn refuse(&mut self, uncovered: Uncovered) {
        self.uncovered.push(uncovered);
    }

    pub(super) fn finish(self, uncovered: &mut Vec<Uncovered>) -> Option<FlowerProgram> {
        uncovered.extend(self.uncovered);
        for (feature, what) in self.missing {
            uncovered.push(Uncovered::new(
                feature,
                format!("the NIC's rules have no {what}"),
                "use newer firmware or another NIC, or take it out of the policy",
            ));
        }
        let needed: u32 = self.priorities.values().sum();
        let longest = self.priorities.values().copied().max().unwrap_or(0);
        if needed > self.support.rules_max || longest > u32::from(u16::MAX) {
            uncovered.push(Uncovered::new(
                Feature::TableSpace,
                format!("{needed} rules are needed, and there is room for {}", self.support.rules_max),
                "use fewer ACL rules, port ranges that are powers of two, or fewer VLANs",
            ));
        }
        uncovered.is_empty().then(|| FlowerProgram::new(self.rules))
    }
}

/// What hardware lacks for a rule.
fn lacking(support: &FlowerSupport, matches: &FlowerMatch, actions: &[FlowerAction]) -> Vec<&'static str> {
    let (keys, can) = (&support.keys, &support.actions);
    let is_masked = |mac: &Option<crate::config::Masked<MacAddr>>| {
        mac.is_some_and(|mac| mac.mask != MacAddr([0xff; 6]) && !mac.mask.is_zero())
    };
    let has_vlan_action =
        actions.iter().any(|action| matches!(action, FlowerAction::VlanPush { .. } | FlowerAction::VlanPop));
    let polices = actions.iter().any(|action| matches!(action, FlowerAction::Police(_)));
    [
        (is_masked(&matches.src_mac) || is_masked(&matches.dst_mac), keys.mac_masks, "MAC masks"),
        (matches.vlan.is_some(), keys.vlan, "VLAN fields"),
        (matches.src_ip.is_some() || matches.dst_ip.is_some(), keys.ip, "IP prefixes"),
        (matches.ip_proto.is_some(), keys.ip_proto, "IP protocol"),
        (matches.fragment.is_some(), keys.fragment, "fragment flag"),
        (matches.src_port.is_some() || matches.dst_port.is_some(), keys.ports, "ports"),
        (matches.tcp_flags.is_some(), keys.tcp_flags, "TCP flags"),
        (matches.icmp_type.is_some() || matches.icmp_code.is_some(), keys.icmp, "ICMP fields"),
        (has_vlan_action, can.vlan, "VLAN push and pop"),
        (polices, can.police, "police action"),
    ]
    .into_iter()
    .filter(|(is_needed, is_there, _)| *is_needed && !is_there)
    .map(|(_, _, what)| what)
    .collect()
}
