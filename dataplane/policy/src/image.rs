//! What the tables should hold: the result of lowering, and the thing that engines compare with what they do hold.

use std::collections::{BTreeMap, BTreeSet};

use sluice_pipeline::tables::{
    FloodChunk, FloodKey, IpGuardKey, MacKey, PortConfig, RuleKey, SwitchConfig, TrunkBitmap, Tuple,
};

use crate::config::{Hook, VhostUser};

/// A port's interface as the kernel engine found it. What is absent is pending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Interface index in the daemon's network namespace.
    pub ifindex: u32,
    /// A veth whose other end is in another network namespace: `bpf_redirect_peer` works.
    pub peer_redirect: bool,
    /// Redirected XDP frames are accepted.
    pub xdp_target: bool,
}

/// Bindings by the port's name in [`Ids::ports`](crate::ids::Ids::ports).
pub type Bindings = BTreeMap<String, Binding>;

/// Where the frames of vNICs go at the moment, as far as VFs are concerned: what the VF side tells the engines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backings {
    /// vNICs that hold a VF or are about to, by name.
    pub vnics: BTreeMap<String, Backing>,
    /// Switches whose uplink's NIC is told, address by address, what its PF is to receive. Such an uplink must not be
    /// promiscuous: NICs then send it what is not for it, and keep from it what is.
    pub filtered_uplinks: BTreeSet<String>,
}

/// A vNIC's VF as the software switch sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// In switchdev mode, the VF's representor: a second port of the vNIC under the same policy.
    pub representor: Option<String>,
    /// The guest uses the VF: the vNIC's addresses are behind the representor or, in legacy mode, behind the uplink,
    /// and nothing is flooded to the software attachment.
    pub in_use: bool,
}

/// What is behind a port, and so which engine serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Behind {
    /// An interface: the kernel engine.
    #[default]
    Netdev,
    /// A guest's rings: the userspace engine.
    VhostUser(VhostUser),
    /// The trunk between the two, a port of both.
    UserTap,
    /// A switch's uplink in the userspace engine's image: what leaves by it need not take the trunk. It is the kernel
    /// engine's port, and nothing comes in by it.
    Uplink,
}

/// A port's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortImage {
    /// Its name in [`Ids::ports`](crate::ids::Ids::ports).
    pub name: String,
    /// The interface that it is, or will be, bound to; empty if it is none.
    pub netdev: String,
    /// What is behind it.
    pub behind: Behind,
    /// Wanted hook.
    pub hook: Hook,
    /// The other end is known to send full checksums.
    pub full_checksums: bool,
    /// Configuration.
    pub config: PortConfig,
    /// VLAN bitmap; all zero unless the port is a trunk.
    pub trunk: TrunkBitmap,
    /// Its interface is told what to receive, so it must not be made promiscuous.
    pub is_filtered: bool,
    /// Nothing is flooded to it: its vNIC is served by another port.
    pub is_standby: bool,
}

/// What a rule does, without the versions that the engine adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleImage {
    /// See [`RuleSlot::rank`](sluice_pipeline::tables::RuleSlot::rank).
    pub rank: u32,
    /// Index of its counters.
    pub counter: u32,
    /// From [`acl_action`](sluice_pipeline::tables::acl_action).
    pub action: u32,
}

/// A group of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupImage {
    /// Tuples by direction, best rank first.
    pub tuples: [Vec<Tuple>; 2],
    /// Rules.
    pub rules: BTreeMap<RuleKey, RuleImage>,
}

/// All tables of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Ports by id.
    pub ports: BTreeMap<u32, PortImage>,
    /// Port ids by interface index, of the ports that are bound.
    pub ifindexes: BTreeMap<u32, u32>,
    /// Switches by id.
    pub switches: BTreeMap<u32, SwitchConfig>,
    /// Static addresses.
    pub macs: BTreeMap<MacKey, u32>,
    /// IP guard.
    pub ip_guard: BTreeSet<IpGuardKey>,
    /// Flood lists.
    pub flood: BTreeMap<FloodKey, FloodChunk>,
    /// ACL groups by id.
    pub groups: BTreeMap<u32, GroupImage>,
}

impl Image {
    /// In the userspace engine's image: the uplink to which the trunk `id` is the long way, if there is one.
    pub fn short_cut(&self, id: u32) -> Option<u32> {
        let trunk = self.ports.get(&id).filter(|port| port.behind == Behind::UserTap)?;
        let is_it =
            |port: &PortImage| port.behind == Behind::Uplink && port.config.switch == trunk.config.switch;
        self.ports.iter().find(|(_, port)| is_it(port)).map(|(id, _)| *id)
    }
}
