//! Checks of switches, uplinks and vNICs, field by field.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sluice_pipeline::tables::{FDB_MAX, PORT_GROUPS_MAX, PORT_MACS_MAX};

use super::{
    AGEING_SECONDS, Check, IP_GUARDS_PER_VNIC, NETDEV_MAX, RATE_BPS, RATE_BURST_BYTES, SOCKET_PATH_MAX,
    VHOST_QUEUES, ViolationCode,
};
use crate::config::{Attachment, Hook, Rate, Switch, VfAttachment, VhostUser, VlanMode, Vnic};
use crate::net::{MacAddr, VlanRange};

/// The field that names a vNIC's interface.
pub(super) const fn attach_field(attach: &Attachment) -> &'static str {
    match attach {
        Attachment::Veth(_) => "attach.veth",
        Attachment::Tap(_) => "attach.tap",
        Attachment::VhostUser(_) => "attach.vhostUser",
    }
}

impl Check<'_> {
    pub(super) fn switch(&mut self, switch: &Switch) {
        let resource = format!("switches/{}", switch.name);
        if !AGEING_SECONDS.contains(&switch.ageing_seconds) {
            let (low, high) = (AGEING_SECONDS.start(), AGEING_SECONDS.end());
            let message = format!("{} seconds is out of range; use {low} to {high}", switch.ageing_seconds);
            self.report(ViolationCode::OutOfRange, &resource, "ageingSeconds", message);
        }
        if let Some(uplink) = &switch.uplink {
            self.netdev(&resource, "uplink.netdev", &uplink.netdev, NETDEV_MAX);
            self.disjoint(&resource, "uplink.trunk", &uplink.trunk);
            self.learn_limit(&resource, "uplink.learnLimit", uplink.learn_limit);
        }
        if let Some(internal) = &switch.internal {
            // The switch's end is named after it, with `-sw` appended.
            self.netdev(&resource, "internal.netdev", &internal.netdev, NETDEV_MAX - 3);
            if let Some(mac) = internal.mac {
                self.mac(&resource, "internal.mac", mac);
            }
            self.vlan(&resource, "internal.vlan", &internal.vlan);
        }
    }

    pub(super) fn vnic(&mut self, vnic: &Vnic, switches: &BTreeSet<&str>, groups: &BTreeSet<&str>) {
        let resource = format!("vnics/{}", vnic.name);
        let policy = &vnic.policy;
        if vnic.switch.is_empty() {
            let message = "the name of a switch is needed";
            self.report(ViolationCode::Missing, &resource, "switch", message);
        } else if !switches.contains(vnic.switch.as_str()) {
            let message = format!(
                "there is no switch `{}`; add it to switches in the same configuration, or correct the name",
                vnic.switch
            );
            self.report(ViolationCode::NotFound, &resource, "switch", message);
        }
        match &vnic.attach {
            Attachment::Veth(netdev) | Attachment::Tap(netdev) => {
                self.netdev(&resource, attach_field(&vnic.attach), netdev, NETDEV_MAX);
            }
            Attachment::VhostUser(rings) => self.vhost_user(&resource, vnic, rings),
        }
        self.mac(&resource, "mac", vnic.mac);
        for (index, mac) in vnic.extra_macs.iter().enumerate() {
            self.mac(&resource, &format!("extraMacs[{index}]"), *mac);
        }
        if vnic.extra_macs.len() >= PORT_MACS_MAX {
            let message = format!(
                "{} further addresses; a vNIC has room for {}, remove some or use another vNIC",
                vnic.extra_macs.len(),
                PORT_MACS_MAX - 1
            );
            self.report(ViolationCode::Limit, &resource, "extraMacs", message);
        }
        self.sriov(&resource, vnic);
        self.vlan(&resource, "policy.vlan", &policy.vlan);
        self.ip_guard(&resource, &policy.ip_guard);
        if let Some(limit) = policy.learn_limit {
            self.learn_limit(&resource, "policy.learnLimit", limit);
        }
        self.rate(&resource, "policy.rate.fromVm", policy.rate_from_vm);
        self.rate(&resource, "policy.rate.toVm", policy.rate_to_vm);
        let mut seen = BTreeSet::new();
        for (index, group) in policy.acl.groups.iter().enumerate() {
            let field = format!("policy.acl.groups[{index}]");
            if !groups.contains(group.as_str()) {
                let message = format!(
                    "there is no ACL group `{group}`; add it to aclGroups in the same configuration, or correct the name"
                );
                self.report(ViolationCode::NotFound, &resource, field, message);
            } else if !seen.insert(group.as_str()) {
                let message = format!("group `{group}` is listed twice; list it once");
                self.report(ViolationCode::Duplicate, &resource, field, message);
            }
        }
        let groups = policy.acl.groups.len() + usize::from(!policy.acl.rules.is_empty());
        if groups > PORT_GROUPS_MAX {
            let message = format!(
                "{groups} groups (the vNIC's own rules count as one), but a vNIC has room for {PORT_GROUPS_MAX}; \
                 put rules that are used together into one group"
            );
            self.report(ViolationCode::Limit, &resource, "policy.acl.groups", message);
        }
        self.rules(&resource, "policy.acl.rules", &policy.acl.rules);
    }

    fn vhost_user(&mut self, resource: &str, vnic: &Vnic, rings: &VhostUser) {
        let path = &rings.path;
        if path.is_empty() {
            let message = "the path of a socket is needed, as in /run/sluice/vm1.sock";
            self.report(ViolationCode::Missing, resource, "attach.vhostUser.path", message);
        } else if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
            let message =
                format!("`{path}` is not the absolute path of a socket; use one like /run/sluice/vm1.sock");
            self.report(ViolationCode::Invalid, resource, "attach.vhostUser.path", message);
        } else if path.len() > SOCKET_PATH_MAX {
            let message =
                format!("the path has {} bytes; the kernel takes at most {SOCKET_PATH_MAX}", path.len());
            self.report(ViolationCode::OutOfRange, resource, "attach.vhostUser.path", message);
        }
        if !VHOST_QUEUES.contains(&rings.queues) {
            let (low, high) = (VHOST_QUEUES.start(), VHOST_QUEUES.end());
            let message = format!("{} queues are out of range; use {low} to {high}", rings.queues);
            self.report(ViolationCode::OutOfRange, resource, "attach.vhostUser.queues", message);
        }
        if vnic.hook == Hook::Xdp {
            let message = "a vhost-user vNIC is served in user space, where there is no hook; leave hook out";
            self.report(ViolationCode::Conflict, resource, "hook", message);
        }
        if vnic.sriov.is_some() {
            let message = "a vhost-user vNIC cannot have a VF; attach it by tap or veth, or leave sriov out";
            self.report(ViolationCode::Conflict, resource, "sriov", message);
        }
    }

    fn sriov(&mut self, resource: &str, vnic: &Vnic) {
        let Some(sriov) = &vnic.sriov else { return };
        if sriov.weight > 100 {
            let message = format!("{} is not a weight; use 0 (never) to 100", sriov.weight);
            self.report(ViolationCode::OutOfRange, resource, "sriov.weight", message);
        }
        match &sriov.attach {
            VfAttachment::Netns { path, netdev, bond } => {
                if path.is_empty() {
                    let message = "the path of a network namespace is needed";
                    self.report(ViolationCode::Missing, resource, "sriov.attach.netns.path", message);
                }
                self.netdev(resource, "sriov.attach.netns.netdev", netdev, NETDEV_MAX);
                if let Some(bond) = bond {
                    self.netdev(resource, "sriov.attach.netns.bond", bond, NETDEV_MAX);
                }
            }
            VfAttachment::External { .. } => {}
            VfAttachment::Qmp { socket, device, .. } => {
                for (field, text) in [("socket", socket), ("device", device)] {
                    if text.is_empty() {
                        let field = format!("sriov.attach.qmp.{field}");
                        self.report(ViolationCode::Missing, resource, field, "it must not be empty");
                    }
                }
            }
        }
    }

    /// As the kernel's `dev_valid_name`.
    fn netdev(&mut self, resource: &str, field: &str, name: &str, longest: usize) {
        if name.is_empty() {
            let message = "the name of a network interface is needed";
            self.report(ViolationCode::Missing, resource, field, message);
        } else if name.len() > longest {
            let message =
                format!("`{name}` has {} bytes; an interface name has at most {longest} here", name.len());
            self.report(ViolationCode::OutOfRange, resource, field, message);
        } else if name == "lo" {
            let message = "the loopback interface is the host's own; name a tap, a veth or a NIC";
            self.report(ViolationCode::Invalid, resource, field, message);
        } else if matches!(name, "." | "..")
            || name.chars().any(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control())
        {
            let message = format!(
                "`{name}` is not an interface name; leave out `/`, `:`, spaces and control characters"
            );
            self.report(ViolationCode::Invalid, resource, field, message);
        }
    }

    fn mac(&mut self, resource: &str, field: &str, mac: MacAddr) {
        if mac.is_zero() {
            let message = "an address is needed; 00:00:00:00:00:00 is none";
            self.report(ViolationCode::Invalid, resource, field, message);
        } else if mac.is_group() {
            let message = format!(
                "{mac} is a group address; clear the lowest bit of the first byte for a port's own address"
            );
            self.report(ViolationCode::Invalid, resource, field, message);
        }
    }

    fn vlan(&mut self, resource: &str, field: &str, mode: &VlanMode) {
        let VlanMode::Trunk { allowed, .. } = mode else {
            return;
        };
        let field = format!("{field}.trunk.allowed");
        if allowed.is_empty() {
            let message = "a trunk needs at least one VLAN or range, as in [\"10\", \"20-29\"]; \
                           for one untagged VLAN use access";
            self.report(ViolationCode::Missing, resource, field.clone(), message);
        }
        self.disjoint(resource, &field, allowed);
    }

    fn disjoint(&mut self, resource: &str, field: &str, ranges: &[VlanRange]) {
        for (index, range) in ranges.iter().enumerate() {
            let overlap = ranges[..index]
                .iter()
                .find(|other| other.first() <= range.last() && range.first() <= other.last());
            if let Some(other) = overlap {
                let message = format!("`{range}` overlaps `{other}`; name each VLAN once");
                self.report(ViolationCode::Conflict, resource, format!("{field}[{index}]"), message);
            }
        }
    }

    fn learn_limit(&mut self, resource: &str, field: &str, limit: u32) {
        if limit > FDB_MAX {
            let message =
                format!("{limit} is out of range; the learning table has room for {FDB_MAX} addresses");
            self.report(ViolationCode::OutOfRange, resource, field, message);
        }
    }

    fn ip_guard(&mut self, resource: &str, addresses: &[IpAddr]) {
        if addresses.len() > IP_GUARDS_PER_VNIC {
            let message = format!("{} addresses; list at most {IP_GUARDS_PER_VNIC}", addresses.len());
            self.report(ViolationCode::Limit, resource, "policy.ipGuard", message);
        }
        let mut seen = BTreeSet::new();
        for (index, address) in addresses.iter().enumerate() {
            let field = format!("policy.ipGuard[{index}]");
            let mapped = match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(ip) => ip.to_ipv4_mapped(),
            };
            let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
            if let Some(ip) = mapped {
                let message = format!("{address} is an IPv4 address in IPv6 clothes; write {ip}");
                self.report(ViolationCode::Invalid, resource, field, message);
            } else if address.is_multicast() || address.is_unspecified() || address.is_loopback() || broadcast
            {
                let message = format!(
                    "{address} cannot be the source of a VM's packets; list the VM's unicast addresses"
                );
                self.report(ViolationCode::Invalid, resource, field, message);
            } else if !seen.insert(address) {
                let message = format!("{address} is listed twice; list it once");
                self.report(ViolationCode::Duplicate, resource, field, message);
            }
        }
    }

    fn rate(&mut self, resource: &str, field: &str, rate: Option<Rate>) {
        let Some(rate) = rate else {
            return;
        };
        if !RATE_BPS.contains(&rate.bits_per_second) {
            let message = format!(
                "{} bit/s is out of range; use {} to {} bit/s, or leave the rate out for no limit",
                rate.bits_per_second,
                RATE_BPS.start(),
                RATE_BPS.end()
            );
            self.report(ViolationCode::OutOfRange, resource, format!("{field}.bps"), message);
        }
        if !RATE_BURST_BYTES.contains(&rate.burst_bytes) {
            let message = format!(
                "{} bytes is out of range; the bucket must hold one frame ({} bytes) and at most {} bytes; \
                 about 10 ms of the rate, but not less than 65536 bytes, suits TCP",
                rate.burst_bytes,
                RATE_BURST_BYTES.start(),
                RATE_BURST_BYTES.end()
            );
            self.report(ViolationCode::OutOfRange, resource, format!("{field}.burstBytes"), message);
        }
    }
}
