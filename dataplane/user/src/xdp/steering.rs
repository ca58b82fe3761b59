//! Steering for a device that is all ours: everything that a queue receives goes to its socket, if it has one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::sys;

/// An attached program, and the map of its sockets. Dropped, it is gone.
#[derive(Debug)]
pub struct Steering {
    map: OwnedFd,
    link: OwnedFd,
    in_driver: bool,
}

impl Steering {
    /// Attaches to an interface with up to `queues` queues, in its driver if that has XDP; all frames still go to the stack.
    /// `frags`: frames may come in several buffers, which needs sockets that take them.
    ///
    /// # Errors
    /// The kernel's: EBUSY if the interface has another XDP program.
    pub fn attach(ifindex: u32, queues: u32, frags: bool) -> io::Result<Steering> {
        let map = sys::make_map(queues)?;
        let program = sys::load_program(&instructions(map.as_fd()), *b"sluice_xsk_all\0\0", frags)?;
        let (link, in_driver) = match sys::attach(program.as_fd(), ifindex, true) {
            Ok(link) => (link, true),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                (sys::attach(program.as_fd(), ifindex, false)?, false)
            }
            Err(error) => return Err(error),
        };
        Ok(Steering { map, link, in_driver })
    }

    /// Whether the program runs in the driver, or later, on frames that the stack has copied.
    pub fn is_in_driver(&self) -> bool {
        self.in_driver
    }

    /// Brings the frames of a queue to a socket. The kernel takes it out by itself when the socket is closed.
    ///
    /// # Errors
    /// The kernel's: EINVAL if the socket is bound to another interface or queue.
    pub fn set(&self, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        sys::set_socket(self.map.as_fd(), queue, Some(socket))
    }

    /// Leaves the frames of a queue to the stack again.
    ///
    /// # Errors
    /// The kernel's: ENOENT if it was not steered.
    pub fn unset(&self, queue: u32) -> io::Result<()> {
        sys::set_socket(self.map.as_fd(), queue, None)
    }

    /// The link that keeps the program attached.
    pub fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// `bpf_redirect_map(&map, context->rx_queue_index, XDP_PASS)`
fn instructions(map: BorrowedFd<'_>) -> [u64; 6] {
    use sys::instruction::{CALL, EXIT, LOAD_VALUE, LOAD_WORD, MOVE, instruction};
    const RX_QUEUE_INDEX: u8 = 16;
    const XDP_PASS: i32 = 2;
    const REDIRECT_MAP: i32 = 51;
    [
        instruction(LOAD_WORD, 0x12, RX_QUEUE_INDEX, 0),
        // The source register says that the value is a map's descriptor (BPF_PSEUDO_MAP_FD).
        instruction(LOAD_VALUE, 0x11, 0, map.as_raw_fd()),
        0,
        instruction(MOVE, 0x03, 0, XDP_PASS),
        instruction(CALL, 0, 0, REDIRECT_MAP),
        instruction(EXIT, 0, 0, 0),
    ]
}
