//! What an eSwitch is to the rest of Sluice: the contract that all back-ends keep.
//!
//! # Who owns what
//! Sluice owns the settings, the link state and the tagged rules of every VF that it has programmed, and the PF's
//! unicast filter and VLANs as far as [`sync_unicast_filter`](Eswitch::sync_unicast_filter) and
//! [`sync_vlans`](Eswitch::sync_vlans) put something there. It does not own
//! other VFs, nor rules without its cookie: they are left alone and reported as [`Observed::foreign`]. The number of
//! VFs and the mode of the eSwitch are the operator's.
//!
//! # Order
//! A VF is closed (its link is forced down, or where the NIC has no such knob, it is not bound to a guest's driver)
//! until [`enable`](Eswitch::enable). [`program`](Eswitch::program) never opens it. The caller programs, reads back,
//! compares ([`Observed::differences`]) and only then enables; and disables before it changes a program to a weaker
//! one. A change between two programs that an open VF may run is made so that at each moment what either forbids and
//! both can express is forbidden, or else refused with [`EswitchError::Open`].
//!
//! # Idempotence
//! Every operation states an outcome. Where the NIC already is so, it writes nothing: [`writes`](Eswitch::writes) stays
//! as it is. After an error nothing is known: the VF may have the old state, the new one or a mixture; repeat the
//! operation, or [`unprogram`](Eswitch::unprogram). What is known is what [`read_back`](Eswitch::read_back) says.
//!
//! # Full tables
//! `program` fails with [`EswitchError::TableFull`] and removes what it had put in for this program; the VF's former
//! program is then not relied on either.
//!
//! # Errors
//! [`EswitchError::class`] says what they mean: *uncovered* (the NIC cannot do it: the policy goes back to software and
//! asking again is pointless until something changes), *passing* (try again), *gone* (the device is not there now) and
//! *broken* (it ought to work: report it; the vNIC is on its software path meanwhile).
//!
//! All calls block, and come from one thread.

use std::collections::BTreeSet;
use std::fmt;

use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Capabilities, Feature, FlowerProgram, PortVlan, Program, VfSettings};

pub use sluice_policy::placement::VfIndex;

/// A VF that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    /// Its number.
    pub index: VfIndex,
    /// Its PCI address, if it is a PCI function.
    pub pci: Option<String>,
    /// Its interface, if it has one in this network namespace.
    pub netdev: Option<String>,
    /// The driver bound to it.
    pub driver: Option<String>,
}

/// What the NIC says about a VF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its link may come up: what [`enable`](Eswitch::enable) and [`disable`](Eswitch::disable) set.
    pub enabled: bool,
    /// What it enforces.
    pub enforced: Enforced,
    /// Rules on its representor that are not ours, in words.
    pub foreign: Vec<String>,
}

/// What a VF runs, as read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// Its settings. A knob that the NIC does not have reads as its default.
    Legacy(VfSettings),
    /// Its rules, in hardware and not.
    Switchdev {
        /// Those of ours that are there, in the order of port, chain and priority.
        program: FlowerProgram,
        /// Those that are there and not in hardware: which, and what the driver said.
        in_software: Vec<String>,
    },
}

/// One thing that is not as programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What, as `ip link` or `tc` would call it.
    pub what: String,
    /// What was programmed.
    pub wanted: String,
    /// What was read.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} and should be {}", self.what, self.found, self.wanted)
    }
}

impl Observed {
    /// How it differs from a program; nothing if the NIC holds just that.
    pub fn differences(&self, program: &Program) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut compare = |what: &str, wanted: String, found: String| {
            if wanted != found {
                differences.push(Difference { what: what.to_owned(), wanted, found });
            }
        };
        match (program, &self.enforced) {
            (Program::Legacy(wanted), Enforced::Legacy(found)) => {
                let VfSettings { mac, vlan, spoofchk, trust, min_rate_mbps, max_rate_mbps, query_rss } =
                    wanted;
                let vlan_text = |vlan: &Option<PortVlan>| match vlan {
                    None => "none".to_owned(),
                    Some(vlan) => {
                        format!("{} qos {} proto {:#06x}", vlan.vid, vlan.qos, vlan.protocol.tpid())
                    }
                };
                let switch = |on: bool| if on { "on" } else { "off" }.to_owned();
                compare("mac", mac.to_string(), found.mac.to_string());
                compare("vlan", vlan_text(vlan), vlan_text(&found.vlan));
                compare("spoofchk", switch(*spoofchk), switch(found.spoofchk));
                compare("trust", switch(*trust), switch(found.trust));
                compare("min_tx_rate", min_rate_mbps.to_string(), found.min_rate_mbps.to_string());
                compare("max_tx_rate", max_rate_mbps.to_string(), found.max_rate_mbps.to_string());
                compare("query_rss", switch(*query_rss), switch(found.query_rss));
            }
            (Program::Switchdev(wanted), Enforced::Switchdev { program, in_software }) => {
                let text = |program: &FlowerProgram| {
                    format!("{} rules ({:016x})", program.rules().len(), program.hash())
                };
                compare("flower program", text(wanted), text(program));
                for rule in in_software {
                    compare(rule, "in hardware".to_owned(), "in software".to_owned());
                }
            }
            (Program::Legacy(_), Enforced::Switchdev { .. }) => {
                compare("eswitch mode", "legacy".to_owned(), "switchdev".to_owned());
            }
            (Program::Switchdev(_), Enforced::Legacy(_)) => {
                compare("eswitch mode", "switchdev".to_owned(), "legacy".to_owned());
            }
        }
        differences
    }
}

/// Traffic counters of a VF, seen from the VM. `None` where the NIC does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VfStats {
    /// Frames that the VM sent.
    pub from_vm_frames: Option<u64>,
    /// Bytes of them.
    pub from_vm_bytes: Option<u64>,
    /// Frames that the VM received.
    pub to_vm_frames: Option<u64>,
    /// Bytes of them.
    pub to_vm_bytes: Option<u64>,
    /// Frames of the VM that the NIC dropped.
    pub from_vm_dropped: Option<u64>,
    /// Frames for the VM that the NIC dropped.
    pub to_vm_dropped: Option<u64>,
}

/// What an error means for the vNIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorClass {
    /// The NIC cannot do it.
    Uncovered,
    /// It may work the next time.
    Passing,
    /// The device is not there.
    Gone,
    /// It should have worked.
    Broken,
}

/// Why an operation failed. `detail` is the kernel's own message, extack included.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EswitchError {
    /// The NIC or its driver refused a part of the program (EOPNOTSUPP, or EINVAL for a value it cannot hold).
    #[error("the NIC cannot enforce {}: {detail}; the vNIC stays on its software path", feature.code())]
    Uncovered {
        /// Which part of a policy.
        feature: Feature,
        /// What it said.
        detail: String,
    },
    /// No room for the rules (ENOSPC).
    #[error("the eSwitch has no room for the rules: {detail}; use fewer or simpler ACL rules")]
    TableFull {
        /// What it said.
        detail: String,
    },
    /// The device is busy (EBUSY, EAGAIN, ETIMEDOUT).
    #[error("the NIC is busy: {detail}; it is tried again")]
    Busy {
        /// What it said.
        detail: String,
    },
    /// The PF is not there: unplugged, renamed or being reset.
    #[error("the PF is gone: {detail}; it is used again when it is back")]
    DeviceGone {
        /// What is missing.
        detail: String,
    },
    /// There is no such VF; somebody changed `sriov_numvfs`.
    #[error("{0} does not exist; write a larger number to sriov_numvfs, or see who changed it")]
    NoSuchVf(VfIndex),
    /// The program cannot be changed while the VF is open.
    #[error("{0} is open, and this change needs it closed; disable it first")]
    Open(VfIndex),
    /// The process may not do it (EPERM).
    #[error("not permitted: {detail}; run sluiced with CAP_NET_ADMIN")]
    NotPermitted {
        /// What it said.
        detail: String,
    },
    /// The program is for an eSwitch in another mode.
    #[error("the program is for another eSwitch mode; read the capabilities again and place the policy anew")]
    WrongMode,
    /// Anything else.
    #[error("{operation} failed: {detail}; see the kernel's log")]
    Broken {
        /// What was tried.
        operation: String,
        /// What it said.
        detail: String,
    },
}

impl EswitchError {
    /// What it means for the vNIC.
    pub const fn class(&self) -> ErrorClass {
        match self {
            EswitchError::Uncovered { .. } | EswitchError::TableFull { .. } | EswitchError::WrongMode => {
                ErrorClass::Uncovered
            }
            EswitchError::Busy { .. } | EswitchError::Open(_) => ErrorClass::Passing,
            EswitchError::DeviceGone { .. } | EswitchError::NoSuchVf(_) => ErrorClass::Gone,
            EswitchError::NotPermitted { .. } | EswitchError::Broken { .. } => ErrorClass::Broken,
        }
    }
}

/// One eSwitch: the VFs of one PF. The module's text is the contract.
pub trait Eswitch {
    /// What it can enforce, as far as can be found out without sending frames.
    ///
    /// # Errors
    /// Of class gone or broken.
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError>;

    /// The VFs that exist, by index.
    ///
    /// # Errors
    /// Of class gone or broken.
    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError>;

    /// Makes the VF enforce the program, all of it and nothing else. Never opens the VF.
    ///
    /// # Errors
    /// Of any class. The caller reads back or unprograms after one.
    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError>;

    /// What the NIC holds, read from it and not from memory.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError>;

    /// Counters.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError>;

    /// Closes the VF first, then takes everything of ours from it. A VF that is gone is unprogrammed.
    ///
    /// # Errors
    /// Of class passing or broken: then the VF may still be open, and the caller tries again.
    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError>;

    /// Opens the VF. The caller has read its program back.
    ///
    /// # Errors
    /// Of any class.
    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError>;

    /// Closes the VF: nothing passes it, in either direction. A VF that is gone is closed.
    ///
    /// # Errors
    /// Of class passing or broken: then the VF may still be open, and the caller tries again.
    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError>;

    /// Has the PF receive just these addresses besides its own: those of vNICs on their software path. Without them a
    /// VF could not reach these vNICs, as the NIC would send their frames over the wire.
    ///
    /// # Errors
    /// Of class passing, gone or broken; table-full if the filter is.
    fn sync_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError>;

    /// Has the PF receive these VLANs, which are those of the software switch, though it is not promiscuous. Nothing to do
    /// where PFs do not filter VLANs.
    ///
    /// # Errors
    /// Of class passing, gone or broken; table-full if there are too many.
    fn sync_vlans(&mut self, _vlans: &BTreeSet<VlanId>) -> Result<(), EswitchError> {
        Ok(())
    }

    /// How many writes to the NIC have been tried since it was opened. A second pass over an unchanged world adds none.
    fn writes(&self) -> u64;
}
