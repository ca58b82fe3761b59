//! What the engine tells its owner: results of opening, observing and syncing.

use std::collections::BTreeMap;
use std::fmt;

use sluice_pipeline::Vlan;
use sluice_policy::image::Bindings;
use sluice_policy::net::MacAddr;

/// What [`Engine::open`](crate::Engine::open) found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptReport {
    /// About the maps.
    pub maps: MapsOutcome,
    /// About the programs.
    pub programs: ProgramsOutcome,
    /// Ports whose links were found attached and stay so.
    pub links: Vec<String>,
    /// Links that were pinned but dead (their device is gone), or whose pin could not be read.
    pub dead_links: Vec<String>,
}

/// Where the maps come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapsOutcome {
    /// None were pinned: new, empty ones.
    Created,
    /// The pinned ones fit and are kept, with what is in them.
    Adopted,
    /// The pinned ones do not fit. New ones are filled by the first sync, and attached programs are then replaced;
    /// until then the old ones serve. Learnt addresses, counters and token buckets start anew.
    Replaced {
        /// What does not fit.
        reason: String,
    },
}

/// Where the programs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramsOutcome {
    /// None were pinned.
    Loaded,
    /// The pinned ones are the same as ours, and are kept.
    Adopted,
    /// The pinned ones differ; the first sync replaces them in every link, atomically.
    Replaced,
}

/// What the engine sees of the ports' interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Interfaces found, as lowering wants them.
    pub bindings: Bindings,
    /// Ports without a usable interface, and why.
    pub absent: BTreeMap<String, String>,
    /// More about the interfaces found, by port.
    pub links: BTreeMap<String, LinkView>,
}

/// An interface, as observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkView {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Kind in rtnetlink's words (`veth`, `tun`, `bond`, …); empty for a physical device.
    pub kind: String,
    /// Administratively up.
    pub up: bool,
    /// Carrier present.
    pub carrier: bool,
    /// MTU.
    pub mtu: u32,
    /// Address.
    pub mac: Option<MacAddr>,
    /// A veth whose other end is in another network namespace.
    pub peer_elsewhere: bool,
    /// The driver runs XDP programs.
    pub native_xdp: bool,
    /// The driver accepts redirected XDP frames at present.
    pub xdp_target: bool,
}

/// What AF_XDP sockets need to know of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireView {
    /// Queues that it receives by.
    pub queues: u32,
    /// MTU.
    pub mtu: u32,
    /// If its driver takes redirected frames, then from every CPU.
    pub from_any_cpu: bool,
}

/// How often a map was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Entries written.
    pub updates: usize,
    /// Entries deleted.
    pub deletes: usize,
}

/// How often each map was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapWrites {
    /// By the map's name; maps that were not written are not listed.
    pub tables: BTreeMap<&'static str, Writes>,
}

impl MapWrites {
    /// All writes together; 0 if the maps already were as wanted.
    pub fn total(&self) -> usize {
        self.tables.values().map(|writes| writes.updates + writes.deletes).sum()
    }

    /// Writes to one map.
    pub fn of(&self, table: &str) -> Writes {
        self.tables.get(table).copied().unwrap_or_default()
    }

    pub(crate) fn updated(&mut self, table: &'static str, count: usize) {
        if count > 0 {
            self.tables.entry(table).or_default().updates += count;
        }
    }

    pub(crate) fn deleted(&mut self, table: &'static str, count: usize) {
        if count > 0 {
            self.tables.entry(table).or_default().deletes += count;
        }
    }
}

impl fmt::Display for MapWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tables.is_empty() {
            return f.write_str("nothing");
        }
        for (index, (table, writes)) in self.tables.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{table} +{}", writes.updates)?;
            if writes.deletes > 0 {
                write!(f, " -{}", writes.deletes)?;
            }
        }
        Ok(())
    }
}

/// What [`Engine::sync`](crate::Engine::sync) did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Writes to the maps; none on a second pass.
    pub writes: MapWrites,
    /// What was done to links, one line each; none on a second pass.
    pub link_changes: Vec<String>,
    /// State of every port of the image, by name.
    pub ports: BTreeMap<String, PortStatus>,
    /// XDP came or went on an interface, which may change what it accepts: observe, lower and sync again.
    pub observe_again: bool,
}

/// State of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortStatus {
    /// Interface index, if there is an interface.
    pub ifindex: Option<u32>,
    /// State.
    pub state: PortState,
    /// Hooks that serve the port, if it is attached.
    pub hooks: HooksInUse,
    /// What the operator should know, such as why XDP was refused.
    pub notes: Vec<String>,
}

/// Whether a port carries traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Programs are attached.
    Attached,
    /// Its interface is not there.
    Pending {
        /// Why.
        reason: String,
    },
    /// Its interface is there but the programs could not be attached.
    Failed {
        /// Why.
        error: String,
    },
}

/// Hooks in use on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HooksInUse {
    /// TCX only.
    Tcx,
    /// XDP, with TCX behind it.
    XdpAndTcx,
    /// No hook: the userspace engine serves the port.
    Userspace,
}

/// A learnt address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbRow {
    /// Switch id.
    pub switch: u32,
    /// Forwarding VLAN.
    pub vlan: Vlan,
    /// Address.
    pub mac: MacAddr,
    /// Port id.
    pub port: u32,
    /// Seconds since it was last seen.
    pub age_seconds: u32,
}

/// What [`Engine::age_fdb`](crate::Engine::age_fdb) did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdbSweep {
    /// Entries that stay.
    pub live: usize,
    /// Entries deleted because they were too old or their port is gone.
    pub removed: usize,
    /// Learnt entries by port id.
    pub by_port: BTreeMap<u32, u32>,
}
