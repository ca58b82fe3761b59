//! Placement on an eSwitch in switchdev mode, as rules that tc flower can hold (tc-flower(8)).
//!
//! Behind each representor is the whole pipeline, in software. So a program need not do everything: it decides what it
//! can decide exactly, in the pipeline's order, and *traps* the rest. Rare frames are trapped (ARP under an IP guard,
//! fragments and IPv6 extension headers where transport fields matter, priority tags, addresses that are not known),
//! never the bulk of the traffic: a policy that would need that is uncovered, since its VF would be slower than no VF.
//!
//! Tagged and untagged frames have chains of their own, since a rule names the outermost ethertype. Chains from a VM:
//! MAC guard and VLAN (0), then IP guard, services, ACL, forward; and *software*, which polices and traps. Frames to a
//! VM take the rules on the uplink's representor if its policy asks nothing of them.

mod acl;
mod build;
mod forward;
mod guards;
mod rule;

use super::{Capabilities, Feature, Neighbours, Uncovered, acl_allows_all, common};
use crate::config::{Config, Direction, Switch, VlanMode, Vnic};
use crate::lower::internal_mac;
use crate::net::{MacAddr, VlanId, VlanRange};
use crate::oracle::Domain;

use build::Builder;

pub use rule::{FlowerAction, FlowerMatch, FlowerProgram, FlowerRule, RulePort, Target, VlanMatch};

/// Everything about one vNIC that the stages need.
struct Subject<'a> {
    config: &'a Config,
    switch: &'a Switch,
    vnic: &'a Vnic,
    neighbours: &'a Neighbours,
}

/// How frames look in a set of chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// Without a tag, all in one domain.
    Untagged(Domain),
    /// With one 802.1Q tag, of an allowed VLAN.
    Tagged,
}

/// What a chain is for, within a framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    IpGuard = 1,
    Services = 2,
    Acl = 3,
    Forward = 4,
}

/// Where a frame of a VM starts.
const START: u32 = 0;
/// Police and trap.
const SOFTWARE: u32 = 1;

impl Framing {
    const fn chain(self, stage: Stage) -> u32 {
        match self {
            Framing::Untagged(_) => 10 + stage as u32,
            Framing::Tagged => 20 + stage as u32,
        }
    }

    /// A match on frames of this framing, with this ethertype behind the tag if given.
    fn frames(self, ethertype: Option<u16>) -> FlowerMatch {
        match self {
            Framing::Untagged(_) => FlowerMatch { ethertype, ..FlowerMatch::default() },
            Framing::Tagged => FlowerMatch {
                ethertype: Some(0x8100),
                vlan: ethertype
                    .map(|ethertype| VlanMatch { ethertype: Some(ethertype), ..VlanMatch::default() }),
                ..FlowerMatch::default()
            },
        }
    }
}

impl Subject<'_> {
    fn macs(&self) -> Vec<MacAddr> {
        macs(self.vnic)
    }

    /// The framings of what the VM may send.
    fn framings(&self) -> Vec<Framing> {
        match &self.vnic.policy.vlan {
            VlanMode::Untagged => vec![Framing::Untagged(Domain::Untagged)],
            VlanMode::Access(vid) => vec![Framing::Untagged(Domain::Customer(*vid))],
            VlanMode::Trunk { native, .. } => {
                let native = native.map(|vid| Framing::Untagged(Domain::Customer(vid)));
                native.into_iter().chain([Framing::Tagged]).collect()
            }
            VlanMode::Tunnel(_) => Vec::new(),
        }
    }

    /// Addresses of the switch's own ports: static, wherever they seem to be.
    fn is_own(&self, mac: MacAddr) -> bool {
        let vnics = self.config.vnics.iter().filter(|vnic| vnic.switch == self.switch.name);
        vnics.flat_map(macs).any(|own| own == mac)
            || self
                .switch
                .internal
                .as_ref()
                .is_some_and(|internal| internal_mac(self.switch, internal) == mac)
    }
}

fn macs(vnic: &Vnic) -> Vec<MacAddr> {
    std::iter::once(vnic.mac).chain(vnic.extra_macs.iter().copied()).collect()
}

/// The VLANs of a trunk, each once, the native one included.
fn trunk_vids(allowed: &[VlanRange], native: Option<VlanId>) -> Vec<VlanId> {
    let vids = allowed.iter().flat_map(|range| range.first().get()..=range.last().get());
    let mut vids: Vec<VlanId> =
        vids.filter_map(|vid| VlanId::new(u32::from(vid)).ok()).chain(native).collect();
    vids.sort_unstable();
    vids.dedup();
    vids
}

/// The rules, or nothing and at least one reason more in `uncovered`.
pub(super) fn place(
    config: &Config,
    switch: &Switch,
    vnic: &Vnic,
    capabilities: &Capabilities,
    neighbours: &Neighbours,
    uncovered: &mut Vec<Uncovered>,
) -> Option<FlowerProgram> {
    common(switch, vnic, capabilities, uncovered);
    let flower = &capabilities.flower;
    if !flower.offload.is_sufficient() {
        uncovered.push(Uncovered::new(
            Feature::Offload,
            format!("rules in hardware: {}", flower.offload),
            "switch it on: `ethtool -K PF hw-tc-offload on`; or use a NIC that has it",
        ));
        return None;
    }
    if !flower.actions.chains || !flower.actions.trap {
        uncovered.push(Uncovered::new(
            Feature::Offload,
            "the NIC's rules cannot go to another chain, or not trap to software",
            "use newer firmware, or another NIC",
        ));
        return None;
    }
    if matches!(vnic.policy.vlan, VlanMode::Tunnel(_)) {
        uncovered.push(Uncovered::new(
            Feature::TunnelVlan,
            "what is in a service VLAN, with or without a tag of its own, is not expressed in rules",
            "put the NIC into legacy mode if its driver has 802.1ad port VLANs, or give the vNIC an access VLAN",
        ));
    }
    let subject = Subject { config, switch, vnic, neighbours };
    let mut builder = Builder::new(flower);
    guards::sources_and_tags(&subject, &mut builder);
    for framing in subject.framings() {
        guards::ip(&subject, framing, &mut builder);
        guards::services(&subject, framing, &mut builder);
        acl::from_vm(&subject, framing, &mut builder);
        forward::from_vm(&subject, framing, &mut builder);
    }
    let police = vnic.policy.rate_from_vm.map(FlowerAction::Police);
    let actions = police.into_iter().chain([FlowerAction::Trap]).collect();
    builder.add(Feature::RateFromVm, SOFTWARE, FlowerMatch::default(), actions);
    forward::to_vm(&subject, &mut builder);
    builder.finish(uncovered)
}

/// Whether a vNIC's policy asks nothing of what it receives, so that a rule may send to it.
fn takes_anything(config: &Config, vnic: &Vnic) -> bool {
    vnic.up && vnic.policy.rate_to_vm.is_none() && acl_allows_all(config, vnic, Direction::ToVm)
}

#[cfg(test)]
mod tests;
