//! Notices of the kernel that something about a NIC may have changed, so that drift is seen long before the next
//! periodic read.
//!
//! A [`Hint`] says where to look, never what is: whoever gets one reads the NIC anew ([`Nic::refresh`](crate::nic::Nic),
//! [`check`](crate::lifecycle::execute::check)). Hints are coalesced, and a wait that was overrun says [`Hint::All`]. Our
//! own writes come back as hints too: they cost one more read, which writes nothing, so it ends there.
//!
//! | happens | seen by |
//! |---|---|
//! | PF or representor up, down, renamed, new, gone; carrier | link notices |
//! | settings of VFs (`ip link set PF vf N …`), while the PF is up | link notices, of the PF |
//! | filters and qdiscs added and removed | traffic control notices |
//! | an address put into or taken from the PF's unicast filter | neighbour notices |
//! | mode of the eSwitch, if there are VFs | devlink's notices of ports that come and go |
//! | PFs and VFs that come and go, drivers bound and unbound, `sriov_numvfs` | uevents |
//!
//! Told by nobody, as tried with Linux 7.2: settings of VFs while the PF is down, the mode of an eSwitch without VFs, and
//! what a NIC or its firmware does by itself. The periodic read has to find these.
//!
//! A [`Watch`] belongs to the network namespace of the thread that opened it, and one thread waits on it; [`Waker`]s wake
//! it from others.

mod decode;

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_KOBJECT_UEVENT, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::netlink::Refusal;
use crate::switchdev::devlink::Devlink;

/// `RTMGRP_LINK`, `RTMGRP_NEIGH` and `RTMGRP_TC` of linux/rtnetlink.h, as bits.
const ROUTE_GROUPS: u32 = 1 | 1 << 2 | 1 << 3;
/// The kernel's own uevents; those of udev have another group.
const UEVENT_GROUP: u32 = 1;
/// Room in each socket, for the notices of some thousand VFs at once.
const SOCKET_BUFFER: usize = 4 << 20;
/// Room for one notice; only its beginning matters.
const NOTICE: usize = 16 * 1024;
/// Notices read in one wait from one socket; more is an overrun.
const NOTICES_MAX: usize = 4096;

/// Where something may have changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hint {
    /// Anywhere: notices were lost.
    All,
    /// An interface with this index: it came, went or changed, or its unicast filter did.
    Link {
        /// Its index.
        ifindex: u32,
    },
    /// Filters or qdiscs of an interface.
    Filters {
        /// Its index.
        ifindex: u32,
    },
    /// A device: a PF, or a VF. Drivers, numbers of VFs, the eSwitch's mode and ports.
    Device {
        /// Its bus, such as `pci`.
        bus: String,
        /// Its address there.
        address: String,
    },
}

/// A subscription to notices.
pub struct Watch {
    sockets: Vec<(Source, Socket)>,
    woken: UnixStream,
    waker: Waker,
}

/// What sends notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Route,
    Devlink,
    Uevents,
}

/// Ends a wait from another thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<UnixStream>);

/// Why there are no notices.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// A socket cannot be had.
    #[error("{what}: {error}; NICs are read at intervals only")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        error: io::Error,
    },
}

impl Waker {
    /// Ends the wait that is, or else the next one.
    pub fn wake(&self) {
        // A full pipe wakes as well, and a watch that is gone needs no waking.
        let _ = (&*self.0).write(&[1]);
    }
}

impl Watch {
    /// Subscribes, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When a socket cannot be had. A kernel without devlink has no notices of that, which is no error.
    pub fn open() -> Result<Watch, WatchError> {
        let failed = |what| move |error| WatchError::Socket { what, error };
        let route =
            subscribe(NETLINK_ROUTE, ROUTE_GROUPS, None).map_err(failed("subscribing to rtnetlink"))?;
        let uevents = subscribe(NETLINK_KOBJECT_UEVENT, UEVENT_GROUP, None)
            .map_err(failed("subscribing to uevents"))?;
        let mut sockets = vec![(Source::Route, route), (Source::Uevents, uevents)];
        if let Some(group) = devlink_group().map_err(failed("asking for devlink's notices"))? {
            let devlink =
                subscribe(NETLINK_GENERIC, 0, Some(group)).map_err(failed("subscribing to devlink"))?;
            sockets.push((Source::Devlink, devlink));
        }
        let pair = || -> io::Result<(UnixStream, UnixStream)> {
            let (woken, waker) = UnixStream::pair()?;
            woken.set_nonblocking(true)?;
            waker.set_nonblocking(true)?;
            Ok((woken, waker))
        };
        let (woken, waker) = pair().map_err(failed("making a pair of sockets"))?;
        Ok(Watch { sockets, woken, waker: Waker(Arc::new(waker)) })
    }

    /// What wakes it.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Waits for hints, until they come, somebody wakes it or `timeout` has passed. Each place is named once; there is
    /// none if it was woken or the time passed.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn wait(&mut self, timeout: Duration) -> Result<Vec<Hint>, WatchError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (ready, is_woken) = self.poll(left)?;
            let mut hints = BTreeSet::new();
            for source in ready {
                self.drain(source, &mut hints)?;
            }
            // Most notices are about things that are none of ours, so it goes on waiting.
            if !hints.is_empty() || is_woken || Instant::now() >= deadline {
                if hints.contains(&Hint::All) {
                    return Ok(vec![Hint::All]);
                }
                return Ok(hints.into_iter().collect());
            }
        }
    }

    /// The sockets that have something to say, and whether somebody woke us.
    fn poll(&mut self, timeout: Duration) -> Result<(Vec<usize>, bool), WatchError> {
        let sockets = self.sockets.iter().map(|(_, socket)| socket.as_fd());
        let mut polled: Vec<PollFd<'_>> = std::iter::once(self.woken.as_fd())
            .chain(sockets)
            .map(|socket| PollFd::new(socket, PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(WatchError::Socket { what: "waiting for notices", error: errno.into() });
            }
        }
        let is_ready = |polled: &PollFd<'_>| polled.revents().is_some_and(|events| !events.is_empty());
        let is_woken = polled.first().is_some_and(is_ready);
        let ready =
            (0..self.sockets.len()).filter(|index| polled.get(index + 1).is_some_and(is_ready)).collect();
        if is_woken {
            let mut bytes = [0; 64];
            while (&self.woken).read(&mut bytes).is_ok_and(|count| count == bytes.len()) {}
        }
        Ok((ready, is_woken))
    }

    fn drain(&self, index: usize, hints: &mut BTreeSet<Hint>) -> Result<(), WatchError> {
        let Some((source, socket)) = self.sockets.get(index) else { return Ok(()) };
        let mut notice = vec![0; NOTICE];
        for _ in 0..NOTICES_MAX {
            match recv(socket.as_raw_fd(), &mut notice, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC) {
                Ok(length) if length > notice.len() => {
                    hints.insert(Hint::All);
                }
                Ok(length) => {
                    let bytes = notice.get(..length).unwrap_or_default();
                    match source {
                        Source::Route => decode::route(bytes, hints),
                        Source::Devlink => decode::devlink(bytes, hints),
                        Source::Uevents => hints.extend(decode::uevent(bytes)),
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(Errno::ENOBUFS) => {
                    hints.insert(Hint::All);
                }
                Err(errno) => {
                    return Err(WatchError::Socket { what: "reading notices", error: errno.into() });
                }
            }
        }
        hints.insert(Hint::All);
        Ok(())
    }
}

fn subscribe(protocol: isize, groups: u32, membership: Option<u32>) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    if let Some(group) = membership {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// The number of devlink's group for notices; `None` if the kernel has no devlink.
fn devlink_group() -> io::Result<Option<u32>> {
    match Devlink::notices() {
        Ok(group) => Ok(Some(group)),
        Err(Refusal { error, .. }) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(None),
        Err(Refusal { error, .. }) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_it_is_woken() {
        let mut watch = Watch::open().expect("sockets");
        let waker = watch.waker();
        waker.wake();
        let start = Instant::now();
        watch.wait(Duration::from_secs(30)).expect("waiting");
        assert!(start.elapsed() < Duration::from_secs(20), "it slept on");
        let thread = std::thread::spawn(move || waker.wake());
        // Other tests on this machine may cause hints, which end a wait too.
        watch.wait(Duration::from_secs(30)).expect("waiting");
        thread.join().expect("waking");
        assert!(start.elapsed() < Duration::from_secs(20), "it slept on");
    }

    #[test]
    fn a_wait_ends_when_its_time_has_passed() {
        let mut watch = Watch::open().expect("sockets");
        let start = Instant::now();
        watch.wait(Duration::ZERO).expect("waiting");
        watch.wait(Duration::from_millis(5)).expect("waiting");
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
