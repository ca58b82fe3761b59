//! Placement: fitting one vNIC's policy onto an eSwitch, completely or not at all.
//!
//! [`place`] is pure: it compares a policy with [`Capabilities`] and returns either a [`Program`] that enforces all of
//! the policy, or every feature that the eSwitch cannot enforce, each with what to do about it. It fails closed: what
//! is not known for sure is not counted on ([`Evidence`]). Back-ends (`sluice-eswitch`) write programs to a NIC and
//! know nothing of policies; this module knows nothing of netlink. What "all of the policy" means for a NIC, and what
//! no NIC does, is in `docs/eswitch.md`.

mod capabilities;
mod flower;
mod legacy;
mod uncovered;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::config::{AclAction, AclRule, Config, Direction, Switch, Vnic};
use crate::net::{MacAddr, VlanId};
use crate::oracle::Domain;

pub use capabilities::{Capabilities, Evidence, FlowerActions, FlowerKeys, FlowerSupport, Mode};
pub use flower::{FlowerAction, FlowerMatch, FlowerProgram, FlowerRule, RulePort, Target, VlanMatch};
pub use uncovered::{Feature, Uncovered};

/// The number of a VF on its PF, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VfIndex(pub u16);

impl fmt::Display for VfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VF {}", self.0)
    }
}

/// The protocol of a VF's port VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VlanProtocol {
    /// 802.1Q, TPID 0x8100.
    Dot1q,
    /// 802.1ad, TPID 0x88a8.
    Dot1ad,
}

impl VlanProtocol {
    /// The tag protocol identifier.
    pub const fn tpid(self) -> u16 {
        match self {
            VlanProtocol::Dot1q => 0x8100,
            VlanProtocol::Dot1ad => 0x88a8,
        }
    }
}

/// The VLAN that the NIC puts a VF into: pushed on what it sends, taken off what it receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortVlan {
    /// VLAN.
    pub vid: VlanId,
    /// Priority in the pushed tag, 0–7.
    pub qos: u8,
    /// Which tag.
    pub protocol: VlanProtocol,
}

/// What the PF driver can be told about one VF (`IFLA_VF_*`, linux/if_link.h), except its link state: that belongs to
/// `enable` and `disable` of the eSwitch, so that programming never opens a VF.
///
/// Defaults are what a NIC does untold; a back-end does not write them where the NIC has no such knob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VfSettings {
    /// Address; zero means none was given.
    pub mac: MacAddr,
    /// Port VLAN.
    pub vlan: Option<PortVlan>,
    /// The NIC drops frames from other source addresses.
    pub spoofchk: bool,
    /// The guest may change its address, be promiscuous and join VLANs.
    pub trust: bool,
    /// Guaranteed rate, Mbit/s; 0 means none.
    pub min_rate_mbps: u32,
    /// Limit on what the VF sends, Mbit/s; 0 means none.
    pub max_rate_mbps: u32,
    /// The guest may read the RSS table.
    pub query_rss: bool,
}

/// What a back-end writes to enforce a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// Settings of the VF, in legacy mode.
    Legacy(VfSettings),
    /// Rules on representors, in switchdev mode.
    Switchdev(FlowerProgram),
}

/// What the forward stage of a switchdev program may know besides the configuration; a legacy eSwitch finds its way
/// alone. What is not here is served by the representor's software port, which is slower and just as right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// vNICs, by name, that are on VFs of the same eSwitch now.
    pub on_vfs: BTreeMap<String, VfIndex>,
    /// Stations known to be behind the uplink.
    pub behind_uplink: BTreeSet<(Domain, MacAddr)>,
}

/// Fits the policy of `vnic`, which is one of `config`'s, onto an eSwitch. The configuration must be valid.
///
/// # Errors
/// Everything that the eSwitch cannot enforce, in the order of the pipeline's stages; never empty.
pub fn place(
    config: &Config,
    vnic: &Vnic,
    capabilities: &Capabilities,
    neighbours: &Neighbours,
) -> Result<Program, Vec<Uncovered>> {
    let mut uncovered = Vec::new();
    let switch = config.switches.iter().find(|switch| switch.name == vnic.switch);
    let program = match (switch, capabilities.mode) {
        (None, _) => {
            uncovered.push(Uncovered::new(Feature::Uplink, "its switch does not exist", "create the switch"));
            None
        }
        (Some(switch), Mode::Legacy) => {
            Some(Program::Legacy(legacy::place(config, switch, vnic, capabilities, &mut uncovered)))
        }
        (Some(switch), Mode::Switchdev) => {
            flower::place(config, switch, vnic, capabilities, neighbours, &mut uncovered)
                .map(Program::Switchdev)
        }
    };
    match program {
        Some(program) if uncovered.is_empty() => Ok(program),
        _ => Err(uncovered),
    }
}

/// What every kind of eSwitch needs: a way out, an interface that is up, a VF to spare.
fn common(switch: &Switch, vnic: &Vnic, capabilities: &Capabilities, uncovered: &mut Vec<Uncovered>) {
    if !vnic.up {
        uncovered.push(Uncovered::new(
            Feature::PortState,
            "it is administratively down, and an idle VF would be wasted on it",
            "set `up: true` on the vNIC",
        ));
    }
    if capabilities.max_vfs == 0 {
        uncovered.push(Uncovered::new(
            Feature::Vfs,
            "the NIC has no VFs",
            "write a number to /sys/class/net/PF/device/sriov_numvfs; `sluice doctor` says what stands in the way",
        ));
    }
    match &switch.uplink {
        None => uncovered.push(Uncovered::new(
            Feature::Uplink,
            format!("switch {} has no uplink, hence no NIC", switch.name),
            "give the switch an uplink that is a PF",
        )),
        Some(uplink) if !uplink.up => uncovered.push(Uncovered::new(
            Feature::Uplink,
            format!("uplink {} is administratively down, which would not stop a VF", uplink.netdev),
            "set `up: true` on the uplink",
        )),
        Some(_) => {}
    }
}

/// The rules that apply to the vNIC in a direction, groups' and own, in no order.
fn acl_rules<'a>(
    config: &'a Config,
    vnic: &'a Vnic,
    direction: Direction,
) -> impl Iterator<Item = &'a AclRule> {
    let acl = &vnic.policy.acl;
    let groups = config.acl_groups.iter().filter(|group| acl.groups.contains(&group.name));
    groups.flat_map(|group| &group.rules).chain(&acl.rules).filter(move |rule| rule.direction == direction)
}

/// Whether the ACL lets everything pass in a direction, so that there is nothing to enforce.
fn acl_allows_all(config: &Config, vnic: &Vnic, direction: Direction) -> bool {
    let default = match direction {
        Direction::FromVm => vnic.policy.acl.default_from_vm,
        Direction::ToVm => vnic.policy.acl.default_to_vm,
    };
    default == AclAction::Allow
        && acl_rules(config, vnic, direction).all(|rule| rule.action == AclAction::Allow)
}

/// How many addresses are learnt behind the vNIC.
fn learn_limit(vnic: &Vnic) -> u32 {
    let is_trunk = matches!(vnic.policy.vlan, crate::config::VlanMode::Trunk { .. });
    let usual = if is_trunk && vnic.policy.allow_spoofing { 256 } else { 0 };
    vnic.policy.learn_limit.unwrap_or(usual)
}

#[cfg(test)]
mod tests;
