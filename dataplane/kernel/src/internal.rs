//! Veth pairs of internal ports: the host's interface on a switch. Both ends are in the daemon's namespace.
//!
//! The switch's end carries an alias that marks the pair as ours; a pair without it is never removed.

use std::collections::BTreeSet;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use sluice_policy::lower::{PortSpec, PortSpecKind};
use sluice_policy::net::MacAddr;

use crate::EngineError;
use crate::links::{Link, Links};
use crate::netlink::Connection;

/// What our aliases start with; the port's name follows.
const ALIAS: &str = "sluice ";
/// What the switch's end has after the host's end's name.
const SUFFIX: &str = "-sw";

/// Makes and removes pairs until they are as wanted. Says what was done, or could not be.
pub(crate) fn ensure(ports: &[PortSpec]) -> Result<Vec<String>, EngineError> {
    let links = Links::read()?;
    let wanted: Vec<(&PortSpec, MacAddr)> = ports
        .iter()
        .filter_map(|port| match port.kind {
            PortSpecKind::Internal { mac } => Some((port, mac)),
            _ => None,
        })
        .collect();
    let unwanted: Vec<&Link> = {
        let names: BTreeSet<&str> = wanted.iter().map(|(port, _)| port.netdev.as_str()).collect();
        links.iter().filter(|link| is_ours(link) && !names.contains(link.view.name.as_str())).collect()
    };
    let mut done = Vec::new();
    if wanted.is_empty() && unwanted.is_empty() {
        return Ok(done);
    }
    let mut connection =
        Connection::open(NETLINK_ROUTE).map_err(EngineError::netlink("connecting to rtnetlink"))?;
    for link in unwanted {
        delete(&mut connection, link)?;
        done.push(format!("removed {} and its peer: no switch wants it any more", link.view.name));
    }
    for (port, mac) in wanted {
        match pair(&links, port) {
            Pair::Complete { marked, host, switch } => {
                if !marked {
                    mark(&mut connection, switch.view.ifindex, &port.name)?;
                    done.push(format!("adopted {}", port.netdev));
                }
                if let Some(host) = host
                    && host.view.mac != Some(mac)
                {
                    set_mac(&mut connection, host.view.ifindex, mac)?;
                    done.push(format!("gave {} the address {mac}", host.view.name));
                }
                for link in host.into_iter().chain([switch]) {
                    if !link.view.up {
                        set_up(&mut connection, link.view.ifindex)?;
                        done.push(format!("set {} up", link.view.name));
                    }
                }
            }
            Pair::Absent { host } => {
                make(&mut connection, host, &port.netdev, mac)?;
                // A veth cannot be made up: its peer is not there yet.
                let links = Links::read()?;
                for link in [links.by_name(host), links.by_name(&port.netdev)].into_iter().flatten() {
                    set_up(&mut connection, link.view.ifindex)?;
                }
                if let Some(link) = links.by_name(&port.netdev) {
                    mark(&mut connection, link.view.ifindex, &port.name)?;
                }
                done.push(format!("made {host} (switch's end {})", port.netdev));
            }
            Pair::Foreign => {} // `observe` says so
        }
    }
    Ok(done)
}

/// Why the switch's end of an internal port cannot be used, if so.
pub(crate) fn objection(links: &Links, port: &PortSpec) -> Option<String> {
    match pair(links, port) {
        Pair::Complete { .. } => None,
        Pair::Absent { .. } => Some(format!("{} has not been made yet", port.netdev)),
        Pair::Foreign => Some(format!(
            "{} or {} is already the name of an interface that Sluice did not make; rename one of them",
            host_name(&port.netdev),
            port.netdev
        )),
    }
}

/// What there is of a port's pair.
enum Pair<'a> {
    /// The host's end is `None` when somebody moved it to another namespace or renamed it.
    Complete {
        host: Option<&'a Link>,
        switch: &'a Link,
        marked: bool,
    },
    Absent {
        host: &'a str,
    },
    Foreign,
}

fn host_name(switch: &str) -> &str {
    switch.strip_suffix(SUFFIX).unwrap_or(switch)
}

fn is_ours(link: &Link) -> bool {
    link.view.kind == "veth" && link.alias.as_deref().is_some_and(|alias| alias.starts_with(ALIAS))
}

/// A pair with both names that has no alias is one that a killed daemon was just making.
fn pair<'a>(links: &'a Links, port: &'a PortSpec) -> Pair<'a> {
    let host = host_name(&port.netdev);
    match (links.by_name(host), links.by_name(&port.netdev)) {
        (None, None) => Pair::Absent { host },
        (Some(host), Some(switch))
            if host.view.kind == "veth"
                && host.peer == Some(switch.view.ifindex)
                && host.peer_namespace.is_none() =>
        {
            Pair::Complete { host: Some(host), switch, marked: is_ours(switch) }
        }
        (_, Some(switch)) if is_ours(switch) => Pair::Complete { host: None, switch, marked: true },
        _ => Pair::Foreign,
    }
}

fn named(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
}

fn indexed(ifindex: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message
}

fn make(connection: &mut Connection, host: &str, switch: &str, mac: MacAddr) -> Result<(), EngineError> {
    let mut message = named(host);
    message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(named(switch)))),
    ]));
    connection
        .request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
        .map(drop)
        .map_err(EngineError::netlink(format!("making the veth pair {host}, {switch}")))
}

fn change(connection: &mut Connection, message: LinkMessage, what: &str) -> Result<(), EngineError> {
    connection
        .request(RouteNetlinkMessage::SetLink(message), 0)
        .map(drop)
        .map_err(EngineError::netlink(format!("{what} of an internal port's interface")))
}

fn mark(connection: &mut Connection, ifindex: u32, port: &str) -> Result<(), EngineError> {
    let mut message = indexed(ifindex);
    message.attributes.push(LinkAttribute::IfAlias(format!("{ALIAS}{port}")));
    change(connection, message, "setting the alias")
}

fn set_mac(connection: &mut Connection, ifindex: u32, mac: MacAddr) -> Result<(), EngineError> {
    let mut message = indexed(ifindex);
    message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    change(connection, message, "setting the address")
}

fn set_up(connection: &mut Connection, ifindex: u32) -> Result<(), EngineError> {
    let mut message = indexed(ifindex);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    change(connection, message, "setting up")
}

fn delete(connection: &mut Connection, link: &Link) -> Result<(), EngineError> {
    match connection.request(RouteNetlinkMessage::DelLink(indexed(link.view.ifindex)), 0) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(EngineError::netlink(format!("deleting {}", link.view.name))(error)),
    }
}
