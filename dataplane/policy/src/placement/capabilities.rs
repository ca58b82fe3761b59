//! What an eSwitch can enforce, and how that is known.

use std::fmt;

/// How it is known that an eSwitch can enforce a feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// There is no such knob, or the driver refuses it.
    #[default]
    Missing,
    /// Somebody's word: a driver's name, a data sheet. Never enough.
    Assumed,
    /// A probe sent frames and found that the NIC takes the setting and does not enforce it.
    Refuted,
    /// It was set and reads back as set.
    ReadBack,
    /// A probe sent frames and found it enforced.
    Probed,
    /// The operator vouches for it; attested, not proven.
    Attested,
}

impl Evidence {
    /// Whether a policy may rest on it.
    pub const fn is_sufficient(self) -> bool {
        matches!(self, Evidence::ReadBack | Evidence::Probed | Evidence::Attested)
    }

    /// The evidence after the operator has vouched for the feature. What a probe has proven stays proven.
    #[must_use]
    pub const fn attested(self) -> Self {
        match self {
            Evidence::Probed => Evidence::Probed,
            _ => Evidence::Attested,
        }
    }

    /// The evidence after a probe has sent frames.
    #[must_use]
    pub const fn probed(self, is_enforced: bool) -> Self {
        match self {
            Evidence::Missing => Evidence::Missing,
            _ if is_enforced => Evidence::Probed,
            _ => Evidence::Refuted,
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Evidence::Missing => "the NIC or its driver does not offer it",
            Evidence::Assumed => "it is only assumed, and nothing has confirmed it",
            Evidence::Refuted => "a probe found that the NIC takes the setting and does not enforce it",
            Evidence::ReadBack => "it was set and read back",
            Evidence::Probed => "proven by a probe",
            Evidence::Attested => "attested, not proven",
        })
    }
}

/// The mode of an eSwitch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// The NIC bridges by itself; the PF driver takes a few settings per VF.
    #[default]
    Legacy,
    /// Each VF has a representor, and rules on representors are the eSwitch.
    Switchdev,
}

/// What an eSwitch can enforce. The default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Its mode.
    pub mode: Mode,
    /// Most VFs.
    pub max_vfs: u16,
    /// Legacy: drops frames whose source is not the VF's address (`spoofchk`).
    pub mac_guard: Evidence,
    /// Legacy: puts a VF into a customer VLAN.
    pub access_vlan: Evidence,
    /// Legacy: puts a VF into a service VLAN (802.1ad).
    pub tunnel_vlan: Evidence,
    /// Legacy: priority of the port VLAN's tag other than 0.
    pub vlan_qos: Evidence,
    /// Legacy: without a port VLAN, drops what the VF sends with a tag.
    pub untagged_only: Evidence,
    /// Limits what a VF sends, in Mbit/s (`max_tx_rate`, devlink `tx_max`).
    pub rate_max: Evidence,
    /// Guarantees a rate.
    pub rate_min: Evidence,
    /// Legacy: `trust` can be taken away.
    pub trust: Evidence,
    /// A VF's link can be forced down.
    pub link_state: Evidence,
    /// Legacy: `query_rss` can be set.
    pub query_rss: Evidence,
    /// Legacy: gives the PF a copy of what VFs send to unknown unicast addresses.
    pub unknown_unicast_to_pf: Evidence,
    /// Switchdev: what its rules can do.
    pub flower: FlowerSupport,
}

/// What flower rules can do in hardware.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowerSupport {
    /// Whether rules with `skip_sw` are taken and reported `in_hw` at all.
    pub offload: Evidence,
    /// Most rules for one vNIC.
    pub rules_max: u32,
    /// What can be matched.
    pub keys: FlowerKeys,
    /// What can be done.
    pub actions: FlowerActions,
}

/// Which fields hardware can match besides ethertype and destination MAC, which are always needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowerKeys {
    /// MAC addresses under any mask.
    pub mac_masks: bool,
    /// VLAN identifier and the ethertype behind the tag.
    pub vlan: bool,
    /// IPv4 and IPv6 prefixes.
    pub ip: bool,
    /// IP protocol.
    pub ip_proto: bool,
    /// Whether it is a fragment.
    pub fragment: bool,
    /// Ports of TCP, UDP and SCTP, under masks.
    pub ports: bool,
    /// TCP flags.
    pub tcp_flags: bool,
    /// Type and code of ICMP and ICMPv6.
    pub icmp: bool,
}

/// What hardware can do with a frame besides dropping and redirecting it, which are always needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowerActions {
    /// Go to another chain.
    pub chains: bool,
    /// Hand the frame to the representor's software port.
    pub trap: bool,
    /// Push and pop an 802.1Q tag.
    pub vlan: bool,
    /// Police with one bucket shared by several rules.
    pub police: bool,
}

impl FlowerKeys {
    /// Everything.
    pub const ALL: FlowerKeys = FlowerKeys {
        mac_masks: true,
        vlan: true,
        ip: true,
        ip_proto: true,
        fragment: true,
        ports: true,
        tcp_flags: true,
        icmp: true,
    };
}

impl FlowerActions {
    /// Everything.
    pub const ALL: FlowerActions = FlowerActions { chains: true, trap: true, vlan: true, police: true };
}
