//! The kernel engine: loads the eBPF programs, attaches them to the ports' interfaces, and keeps the maps equal to an
//! [`Image`](sluice_policy::image::Image).
//!
//! Everything lives in pins under one directory of a bpffs. An [`Engine`] that goes away, or is killed, leaves
//! programs, links and maps as they are, and traffic goes on; the next one adopts them and touches only differences.
//!
//! One thread owns the engine and calls block. [`LinkMonitor`] may live in another thread.
//!
//! Unsafe code is in `syscall` (bpf(2), membarrier(2)) and `ethtool` (ioctls) only.

#![deny(unsafe_code)]

mod attach;
mod engine;
mod error;
mod ethtool;
mod features;
mod hook;
mod internal;
mod kernel_types;
mod links;
mod live;
mod loader;
mod maps;
mod monitor;
mod netlink;
mod object;
mod observe;
mod peer;
mod pins;
mod promisc;
mod report;
mod stats;
mod sync;
mod syscall;
mod vlan_offload;

pub use engine::{Engine, EngineOptions};
pub use error::EngineError;
pub use live::LiveTables;
pub use monitor::{LinkEvent, LinkMonitor};
pub use report::{
    AdoptReport, FdbRow, FdbSweep, HooksInUse, LinkView, MapWrites, MapsOutcome, Observation, PortState,
    PortStatus, ProgramsOutcome, SyncReport, WireView, Writes,
};
