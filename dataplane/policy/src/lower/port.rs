//! Port entries, from each of the three kinds of port, and the addresses that belong to them.

use std::net::{IpAddr, Ipv6Addr};

use sluice_pipeline::tables::{
    AclConfig, IpGuardKey, MacKey, PORT_GROUPS_MAX, PORT_MACS_MAX, PortConfig, RATE_SHIFT, RateConfig,
    TrunkBitmap, Vlan, acl_action, mac_word, port_flag, port_kind, vlan_mode,
};

use crate::config::{Attachment, Hook, Internal, Policy, Rate, Switch, Uplink, VlanMode, Vnic};
use crate::image::{Behind, Bindings, Image, PortImage};
use crate::lower::{internal_port, internal_port_netdev, uplink_port, user_port, user_tap_netdev, vnic_port};
use crate::net::{MacAddr, VlanId, VlanRange};

/// Addresses learnt from a trunk vNIC that may spoof, unless its policy says otherwise.
const TRUNK_LEARN_LIMIT: u32 = 256;

const OPEN: AclConfig =
    AclConfig { groups: [0; PORT_GROUPS_MAX], group_count: 0, default_action: acl_action::ALLOW };

const UNLIMITED: RateConfig = RateConfig { ns_per_byte: 0, burst_ns: 0 };

/// A port that does nothing yet.
const fn blank(kind: u8, switch: u32) -> PortConfig {
    PortConfig {
        flags: 0,
        ifindex: 0,
        switch,
        kind,
        vlan_mode: vlan_mode::ACCESS,
        vlan: Vlan::UNTAGGED,
        native: Vlan::UNTAGGED,
        mac_count: 0,
        reserved: 0,
        learn_limit: 0,
        guard_ipv4: [0; 2],
        macs: [0; PORT_MACS_MAX],
        acl: [OPEN; 2],
        rate: [UNLIMITED; 2],
    }
}

/// A switch's uplink: carries everything it is told to, learns, and gets what nobody else is known to want.
pub(super) fn uplink(switch_name: &str, uplink: &Uplink, switch: u32) -> PortImage {
    let mut config = blank(port_kind::UPLINK, switch);
    let mut trunk = [0; 64];
    config.flags = port_flag::UNKNOWN_UNICAST;
    set(&mut config, port_flag::UP, uplink.up);
    set(&mut config, port_flag::LEARN, uplink.learn_limit > 0);
    config.learn_limit = uplink.learn_limit;
    config.native = uplink.native.map_or(Vlan::UNTAGGED, customer);
    if uplink.trunk.is_empty() {
        config.vlan_mode = vlan_mode::ALL;
    } else {
        config.vlan_mode = vlan_mode::TRUNK;
        config.flags |= port_flag::NATIVE;
        trunk = bitmap(&uplink.trunk, uplink.native);
    }
    PortImage {
        name: uplink_port(switch_name),
        netdev: uplink.netdev.clone(),
        hook: uplink.hook,
        full_checksums: uplink.full_checksums,
        config,
        trunk,
        behind: Behind::Netdev,
        is_filtered: false,
        is_standby: false,
    }
}

/// The host's own port: one address, no guards.
pub(super) fn internal(switch: &Switch, internal: &Internal, switch_id: u32) -> PortImage {
    let mut config = blank(port_kind::INTERNAL, switch_id);
    config.flags = port_flag::UP;
    config.mac_count = 1;
    config.macs[0] = mac_word(internal_mac(switch, internal).0);
    let trunk = apply_vlan_mode(&mut config, &internal.vlan);
    PortImage {
        name: internal_port(&switch.name),
        netdev: internal_port_netdev(internal),
        hook: Hook::Tcx,
        full_checksums: false,
        config,
        trunk,
        behind: Behind::Netdev,
        is_filtered: false,
        is_standby: false,
    }
}

/// The trunk to the userspace engine: carries everything, and gets what that engine may know the way of. What is behind it
/// is in the table of static addresses, or is for that engine to learn.
pub(super) fn user_tap(switch_name: &str, switch: u32) -> PortImage {
    let mut config = blank(port_kind::UPLINK, switch);
    config.flags = port_flag::UP | port_flag::UNKNOWN_UNICAST | port_flag::STEERED;
    config.vlan_mode = vlan_mode::ALL;
    PortImage {
        name: user_port(switch_name),
        netdev: user_tap_netdev(switch_name),
        behind: Behind::UserTap,
        hook: Hook::Tcx,
        full_checksums: false,
        config,
        trunk: [0; 64],
        is_filtered: false,
        is_standby: false,
    }
}

/// A VM's interface under its policy.
pub(super) fn vnic(vnic: &Vnic, switch: u32, acl: [AclConfig; 2]) -> PortImage {
    let policy = &vnic.policy;
    let mut config = blank(port_kind::VNIC, switch);
    set(&mut config, port_flag::UP, vnic.up);
    set(&mut config, port_flag::MAC_GUARD, !policy.allow_spoofing);
    set(&mut config, port_flag::IP_GUARD, !policy.ip_guard.is_empty());
    set(&mut config, port_flag::DHCP_GUARD, policy.dhcp_guard);
    set(&mut config, port_flag::RA_GUARD, policy.ra_guard);
    set(&mut config, port_flag::UNKNOWN_UNICAST, policy.unknown_unicast);
    config.guard_ipv4 = first_ipv4(policy);
    config.learn_limit = learn_limit(policy);
    let learns = config.learn_limit > 0;
    set(&mut config, port_flag::LEARN, learns);
    for (slot, mac) in config.macs.iter_mut().zip(vnic.macs()) {
        *slot = mac_word(mac.0);
        config.mac_count += 1;
    }
    config.acl = acl;
    config.rate = [policy.rate_from_vm, policy.rate_to_vm].map(|rate| rate.map_or(UNLIMITED, lower_rate));
    let trunk = apply_vlan_mode(&mut config, &policy.vlan);
    PortImage {
        name: vnic_port(&vnic.name),
        netdev: vnic.attach.netdev().unwrap_or_default().to_owned(),
        behind: match &vnic.attach {
            Attachment::Veth(_) | Attachment::Tap(_) => Behind::Netdev,
            Attachment::VhostUser(rings) => Behind::VhostUser(rings.clone()),
        },
        hook: vnic.hook,
        full_checksums: vnic.full_checksums,
        config,
        trunk,
        is_filtered: false,
        is_standby: false,
    }
}

/// The port of a vNIC's VF: the same policy on another interface.
pub(super) fn representor(software: &PortImage, name: String, netdev: &str) -> PortImage {
    let mut port = PortImage {
        name,
        netdev: netdev.to_owned(),
        hook: Hook::Tcx,
        full_checksums: false,
        behind: Behind::Netdev,
        ..software.clone()
    };
    // What `bind` enters is the software attachment's.
    port.config.ifindex = 0;
    port.config.flags &= !(port_flag::ATTACHED | port_flag::PEER_REDIRECT | port_flag::XDP_TARGET);
    port
}

/// Enters what is known of the port's interface, and the port's static addresses.
pub(super) fn bind(port: &mut PortImage, id: u32, bindings: &Bindings, image: &mut Image) {
    let config = &mut port.config;
    for mac in &config.macs[..usize::from(config.mac_count)] {
        image.macs.insert(MacKey::from_word(config.switch, *mac), id);
    }
    let Some(binding) = bindings.get(&port.name) else {
        return;
    };
    config.flags |= port_flag::ATTACHED;
    if matches!(port.behind, Behind::VhostUser(_)) {
        return; // nothing that the kernel knows
    }
    config.ifindex = binding.ifindex;
    set(config, port_flag::PEER_REDIRECT, binding.peer_redirect);
    set(config, port_flag::XDP_TARGET, binding.xdp_target);
    image.ifindexes.insert(binding.ifindex, id);
}

fn set(config: &mut PortConfig, flag: u32, on: bool) {
    if on {
        config.flags |= flag;
    }
}

fn customer(vid: VlanId) -> Vlan {
    Vlan(vid.get())
}

/// Sets mode, VLANs and the native flag; returns the trunk's set.
fn apply_vlan_mode(config: &mut PortConfig, mode: &VlanMode) -> TrunkBitmap {
    match mode {
        VlanMode::Untagged => config.vlan_mode = vlan_mode::ACCESS,
        VlanMode::Access(vid) => {
            config.vlan_mode = vlan_mode::ACCESS;
            config.vlan = customer(*vid);
        }
        VlanMode::Trunk { allowed, native } => {
            config.vlan_mode = vlan_mode::TRUNK;
            if let Some(native) = native {
                config.flags |= port_flag::NATIVE;
                config.native = customer(*native);
            }
            return bitmap(allowed, *native);
        }
        VlanMode::Tunnel(vid) => {
            config.vlan_mode = vlan_mode::TUNNEL;
            config.vlan = Vlan(vid.get() | Vlan::SERVICE);
        }
    }
    [0; 64]
}

/// The set as bits. The native VLAN is a member too, so that it is accepted with its tag as well.
fn bitmap(ranges: &[VlanRange], native: Option<VlanId>) -> TrunkBitmap {
    let mut bits = [0u64; 64];
    let ranged = ranges.iter().flat_map(|range| range.first().get()..=range.last().get());
    for vid in ranged.chain(native.map(VlanId::get)) {
        bits[usize::from(vid / 64)] |= 1 << (vid % 64);
    }
    bits
}

/// Nanoseconds per byte and per burst, rounded to the nearest; never 0, which would mean no limit.
fn lower_rate(rate: Rate) -> RateConfig {
    let bits_per_second = u128::from(rate.bits_per_second.max(1));
    let per = |bytes: u128| {
        let ns = (bytes * 8_000_000_000 + bits_per_second / 2) / bits_per_second;
        u64::try_from(ns).unwrap_or(u64::MAX >> 1).max(1)
    };
    RateConfig { ns_per_byte: per(1 << RATE_SHIFT), burst_ns: per(u128::from(rate.burst_bytes)) }
}

/// How many addresses are learnt behind a vNIC: what its policy says, or 256 on a trunk that may spoof, or none.
pub fn learn_limit(policy: &Policy) -> u32 {
    policy.learn_limit.unwrap_or(match policy.vlan {
        VlanMode::Trunk { .. } if policy.allow_spoofing => TRUNK_LEARN_LIMIT,
        _ => 0,
    })
}

/// The address of a switch's internal port: as given, or locally administered and derived from the switch's name.
pub fn internal_mac(switch: &Switch, internal: &Internal) -> MacAddr {
    internal.mac.unwrap_or_else(|| {
        let hash = super::acl::fnv1a(switch.name.as_bytes()).to_be_bytes();
        MacAddr([0x06, hash[0] ^ hash[5], hash[1] ^ hash[6], hash[2] ^ hash[7], hash[3], hash[4]])
    })
}

/// The link-local address made from a MAC (modified EUI-64, RFC 4291 appendix A).
pub fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 0x02, b, c, 0xff, 0xfe, d, e, f])
}

/// The addresses that a vNIC may use; empty if it may use any.
///
/// Where an IPv6 address is given, the link-local addresses of the vNIC's MACs are allowed too.
pub fn effective_ip_guard(vnic: &Vnic) -> Vec<IpAddr> {
    let mut addresses = vnic.policy.ip_guard.clone();
    if addresses.iter().any(IpAddr::is_ipv6) {
        addresses.extend(vnic.macs().map(|mac| IpAddr::V6(link_local(mac))));
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// The addresses that the pipeline looks for before the table.
fn first_ipv4(policy: &Policy) -> [u32; 2] {
    let mut first = [0; 2];
    let ipv4 = policy.ip_guard.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(u32::from_ne_bytes(address.octets())),
        IpAddr::V6(_) => None,
    });
    for (slot, address) in first.iter_mut().zip(ipv4) {
        *slot = address;
    }
    first
}

pub(super) fn ip_guard_keys(vnic: &Vnic, port: u32) -> impl Iterator<Item = IpGuardKey> {
    effective_ip_guard(vnic)
        .into_iter()
        .map(move |address| IpGuardKey { port, ip: super::acl::octets(address) })
}
