//! Signals eventfds without ever waiting.
//!
//! A write to an eventfd waits while its counter is full, unless the file says otherwise, and that is for everybody to change who
//! has the file. The kernel itself never waits: its own signal leaves a full counter full. Asynchronous I/O ends with such a
//! signal: here, a read of a file in which there is nothing to read, which has ended when the system call returns (io_submit(2),
//! `IOCB_FLAG_RESFD`).
//!
//! One context serves all threads. Ended reads are kept by the kernel until somebody asks for them, which is done now and then.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

/// Reads that the kernel keeps at least.
const CAPACITY: usize = 1024;
/// After how many it is asked for those that ended.
const SOMETIMES: u32 = 128;
/// How often one signal is tried when others were quicker to fill the room.
const ATTEMPTS: u32 = 16;

const READ: u16 = 0;
const SIGNAL_AT_END: u32 = 1;

/// `struct iocb` of linux/aio_abi.h, on machines that store the lowest byte first.
#[repr(C)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

const _: () = assert!(size_of::<Request>() == 64 && cfg!(target_endian = "little"));

/// `struct io_event`
type Ended = [u64; 4];

/// What signals eventfds.
#[derive(Debug)]
pub(super) struct Bell {
    /// `aio_context_t`
    context: libc::c_ulong,
    /// A file in which there is nothing to read.
    empty: OwnedFd,
    rung: AtomicU32,
}

static BELL: OnceLock<Result<Bell, Errno>> = OnceLock::new();

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Bell {
    /// The process's own. It stays until the process ends.
    pub(super) fn get() -> Result<&'static Bell, Errno> {
        BELL.get_or_init(Bell::new).as_ref().map_err(|error| *error)
    }

    fn new() -> Result<Bell, Errno> {
        let empty = memfd_create("nothing", MemfdFlags::CLOEXEC)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the second argument is a variable of ours, zero, as is asked for.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, CAPACITY, &raw mut context) };
        if result < 0 {
            return Err(last_error());
        }
        Ok(Bell { context, empty, rung: AtomicU32::new(0) })
    }

    /// Signals an eventfd; a counter that is full stays so.
    #[inline]
    pub(super) fn ring(&self, event: BorrowedFd<'_>) {
        let mut byte = 0_u8;
        let request = Request {
            data: 0,
            key: 0,
            rw_flags: 0,
            opcode: READ,
            priority: 0,
            file: self.empty.as_raw_fd() as u32,
            buffer: (&raw mut byte) as u64,
            len: 1,
            offset: 0,
            reserved: 0,
            flags: SIGNAL_AT_END,
            event: event.as_raw_fd() as u32,
        };
        let requests = [&raw const request];
        for _ in 0..ATTEMPTS {
            // SAFETY: the context is ours, the request and its buffer live until the call returns, when the read has ended: there is
            // nothing in the file to wait for.
            let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_ptr()) };
            if taken == 1 || last_error() != Errno::AGAIN {
                break;
            }
            self.forget();
        }
        if self.rung.fetch_add(1, Ordering::Relaxed).is_multiple_of(SOMETIMES) {
            self.forget();
        }
    }

    /// Makes room in the kernel's list of ended reads.
    #[cold]
    fn forget(&self) {
        let mut ended = [const { MaybeUninit::<Ended>::uninit() }; CAPACITY / 4];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the context is ours, and the kernel writes at most as many entries as there are. It waits for none.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                ended.len(),
                ended.as_mut_ptr(),
                &raw const now,
            );
        }
    }
}
