//! The few calls of bpf(2) that the harness makes for its own small programs.
//!
//! They are hand-assembled ([`crate::programs`]) so that the harness measures with the same instructions whatever
//! compiler built the switch, and so that no compiled object is needed for them.

#![allow(unsafe_code)]

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use bytemuck::{Pod, Zeroable};

/// A program or link type and its attach type, as the kernel numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// XDP.
    Xdp,
    /// A classifier on TCX ingress.
    Tcx,
}

impl Kind {
    const fn program_type(self) -> u32 {
        match self {
            Kind::Xdp => 6, // BPF_PROG_TYPE_XDP
            Kind::Tcx => 3, // BPF_PROG_TYPE_SCHED_CLS
        }
    }

    const fn attach_type(self) -> u32 {
        match self {
            Kind::Xdp => 37, // BPF_XDP
            Kind::Tcx => 46, // BPF_TCX_INGRESS
        }
    }
}

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_LOOKUP_ELEM: c_long = 1;
const BPF_MAP_UPDATE_ELEM: c_long = 2;
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_TEST_RUN: c_long = 10;
const BPF_LINK_CREATE: c_long = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: redirected frames really travel. Kernel 5.18.
const LIVE_FRAMES: u32 = 2;

/// Leading fields of `union bpf_attr`; the kernel takes what is not passed for zero.
mod attr {
    use super::{Pod, Zeroable};

    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    pub(super) struct MapCreate {
        pub(super) map_type: u32,
        pub(super) key_size: u32,
        pub(super) value_size: u32,
        pub(super) max_entries: u32,
    }

    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    pub(super) struct MapElement {
        pub(super) map_fd: u32,
        pub(super) reserved: u32,
        pub(super) key: u64,
        pub(super) value: u64,
        pub(super) flags: u64,
    }

    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    pub(super) struct ProgLoad {
        pub(super) prog_type: u32,
        pub(super) insn_cnt: u32,
        pub(super) insns: u64,
        pub(super) license: u64,
        pub(super) log_level: u32,
        pub(super) log_size: u32,
        pub(super) log_buf: u64,
    }

    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    pub(super) struct TestRun {
        pub(super) prog_fd: u32,
        pub(super) retval: u32,
        pub(super) data_size_in: u32,
        pub(super) data_size_out: u32,
        pub(super) data_in: u64,
        pub(super) data_out: u64,
        pub(super) repeat: u32,
        pub(super) duration: u32,
        pub(super) ctx_size_in: u32,
        pub(super) ctx_size_out: u32,
        pub(super) ctx_in: u64,
        pub(super) ctx_out: u64,
        pub(super) flags: u32,
        pub(super) cpu: u32,
        pub(super) batch_size: u32,
        pub(super) reserved: u32,
    }

    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    pub(super) struct LinkCreate {
        pub(super) prog_fd: u32,
        pub(super) ifindex: u32,
        pub(super) attach_type: u32,
        pub(super) flags: u32,
    }
}

/// # Safety
/// Pointers inside `attr` are valid for what the command reads and writes, as long as the call lasts.
unsafe fn bpf<T: Pod>(command: c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the attribute outlives the call and the size is its own; the rest is the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as usize as u64
}

/// # Safety
/// `fd` is open and nobody else owns it.
unsafe fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the caller's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A word that programs reach directly, without a look-up: a map of one element.
#[derive(Debug)]
pub(crate) struct Word {
    map: OwnedFd,
}

impl Word {
    /// A new one.
    pub(crate) fn new(value: u64) -> Result<Word> {
        let mut attr =
            attr::MapCreate { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size: 8, max_entries: 1 };
        // SAFETY: no pointers.
        let map = unsafe { bpf(BPF_MAP_CREATE, &mut attr) }.context("making a map")?;
        // SAFETY: just made.
        let word = Word { map: unsafe { owned(map) } };
        update(word.map.as_fd(), &0u32, &value)?;
        Ok(word)
    }

    pub(crate) fn fd(&self) -> i32 {
        self.map.as_raw_fd()
    }

    /// What it holds now.
    pub(crate) fn read(&self) -> Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        let mut attr = attr::MapElement {
            map_fd: self.map.as_raw_fd() as u32,
            reserved: 0,
            key: (&raw const key) as usize as u64,
            value: (&raw mut value) as usize as u64,
            flags: 0,
        };
        // SAFETY: the key is four bytes and the value eight, as the map wants them.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.context("reading a map")?;
        Ok(value)
    }
}

/// Loads a program.
pub(crate) fn load(kind: Kind, instructions: &[u64]) -> Result<OwnedFd> {
    let license = c"GPL";
    let mut log = vec![0u8; 16 << 10];
    let mut attr = attr::ProgLoad {
        prog_type: kind.program_type(),
        insn_cnt: instructions.len() as u32,
        insns: address(instructions),
        license: license.as_ptr() as usize as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log_buf: log.as_mut_ptr() as usize as u64,
    };
    // SAFETY: instructions, license and log outlive the call, with their true lengths.
    match unsafe { bpf(BPF_PROG_LOAD, &mut attr) } {
        // SAFETY: just made.
        Ok(fd) => Ok(unsafe { owned(fd) }),
        Err(error) => bail!("loading a {kind:?} program: {error}\n{}", String::from_utf8_lossy(&log)),
    }
}

/// Attaches a program to an interface of the calling thread's namespace, until the link is dropped.
pub(crate) fn attach(kind: Kind, program: BorrowedFd<'_>, ifindex: u32) -> Result<OwnedFd> {
    let mut attr = attr::LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        ifindex,
        attach_type: kind.attach_type(),
        flags: 0,
    };
    // SAFETY: no pointers.
    let link = unsafe { bpf(BPF_LINK_CREATE, &mut attr) };
    let link = link.with_context(|| format!("attaching a {kind:?} program to interface {ifindex}"))?;
    // SAFETY: just made.
    Ok(unsafe { owned(link) })
}

/// Runs an XDP program `repeat` times on copies of `frame`, which then travel as it says.
pub(crate) fn run_live(
    program: BorrowedFd<'_>,
    ifindex: u32,
    frame: &[u8],
    repeat: u32,
    batch: u32,
) -> Result<()> {
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, frame.len() as u32, 0, ifindex, 0, 0];
    let mut attr = attr::TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: address(frame),
        repeat,
        ctx_in: address(&context),
        ctx_size_in: size_of_val(&context) as u32,
        flags: LIVE_FRAMES,
        batch_size: batch,
        ..attr::TestRun::zeroed()
    };
    // SAFETY: the frame outlives the call, with its true length; nothing is written.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }.context("running a program on live frames")?;
    Ok(())
}

/// Writes an element of a map.
pub(crate) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> Result<()> {
    let mut attr = attr::MapElement {
        map_fd: map.as_raw_fd() as u32,
        reserved: 0,
        key: std::ptr::from_ref(key) as usize as u64,
        value: std::ptr::from_ref(value) as usize as u64,
        flags: 0,
    };
    // SAFETY: both outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.context("writing a map")?;
    Ok(())
}
