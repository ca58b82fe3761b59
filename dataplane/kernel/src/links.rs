//! The interfaces of the network namespace, as rtnetlink lists them.

use std::collections::HashMap;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use sluice_policy::net::MacAddr;

use crate::netlink::Connection;
use crate::{EngineError, LinkView, features};

/// A link, with what only this crate asks for.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) view: LinkView,
    /// For a veth: its peer's interface index, in the peer's namespace.
    pub(crate) peer: Option<u32>,
    /// Number that our namespace has for the peer's, if that is another one.
    pub(crate) peer_namespace: Option<i32>,
    /// Alias.
    pub(crate) alias: Option<String>,
}

/// All links at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Links {
    by_name: HashMap<String, Link>,
    names: HashMap<u32, String>,
}

impl Links {
    /// Reads them all; about 3 µs per link.
    pub(crate) fn read() -> Result<Links, EngineError> {
        let failed = || EngineError::netlink("listing interfaces");
        let mut connection = Connection::open(NETLINK_ROUTE).map_err(failed())?;
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answers = connection.dump(RouteNetlinkMessage::GetLink(request)).map_err(failed())?;
        // Without the family (before 6.3) nothing is known to run XDP, and TCX serves.
        let features = features::read().unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel does not tell the interfaces' XDP features; TCX only");
            HashMap::new()
        });
        let mut links = Links::default();
        for answer in answers {
            let RouteNetlinkMessage::NewLink(message) = answer else { continue };
            let mut link = parse(&message);
            let features = features.get(&link.view.ifindex).copied().unwrap_or_default();
            link.view.native_xdp = features.native;
            link.view.xdp_target = features.target;
            links.names.insert(link.view.ifindex, link.view.name.clone());
            links.by_name.insert(link.view.name.clone(), link);
        }
        Ok(links)
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&Link> {
        self.by_name.get(name)
    }

    pub(crate) fn by_ifindex(&self, ifindex: u32) -> Option<&Link> {
        self.by_name.get(self.names.get(&ifindex)?)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Link> {
        self.by_name.values()
    }
}

/// Reads a link's message.
pub(crate) fn parse(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut view = LinkView {
        ifindex: message.header.index,
        name: String::new(),
        kind: String::new(),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        mtu: 0,
        mac: None,
        peer_elsewhere: false,
        native_xdp: false,
        xdp_target: false,
    };
    let (mut peer, mut peer_namespace, mut alias) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => view.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => view.mtu = *mtu,
            LinkAttribute::Address(bytes) => view.mac = bytes.as_slice().try_into().ok().map(MacAddr),
            LinkAttribute::Link(ifindex) => peer = Some(*ifindex),
            LinkAttribute::LinkNetNsId(id) => peer_namespace = Some(*id),
            LinkAttribute::IfAlias(text) => alias = Some(text.clone()),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        view.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    view.peer_elsewhere = view.kind == "veth" && peer_namespace.is_some();
    Link { view, peer, peer_namespace, alias }
}

/// The links that a batch of notifications is about; `true` with those that are gone.
pub(crate) fn parse_notifications(mut bytes: &[u8]) -> Vec<(Link, bool)> {
    let mut links = Vec::new();
    while bytes.len() >= size_of::<libc::nlmsghdr>() {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let Some(message) = bytes.get(..length).filter(|_| length >= size_of::<libc::nlmsghdr>()) else {
            break;
        };
        if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message)
            && let NetlinkPayload::InnerMessage(inner) = message.payload
        {
            match inner {
                RouteNetlinkMessage::NewLink(link) => links.push((parse(&link), false)),
                RouteNetlinkMessage::DelLink(link) => links.push((parse(&link), true)),
                _ => {}
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    links
}
