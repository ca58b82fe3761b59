//! What uplinks receive that is not for their own address: a wire's frames are for VMs.
//!
//! Most are made promiscuous. One whose NIC is told address by address what to receive must not be, and receives all group
//! addresses besides: neighbour discovery needs them.
//!
//! What we set we take back, also in another life of the daemon: a directory `PIN_DIR/promisc/IFINDEX`, or
//! `PIN_DIR/allmulti/IFINDEX`, stands for it. Packet sockets would count for us, but what they ask for ends with the process.

use std::collections::BTreeSet;
use std::fs;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::EngineError;
use crate::links::{Link, Links};
use crate::netlink::Connection;
use crate::pins::Pins;

/// What an interface receives besides what is for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reception {
    /// Everything.
    All,
    /// All group addresses.
    Groups,
}

impl Reception {
    const fn flag(self) -> LinkFlags {
        match self {
            Reception::All => LinkFlags::Promisc,
            Reception::Groups => LinkFlags::Allmulti,
        }
    }

    const fn is_on(self, link: &Link) -> bool {
        match self {
            Reception::All => link.promiscuous,
            Reception::Groups => link.all_groups,
        }
    }

    /// In words, and when it is no longer so.
    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Reception::All => ("promiscuous", "no longer promiscuous"),
            Reception::Groups => ("receive all group addresses", "no longer receive all group addresses"),
        }
    }
}

/// Whether an uplink needs it: veths and taps deliver every frame anyhow.
pub(crate) fn is_needed(link: &Link) -> bool {
    !matches!(link.view.kind.as_str(), "veth" | "tun")
}

/// Has these interfaces receive so, and those no longer that did so for us and are not wanted. Says what it did.
pub(crate) fn reconcile(
    reception: Reception,
    wanted: &BTreeSet<u32>,
    links: &Links,
    pins: &Pins,
) -> Result<Vec<String>, EngineError> {
    let mut done = Vec::new();
    let (words, no_words) = reception.words();
    let directory = pins.reception(reception);
    let marked: BTreeSet<u32> = match fs::read_dir(&directory) {
        Ok(entries) => {
            entries.flatten().filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).collect()
        }
        Err(_) => BTreeSet::new(),
    };
    for ifindex in wanted {
        let Some(link) = links.by_ifindex(*ifindex).filter(|link| !reception.is_on(link)) else { continue };
        // The mark first: at worst, a mode is taken back that nobody had set.
        let mark = directory.join(ifindex.to_string());
        fs::create_dir_all(&mark).map_err(EngineError::io(format!("making {}", mark.display())))?;
        set(link, reception, true)?;
        done.push(format!("made {} {words}", link.view.name));
    }
    for ifindex in marked.difference(wanted) {
        if let Some(link) = links.by_ifindex(*ifindex).filter(|link| reception.is_on(link)) {
            set(link, reception, false)?;
            done.push(format!("made {} {no_words}", link.view.name));
        }
        let mark = directory.join(ifindex.to_string());
        fs::remove_dir(&mark).map_err(EngineError::io(format!("removing {}", mark.display())))?;
    }
    Ok(done)
}

fn set(link: &Link, reception: Reception, on: bool) -> Result<(), EngineError> {
    let failed = || EngineError::netlink(format!("setting what {} receives", link.view.name));
    let mut message = LinkMessage::default();
    message.header.index = link.view.ifindex;
    message.header.flags = if on { reception.flag() } else { LinkFlags::empty() };
    message.header.change_mask = reception.flag();
    let mut connection = Connection::open(NETLINK_ROUTE).map_err(failed())?;
    match connection.request(RouteNetlinkMessage::SetLink(message), 0) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(failed()(error)),
    }
}
