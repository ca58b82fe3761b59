//! A shorter way out of a device that copies: a tap of our own, whose XDP program redirects all that we write to it.
//!
//! A socket in copy mode has the kernel make an skb of each frame, for which a veth's other end with XDP copies it once more. What comes
//! by the tap reaches the driver as the page that it was written to (`ndo_xdp_xmit`), as what the kernel engine forwards in XDP does.
//! Though each frame takes a call of the kernel's, it takes three quarters of the time.
//!
//! Nobody is told of a frame that the driver refuses, as long as it does: this is for devices that say they take such frames, and
//! whoever opens one closes it when the device says so no more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use rustix::io::{Errno, write};

use super::sys;
use crate::tap::quiet_tap;

/// A tap, and its program.
#[derive(Debug)]
pub(super) struct Redirector {
    tap: OwnedFd,
    _link: OwnedFd,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It is on its way.
    Redirected,
    /// There was no memory for it.
    Refused,
    /// The tap is gone.
    Gone,
}

impl Redirector {
    /// Redirects to an interface of this thread's network namespace.
    ///
    /// # Errors
    /// The kernel's: there is no module tun, or no right to make a tap or to load a program.
    pub(super) fn open(ifindex: u32) -> io::Result<Redirector> {
        let (tap, name) = quiet_tap()?;
        let program = sys::load_program(&instructions(ifindex), *b"sluice_redirect\0", false)?;
        let link = sys::attach(program.as_fd(), if_nametoindex(name.as_str())?, true)?;
        Ok(Redirector { tap, _link: link })
    }

    /// Sends one frame.
    #[inline]
    pub(super) fn send(&self, frame: &[u8]) -> Written {
        match write(&self.tap, frame) {
            Ok(_) => Written::Redirected,
            Err(Errno::BADFD | Errno::NODEV | Errno::IO) => Written::Gone,
            Err(_) => Written::Refused,
        }
    }
}

/// `bpf_redirect(ifindex, 0)`
fn instructions(ifindex: u32) -> [u64; 4] {
    use sys::instruction::{CALL, EXIT, MOVE, instruction};
    const REDIRECT: i32 = 23;
    [
        instruction(MOVE, 0x01, 0, ifindex.cast_signed()),
        instruction(MOVE, 0x02, 0, 0),
        instruction(CALL, 0, 0, REDIRECT),
        instruction(EXIT, 0, 0, 0),
    ]
}
