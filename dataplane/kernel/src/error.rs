//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

/// Why the engine could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The build did not embed the eBPF object.
    #[error(
        "this build has no eBPF object inside: run `cargo xtask build-ebpf`, then build again \
         (or build with SLUICE_BPF_OBJECT set to the object's path)"
    )]
    ObjectMissing,
    /// The object is not what this engine expects.
    #[error(
        "the embedded eBPF object does not fit this engine ({0}): run `cargo xtask build-ebpf` and build again"
    )]
    ObjectMismatch(String),
    /// The running kernel does not tell what the programs must know of its structures.
    #[error(
        "the kernel does not tell where in its structures it keeps what guests leave undone ({0}): Sluice needs a kernel \
         with CONFIG_DEBUG_INFO_BTF"
    )]
    KernelTypes(String),
    /// The kernel refused the object.
    #[error(
        "the kernel refused the eBPF object; Sluice needs Linux 6.6 or later and CAP_BPF, CAP_NET_ADMIN and \
         CAP_PERFMON: {0}"
    )]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel's verifier or the loading of one program failed.
    #[error("the kernel refused the program `{name}`; Sluice needs Linux 6.6 or later: {source}")]
    Program {
        /// The program.
        name: &'static str,
        /// The kernel's answer, with the verifier's log.
        source: Box<aya::programs::ProgramError>,
    },
    /// The pin directory is not on a bpffs, and none could be mounted.
    #[error(
        "{path} is not on a BPF file system and none could be mounted ({source}): run \
         `mount -t bpf bpf /sys/fs/bpf` as root, and choose a directory below it"
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
        /// Why mounting failed.
        source: io::Error,
    },
    /// Another process owns the pins.
    #[error("{0} is in use by another process; only one sluiced may run on it")]
    Locked(PathBuf),
    /// A table has no room.
    #[error(
        "table {table} is full ({max_entries} entries); the configuration needs more than this build provides"
    )]
    TableFull {
        /// The map.
        table: &'static str,
        /// Its size.
        max_entries: u32,
    },
    /// A map operation failed.
    #[error("{operation} on map {table}: {source}")]
    Map {
        /// The map.
        table: &'static str,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Netlink said no.
    #[error("{operation} by netlink: {source}")]
    Netlink {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Some other operation failed.
    #[error("{operation}: {source}")]
    Io {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl EngineError {
    /// An [`EngineError::Io`] maker for `map_err`.
    pub(crate) fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> EngineError {
        let operation = operation.into();
        move |source| EngineError::Io { operation, source }
    }

    /// An [`EngineError::Netlink`] maker for `map_err`.
    pub(crate) fn netlink(operation: impl Into<String>) -> impl FnOnce(io::Error) -> EngineError {
        let operation = operation.into();
        move |source| EngineError::Netlink { operation, source }
    }
}
