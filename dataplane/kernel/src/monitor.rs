//! Notice of interfaces that come, change and go.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};

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
    socket: OwnedFd,
}

impl LinkMonitor {
    /// Subscribes.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn open() -> Result<LinkMonitor, EngineError> {
        let open = || -> io::Result<OwnedFd> {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::NetlinkRoute,
            )?;
            setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP_LINK))?;
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
            Ok(0) | Err(Errno::EINTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(error) => return Err(failed()(error.into())),
        }
        let mut events = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    events.extend(links::parse_notifications(&buffer[..length]).into_iter().map(event));
                }
                Err(Errno::EAGAIN) => return Ok(events),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => events.push(LinkEvent::Overrun),
                Err(error) => return Err(failed()(error.into())),
            }
        }
    }
}

fn event((link, gone): (links::Link, bool)) -> LinkEvent {
    let (ifindex, name) = (link.view.ifindex, link.view.name);
    if gone { LinkEvent::Gone { ifindex, name } } else { LinkEvent::Changed { ifindex, name } }
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
