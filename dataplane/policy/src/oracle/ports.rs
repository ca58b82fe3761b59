//! The ports that a configuration means, with what the oracle needs to know of each.

use crate::config::{Config, Switch, VlanMode, Vnic};
use crate::image::{Backing, Backings};
use crate::lower::internal_mac;
use crate::net::{MacAddr, VlanId, VlanRange};
use crate::oracle::Domain;

/// How a port treats tags.
#[derive(Clone, Debug)]
pub(super) enum Membership {
    /// One domain, untagged.
    Access(Domain),
    /// Some customer VLANs with tags, and perhaps one domain without.
    Trunk(Vec<VlanRange>, Option<Domain>),
    /// Every VLAN with its tag, except one domain without.
    All(Domain),
    /// Whatever comes goes behind this service tag.
    Tunnel(VlanId),
}

/// A port.
#[derive(Clone, Debug)]
pub(super) struct Port<'a> {
    pub(super) name: String,
    pub(super) switch: &'a Switch,
    /// Set if it is a VM's interface.
    pub(super) vnic: Option<&'a Vnic>,
    pub(super) up: bool,
    /// Addresses that its frames may have.
    pub(super) macs: Vec<MacAddr>,
    /// Addresses that are found there.
    pub(super) owns: Vec<MacAddr>,
    /// The NIC behind it may give back what it is sent.
    pub(super) loops: bool,
    /// Its vNIC has a VF.
    pub(super) has_vf: bool,
    /// Its vNIC is served elsewhere: nothing is flooded to it.
    pub(super) is_standby: bool,
    pub(super) membership: Membership,
    pub(super) learn_limit: u32,
    pub(super) wants_unknown_unicast: bool,
}

impl Port<'_> {
    pub(super) fn is_on_switch_of(&self, other: &Port<'_>) -> bool {
        self.switch.name == other.switch.name
    }
}

/// All ports of a configuration.
pub(super) fn all<'a>(config: &'a Config, backings: &Backings) -> Vec<Port<'a>> {
    let mut ports = Vec::new();
    for switch in &config.switches {
        if let Some(uplink) = &switch.uplink {
            let native = uplink.native.map_or(Domain::Untagged, Domain::Customer);
            ports.push(Port {
                name: format!("uplink/{}", switch.name),
                switch,
                vnic: None,
                up: uplink.up,
                macs: Vec::new(),
                owns: served_by_vfs(config, switch, backings),
                loops: backings.filtered_uplinks.contains(&switch.name),
                has_vf: false,
                is_standby: false,
                membership: if uplink.trunk.is_empty() {
                    Membership::All(native)
                } else {
                    Membership::Trunk(uplink.trunk.clone(), Some(native))
                },
                learn_limit: uplink.learn_limit,
                wants_unknown_unicast: true,
            });
        }
        if let Some(internal) = &switch.internal {
            ports.push(Port {
                name: format!("internal/{}", switch.name),
                switch,
                vnic: None,
                up: true,
                macs: vec![internal_mac(switch, internal)],
                owns: vec![internal_mac(switch, internal)],
                loops: false,
                has_vf: false,
                is_standby: false,
                membership: membership(&internal.vlan),
                learn_limit: 0,
                wants_unknown_unicast: false,
            });
        }
    }
    for vnic in &config.vnics {
        let Some(switch) = config.switches.iter().find(|switch| switch.name == vnic.switch) else {
            continue;
        };
        let policy = &vnic.policy;
        let is_trunk = matches!(policy.vlan, VlanMode::Trunk { .. });
        let usual_limit = if is_trunk && policy.allow_spoofing { 256 } else { 0 };
        let learn_limit = policy.learn_limit.unwrap_or(usual_limit);
        let macs: Vec<MacAddr> = vnic.macs().collect();
        let backing = backings.vnics.get(&vnic.name);
        let in_use = backing.is_some_and(|backing| {
            backing.in_use && (backing.representor.is_some() || switch.uplink.is_some())
        });
        let software = Port {
            name: format!("vnic/{}", vnic.name),
            switch,
            vnic: Some(vnic),
            up: vnic.up,
            owns: if in_use { Vec::new() } else { macs.clone() },
            macs,
            loops: false,
            has_vf: backing.is_some(),
            is_standby: backing.is_some_and(|backing| backing.in_use),
            membership: membership(&policy.vlan),
            learn_limit,
            wants_unknown_unicast: policy.unknown_unicast || learn_limit > 0,
        };
        if let Some(Backing { representor: Some(_), in_use }) = backing {
            ports.push(Port {
                name: format!("vf/{}", vnic.name),
                owns: if *in_use { software.macs.clone() } else { Vec::new() },
                is_standby: !in_use,
                ..software.clone()
            });
        }
        ports.push(software);
    }
    ports
}

/// Addresses of vNICs whose guests use a VF that has no representor: the uplink leads to them.
fn served_by_vfs(config: &Config, switch: &Switch, backings: &Backings) -> Vec<MacAddr> {
    let here = config.vnics.iter().filter(|vnic| vnic.switch == switch.name);
    let behind_uplink = here.filter(|vnic| {
        let backing = backings.vnics.get(&vnic.name);
        backing.is_some_and(|backing| backing.in_use && backing.representor.is_none())
    });
    behind_uplink.flat_map(Vnic::macs).collect()
}

fn membership(mode: &VlanMode) -> Membership {
    match mode {
        VlanMode::Untagged => Membership::Access(Domain::Untagged),
        VlanMode::Access(vid) => Membership::Access(Domain::Customer(*vid)),
        VlanMode::Trunk { allowed, native } => {
            Membership::Trunk(allowed.clone(), native.map(Domain::Customer))
        }
        VlanMode::Tunnel(vid) => Membership::Tunnel(*vid),
    }
}
