//! Every bpf(2) call that aya does not offer: batches, links with their interface index, pins by descriptor; and the
//! RCU grace period.
//!
//! Layouts are those of `union bpf_attr` in `include/uapi/linux/bpf.h`. The kernel takes any prefix of the union, so
//! each command has a structure of its own.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{bpf_attach_type, bpf_cmd};
use bytemuck::{Pod, Zeroable};

/// `BPF_F_BEFORE`: with no reference given, before all other programs.
const BPF_F_BEFORE: u32 = 1 << 3;
/// `XDP_FLAGS_DRV_MODE`.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// A structure without padding that bpf(2) takes as its attributes.
trait Attr: Pod {}

/// Runs a command.
///
/// # Safety
/// Every address inside `attr` must be valid for what the command reads or writes there.
unsafe fn bpf<A: Attr>(command: bpf_cmd, attr: &mut A) -> io::Result<i64> {
    // SAFETY: `attr` is a live, initialised structure of the size given; the caller vouches for addresses inside it.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes ownership of a descriptor that bpf(2) returned.
fn own(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec, as bpf(2) always does).
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

fn address_mut(bytes: &mut [u8]) -> u64 {
    bytes.as_mut_ptr() as u64
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}
impl Attr for ElementAttr {}

/// Sizes of a map, as the kernel sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapShape {
    /// `enum bpf_map_type`.
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

/// Looks an element up; `false` if it is not there. `value` is as long as the map's values (of all CPUs).
pub(crate) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: address_mut(value),
        flags: 0,
    };
    // SAFETY: key and value are as long as the map's, which `maps` checks before it makes a table.
    match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an element.
pub(crate) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    // SAFETY: as in `map_lookup`; the kernel only reads both.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Deletes an element; `false` if it was not there.
pub(crate) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr =
        ElementAttr { map_fd: map.as_raw_fd() as u32, pad: 0, key: address(key), value: 0, flags: 0 };
    // SAFETY: as in `map_lookup`; the kernel only reads the key.
    match unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes the key after `key` (the first, for `None`) to `next`; `false` at the end.
pub(crate) fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: key.map_or(0, address),
        value: address_mut(next),
        flags: 0,
    };
    // SAFETY: as in `map_lookup`.
    match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}
impl Attr for BatchAttr {}

/// Where a batched look-up goes on. Opaque: a bucket number for hashes, a key for arrays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor([u8; 128]);

impl Default for Cursor {
    fn default() -> Self {
        Cursor([0; 128])
    }
}

/// What a batched look-up returned.
pub(crate) struct Batch {
    /// Elements written to the buffers.
    pub(crate) count: u32,
    /// There is nothing after them.
    pub(crate) end: bool,
}

/// Reads up to `count` elements; `from` is where an earlier call ended. Buffers hold `count` keys and values.
///
/// # Errors
/// `ENOSPC` if a hash bucket does not fit into `count` elements.
pub(crate) fn map_lookup_batch(
    map: BorrowedFd<'_>,
    from: Option<&Cursor>,
    to: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<Batch> {
    let mut attr = BatchAttr {
        in_batch: from.map_or(0, |cursor| address(&cursor.0)),
        out_batch: address_mut(&mut to.0),
        keys: address_mut(keys),
        values: address_mut(values),
        count,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: `maps` sizes both buffers for `count` elements; cursors have room for any key of ours.
    match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => Ok(Batch { count: attr.count, end: false }),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(Batch { count: attr.count, end: true })
        }
        Err(error) => Err(error),
    }
}

/// Writes `count` elements, each atomically, in order. Returns how many were written, and what ended it early.
pub(crate) fn map_update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count,
        map_fd: map.as_raw_fd() as u32,
        ..BatchAttr::zeroed()
    };
    // SAFETY: `maps` passes `count` whole keys and values.
    match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) } {
        Ok(_) => (count, Ok(())),
        // The kernel counts what it has written, unless it refused the call as a whole.
        Err(error) => (if attr.count < count { attr.count } else { 0 }, Err(error)),
    }
}

/// Deletes elements; returns how many were deleted before the first that was missing (all, if the result is `count`).
pub(crate) fn map_delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> io::Result<u32> {
    let mut attr =
        BatchAttr { keys: address(keys), count, map_fd: map.as_raw_fd() as u32, ..BatchAttr::zeroed() };
    // SAFETY: `maps` passes `count` whole keys.
    match unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attr) } {
        Ok(_) => Ok(attr.count),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(attr.count),
        Err(error) => Err(error),
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    file_flags: u32,
}
impl Attr for PathAttr {}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins a map, program or link.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = PathAttr { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, file_flags: 0 };
    // SAFETY: the path is a live, zero-terminated string.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned map, program or link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PathAttr { path: path.as_ptr() as u64, fd: 0, file_flags: 0 };
    // SAFETY: as in `pin`.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) }.map(own)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}
impl Attr for InfoAttr {}

/// Reads as much of an object's information as `info` has room for; the rest of `info` stays zero.
fn info<I: Pod>(object: BorrowedFd<'_>) -> io::Result<I> {
    let mut info = I::zeroed();
    let bytes = bytemuck::bytes_of_mut(&mut info);
    let mut attr =
        InfoAttr { fd: object.as_raw_fd() as u32, length: bytes.len() as u32, info: address_mut(bytes) };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which is plain data.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Start of `struct bpf_map_info`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// A map's id and shape.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<(u32, MapShape)> {
    let MapInfo { kind, id, key_size, value_size, max_entries, flags } = info(map)?;
    Ok((id, MapShape { kind, key_size, value_size, max_entries, flags }))
}

/// Start of `struct bpf_prog_info`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    xlated_length: u32,
    jited: u64,
    xlated: u64,
    load_time: u64,
    created_by_uid: u32,
    map_ids_length: u32,
    map_ids: u64,
}

/// What makes a program the one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProgramIdentity {
    /// Hash of its instructions, without the maps it refers to.
    pub(crate) tag: [u8; 8],
    /// Those maps, sorted.
    pub(crate) map_ids: Vec<u32>,
}

/// A program's id and identity.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<(u32, ProgramIdentity)> {
    let mut map_ids = vec![0u32; 128];
    let room = map_ids.len() as u32;
    let mut info = ProgramInfo::zeroed();
    info.map_ids_length = room;
    info.map_ids = map_ids.as_mut_ptr() as u64;
    let bytes = bytemuck::bytes_of_mut(&mut info);
    let mut attr =
        InfoAttr { fd: program.as_raw_fd() as u32, length: bytes.len() as u32, info: address_mut(bytes) };
    // SAFETY: the kernel writes at most `length` bytes to `info` and `map_ids_length` numbers to `map_ids`.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    map_ids.truncate(info.map_ids_length as usize);
    map_ids.sort_unstable();
    Ok((info.id, ProgramIdentity { tag: info.tag, map_ids }))
}

/// Start of `struct bpf_link_info`, with the part that XDP and TCX links share.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    attach_type: u32,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// Id of its program.
    pub(crate) program: u32,
    /// Its interface; 0 if that is gone or the link was detached by force.
    pub(crate) ifindex: u32,
}

/// Looks at an XDP or TCX link.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let RawLinkInfo { program, ifindex, .. } = info(link)?;
    Ok(LinkInfo { program, ifindex })
}

/// The hooks that we attach to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LinkKind {
    /// TCX ingress, before every other program.
    Tcx,
    /// XDP in native mode.
    Xdp,
}

impl std::fmt::Display for LinkKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LinkKind::Tcx => "TCX",
            LinkKind::Xdp => "XDP",
        })
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkCreateAttr {
    program_fd: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}
impl Attr for LinkCreateAttr {}

/// Attaches a program to an interface of the calling thread's network namespace.
pub(crate) fn link_create(program: BorrowedFd<'_>, ifindex: u32, kind: LinkKind) -> io::Result<OwnedFd> {
    let (attach_type, flags) = match kind {
        LinkKind::Tcx => (bpf_attach_type::BPF_TCX_INGRESS as u32, BPF_F_BEFORE),
        LinkKind::Xdp => (bpf_attach_type::BPF_XDP as u32, XDP_FLAGS_DRV_MODE),
    };
    let mut attr = LinkCreateAttr {
        program_fd: program.as_raw_fd() as u32,
        ifindex,
        attach_type,
        flags,
        ..LinkCreateAttr::zeroed()
    };
    // SAFETY: there are no addresses in the attributes.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(own)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}
impl Attr for LinkUpdateAttr {}

/// Replaces a link's program; no packet passes without one.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: link.as_raw_fd() as u32,
        program_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_program_fd: 0,
    };
    // SAFETY: there are no addresses in the attributes.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkDetachAttr {
    link_fd: u32,
}
impl Attr for LinkDetachAttr {}

/// Detaches a link now; closing the last descriptor would do it some time later.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetachAttr { link_fd: link.as_raw_fd() as u32 };
    // SAFETY: there are no addresses in the attributes.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// `MEMBARRIER_CMD_GLOBAL` of `include/uapi/linux/membarrier.h`.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Waits until no program that was running at the call is running any more, so that nobody reads what could be
/// reached only before it.
pub(crate) fn grace_period() {
    // SAFETY: no addresses are passed. MEMBARRIER_CMD_GLOBAL is a synchronize_rcu(), which BPF programs are readers of.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        // Refused under nohz_full. Programs run in softirq context for microseconds; this is longer by far than any
        // of them, even on a CPU that the hypervisor takes away.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// CLOCK_MONOTONIC, the clock of `bpf_ktime_get_ns`, in nanoseconds.
pub(crate) fn monotonic_nanoseconds() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
