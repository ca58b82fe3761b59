//! Giving up capabilities that are not needed after start.
//!
//! Capabilities belong to threads, and new threads inherit them: the reconciler's thread and the main thread each
//! call this once, before they start others.

use caps::{CapSet, Capability, CapsHashSet};

/// What every thread keeps: attaching programs, reading and writing maps, and netlink.
const KEPT: [Capability; 4] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_BPF, Capability::CAP_PERFMON];

/// What the engine's thread keeps besides. Whether a veth may be served by XDP depends on the checksum offload of its
/// other end, which is usually in another network namespace; setns(2) into it demands `CAP_SYS_ADMIN`. That finds
/// namespaces in /run/netns; one that is known only by a process of more privileges than ours would need
/// `CAP_SYS_PTRACE` too, which is not worth it: such a port says `fullChecksums: true`.
///
/// The memory of frames is pinned for the AF_XDP sockets of uplinks, and no memory is pinned beyond `RLIMIT_MEMLOCK`, which is
/// 8 MiB in most places, without `CAP_IPC_LOCK`. As a systemd service the daemon has no limit and goes without.
const KEPT_BY_ENGINE: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_IPC_LOCK];

/// The kernel did not let a capability go.
#[derive(Debug, thiserror::Error)]
#[error("dropping capabilities: {0}")]
pub struct PrivilegeError(#[from] caps::errors::CapsError);

/// Which thread it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The one that owns the engine, and its children.
    Engine,
    /// Any other: it serves requests and listens to netlink.
    Other,
}

/// Keeps only what is needed, in the calling thread.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn drop_for_thread(role: Role) -> Result<(), PrivilegeError> {
    let more: &[Capability] = match role {
        Role::Engine => &KEPT_BY_ENGINE,
        Role::Other => &[],
    };
    let wanted: CapsHashSet = KEPT.iter().chain(more).copied().collect();
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&wanted).copied().collect();
    // What cannot be inherited cannot come back in a child.
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}
