//! Placement on an eSwitch in legacy mode: the NIC bridges by (VLAN, MAC), and the PF driver takes a handful of
//! settings per VF. MAC guard, one VLAN and the sending rate fit; all else stays in software.

use super::{
    Capabilities, Evidence, Feature, PortVlan, Uncovered, VfSettings, VlanProtocol, acl_allows_all, common,
    learn_limit,
};
use crate::config::{Config, Direction, Rate, Switch, Uplink, VlanMode, Vnic};
use crate::net::VlanId;
use crate::oracle::Domain;

const SWITCHDEV: &str = "put the NIC into switchdev mode: `devlink dev eswitch set DEV mode switchdev`; or drop it from the policy";

/// The settings, which are only good if nothing was added to `uncovered`.
pub(super) fn place(
    config: &Config,
    switch: &Switch,
    vnic: &Vnic,
    capabilities: &Capabilities,
    uncovered: &mut Vec<Uncovered>,
) -> VfSettings {
    common(switch, vnic, capabilities, uncovered);
    let policy = &vnic.policy;
    if !policy.allow_spoofing {
        need(
            capabilities.mac_guard,
            Feature::MacGuard,
            "dropping spoofed source addresses (spoofchk)",
            "`sluice probe uplink` finds out; if you know better, attest macGuard on the uplink; or allow spoofing",
            uncovered,
        );
    }
    if !vnic.extra_macs.is_empty() {
        uncovered.push(Uncovered::new(
            Feature::ExtraMacs,
            "a VF in legacy mode has one address that its guest cannot change",
            "remove extraMacs, or put the NIC into switchdev mode",
        ));
    }
    if !policy.ip_guard.is_empty() {
        refuse(Feature::IpGuard, "IP guard", uncovered);
    }
    let vlan = vlan(policy.vlan.clone(), capabilities, uncovered);
    if let Some(uplink) = &switch.uplink {
        carried(uplink, &policy.vlan, uncovered);
    }
    if policy.dhcp_guard {
        refuse(Feature::DhcpGuard, "DHCP guard", uncovered);
    }
    if policy.ra_guard {
        refuse(Feature::RaGuard, "RA guard", uncovered);
    }
    if !acl_allows_all(config, vnic, Direction::FromVm) {
        refuse(Feature::AclFromVm, "an ACL on what the VM sends", uncovered);
    }
    let max_rate_mbps = policy.rate_from_vm.map_or(0, |rate| max_rate(rate, capabilities, uncovered));
    unknown_unicast(config, vnic, capabilities, uncovered);
    if !acl_allows_all(config, vnic, Direction::ToVm) {
        refuse(Feature::AclToVm, "an ACL on what the VM receives", uncovered);
    }
    if policy.rate_to_vm.is_some() {
        refuse(Feature::RateToVm, "a rate limit on what the VM receives", uncovered);
    }
    VfSettings {
        mac: vnic.mac,
        vlan,
        spoofchk: !policy.allow_spoofing,
        trust: false,
        min_rate_mbps: 0,
        max_rate_mbps,
        query_rss: false,
    }
}

fn refuse(feature: Feature, what: &str, uncovered: &mut Vec<Uncovered>) {
    uncovered.push(Uncovered::new(feature, format!("{what} is beyond an eSwitch in legacy mode"), SWITCHDEV));
}

fn need(
    evidence: Evidence,
    feature: Feature,
    what: &str,
    remedy: impl Into<String>,
    uncovered: &mut Vec<Uncovered>,
) {
    if !evidence.is_sufficient() {
        uncovered.push(Uncovered::new(feature, format!("{what}: {evidence}"), remedy));
    }
}

fn vlan(mode: VlanMode, capabilities: &Capabilities, uncovered: &mut Vec<Uncovered>) -> Option<PortVlan> {
    let tag = |vid: VlanId, protocol| Some(PortVlan { vid, qos: 0, protocol });
    match mode {
        VlanMode::Untagged => {
            need(
                capabilities.untagged_only,
                Feature::UntaggedVlan,
                "keeping a VF without a port VLAN from tagging its frames for any VLAN it likes",
                "give the vNIC an access VLAN",
                uncovered,
            );
            None
        }
        VlanMode::Access(vid) => {
            need(
                capabilities.access_vlan,
                Feature::AccessVlan,
                "a port VLAN",
                "use a NIC whose driver has `ip link set PF vf N vlan`",
                uncovered,
            );
            tag(vid, VlanProtocol::Dot1q)
        }
        VlanMode::Tunnel(vid) => {
            need(
                capabilities.tunnel_vlan,
                Feature::TunnelVlan,
                "a port VLAN of protocol 802.1ad",
                "use a NIC whose driver has `ip link set PF vf N vlan V proto 802.1ad`",
                uncovered,
            );
            tag(vid, VlanProtocol::Dot1ad)
        }
        VlanMode::Trunk { .. } => {
            uncovered.push(Uncovered::new(
                Feature::TrunkVlan,
                "in legacy mode a VF takes one VLAN (MAX_VLAN_LIST_LEN is 1)",
                "trunk VLANs need switchdev mode: `devlink dev eswitch set DEV mode switchdev`",
            ));
            None
        }
    }
}

/// The NIC sends every VLAN over the wire with its tag; the uplink must want just that.
fn carried(uplink: &Uplink, mode: &VlanMode, uncovered: &mut Vec<Uncovered>) {
    let domain = match mode {
        VlanMode::Untagged => Domain::Untagged,
        VlanMode::Access(vid) => Domain::Customer(*vid),
        VlanMode::Tunnel(vid) => Domain::Service(*vid),
        VlanMode::Trunk { .. } => return,
    };
    let native = uplink.native.map_or(Domain::Untagged, Domain::Customer);
    let in_trunk = uplink.trunk.is_empty()
        || matches!(domain, Domain::Customer(vid) if uplink.trunk.iter().any(|range| range.contains(vid.get())));
    if domain == native && domain != Domain::Untagged {
        uncovered.push(Uncovered::new(
            Feature::Uplink,
            format!(
                "{domain} travels untagged on uplink {}, and the NIC would send it tagged",
                uplink.netdev
            ),
            "have the uplink carry that VLAN tagged (remove `native`)",
        ));
    } else if domain != native && (domain == Domain::Untagged || !in_trunk) {
        uncovered.push(Uncovered::new(
            Feature::Uplink,
            format!(
                "uplink {} does not carry {domain}, and the NIC would send it all the same",
                uplink.netdev
            ),
            "add the VLAN to the uplink's trunk, or leave the trunk empty",
        ));
    }
}

fn max_rate(rate: Rate, capabilities: &Capabilities, uncovered: &mut Vec<Uncovered>) -> u32 {
    need(
        capabilities.rate_max,
        Feature::RateFromVm,
        "a rate limit on what a VF sends",
        "use a NIC whose driver has `ip link set PF vf N max_tx_rate`, or remove the limit",
        uncovered,
    );
    let mbps = u32::try_from(rate.bits_per_second / 1_000_000).ok().filter(|mbps| *mbps > 0);
    match mbps {
        Some(mbps) if rate.bits_per_second.is_multiple_of(1_000_000) => mbps,
        _ => {
            uncovered.push(Uncovered::new(
                Feature::RateFromVm,
                format!("NICs count in whole Mbit/s, and the limit is {} bit/s", rate.bits_per_second),
                "use a whole number of Mbit/s",
            ));
            0
        }
    }
}

/// The NIC sends frames to addresses it does not know out of the wire, and shows them to nobody else.
fn unknown_unicast(
    config: &Config,
    vnic: &Vnic,
    capabilities: &Capabilities,
    uncovered: &mut Vec<Uncovered>,
) {
    if learn_limit(vnic) > 0 {
        refuse(Feature::Learning, "learning addresses behind the VM", uncovered);
    }
    if vnic.policy.unknown_unicast {
        refuse(Feature::UnknownUnicast, "showing the VM frames to unknown addresses", uncovered);
    }
    let asks = |other: &&Vnic| {
        other.switch == vnic.switch
            && other.name != vnic.name
            && (other.policy.unknown_unicast || learn_limit(other) > 0)
    };
    if !capabilities.unknown_unicast_to_pf.is_sufficient()
        && let Some(other) = config.vnics.iter().find(asks)
    {
        uncovered.push(Uncovered::new(
            Feature::UnknownUnicast,
            format!(
                "vNIC {} of the same switch learns or asks for unknown addresses, and would not see this VM's frames to them: {}",
                other.name, capabilities.unknown_unicast_to_pf
            ),
            format!("put {} on another switch, or take learning and unknownUnicast from it", other.name),
        ));
    }
}
