//! Links of one network namespace: what is asked of them, and what is done to them.
//!
//! A [`Links`] is a netlink socket that was opened inside the namespace; it stays there, whoever uses it. It also holds
//! the namespace alive, and an interface in a namespace that should be gone does not come home: so it lives for one call
//! of a plug, never longer. Of each message only what matters is looked at, so that nothing that a guest sets hides its
//! VF. Requires Linux 5.14, which tells the device that an interface belongs to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BondPrimaryReselect, InfoBond, InfoData, InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage, Prop,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use nix::sys::time::{TimeVal, TimeValLike};
use sluice_policy::net::MacAddr;

/// Length of `struct ifinfomsg`, and where its fields are.
const HEADER: usize = 16;
const IFINDEX: usize = 4;
const FLAGS: usize = 8;
/// Length of `struct nlmsghdr`.
const MESSAGE_HEADER: usize = 16;
/// Length of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// `NLMSGERR_ATTR_MSG` of linux/netlink.h.
const ERROR_TEXT: u16 = 1;
/// The kernel answers at once, unless somebody holds its lock for links; nobody does for so long.
const ANSWER_SECONDS: i64 = 5;
/// How often a list is asked for again because interfaces changed while it was made.
const REPEATS: usize = 20;
/// The mode of a bond in which one slave is active (linux/if_bonding.h).
const ACTIVE_BACKUP: u8 = 1;

/// A network namespace, held open.
#[derive(Debug)]
pub(super) struct Namespace(File);

impl Namespace {
    /// Opens one by the file that stands for it.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is no namespace.
    pub(super) fn open(path: &Path) -> io::Result<Namespace> {
        // Whoever lays a pipe there must not hold us up.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Namespace(file))
    }

    /// That of the calling thread.
    pub(super) fn own() -> io::Result<Namespace> {
        Namespace::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether they are the same.
    pub(super) fn is(&self, other: &Namespace) -> bool {
        match (self.0.metadata(), other.0.metadata()) {
            (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
            _ => false,
        }
    }

    /// A connection to its links. Entering another namespace demands `CAP_SYS_ADMIN`.
    pub(super) fn links(&self) -> io::Result<Links> {
        // A thread has a namespace, and the sockets that it opens stay there: so a thread that ends is all it takes.
        std::thread::scope(|scope| {
            let opening = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                setns(&self.0, CloneFlags::CLONE_NEWNET)?;
                Links::open()
            })?;
            opening.join().unwrap_or_else(|_| Err(io::Error::other("the helper thread panicked")))
        })
    }
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// Further names.
    pub(super) alt_names: Vec<String>,
    pub(super) address: Option<MacAddr>,
    /// The device that it belongs to, as its bus calls it: a PCI address.
    pub(super) device: Option<String>,
    /// Administratively up.
    pub(super) up: bool,
    /// Up, with a carrier.
    pub(super) running: bool,
    /// Index of the bond or bridge that it is a slave of.
    pub(super) master: Option<u32>,
    /// An XDP program is attached.
    pub(super) has_xdp: bool,
    /// If it is a bond.
    pub(super) bond: Option<Bond>,
}

/// What matters of a bond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bond {
    pub(super) mode: u8,
    pub(super) active: Option<u32>,
    pub(super) primary: Option<u32>,
    pub(super) reselect: u8,
    pub(super) miimon: u32,
    pub(super) arp_interval: u32,
}

impl Bond {
    /// One slave is active at a time.
    pub(super) fn is_active_backup(&self) -> bool {
        self.mode == ACTIVE_BACKUP
    }

    /// It looks after its slaves' links.
    pub(super) fn is_watching(&self) -> bool {
        self.miimon > 0 || self.arp_interval > 0
    }
}

/// What the kernel would not do.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: io::Error,
    /// Its own words, if it said any.
    pub(super) words: Option<String>,
}

impl Refusal {
    /// A name is taken.
    pub(super) fn is_clash(&self) -> bool {
        self.error.raw_os_error() == Some(libc::EEXIST)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.words {
            Some(words) => write!(f, "{} ({words})", self.error),
            None => self.error.fmt(f),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal { error, words: None }
    }
}

/// A connection to the links of a namespace.
pub(super) struct Links {
    socket: Socket,
    sequence: u32,
}

impl Links {
    /// Those of the calling thread's namespace.
    pub(super) fn open() -> io::Result<Links> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS))?;
        Ok(Links { socket, sequence: 0 })
    }

    /// All of them.
    pub(super) fn list(&mut self) -> Result<Vec<Link>, Refusal> {
        let question = || {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
            RouteNetlinkMessage::GetLink(message)
        };
        let mut attempt = 0;
        loop {
            match self.exchange(question(), NLM_F_DUMP) {
                Err(refusal) if refusal.error.kind() == io::ErrorKind::Interrupted && attempt < REPEATS => {
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Moves an interface into another namespace, where it is to have this name; it may end up there with its old one.
    pub(super) fn move_to(&mut self, index: u32, to: &Namespace, name: &str) -> Result<(), Refusal> {
        let attributes =
            vec![LinkAttribute::NetNsFd(to.0.as_raw_fd()), LinkAttribute::IfName(name.to_owned())];
        self.set(index, attributes)
    }

    /// Gives a name to an interface that is down.
    pub(super) fn rename(&mut self, index: u32, name: &str) -> Result<(), Refusal> {
        self.set(index, vec![LinkAttribute::IfName(name.to_owned())])
    }

    /// Takes further names away.
    pub(super) fn drop_names(&mut self, index: u32, names: &[String]) -> Result<(), Refusal> {
        let names = names.iter().cloned().map(Prop::AltIfName).collect();
        let message = about(index, vec![LinkAttribute::PropList(names)]);
        self.exchange(RouteNetlinkMessage::DelLinkProp(message), NLM_F_ACK).map(drop)
    }

    /// Makes an interface the slave of a bond or bridge; of nobody by index 0.
    pub(super) fn set_master(&mut self, index: u32, master: u32) -> Result<(), Refusal> {
        self.set(index, vec![LinkAttribute::Controller(master)])
    }

    /// Sets an interface up.
    pub(super) fn up(&mut self, index: u32) -> Result<(), Refusal> {
        let mut message = about(index, Vec::new());
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.exchange(RouteNetlinkMessage::SetLink(message), NLM_F_ACK).map(drop)
    }

    /// Sets an interface down, and has it receive only what is for it.
    pub(super) fn down(&mut self, index: u32) -> Result<(), Refusal> {
        let mut message = about(index, Vec::new());
        message.header.change_mask = LinkFlags::Up | LinkFlags::Promisc | LinkFlags::Allmulti;
        self.exchange(RouteNetlinkMessage::SetLink(message), NLM_F_ACK).map(drop)
    }

    /// Has a bond use this slave whenever it has a link.
    pub(super) fn set_primary(&mut self, bond: u32, slave: u32) -> Result<(), Refusal> {
        let settings = vec![InfoBond::PrimaryReselect(BondPrimaryReselect::Always), InfoBond::Primary(slave)];
        let info = vec![LinkInfo::Kind(InfoKind::Bond), LinkInfo::Data(InfoData::Bond(settings))];
        let message = about(bond, vec![LinkAttribute::LinkInfo(info)]);
        self.exchange(RouteNetlinkMessage::NewLink(message), NLM_F_ACK).map(drop)
    }

    fn set(&mut self, index: u32, attributes: Vec<LinkAttribute>) -> Result<(), Refusal> {
        self.exchange(RouteNetlinkMessage::SetLink(about(index, attributes)), NLM_F_ACK).map(drop)
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<Link>, Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::new(
            NetlinkHeader::default(),
            NetlinkPayload::InnerMessage(Message::Request(message)),
        );
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let (mut links, mut interrupted) = (Vec::new(), false);
        loop {
            let (buffer, _) = self.socket.recv_from_full()?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let broken = || io::Error::other("the kernel sent a truncated netlink message");
                let length = number(rest).ok_or_else(broken)? as usize;
                let bytes = rest.get(..length).filter(|_| length >= MESSAGE_HEADER).ok_or_else(broken)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                let message = NetlinkMessage::<Message>::deserialize(bytes).map_err(io::Error::other)?;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::Done(_) if interrupted => {
                        return Err(io::Error::from(io::ErrorKind::Interrupted).into());
                    }
                    NetlinkPayload::Done(_) => return Ok(links),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(links),
                        Some(code) => {
                            let error_number = io::Error::from_raw_os_error(-code.get());
                            return Err(Refusal { error: error_number, words: words(&error.header) });
                        }
                    },
                    NetlinkPayload::InnerMessage(Message::Present(link)) => links.push(link),
                    _ => {}
                }
            }
        }
    }
}

/// A message about an interface.
fn about(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

/// Requests go by the crate's types, answers by our own.
#[derive(Debug)]
enum Message {
    Request(RouteNetlinkMessage),
    Present(Link),
    Other,
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Message::Request(message) => message.message_type(),
            Message::Present(_) | Message::Other => libc::NLMSG_NOOP as u16,
        }
    }

    fn buffer_len(&self) -> usize {
        match self {
            Message::Request(message) => message.buffer_len(),
            Message::Present(_) | Message::Other => 0,
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        if let Message::Request(message) = self {
            message.serialize(buffer);
        }
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        match header.message_type {
            libc::RTM_NEWLINK => parse(payload).map(Message::Present),
            _ => Ok(Message::Other),
        }
    }
}

/// What the kernel says behind the header of a refused request.
fn words(bytes: &[u8]) -> Option<String> {
    let attributes = NlasIterator::new(bytes.get(MESSAGE_HEADER..)?);
    let text_of = |attribute: Result<NlaBuffer<&[u8]>, DecodeError>| {
        let attribute = attribute.ok()?;
        (attribute.kind() == ERROR_TEXT).then(|| text(attribute.value()))
    };
    attributes.filter_map(text_of).find(|text| !text.is_empty())
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.get(..4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Reads a link's message. Broken attributes are left out.
fn parse(payload: &[u8]) -> Result<Link, DecodeError> {
    let truncated = || DecodeError::from("a link's message is cut off".to_owned());
    let field = |offset: usize| payload.get(offset..).and_then(number).ok_or_else(truncated);
    let flags = field(FLAGS)? as i32;
    let is_set = |flag: i32| flags & flag != 0;
    let mut link = Link {
        index: field(IFINDEX)?,
        up: is_set(libc::IFF_UP),
        running: is_set(libc::IFF_UP) && is_set(libc::IFF_RUNNING) && is_set(libc::IFF_LOWER_UP),
        ..Link::default()
    };
    for (kind, value) in attributes(payload.get(HEADER..).ok_or_else(truncated)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.address = value.try_into().ok().map(MacAddr),
            libc::IFLA_MASTER => link.master = number(value),
            libc::IFLA_PARENT_DEV_NAME => link.device = Some(text(value)),
            libc::IFLA_PROP_LIST => {
                let names = attributes(value).filter(|(kind, _)| *kind == libc::IFLA_ALT_IFNAME);
                link.alt_names = names.map(|(_, value)| text(value)).collect();
            }
            libc::IFLA_XDP => {
                let attached = attributes(value).find(|(kind, _)| *kind == IFLA_XDP_ATTACHED);
                link.has_xdp =
                    attached.is_some_and(|(_, value)| value.first().is_some_and(|mode| *mode != 0));
            }
            libc::IFLA_LINKINFO => link.bond = bond(value),
            _ => {}
        }
    }
    Ok(link)
}

/// `IFLA_XDP_ATTACHED` of linux/if_link.h.
const IFLA_XDP_ATTACHED: u16 = 2;
/// `IFLA_BOND_…` of linux/if_link.h.
const BOND_MODE: u16 = 1;
const BOND_ACTIVE: u16 = 2;
const BOND_MIIMON: u16 = 3;
const BOND_ARP_INTERVAL: u16 = 7;
const BOND_PRIMARY: u16 = 11;
const BOND_PRIMARY_RESELECT: u16 = 12;

/// The details of a bond; `None` if it is something else.
fn bond(information: &[u8]) -> Option<Bond> {
    let find =
        |wanted: u16| attributes(information).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    if text(find(libc::IFLA_INFO_KIND)?) != "bond" {
        return None;
    }
    let mut bond = Bond::default();
    for (kind, value) in attributes(find(libc::IFLA_INFO_DATA).unwrap_or_default()) {
        let byte = value.first().copied().unwrap_or_default();
        match kind {
            BOND_MODE => bond.mode = byte,
            BOND_ACTIVE => bond.active = number(value),
            BOND_MIIMON => bond.miimon = number(value).unwrap_or_default(),
            BOND_ARP_INTERVAL => bond.arp_interval = number(value).unwrap_or_default(),
            BOND_PRIMARY => bond.primary = number(value),
            BOND_PRIMARY_RESELECT => bond.reselect = byte,
            _ => {}
        }
    }
    Some(bond)
}

/// The attributes up to the first broken one.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).filter_map(|attribute: NlaBuffer<&[u8]>| {
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(ATTRIBUTE_HEADER..length)?))
    })
}
