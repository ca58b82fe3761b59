//! The interfaces of the network namespace, as rtnetlink lists them.
//!
//! Of each message only the attributes that matter are looked at: one that is new to us must not make a live port's
//! interface look absent.

use std::collections::HashMap;
use std::io;

use netlink_packet_core::{
    DecodeError, NLA_F_NESTED, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, NlaBuffer, NlasIterator,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use sluice_policy::net::MacAddr;

use crate::netlink::Connection;
use crate::{EngineError, LinkView, features};

/// How often a list is asked for again because interfaces changed while it was made.
const RETRIES: usize = 20;

/// `struct ifinfomsg`: its size, and where its fields are.
const HEADER: usize = 16;
const IFINDEX: usize = 4;
const FLAGS: usize = 8;
/// Of a tap: whether frames have virtio-net headers (linux/if_link.h).
const IFLA_TUN_VNET_HDR: u16 = 5;

/// A link, with what only this crate asks for.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) view: LinkView,
    /// For a veth: its peer's interface index, in the peer's namespace.
    pub(crate) peer: Option<u32>,
    /// Number that our namespace has for the peer's, if that is another one.
    pub(crate) peer_namespace: Option<i32>,
    /// A tap whose frames have virtio-net headers, which may leave checksums and cutting to others.
    pub(crate) vnet_headers: bool,
    /// Alias.
    pub(crate) alias: Option<String>,
    /// Receives every frame on its wire, because somebody set it so.
    pub(crate) promiscuous: bool,
    /// Receives every group address, because somebody set it so.
    pub(crate) all_groups: bool,
}

/// All links at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Links {
    by_name: HashMap<String, Link>,
    names: HashMap<u32, String>,
}

impl Links {
    /// Reads them all.
    pub(crate) fn read() -> Result<Links, EngineError> {
        let list = list().map_err(EngineError::netlink("listing interfaces"))?;
        // Without the family (before 6.3) nothing is known to run XDP, and TCX serves.
        let features = features::read().unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel does not tell the interfaces' XDP features; TCX only");
            HashMap::new()
        });
        let mut links = Links::default();
        for mut link in list {
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

fn list() -> io::Result<Vec<Link>> {
    let mut connection = Connection::open(NETLINK_ROUTE)?;
    let mut tries = 0;
    loop {
        match connection.dump(Message::List) {
            Ok(messages) => {
                let link = |message| match message {
                    Message::Present(link) => Some(link),
                    Message::Gone(_) | Message::List => None,
                };
                return Ok(messages.into_iter().filter_map(link).collect());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < RETRIES => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

/// The messages about links.
#[derive(Debug)]
enum Message {
    /// List them all (`RTM_GETLINK`).
    List,
    /// It is there (`RTM_NEWLINK`).
    Present(Link),
    /// It is gone (`RTM_DELLINK`).
    Gone(Link),
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Message::List => libc::RTM_GETLINK,
            Message::Present(_) => libc::RTM_NEWLINK,
            Message::Gone(_) => libc::RTM_DELLINK,
        }
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].fill(0);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        match header.message_type {
            libc::RTM_NEWLINK => parse(payload).map(Message::Present),
            libc::RTM_DELLINK => parse(payload).map(Message::Gone),
            other => Err(DecodeError::from(format!("{other} is no message about a link"))),
        }
    }
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.get(..4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Reads a link's message.
fn parse(payload: &[u8]) -> Result<Link, DecodeError> {
    let truncated = || DecodeError::from("a link's message is cut off".to_owned());
    let field = |offset: usize| payload.get(offset..).and_then(number).ok_or_else(truncated);
    let flags = field(FLAGS)? as i32;
    let mut link = Link {
        view: LinkView {
            ifindex: field(IFINDEX)?,
            name: String::new(),
            kind: String::new(),
            up: flags & libc::IFF_UP != 0,
            carrier: flags & libc::IFF_LOWER_UP != 0,
            mtu: 0,
            mac: None,
            peer_elsewhere: false,
            native_xdp: false,
            xdp_target: false,
        },
        peer: None,
        peer_namespace: None,
        vnet_headers: false,
        alias: None,
        promiscuous: flags & libc::IFF_PROMISC != 0,
        all_groups: flags & libc::IFF_ALLMULTI != 0,
    };
    for attribute in NlasIterator::new(payload.get(HEADER..).ok_or_else(truncated)?) {
        let attribute: NlaBuffer<&[u8]> = attribute?;
        let value = attribute.value();
        match attribute.kind() & !NLA_F_NESTED {
            libc::IFLA_IFNAME => link.view.name = text(value),
            libc::IFLA_MTU => link.view.mtu = number(value).unwrap_or(0),
            libc::IFLA_ADDRESS => link.view.mac = value.try_into().ok().map(MacAddr),
            libc::IFLA_LINK => link.peer = number(value),
            libc::IFLA_LINK_NETNSID => link.peer_namespace = number(value).map(|id| id as i32),
            libc::IFLA_IFALIAS => link.alias = Some(text(value)),
            libc::IFLA_LINKINFO => {
                for info in NlasIterator::new(value) {
                    let info: NlaBuffer<&[u8]> = info?;
                    match info.kind() & !NLA_F_NESTED {
                        libc::IFLA_INFO_KIND => link.view.kind = text(info.value()),
                        // Behind the kind, always.
                        libc::IFLA_INFO_DATA if link.view.kind == "tun" => {
                            link.vnet_headers = has_vnet_headers(info.value())?;
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link.view.peer_elsewhere = link.view.kind == "veth" && link.peer_namespace.is_some();
    Ok(link)
}

/// Whether a tap's data says that its frames have virtio-net headers.
fn has_vnet_headers(data: &[u8]) -> Result<bool, DecodeError> {
    for attribute in NlasIterator::new(data) {
        let attribute: NlaBuffer<&[u8]> = attribute?;
        if attribute.kind() & !NLA_F_NESTED == IFLA_TUN_VNET_HDR {
            return Ok(attribute.value().first().is_some_and(|value| *value != 0));
        }
    }
    Ok(false)
}

/// The links that a batch of notifications is about; `true` with those that are gone.
pub(crate) fn parse_notifications(mut bytes: &[u8]) -> Vec<(Link, bool)> {
    let mut links = Vec::new();
    while let Some(length) = number(bytes) {
        let length = length as usize;
        let Some(message) = bytes.get(..length).filter(|_| length >= size_of::<libc::nlmsghdr>()) else {
            break;
        };
        if let Ok(message) = NetlinkMessage::<Message>::deserialize(message) {
            match message.payload {
                NetlinkPayload::InnerMessage(Message::Present(link)) => links.push((link, false)),
                NetlinkPayload::InnerMessage(Message::Gone(link)) => links.push((link, true)),
                _ => {}
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    links
}
