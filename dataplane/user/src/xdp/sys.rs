//! The system calls of AF_XDP, and the bpf(2) calls that bring frames to its sockets.
//!
//! Layouts are those of `linux/if_xdp.h` and of `union bpf_attr` in `linux/bpf.h`. The kernel takes what is not passed of the
//! union for zero, so each command has a structure of its own.

#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use bytemuck::{Pod, Zeroable};

use crate::frame::{Region, SMALL_CHUNK};

/// The four rings, by the option that makes each and the offset at which it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingKind {
    Fill,
    Completion,
    Receive,
    Transmit,
}

/// Where a ring's parts are in its mapping, in bytes.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RingOffsets {
    pub(super) producer: u64,
    pub(super) consumer: u64,
    pub(super) descriptors: u64,
    pub(super) flags: u64,
}

/// `struct xdp_mmap_offsets`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Offsets {
    receive: RingOffsets,
    transmit: RingOffsets,
    fill: RingOffsets,
    completion: RingOffsets,
}

impl Offsets {
    pub(super) fn of(&self, kind: RingKind) -> RingOffsets {
        match kind {
            RingKind::Fill => self.fill,
            RingKind::Completion => self.completion,
            RingKind::Receive => self.receive,
            RingKind::Transmit => self.transmit,
        }
    }
}

/// `struct xdp_umem_reg`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct UmemRegistration {
    address: u64,
    length: u64,
    chunk_size: u32,
    headroom: u32,
    flags: u32,
    tx_metadata_length: u32,
}

/// `struct xdp_statistics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SocketStatistics {
    /// Frames dropped for other reasons than the following.
    pub rx_dropped: u64,
    /// Descriptors in the fill ring that the kernel refused: a bug.
    pub rx_invalid_descs: u64,
    /// Descriptors in the transmit ring that the kernel refused: a bug.
    pub tx_invalid_descs: u64,
    /// Frames dropped as the worker was too slow.
    pub rx_ring_full: u64,
    /// Frames dropped for want of chunks.
    pub rx_fill_ring_empty_descs: u64,
    /// Transmit rings found empty.
    pub tx_ring_empty_descs: u64,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An AF_XDP socket.
pub(super) fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(i64::from(unsafe {
        libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    }))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn set_option<T: Pod>(fd: BorrowedFd<'_>, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value is alive, and of the size given.
    check(i64::from(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as u32,
        )
    }))?;
    Ok(())
}

fn option<T: Pod>(fd: BorrowedFd<'_>, option: i32) -> io::Result<T> {
    let mut value = T::zeroed();
    let mut length = size_of::<T>() as u32;
    // SAFETY: the value is alive, writable, and of the size given; any bytes make one.
    check(i64::from(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &raw mut length,
        )
    }))?;
    Ok(value)
}

/// Registers a region's small chunks.
///
/// The kernel may write only into chunks that are handed to it through a fill ring, which is why this is safe.
pub(super) fn register(fd: BorrowedFd<'_>, region: &Region) -> io::Result<()> {
    let (memory, length) = region.umem();
    let registration = UmemRegistration {
        address: memory.as_ptr() as u64,
        length: length as u64,
        chunk_size: SMALL_CHUNK as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_length: 0,
    };
    set_option(fd, libc::XDP_UMEM_REG, &registration)
}

/// Makes a ring of `entries`, a power of two.
pub(super) fn make_ring(fd: BorrowedFd<'_>, kind: RingKind, entries: u32) -> io::Result<()> {
    let option = match kind {
        RingKind::Fill => libc::XDP_UMEM_FILL_RING,
        RingKind::Completion => libc::XDP_UMEM_COMPLETION_RING,
        RingKind::Receive => libc::XDP_RX_RING,
        RingKind::Transmit => libc::XDP_TX_RING,
    };
    set_option(fd, option, &entries)
}

/// Where the parts of rings are.
pub(super) fn offsets(fd: BorrowedFd<'_>) -> io::Result<Offsets> {
    option(fd, libc::XDP_MMAP_OFFSETS)
}

/// Whether the driver moves frames without copying them.
pub(super) fn is_zero_copy(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let flags: u32 = option(fd, libc::XDP_OPTIONS)?;
    Ok(flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

/// The socket's own counters.
pub(super) fn statistics(fd: BorrowedFd<'_>) -> io::Result<SocketStatistics> {
    option(fd, libc::XDP_STATISTICS)
}

/// Maps a ring; answers its start, and the length to be unmapped.
pub(super) fn map_ring(fd: BorrowedFd<'_>, kind: RingKind, length: usize) -> io::Result<NonNull<u8>> {
    let offset = match kind {
        RingKind::Receive => libc::XDP_PGOFF_RX_RING,
        RingKind::Transmit => libc::XDP_PGOFF_TX_RING,
        RingKind::Fill => libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t,
        RingKind::Completion => libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t,
    };
    // SAFETY: a new mapping, which overlaps nothing.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            fd.as_raw_fd(),
            offset,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a ring was mapped at address 0"))
}

/// Binds a socket to a queue of an interface.
pub(super) fn bind(fd: BorrowedFd<'_>, ifindex: u32, queue: u32, flags: u16) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: flags,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    // SAFETY: the address is alive, and of the size given.
    check(i64::from(unsafe {
        libc::bind(
            fd.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_xdp>() as u32,
        )
    }))?;
    Ok(())
}

/// Makes the kernel look at the transmit ring.
pub(super) fn kick_transmit(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe {
        libc::sendto(fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0)
    } as i64)?;
    Ok(())
}

/// Makes the kernel look at the fill ring.
pub(super) fn kick_receive(fd: BorrowedFd<'_>) {
    // SAFETY: no memory is passed. What it answers says nothing new.
    unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
}

/// A structure without padding that bpf(2) takes as its attributes.
trait Attributes: Pod {}

/// Runs a command.
///
/// # Safety
/// Every address inside `attributes` must be valid for what the command reads or writes there.
unsafe fn bpf<A: Attributes>(command: u32, attributes: &mut A) -> io::Result<i64> {
    // SAFETY: the structure is alive and of the size given; the caller vouches for addresses inside it.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) })
}

fn own(fd: i64) -> OwnedFd {
    // SAFETY: bpf(2) has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}
impl Attributes for MapCreate {}

/// An XSKMAP of so many queues.
pub(super) fn make_map(queues: u32) -> io::Result<OwnedFd> {
    const BPF_MAP_CREATE: u32 = 0;
    const BPF_MAP_TYPE_XSKMAP: u32 = 17;
    let mut attributes =
        MapCreate { map_type: BPF_MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, max_entries: queues };
    // SAFETY: there is no address inside.
    Ok(own(unsafe { bpf(BPF_MAP_CREATE, &mut attributes) }?))
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MapElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}
impl Attributes for MapElement {}

/// Puts a socket into an XSKMAP, or takes what is there out.
pub(super) fn set_socket(map: BorrowedFd<'_>, queue: u32, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    const BPF_MAP_UPDATE_ELEM: u32 = 2;
    const BPF_MAP_DELETE_ELEM: u32 = 3;
    let value = socket.map(|socket| socket.as_raw_fd() as u32);
    let mut attributes = MapElement {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: std::ptr::from_ref(&queue) as u64,
        value: value.as_ref().map_or(0, |value| std::ptr::from_ref(value) as u64),
        flags: 0,
    };
    let command = if value.is_some() { BPF_MAP_UPDATE_ELEM } else { BPF_MAP_DELETE_ELEM };
    // SAFETY: key and value are alive, and four bytes long, as the map has it.
    unsafe { bpf(command, &mut attributes) }?;
    Ok(())
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}
impl Attributes for ProgramLoad {}

const BPF_XDP: u32 = 37;

/// Instructions of BPF, as far as programs are put together here.
pub(super) mod instruction {
    pub(in super::super) const LOAD_WORD: u8 = 0x61;
    pub(in super::super) const LOAD_VALUE: u8 = 0x18;
    pub(in super::super) const MOVE: u8 = 0xb7;
    pub(in super::super) const CALL: u8 = 0x85;
    pub(in super::super) const EXIT: u8 = 0x95;

    /// Opcode, registers (destination in the low half), offset, immediate value.
    pub(in super::super) const fn instruction(code: u8, registers: u8, offset: u8, value: i32) -> u64 {
        code as u64 | (registers as u64) << 8 | (offset as u64) << 16 | (value as u32 as u64) << 32
    }
}

/// Loads an XDP program. `frags`: it takes frames in several buffers.
pub(super) fn load_program(instructions: &[u64], name: [u8; 16], frags: bool) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: u32 = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
    let mut attributes = ProgramLoad {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: if frags { BPF_F_XDP_HAS_FRAGS } else { 0 },
        name,
        ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    // SAFETY: the instructions and the licence are alive, and as long as is said.
    Ok(own(unsafe { bpf(BPF_PROG_LOAD, &mut attributes) }?))
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}
impl Attributes for LinkCreate {}

/// Attaches an XDP program to an interface: in the driver, or before the stack. It stays as long as the link.
pub(super) fn attach(program: BorrowedFd<'_>, ifindex: u32, in_driver: bool) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: u32 = 28;
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let flags = if in_driver { XDP_FLAGS_DRV_MODE } else { XDP_FLAGS_SKB_MODE };
    let mut attributes =
        LinkCreate { program: program.as_raw_fd() as u32, ifindex, attach_type: BPF_XDP, flags };
    // SAFETY: there is no address inside.
    Ok(own(unsafe { bpf(BPF_LINK_CREATE, &mut attributes) }?))
}
