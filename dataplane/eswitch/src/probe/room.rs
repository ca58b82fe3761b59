//! A network namespace of the probe's own, without a name: it goes with its last descriptor, however the process ends,
//! and the kernel then removes what was made in it and puts a VF's interface back into the first namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::thread;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sched::{CloneFlags, setns, unshare};
use sluice_policy::net::{MacAddr, VlanId};

use crate::netlink::attr::{Attributes, Read, u32_at};
use crate::netlink::{Connection, Refusal};

/// Of linux/rtnetlink.h and linux/if_link.h.
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const IFLA_ADDRESS: u16 = 1;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_NET_NS_FD: u16 = 28;
/// `struct ifinfomsg`, and where it has what.
const HEADER: usize = 16;
const IFINDEX: usize = 4;
const FLAGS: usize = 8;
const CHANGE: usize = 12;
const IFF_UP: u32 = 1;
const IFF_RUNNING: u32 = 1 << 6;

/// The namespace of the thread that runs.
const HERE: &str = "/proc/thread-self/ns/net";

/// A namespace, and the way there and back.
pub(super) struct Room {
    inside: File,
    outside: File,
    route_inside: Connection,
    route_outside: Connection,
}

/// An interface in the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inmate {
    pub(super) ifindex: u32,
    /// It is up and has a carrier.
    pub(super) is_running: bool,
}

impl Room {
    /// Makes one. It needs CAP_SYS_ADMIN, as all namespaces do.
    pub(super) fn open() -> io::Result<Room> {
        let outside = File::open(HERE)?;
        let route_outside = Connection::open(NETLINK_ROUTE)?;
        let (inside, route_inside) = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            // An interface that comes up should not announce itself; a kernel without IPv6 does not.
            for which in ["all", "default"] {
                let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
            }
            Ok((File::open(HERE)?, Connection::open(NETLINK_ROUTE)?))
        })?;
        Ok(Room { inside, outside, route_inside, route_outside })
    }

    /// Takes an interface in from outside.
    pub(super) fn take(&mut self, ifindex: u32) -> Result<(), Refusal> {
        let message = moving(ifindex, &self.inside);
        self.route_outside.request(SET_LINK, &message, 0).map(drop)
    }

    /// Puts an interface out again.
    pub(super) fn put_out(&mut self, ifindex: u32) -> Result<(), Refusal> {
        let message = moving(ifindex, &self.outside);
        self.route_inside.request(SET_LINK, &message, 0).map(drop)
    }

    /// Sets an interface up.
    pub(super) fn set_up(&mut self, ifindex: u32) -> Result<(), Refusal> {
        let mut message = header(ifindex);
        for at in [FLAGS, CHANGE] {
            message[at..at + 4].copy_from_slice(&IFF_UP.to_ne_bytes());
        }
        self.route_inside.request(SET_LINK, &message, 0).map(drop)
    }

    /// The interface inside with this address.
    pub(super) fn find(&mut self, mac: MacAddr) -> Result<Option<Inmate>, Refusal> {
        let links = self.route_inside.dump(GET_LINK, &header(0))?;
        Ok(links.iter().find_map(|link| {
            let attributes = Read::new(link.payload.get(HEADER..)?);
            if attributes.array(IFLA_ADDRESS) != Some(mac.0) {
                return None;
            }
            let flags = u32_at(&link.payload, FLAGS)?;
            let is_running = flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING;
            Some(Inmate { ifindex: u32_at(&link.payload, IFINDEX)?, is_running })
        }))
    }

    /// Has an interface outside receive a VLAN, by a VLAN interface on it in here. It goes with the room.
    pub(super) fn join(&mut self, ifindex: u32, vlan: VlanId) -> Result<(), Refusal> {
        let data = Attributes::default().put(IFLA_VLAN_ID, &vlan.get().to_ne_bytes());
        let info = Attributes::default().text(IFLA_INFO_KIND, "vlan").nest(IFLA_INFO_DATA, &data);
        let message = Attributes::after(&header(0))
            .put(IFLA_LINK, &ifindex.to_ne_bytes())
            .put(IFLA_NET_NS_FD, &self.inside.as_raw_fd().to_ne_bytes())
            .nest(IFLA_LINKINFO, &info)
            .into_bytes();
        self.route_outside.request(NEW_LINK, &message, NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// Does something inside. Sockets opened there stay there.
    pub(super) fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_thread(|| {
            setns(&self.inside, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }
}

/// On a thread of its own, which may change its namespace.
fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let panicked = |_| Err(io::Error::other("a thread of the probe panicked"));
        scope.spawn(work).join().unwrap_or_else(panicked)
    })
}

fn header(ifindex: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    header
}

fn moving(ifindex: u32, namespace: &File) -> Vec<u8> {
    Attributes::after(&header(ifindex)).put(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_empty_and_elsewhere() {
        // Without privileges there are no namespaces.
        let Ok(mut room) = Room::open() else { return };
        assert_eq!(room.find(MacAddr([2, 9, 9, 9, 9, 9])).expect("links"), None);
        let inside = room.enter(|| fs::read_link(HERE)).expect("a name");
        assert_ne!(inside, fs::read_link(HERE).expect("a name"));
    }
}
