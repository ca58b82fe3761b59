//! Notice of interfaces that come, change and go; and of what their drivers can do with XDP, which a veth's other end decides on, where
//! nobody here sees it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::net::if_::if_indextoname;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::{EngineError, features, links};

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
/// Events are not debounced.
#[derive(Debug)]
pub struct LinkMonitor {
    links: Socket,
    /// Absent where the kernel has no such notices (before 6.3).
    features: Option<Socket>,
}

/// A socket of a netlink family that hears of something.
fn listener(family: isize, groups: u32) -> io::Result<Socket> {
    let mut socket = Socket::new(family)?;
    socket.set_non_blocking(true)?;
    setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

/// Subscribes to changes of what drivers can do with XDP.
fn features_listener() -> io::Result<Socket> {
    let group = features::group()?;
    let socket = listener(NETLINK_GENERIC, 0)?;
    socket.add_membership(group)?;
    Ok(socket)
}

impl LinkMonitor {
    /// Subscribes.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn open() -> Result<LinkMonitor, EngineError> {
        let links = listener(NETLINK_ROUTE, GROUP_LINK)
            .map_err(EngineError::netlink("subscribing to interface changes"))?;
        let features = features_listener()
            .inspect_err(|error| tracing::warn!(%error, "the kernel gives no notice of changed XDP features"))
            .ok();
        Ok(LinkMonitor { links, features })
    }

    /// Waits for events, up to `timeout`; an empty list means that there were none.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn next_timeout(&self, timeout: Duration) -> Result<Vec<LinkEvent>, EngineError> {
        let failed = || EngineError::netlink("waiting for interface changes");
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let sockets = [Some(&self.links), self.features.as_ref()];
        let mut polled: Vec<PollFd<'_>> = sockets
            .into_iter()
            .flatten()
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
            .collect();
        match poll(&mut polled, timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(error) => return Err(failed()(error.into())),
        }
        let mut events = Vec::new();
        read(&self.links, &mut events, |datagram, events| {
            events.extend(links::parse_notifications(datagram).into_iter().map(event));
        })
        .map_err(failed())?;
        if let Some(socket) = &self.features {
            read(socket, &mut events, |datagram, events| {
                // One that has no name any more is told of as gone.
                let named =
                    features::changed(datagram).and_then(|ifindex| Some((ifindex, name_of(ifindex)?)));
                events.extend(named.map(|(ifindex, name)| LinkEvent::Changed { ifindex, name }));
            })
            .map_err(failed())?;
        }
        Ok(events)
    }
}

/// Takes all datagrams that wait.
fn read(
    socket: &Socket,
    events: &mut Vec<LinkEvent>,
    mut take: impl FnMut(&[u8], &mut Vec<LinkEvent>),
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => take(&buffer[..length], events),
            Err(Errno::EAGAIN) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::ENOBUFS) => events.push(LinkEvent::Overrun),
            Err(error) => return Err(error.into()),
        }
    }
}

fn name_of(ifindex: u32) -> Option<String> {
    if_indextoname(ifindex).ok()?.into_string().ok()
}

fn event((link, gone): (links::Link, bool)) -> LinkEvent {
    let (ifindex, name) = (link.view.ifindex, link.view.name);
    if gone { LinkEvent::Gone { ifindex, name } } else { LinkEvent::Changed { ifindex, name } }
}
