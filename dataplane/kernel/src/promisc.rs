//! Promiscuous mode of uplinks: a wire's frames for VMs are not for the wire's own address.
//!
//! What we set we take back, also in another life of the daemon: a directory `PIN_DIR/promisc/IFINDEX` stands for it.
//! Packet sockets would count for us, but what they ask for ends with the process.

use std::collections::BTreeSet;
use std::fs;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::EngineError;
use crate::links::{Link, Links};
use crate::netlink::Connection;
use crate::pins::Pins;

/// Whether an uplink needs it: veths and taps deliver every frame anyhow.
pub(crate) fn is_needed(link: &Link) -> bool {
    !matches!(link.view.kind.as_str(), "veth" | "tun")
}

/// Makes these interfaces promiscuous, and those not that were so for us and are not wanted. Says what it did.
pub(crate) fn reconcile(
    wanted: &BTreeSet<u32>,
    links: &Links,
    pins: &Pins,
) -> Result<Vec<String>, EngineError> {
    let mut done = Vec::new();
    let directory = pins.promiscuous();
    let marked: BTreeSet<u32> = match fs::read_dir(&directory) {
        Ok(entries) => {
            entries.flatten().filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).collect()
        }
        Err(_) => BTreeSet::new(),
    };
    for ifindex in wanted {
        let Some(link) = links.by_ifindex(*ifindex).filter(|link| !link.promiscuous) else { continue };
        // The mark first: at worst, a mode is taken back that nobody had set.
        let mark = directory.join(ifindex.to_string());
        fs::create_dir_all(&mark).map_err(EngineError::io(format!("making {}", mark.display())))?;
        set(link, true)?;
        done.push(format!("made {} promiscuous", link.view.name));
    }
    for ifindex in marked.difference(wanted) {
        if let Some(link) = links.by_ifindex(*ifindex).filter(|link| link.promiscuous) {
            set(link, false)?;
            done.push(format!("made {} no longer promiscuous", link.view.name));
        }
        let mark = directory.join(ifindex.to_string());
        fs::remove_dir(&mark).map_err(EngineError::io(format!("removing {}", mark.display())))?;
    }
    Ok(done)
}

fn set(link: &Link, on: bool) -> Result<(), EngineError> {
    let failed = || EngineError::netlink(format!("setting the promiscuous mode of {}", link.view.name));
    let mut message = LinkMessage::default();
    message.header.index = link.view.ifindex;
    message.header.flags = if on { LinkFlags::Promisc } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Promisc;
    let mut connection = Connection::open(NETLINK_ROUTE).map_err(failed())?;
    match connection.request(RouteNetlinkMessage::SetLink(message), 0) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(failed()(error)),
    }
}
