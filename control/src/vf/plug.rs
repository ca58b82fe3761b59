//! How a VF reaches a VM and is taken back: the plugs.
//!
//! | plug | what it does |
//! |---|---|
//! | [`netns`] | moves the VF's interface into a network namespace, and into a bond there |
//! | [`external`] | asks an orchestrator, by the vNIC's status, and takes its acknowledgement |
//! | [`qmp`] | has QEMU plug the VF by VFIO, as the primary of a failover pair if there is one |
//!
//! A plug is asked again and again until it says [`Progress::Done`] or fails: a call never waits for a guest, an
//! orchestrator or QEMU. Every call may be repeated, also after the daemon was restarted: what is already so is done.
//! The NIC's thread owns it; that thread needs `CAP_NET_ADMIN`, and `CAP_SYS_ADMIN` to enter namespaces.

mod driver;
pub mod external;
pub mod netns;
pub mod qmp;

use std::path::PathBuf;
use std::sync::Arc;

use sluice_policy::config::VfAttachment;
use sluice_policy::net::MacAddr;
use sluice_proto::v1;

/// A VF on its way into a guest or out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Interface of the PF.
    pub pf: String,
    /// Number on the PF.
    pub index: u16,
    /// PCI address, if it is a PCI function.
    pub pci: Option<String>,
    /// Interface, if it has one in the daemon's network namespace.
    pub netdev: Option<String>,
    /// The vNIC's address, which the VF has.
    pub mac: MacAddr,
}

/// How far something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is so.
    Done,
    /// Ask again soon.
    Pending,
}

/// Why a VF does not get into a guest, or out of it.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The guest, QEMU or the orchestrator will not have it: asking again is pointless for now.
    #[error("{0}")]
    Refused(String),
    /// There is no guest: no namespace, no monitor's socket.
    #[error("{path} is not there: {error}; the VF is granted again when it is", path = path.display())]
    Absent {
        /// What is missing.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It should have worked.
    #[error("{operation}: {detail}")]
    Failed {
        /// What was tried.
        operation: String,
        /// What came of it.
        detail: String,
    },
}

/// What was seen of a transition's cost, beyond what the daemon sees itself.
pub use sluice_eswitch::lifecycle::Losses;

/// A way into a VM.
pub trait Plug: Send {
    /// Whether a VF could be given now, before anything is programmed for it.
    ///
    /// # Errors
    /// Why not.
    fn check(&mut self) -> Result<(), PlugError>;

    /// Gives the VF to the guest. Where opening a VF binds its driver, it is open already.
    ///
    /// # Errors
    /// Why not; the VF is then taken back by [`unplug`](Self::unplug).
    fn plug(&mut self, vf: &Candidate) -> Result<Progress, PlugError>;

    /// Whether the guest uses the VF, or could.
    ///
    /// # Errors
    /// When it cannot be told.
    fn is_active(&mut self, vf: &Candidate) -> Result<bool, PlugError>;

    /// Takes the VF from the guest: gracefully, or `by_force` without asking. Done when the guest has let go; a VF that
    /// is gone, and one that was never given, has been let go of.
    ///
    /// # Errors
    /// Why not; it is asked again, by force at last.
    fn unplug(&mut self, vf: &Candidate, by_force: bool) -> Result<Progress, PlugError>;

    /// What is asked of an orchestrator now; without its deadline, which is the lifecycle's.
    fn request(&self) -> Option<v1::VfRequest> {
        None
    }

    /// Takes an orchestrator's answer; `false` if its ticket is not awaited. What it said is told when the plug is asked
    /// the next time.
    fn acknowledge(&mut self, _answer: &v1::AcknowledgeVfRequest) -> bool {
        false
    }

    /// What the other side has reported of the last transition's cost, once.
    fn losses(&mut self) -> Losses {
        Losses::default()
    }
}

/// The plug of a vNIC.
pub fn of(_vnic: &str, attach: &VfAttachment) -> Box<dyn Plug> {
    of_host(attach, &Arc::new(netns::Host::open()))
}

/// The plug of a vNIC of a host whose namespaces are open already.
pub fn of_host(attach: &VfAttachment, host: &Arc<netns::Host>) -> Box<dyn Plug> {
    match attach {
        VfAttachment::Netns { path, netdev, bond } => {
            Box::new(netns::Netns::new(path, netdev, bond.as_deref(), Arc::clone(host)))
        }
        VfAttachment::External { .. } => Box::new(external::External::new()),
        VfAttachment::Qmp { socket, device, bus, failover_pair } => {
            Box::new(qmp::Qmp::new(socket, device, bus.as_deref(), failover_pair.as_deref()))
        }
    }
}
