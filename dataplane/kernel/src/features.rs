//! What the drivers of the interfaces can do with XDP, as the kernel's `netdev` family tells.
//!
//! Source: `Documentation/netlink/specs/netdev.yaml`; since Linux 6.3.

use std::collections::HashMap;
use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, Nla, NlaBuffer, NlasIterator, Parseable,
};
use netlink_sys::protocols::NETLINK_GENERIC;

use crate::netlink::Connection;

/// XDP programs run in the driver: `NETDEV_XDP_ACT_BASIC`.
const ACT_BASIC: u64 = 1 << 0;
/// Redirected frames are accepted: `NETDEV_XDP_ACT_NDO_XMIT`.
const ACT_NDO_XMIT: u64 = 1 << 2;

/// The controller family and its `CTRL_CMD_GETFAMILY`.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
/// The group that hears of changes.
const MANAGEMENT: &[u8] = b"mgmt\0";
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_CMD_DEV_CHANGE_NTF: u8 = 4;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// XDP abilities of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct XdpFeatures {
    /// The driver runs programs.
    pub(crate) native: bool,
    /// It accepts redirected frames at present.
    pub(crate) target: bool,
}

/// A generic netlink message, without regard to its family.
#[derive(Debug)]
struct Generic {
    family: u16,
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl NetlinkSerializable for Generic {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        use netlink_packet_core::Emitable;
        4 + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        use netlink_packet_core::Emitable;
        buffer[..4].copy_from_slice(&[self.command, 1, 0, 0]);
        self.attributes.as_slice().emit(&mut buffer[4..]);
    }
}

impl NetlinkDeserializable for Generic {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let attributes = NlasIterator::new(payload.get(4..).unwrap_or_default())
            .map(|nla: Result<NlaBuffer<&[u8]>, DecodeError>| DefaultNla::parse(&nla?))
            .collect::<Result<_, _>>()?;
        let command = payload.first().copied().unwrap_or(0);
        Ok(Generic { family: header.message_type, command, attributes })
    }
}

/// The value of an attribute, if it is there.
fn value(attributes: &[DefaultNla], kind: u16) -> Option<Vec<u8>> {
    let nla = attributes.iter().find(|nla| nla.kind() == kind)?;
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    Some(bytes)
}

/// A little number among attributes, of any width.
fn number(attributes: &[DefaultNla], kind: u16) -> Option<u64> {
    match *value(attributes, kind)?.as_slice() {
        [a, b] => Some(u64::from(u16::from_ne_bytes([a, b]))),
        [a, b, c, d] => Some(u64::from(u32::from_ne_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => Some(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    }
}

/// Attributes one behind the other; what comes behind one that is broken is left out.
fn attributes(bytes: &[u8]) -> Vec<DefaultNla> {
    NlasIterator::new(bytes)
        .map_while(|nla: Result<NlaBuffer<&[u8]>, DecodeError>| DefaultNla::parse(&nla.ok()?).ok())
        .collect()
}

/// What the kernel tells of its netdev family.
fn family(connection: &mut Connection) -> io::Result<Vec<DefaultNla>> {
    let name = DefaultNla::new(CTRL_ATTR_FAMILY_NAME, b"netdev\0".to_vec());
    let request = Generic { family: GENL_ID_CTRL, command: CTRL_CMD_GETFAMILY, attributes: vec![name] };
    let answers = connection.request(request, 0)?;
    let answer = answers.into_iter().next();
    Ok(answer.ok_or_else(|| io::Error::other("the kernel did not tell of its netdev family"))?.attributes)
}

/// The multicast group of notices that an interface's abilities changed.
pub(crate) fn group() -> io::Result<u32> {
    let family = family(&mut Connection::open(NETLINK_GENERIC)?)?;
    let groups = attributes(&value(&family, CTRL_ATTR_MCAST_GROUPS).unwrap_or_default());
    groups
        .iter()
        .filter_map(|group| value(std::slice::from_ref(group), group.kind()))
        .map(|group| attributes(&group))
        .find(|group| value(group, CTRL_ATTR_MCAST_GRP_NAME).as_deref() == Some(MANAGEMENT))
        .and_then(|group| number(&group, CTRL_ATTR_MCAST_GRP_ID))
        .map(|group| group as u32)
        .ok_or_else(|| io::Error::other("the kernel's netdev family gives no notice of changes"))
}

/// The interface that a notice is about, of its abilities; `None` for notices of another kind.
pub(crate) fn changed(datagram: &[u8]) -> Option<u32> {
    let notice = NetlinkMessage::<Generic>::deserialize(datagram).ok()?;
    match notice.payload {
        NetlinkPayload::InnerMessage(notice) if notice.command == NETDEV_CMD_DEV_CHANGE_NTF => {
            number(&notice.attributes, NETDEV_A_DEV_IFINDEX).map(|ifindex| ifindex as u32)
        }
        _ => None,
    }
}

/// XDP abilities of every interface in the thread's network namespace, by interface index.
pub(crate) fn read() -> io::Result<HashMap<u32, XdpFeatures>> {
    let mut connection = Connection::open(NETLINK_GENERIC)?;
    let family = number(&family(&mut connection)?, CTRL_ATTR_FAMILY_ID)
        .ok_or_else(|| io::Error::other("the kernel did not tell the number of its netdev family"))?;
    let list = Generic { family: family as u16, command: NETDEV_CMD_DEV_GET, attributes: Vec::new() };
    let devices = connection.dump(list)?;
    Ok(devices
        .iter()
        .filter_map(|device| {
            let features = number(&device.attributes, NETDEV_A_DEV_XDP_FEATURES)?;
            Some((
                number(&device.attributes, NETDEV_A_DEV_IFINDEX)? as u32,
                XdpFeatures { native: features & ACT_BASIC != 0, target: features & ACT_NDO_XMIT != 0 },
            ))
        })
        .collect())
}
