//! The desired state: switches, ACL groups and vNICs, as the operator or controller wants them.
//!
//! These are the domain types; `sluice-control` converts them from and to the protocol's messages in one file.
//! A value here is well-formed field by field; whether the whole makes sense is for
//! [`validate`](crate::validate::validate) to say.

use std::net::IpAddr;

use crate::net::{IpPrefix, MacAddr, PortRange, VlanId, VlanRange};

/// Everything that is desired. Names are unique within each list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Switches.
    pub switches: Vec<Switch>,
    /// Shared rule sets.
    pub acl_groups: Vec<AclGroup>,
    /// VM interfaces.
    pub vnics: Vec<Vnic>,
}

/// Which kernel hook serves a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// TCX on virtual ports; XDP (with TCX behind it) on uplinks whose driver has it and whose link is a wire.
    #[default]
    Auto,
    /// TCX only.
    Tcx,
    /// XDP, with TCX behind it. Costs TSO on a virtual port; refused there unless full checksums are known to come.
    Xdp,
}

/// An L2 forwarding domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Unique name.
    pub name: String,
    /// The way out, if any.
    pub uplink: Option<Uplink>,
    /// The host's own interface on this switch, if any; Sluice makes it.
    pub internal: Option<Internal>,
    /// Learnt addresses unseen for so long are forgotten. Seconds; 300 unless told.
    pub ageing_seconds: u32,
}

/// A switch's uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// The network interface.
    pub netdev: String,
    /// Hook.
    pub hook: Hook,
    /// The far end never relies on checksum offload, so XDP may serve a virtual uplink.
    pub full_checksums: bool,
    /// VLANs carried; empty means all, customer and service.
    pub trunk: Vec<VlanRange>,
    /// The VLAN that travels untagged; `None` is the switch's untagged domain.
    pub native: Option<VlanId>,
    /// Most addresses learnt from it. 16 384 unless told.
    pub learn_limit: u32,
    /// Administratively up.
    pub up: bool,
    /// What its NIC enforces by the operator's word.
    pub attest: Vec<Attestable>,
}

/// An ability of an eSwitch that an operator may vouch for, since a probe cannot always prove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attestable {
    /// Drops frames whose source is not the VF's address.
    MacGuard,
    /// Drops what a VF without a port VLAN sends with a tag.
    Untagged,
    /// Limits what a VF sends.
    RateFromVm,
    /// Puts a VF into a customer VLAN.
    AccessVlan,
    /// Puts a VF into a service VLAN.
    TunnelVlan,
    /// Gives the PF a copy of what VFs send to unknown addresses.
    UnknownUnicast,
}

impl Attestable {
    /// All of them.
    pub const ALL: [Attestable; 6] = [
        Attestable::MacGuard,
        Attestable::Untagged,
        Attestable::RateFromVm,
        Attestable::AccessVlan,
        Attestable::TunnelVlan,
        Attestable::UnknownUnicast,
    ];

    /// Its name in configurations.
    pub const fn name(self) -> &'static str {
        match self {
            Attestable::MacGuard => "macGuard",
            Attestable::Untagged => "untagged",
            Attestable::RateFromVm => "rateFromVm",
            Attestable::AccessVlan => "accessVlan",
            Attestable::TunnelVlan => "tunnelVlan",
            Attestable::UnknownUnicast => "unknownUnicast",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Attestable> {
        Attestable::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// The host's interface on a switch: one end of a veth pair that Sluice makes, in the daemon's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Internal {
    /// Name of the host's end; the switch's end gets `-sw` appended (so at most 12 characters).
    pub netdev: String,
    /// MAC address of the host's end; derived from the name if not given.
    pub mac: Option<MacAddr>,
    /// VLAN mode.
    pub vlan: VlanMode,
}

/// A named set of rules that vNICs share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AclGroup {
    /// Unique name.
    pub name: String,
    /// Rules, in any order; priority decides.
    pub rules: Vec<AclRule>,
}

/// Direction, seen from the VM.
pub use sluice_pipeline::tables::Direction;

/// What a rule does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AclAction {
    /// Let it pass.
    Allow,
    /// Drop it.
    Deny,
}

/// One ACL rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AclRule {
    /// 0–65 535; the highest that matches wins, and among equals a deny does.
    pub priority: u32,
    /// Direction it applies to.
    pub direction: Direction,
    /// What it matches.
    pub matches: AclMatch,
    /// What it does.
    pub action: AclAction,
}

/// A value under a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Masked<T> {
    /// The bits wanted; zero where the mask is.
    pub value: T,
    /// The bits compared.
    pub mask: T,
}

/// What a rule matches. A field that is absent (or empty) matches everything.
///
/// Fields below IP imply IP. Fragments after the first match only rules without transport fields
/// (`src_ports`, `dst_ports`, `tcp_flags`, `icmp_type`, `icmp_code`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AclMatch {
    /// Source MAC.
    pub src_mac: Option<Masked<MacAddr>>,
    /// Destination MAC.
    pub dst_mac: Option<Masked<MacAddr>>,
    /// Ethertype after all VLAN tags.
    pub ethertype: Option<u16>,
    /// Customer VLAN that the packet is forwarded in.
    pub vlan: Option<VlanId>,
    /// Source prefix.
    pub src_ip: Option<IpPrefix>,
    /// Destination prefix.
    pub dst_ip: Option<IpPrefix>,
    /// IP protocol, after IPv6 extension headers.
    pub ip_proto: Option<u8>,
    /// Source ports (any of them); needs `ip_proto` TCP, UDP or SCTP.
    pub src_ports: Vec<PortRange>,
    /// Destination ports, likewise.
    pub dst_ports: Vec<PortRange>,
    /// TCP flags under a mask; needs `ip_proto` TCP.
    pub tcp_flags: Option<Masked<u8>>,
    /// ICMP or ICMPv6 type; needs `ip_proto` ICMP or ICMPv6.
    pub icmp_type: Option<u8>,
    /// ICMP or ICMPv6 code; needs `icmp_type`.
    pub icmp_code: Option<u8>,
}

/// A VM's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vnic {
    /// Unique name.
    pub name: String,
    /// Name of its switch.
    pub switch: String,
    /// Its software attachment.
    pub attach: Attachment,
    /// Hook.
    pub hook: Hook,
    /// The guest sends full checksums (its transmit checksum offload is off), so XDP may serve the port.
    pub full_checksums: bool,
    /// Its address, first of its addresses.
    pub mac: MacAddr,
    /// Further addresses of the same interface; at most three.
    pub extra_macs: Vec<MacAddr>,
    /// Administratively up.
    pub up: bool,
    /// Its policy.
    pub policy: Policy,
    /// Its claim to a VF, if it has one.
    pub sriov: Option<Sriov>,
}

/// A vNIC's claim to a VF of its uplink's NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// 0–100: who gets the VFs when there are too few; 0 means never.
    pub weight: u8,
    /// How the VF reaches the VM.
    pub attach: VfAttachment,
}

/// How a VF reaches a VM and is taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VfAttachment {
    /// Its interface is moved into a network namespace.
    Netns {
        /// Path of the namespace, or its name in `/run/netns`.
        path: String,
        /// Name of the interface there.
        netdev: String,
        /// A bond there, in active-backup mode, of which it becomes the primary slave.
        bond: Option<String>,
    },
    /// An orchestrator plugs and acknowledges.
    External {
        /// Driver that the VF gets where opening it binds one; the usual one for its interface if not given.
        driver: Option<String>,
    },
    /// QEMU's monitor plugs.
    Qmp {
        /// Path of the monitor's socket.
        socket: String,
        /// Identifier of the device.
        device: String,
        /// Bus to plug into; QEMU's choice if not given.
        bus: Option<String>,
        /// Identifier of the virtio-net device whose primary the VF becomes.
        failover_pair: Option<String>,
    },
}

impl Vnic {
    /// Whether it ever may have a VF.
    pub fn wants_vf(&self) -> bool {
        self.sriov.as_ref().is_some_and(|sriov| sriov.weight > 0)
    }

    /// Its addresses, its own first.
    pub fn macs(&self) -> impl Iterator<Item = MacAddr> {
        std::iter::once(self.mac).chain(self.extra_macs.iter().copied())
    }
}

impl VfAttachment {
    /// Driver that the VF gets where opening it binds one; `None` means the usual one for its interface.
    pub fn driver(&self) -> Option<&str> {
        match self {
            VfAttachment::Netns { .. } => None,
            VfAttachment::External { driver } => driver.as_deref(),
            VfAttachment::Qmp { .. } => Some("vfio-pci"),
        }
    }
}

/// The software attachment of a vNIC: an interface that somebody else makes, and may make later, or a VMM's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// The host's end of a veth pair.
    Veth(String),
    /// A tap.
    Tap(String),
    /// The guest's rings, served by the userspace engine.
    VhostUser(VhostUser),
}

/// How a guest is attached by vhost-user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUser {
    /// The unix socket.
    pub path: String,
    /// Who listens on it.
    pub mode: VhostMode,
    /// Most queue pairs that the guest may use. 1 unless told.
    pub queues: u16,
}

/// Who listens on a vhost-user socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VhostMode {
    /// The daemon; the VMM connects.
    #[default]
    Server,
    /// The VMM; the daemon connects, and tries until it can.
    Client,
}

impl Attachment {
    /// The interface's name, if it is one.
    pub fn netdev(&self) -> Option<&str> {
        match self {
            Attachment::Veth(name) | Attachment::Tap(name) => Some(name),
            Attachment::VhostUser(_) => None,
        }
    }
}

/// The policy of one vNIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// VLAN mode.
    pub vlan: VlanMode,
    /// Source MACs other than its own may be sent (MAC guard off).
    pub allow_spoofing: bool,
    /// Addresses it may use; empty means any. Where an IPv6 address is given, the link-local addresses made from
    /// the vNIC's MACs (RFC 4291 appendix A) are allowed too, since neighbour discovery needs them.
    pub ip_guard: Vec<IpAddr>,
    /// It may not serve DHCP: neither send from a server's port nor to a client's.
    pub dhcp_guard: bool,
    /// It may not advertise routes.
    pub ra_guard: bool,
    /// It wants frames to unknown unicast addresses.
    pub unknown_unicast: bool,
    /// Addresses behind it are learnt, up to so many; `None`: none, except on a trunk with spoofing allowed, which learns up to 256.
    pub learn_limit: Option<u32>,
    /// ACL.
    pub acl: Acl,
    /// Rate limit on what it sends.
    pub rate_from_vm: Option<Rate>,
    /// Rate limit on what it receives.
    pub rate_to_vm: Option<Rate>,
}

/// How a port treats VLAN tags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VlanMode {
    /// The switch's untagged domain; tagged frames are dropped.
    #[default]
    Untagged,
    /// One VLAN, untagged on the port.
    Access(VlanId),
    /// Tagged VLANs of a set; untagged frames belong to `native`, if given (which need not be in the set, and is
    /// accepted with its tag too).
    Trunk {
        /// The set; not empty.
        allowed: Vec<VlanRange>,
        /// The VLAN that travels untagged.
        native: Option<VlanId>,
    },
    /// Whatever the VM sends, tagged or not, travels behind this service tag (802.1ad).
    Tunnel(VlanId),
}

/// A vNIC's ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    /// Names of shared groups.
    pub groups: Vec<String>,
    /// Rules of its own, matched together with those of the groups.
    pub rules: Vec<AclRule>,
    /// What happens to sent packets that no rule matches.
    pub default_from_vm: AclAction,
    /// What happens to received packets that no rule matches.
    pub default_to_vm: AclAction,
}

impl Default for Acl {
    fn default() -> Self {
        Acl {
            groups: Vec::new(),
            rules: Vec::new(),
            default_from_vm: AclAction::Allow,
            default_to_vm: AclAction::Allow,
        }
    }
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second of Ethernet frames (without FCS and preamble).
    pub bits_per_second: u64,
    /// Depth of the bucket in bytes.
    pub burst_bytes: u64,
}
