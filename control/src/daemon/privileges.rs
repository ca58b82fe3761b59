//! Giving up capabilities that are not needed after start.
//!
//! Capabilities belong to threads, and new threads inherit them: each long-lived thread calls this before it starts
//! others.

use caps::{CapSet, Capability, CapsHashSet};

/// What is kept: attaching and reading programs and maps, and the netlink calls of `internal` ports.
const KEPT: [Capability; 4] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_BPF, Capability::CAP_PERFMON];

/// The kernel did not let a capability go.
#[derive(Debug, thiserror::Error)]
#[error("dropping capabilities: {0}")]
pub struct PrivilegeError(#[from] caps::errors::CapsError);

/// Keeps only what is needed, in the calling thread.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn drop_for_thread() -> Result<(), PrivilegeError> {
    let kept: CapsHashSet = KEPT.into_iter().collect();
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&kept).copied().collect();
    // What cannot be inherited cannot come back in a child.
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}
