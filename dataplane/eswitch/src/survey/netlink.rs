//! What files do not tell, asked of the kernel: the device of an interface (rtnetlink), its eSwitch's mode and firmware
//! (devlink), and whether it takes flower rules (ethtool).
//!
//! The answers are for the network namespace of the calling thread, which need not be the one that `/sys` shows: so
//! the device is asked for here, and found in sysfs by its bus.

use nix::errno::Errno;

use super::reading::{Reading, Why};
use crate::netlink::attr::{Attributes, Read, each, u32_at};
use crate::netlink::{Connection, Raw, Refusal};

/// `RTM_NEWLINK`, `RTM_GETLINK`, `IFF_UP` and attributes of linux/if_link.h.
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const UP: u32 = 1;
const IFNAME: u16 = 3;
const MASTER: u16 = 10;
const LINK_INFO: u16 = 18;
const LINK_KIND: u16 = 1;
const PARENT_NAME: u16 = 56;
const PARENT_BUS: u16 = 57;
/// Length of `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

/// linux/genetlink.h.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GENERIC_HEADER: usize = 4;

/// linux/devlink.h.
const ESWITCH_GET: u8 = 29;
const INFO_GET: u8 = 51;
const BUS_NAME: u16 = 1;
const DEVICE_NAME: u16 = 2;
const ESWITCH_MODE: u16 = 25;
const VERSION_FIXED: u16 = 100;
const VERSION_RUNNING: u16 = 101;
const VERSION_NAME: u16 = 103;
const VERSION_VALUE: u16 = 104;

/// linux/ethtool_netlink.h.
const FEATURES_GET: u8 = 11;
const HEADER: u16 = 1;
/// `NLA_F_NESTED` of linux/netlink.h, which ethtool insists on.
const NESTED: u16 = 0x8000;
const HEADER_IFINDEX: u16 = 1;
const FEATURES_CHANGEABLE: u16 = 2;
const FEATURES_ACTIVE: u16 = 4;
const BITSET_BITS: u16 = 3;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;
const TC_OFFLOAD: &str = "hw-tc-offload";

/// An interface of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub ifindex: u32,
    /// Whether it is administratively up.
    pub is_up: bool,
    /// What kind of virtual interface it is, such as `veth`.
    pub kind: Option<String>,
    /// Its device.
    pub parent: Option<Parent>,
    /// The interfaces that it is made of, if it is a bond.
    pub members: Vec<String>,
}

/// A device by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its bus.
    pub bus: String,
    /// Its address there.
    pub device: String,
}

/// Modes of an eSwitch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EswitchMode {
    /// Knobs per VF.
    Legacy,
    /// Representors and rules.
    Switchdev,
    /// Rules can be written, and no traffic passes yet.
    SwitchdevInactive,
    /// A later kernel's.
    Other(u16),
}

/// Whether an interface takes flower rules, by its feature `hw-tc-offload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// It is on.
    pub on: bool,
    /// It can be changed.
    pub changeable: bool,
}

/// A version that a driver tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Of what, such as `fw`.
    pub name: String,
    /// Which.
    pub value: String,
}

impl<T> From<Refusal> for Reading<T> {
    fn from(refusal: Refusal) -> Self {
        match Errno::from_raw(refusal.errno()) {
            // devlink has no such device here, or the driver does not answer this question.
            Errno::ENODEV | Errno::EOPNOTSUPP => Reading::Absent,
            _ => refusal.error.into(),
        }
    }
}

fn ask<T>(answer: Result<Reading<T>, Refusal>) -> Reading<T> {
    answer.unwrap_or_else(Reading::from)
}

/// The interface with this name.
pub(super) fn link(netdev: &str) -> Reading<Link> {
    ask((|| {
        let mut route = Connection::open(netlink_sys::protocols::NETLINK_ROUTE)?;
        let question = Attributes::after(&[0; LINK_HEADER]).text(IFNAME, netdev).into_bytes();
        let answers = route.request(GET_LINK, &question, 0)?;
        let Some(mut link) = answers.iter().find_map(read_link) else {
            return Ok(Reading::Unknown(Why::NotTold));
        };
        if link.kind.as_deref() == Some("bond") {
            let all = route.dump(GET_LINK, &[0; LINK_HEADER])?;
            link.members = all.iter().filter_map(|other| member(other, link.ifindex)).collect();
        }
        Ok(Reading::Known(link))
    })())
}

fn link_body(message: &Raw) -> Option<Read<'_>> {
    (message.kind == NEW_LINK).then(|| Read::new(message.payload.get(LINK_HEADER..).unwrap_or_default()))
}

fn read_link(message: &Raw) -> Option<Link> {
    let attributes = link_body(message)?;
    let parent = attributes.text(PARENT_BUS).zip(attributes.text(PARENT_NAME));
    Some(Link {
        ifindex: u32_at(&message.payload, 4)?,
        is_up: u32_at(&message.payload, 8)? & UP != 0,
        kind: attributes.nested(LINK_INFO).text(LINK_KIND),
        parent: parent.map(|(bus, device)| Parent { bus, device }),
        members: Vec::new(),
    })
}

fn member(message: &Raw, master: u32) -> Option<String> {
    let attributes = link_body(message)?;
    (attributes.u32(MASTER)? == master).then(|| attributes.text(IFNAME))?
}

/// A family of generic netlink.
struct Family {
    connection: Connection,
    number: u16,
}

impl Family {
    fn open(name: &str) -> Result<Family, Refusal> {
        let mut connection = Connection::open(netlink_sys::protocols::NETLINK_GENERIC)?;
        let question = Attributes::after(&[GET_FAMILY, 1, 0, 0]).text(FAMILY_NAME, name).into_bytes();
        let answers = connection.request(CONTROLLER, &question, 0)?;
        let number = answers.iter().find_map(|answer| body(answer).u16(FAMILY_ID));
        let number =
            number.ok_or_else(|| std::io::Error::other("the kernel names no number for a family"))?;
        Ok(Family { connection, number })
    }

    fn request(&mut self, question: Attributes) -> Result<Vec<Raw>, Refusal> {
        self.connection.request(self.number, &question.into_bytes(), 0)
    }
}

fn body(message: &Raw) -> Read<'_> {
    Read::new(message.payload.get(GENERIC_HEADER..).unwrap_or_default())
}

fn devlink(command: u8, parent: &Parent) -> Result<Vec<Raw>, Refusal> {
    let question = Attributes::after(&[command, 1, 0, 0]);
    Family::open("devlink")?.request(question.text(BUS_NAME, &parent.bus).text(DEVICE_NAME, &parent.device))
}

/// The mode of a device's eSwitch.
pub(super) fn eswitch_mode(parent: &Parent) -> Reading<EswitchMode> {
    ask(devlink(ESWITCH_GET, parent).map(|answers| {
        match answers.iter().find_map(|answer| body(answer).u16(ESWITCH_MODE)) {
            None => Reading::Absent,
            Some(mode) => Reading::Known(EswitchMode::of(mode)),
        }
    }))
}

impl EswitchMode {
    const fn of(number: u16) -> EswitchMode {
        match number {
            0 => EswitchMode::Legacy,
            1 => EswitchMode::Switchdev,
            2 => EswitchMode::SwitchdevInactive,
            other => EswitchMode::Other(other),
        }
    }
}

/// Versions of a device's firmware and parts.
pub(super) fn versions(parent: &Parent) -> Reading<Vec<Version>> {
    ask(devlink(INFO_GET, parent).map(|answers| {
        let found: Vec<Version> = answers
            .iter()
            .flat_map(|answer| each(answer.payload.get(GENERIC_HEADER..).unwrap_or_default()))
            .filter_map(|(kind, value)| version(kind, value))
            .collect();
        if found.is_empty() { Reading::Absent } else { Reading::Known(found) }
    }))
}

fn version(kind: u16, value: &[u8]) -> Option<Version> {
    let attributes = Read::new(value);
    matches!(kind, VERSION_FIXED | VERSION_RUNNING).then_some(())?;
    Some(Version { name: attributes.text(VERSION_NAME)?, value: attributes.text(VERSION_VALUE)? })
}

/// Whether an interface takes flower rules.
pub(super) fn tc_offload(ifindex: u32) -> Reading<Offload> {
    ask((|| {
        let header = Attributes::default().put(HEADER_IFINDEX, &ifindex.to_ne_bytes());
        let question = Attributes::after(&[FEATURES_GET, 1, 0, 0]).nest(HEADER | NESTED, &header);
        let answers = Family::open("ethtool")?.request(question)?;
        Ok(answers.first().map_or(Reading::Absent, |answer| Reading::Known(offload(&body(answer)))))
    })())
}

/// The set of changeable features lists all, and marks them; the set of active ones lists only these.
fn offload(features: &Read<'_>) -> Offload {
    let bits = |set: u16| {
        let list = features.nested(set).get(BITSET_BITS).unwrap_or_default();
        each(list)
            .map(|(_, bit)| Read::new(bit))
            .find(|bit| bit.text(BIT_NAME).as_deref() == Some(TC_OFFLOAD))
    };
    Offload {
        on: bits(FEATURES_ACTIVE).is_some(),
        changeable: bits(FEATURES_CHANGEABLE).is_some_and(|bit| bit.get(BIT_VALUE).is_some()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bit(name: &str, is_set: bool) -> Attributes {
        let bit = Attributes::default().put(1, &11_u32.to_ne_bytes()).text(BIT_NAME, name);
        Attributes::default().nest(1, &if is_set { bit.put(BIT_VALUE, &[]) } else { bit })
    }

    #[test]
    fn features_are_active_changeable_both_or_neither() {
        let answer = |changeable: bool, active: &str| {
            let set = |bits: &Attributes| Attributes::default().nest(BITSET_BITS, bits);
            Attributes::default()
                .nest(FEATURES_CHANGEABLE, &set(&bit(TC_OFFLOAD, changeable)))
                .nest(FEATURES_ACTIVE, &set(&bit(active, false)))
                .into_bytes()
        };
        let of = |bytes: &[u8]| offload(&Read::new(bytes));
        assert_eq!(of(&answer(true, TC_OFFLOAD)), Offload { on: true, changeable: true });
        assert_eq!(of(&answer(true, "tx-lro")), Offload { on: false, changeable: true });
        assert_eq!(of(&answer(false, "tx-lro")), Offload { on: false, changeable: false });
        assert_eq!(of(&[]), Offload { on: false, changeable: false });
    }

    #[test]
    fn running_and_fixed_versions_are_told() {
        let one = Attributes::default().text(VERSION_NAME, "fw").text(VERSION_VALUE, "7.2").into_bytes();
        let found = Version { name: "fw".into(), value: "7.2".into() };
        assert_eq!(version(VERSION_RUNNING, &one), Some(found));
        assert_eq!(version(102, &one), None, "what is stored does not run yet");
        assert_eq!(version(VERSION_FIXED, &one[..4]), None);
    }

    #[test]
    fn links_name_their_devices() {
        let header = [&[0; 4][..], &7_u32.to_ne_bytes(), &UP.to_ne_bytes(), &[0; 4]].concat();
        let payload = Attributes::after(&header)
            .text(PARENT_NAME, "0000:01:00.0")
            .text(PARENT_BUS, "pci")
            .put(MASTER, &3_u32.to_ne_bytes())
            .text(IFNAME, "pf0")
            .into_bytes();
        let message = Raw { kind: NEW_LINK, payload };
        let link = read_link(&message).expect("a link");
        assert_eq!((link.ifindex, link.is_up, link.kind), (7, true, None));
        assert_eq!(link.parent, Some(Parent { bus: "pci".into(), device: "0000:01:00.0".into() }));
        assert_eq!((member(&message, 3), member(&message, 4)), (Some("pf0".to_owned()), None));
    }

    #[test]
    fn the_kernel_knows_the_loopback_interface() {
        let Reading::Known(found) = link("lo") else { panic!("there is a loopback interface") };
        assert_eq!(found.parent, None);
        assert_eq!(tc_offload(found.ifindex), Reading::Known(Offload { on: false, changeable: false }));
        assert_eq!(link("none-such"), Reading::Absent);
        let nobody = Parent { bus: "pci".into(), device: "ffff:ff:1f.7".into() };
        // Absent, or there is no devlink in this kernel.
        assert_eq!(eswitch_mode(&nobody), Reading::Absent);
    }
}
