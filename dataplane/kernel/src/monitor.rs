//! Notice of interfaces that come, change and go.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{EngineError, links};

/// `RTMGRP_LINK`.
const GROUP_LINK: u32 = 1;
/// Room for one datagram of notifications.
const BUFFER: usize = 64 * 1024;
/// Socket buffer: the notices of some thousand interfaces at once.
const SOCKET_BUFFER: usize = 4 << 20;

/// What happened to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is new, or some property of it changed.
    Changed {
        /// Interface index.
        ifindex: u32,
        /// Name.
        name: String,
    },
    /// It is gone.
    Gone {
        /// Interface index.
        ifindex: u32,
        /// Name.
        name: String,
    },
    /// Events were lost; look at everything.
    Overrun,
}

/// A subscription to the kernel's link notifications in the network namespace of the thread that opened it.
///
/// It may be waited on by polling its descriptor, too. Events are not debounced.
#[derive(Debug)]
pub struct LinkMonitor {
    socket: Socket,
}

impl LinkMonitor {
    /// Subscribes.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn open() -> Result<LinkMonitor, EngineError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, GROUP_LINK))?;
            socket.set_rx_buf_sz(SOCKET_BUFFER as i32)?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        let socket = open().map_err(EngineError::netlink("subscribing to interface changes"))?;
        Ok(LinkMonitor { socket })
    }

    /// Waits for events, up to `timeout`; an empty list means that there were none.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn next_timeout(&self, timeout: Duration) -> Result<Vec<LinkEvent>, EngineError> {
        let failed = || EngineError::netlink("waiting for interface changes");
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(error) => return Err(failed()(error.into())),
        }
        let mut events = Vec::new();
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => events.extend(links::parse_notifications(&buffer).into_iter().map(event)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => events.push(LinkEvent::Overrun),
                Err(error) => return Err(failed()(error)),
            }
        }
    }
}

fn event((link, gone): (links::Link, bool)) -> LinkEvent {
    let (ifindex, name) = (link.view.ifindex, link.view.name);
    if gone { LinkEvent::Gone { ifindex, name } } else { LinkEvent::Changed { ifindex, name } }
}

#[allow(unsafe_code)]
impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the socket's, which lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}
