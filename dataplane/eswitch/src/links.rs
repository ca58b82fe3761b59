//! Links of one network namespace: what is asked of them, and what is done to them. By this a VF's interface is carried
//! into a guest's namespace and back.
//!
//! A [`Links`] is a netlink socket that was opened inside the namespace; it stays there, whoever uses it. It also holds
//! the namespace alive, and an interface in a namespace that should be gone does not come home: so it lives for one
//! errand, never longer. Of each message only what matters is looked at, so that nothing that a guest sets hides its
//! VF. Requires Linux 5.14, which tells the device that an interface belongs to.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use sluice_policy::net::MacAddr;

use crate::netlink::attr::{Attributes, Read, each, text, u32_at};
use crate::netlink::{Connection, Raw, Refusal};

/// Length of `struct ifinfomsg`, and where its fields are.
const HEADER: usize = 16;
const IFINDEX: usize = 4;
const FLAGS: usize = 8;
const CHANGE: usize = 12;
/// `RTM_DELLINKPROP` of linux/rtnetlink.h.
const DEL_LINK_PROP: u16 = 109;
/// `NLA_F_NESTED` of linux/netlink.h, which newer requests demand.
const NESTED: u16 = 0x8000;
/// `RTEXT_FILTER_SKIP_STATS` of linux/rtnetlink.h.
const SKIP_STATS: u32 = 8;
/// `IFLA_XDP_ATTACHED` of linux/if_link.h.
const XDP_ATTACHED: u16 = 2;
/// `IFLA_BOND_…` of linux/if_link.h.
const BOND_MODE: u16 = 1;
const BOND_ACTIVE: u16 = 2;
const BOND_MIIMON: u16 = 3;
const BOND_ARP_INTERVAL: u16 = 7;
const BOND_PRIMARY: u16 = 11;
const BOND_PRIMARY_RESELECT: u16 = 12;
/// The mode of a bond in which one slave is active (linux/if_bonding.h).
const ACTIVE_BACKUP: u8 = 1;
/// A bond whose primary is always used while it has a link (linux/if_bonding.h).
const RESELECT_ALWAYS: u8 = 0;
/// The kernel answers at once, unless somebody holds its lock for links; nobody does for so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace, held open.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Opens one by the file that stands for it.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is no namespace.
    pub fn open(path: &Path) -> io::Result<Namespace> {
        // Whoever lays a pipe there must not hold us up.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Namespace(file))
    }

    /// That of the calling thread.
    pub fn own() -> io::Result<Namespace> {
        Namespace::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether they are the same.
    pub fn is(&self, other: &Namespace) -> bool {
        match (self.0.metadata(), other.0.metadata()) {
            (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
            _ => false,
        }
    }

    /// A connection to its links. Entering another namespace demands `CAP_SYS_ADMIN`.
    pub fn links(&self) -> io::Result<Links> {
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
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Further names.
    pub alt_names: Vec<String>,
    /// Its link-layer address, if it has one of six bytes.
    pub address: Option<MacAddr>,
    /// The device that it belongs to, as its bus calls it: a PCI address.
    pub device: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// Up, with a carrier.
    pub running: bool,
    /// Index of the bond or bridge that it is a slave of.
    pub master: Option<u32>,
    /// An XDP program is attached.
    pub has_xdp: bool,
    /// If it is a bond.
    pub bond: Option<Bond>,
}

/// What matters of a bond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bond {
    /// How it uses its slaves: `BOND_MODE_…` of linux/if_bonding.h.
    pub mode: u8,
    /// Index of the slave in use.
    pub active: Option<u32>,
    /// Index of the slave that is preferred.
    pub primary: Option<u32>,
    /// When it goes back to that: `BOND_PRI_RESELECT_…` of linux/if_bonding.h.
    pub reselect: u8,
    /// Milliseconds between looks at the slaves' links; 0: never.
    pub miimon: u32,
    /// Milliseconds between ARP probes; 0: none.
    pub arp_interval: u32,
}

impl Bond {
    /// One slave is active at a time.
    pub fn is_active_backup(&self) -> bool {
        self.mode == ACTIVE_BACKUP
    }

    /// It looks after its slaves' links.
    pub fn is_watching(&self) -> bool {
        self.miimon > 0 || self.arp_interval > 0
    }
}

/// What the kernel would not do, and its own words if it said any.
#[derive(Debug)]
pub struct LinkError(Refusal);

impl LinkError {
    /// A name is taken.
    pub fn is_clash(&self) -> bool {
        self.0.errno() == libc::EEXIST
    }
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for LinkError {}

impl From<Refusal> for LinkError {
    fn from(refusal: Refusal) -> Self {
        LinkError(refusal)
    }
}

/// A connection to the links of a namespace.
pub struct Links(Connection);

impl Links {
    /// Those of the calling thread's namespace.
    fn open() -> io::Result<Links> {
        let connection = Connection::open(NETLINK_ROUTE)?;
        connection.wait_at_most(PATIENCE)?;
        Ok(Links(connection))
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list(&mut self) -> Result<Vec<Link>, LinkError> {
        let question = about(0).put(libc::IFLA_EXT_MASK, &SKIP_STATS.to_ne_bytes());
        let answers = self.0.dump(libc::RTM_GETLINK, &question.into_bytes())?;
        Ok(answers.iter().filter_map(parse).collect())
    }

    /// Moves an interface into another namespace, where it is to have this name; it may end up there with its old one.
    ///
    /// # Errors
    /// The kernel's; a [clash](LinkError::is_clash) if the name is taken there.
    pub fn move_to(&mut self, index: u32, to: &Namespace, name: &str) -> Result<(), LinkError> {
        let request = about(index).put(libc::IFLA_NET_NS_FD, &to.0.as_raw_fd().to_ne_bytes());
        self.set(request.text(libc::IFLA_IFNAME, name))
    }

    /// Gives a name to an interface that is down.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<(), LinkError> {
        self.set(about(index).text(libc::IFLA_IFNAME, name))
    }

    /// Takes further names away.
    ///
    /// # Errors
    /// The kernel's.
    pub fn drop_names(&mut self, index: u32, names: &[String]) -> Result<(), LinkError> {
        let list =
            names.iter().fold(Attributes::default(), |list, name| list.text(libc::IFLA_ALT_IFNAME, name));
        self.change(DEL_LINK_PROP, about(index).nest(libc::IFLA_PROP_LIST | NESTED, &list))
    }

    /// Makes an interface the slave of a bond or bridge; of nobody by index 0.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_master(&mut self, index: u32, master: u32) -> Result<(), LinkError> {
        self.set(about(index).put(libc::IFLA_MASTER, &master.to_ne_bytes()))
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn up(&mut self, index: u32) -> Result<(), LinkError> {
        self.set(flagged(index, libc::IFF_UP, libc::IFF_UP))
    }

    /// Sets an interface down, and has it receive only what is for it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn down(&mut self, index: u32) -> Result<(), LinkError> {
        self.set(flagged(index, 0, libc::IFF_UP | libc::IFF_PROMISC | libc::IFF_ALLMULTI))
    }

    /// Has a bond use this slave whenever it has a link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_primary(&mut self, bond: u32, slave: u32) -> Result<(), LinkError> {
        let settings = Attributes::default()
            .put(BOND_PRIMARY_RESELECT, &[RESELECT_ALWAYS])
            .put(BOND_PRIMARY, &slave.to_ne_bytes());
        let info =
            Attributes::default().text(libc::IFLA_INFO_KIND, "bond").nest(libc::IFLA_INFO_DATA, &settings);
        self.change(libc::RTM_NEWLINK, about(bond).nest(libc::IFLA_LINKINFO, &info))
    }

    fn set(&mut self, request: Attributes) -> Result<(), LinkError> {
        self.change(libc::RTM_SETLINK, request)
    }

    fn change(&mut self, kind: u16, request: Attributes) -> Result<(), LinkError> {
        self.0.request(kind, &request.into_bytes(), 0)?;
        Ok(())
    }
}

/// A message about an interface.
fn about(index: u32) -> Attributes {
    flagged(index, 0, 0)
}

/// A message about an interface whose `flags` are to be as said, as far as they are in `mask`.
fn flagged(index: u32, flags: i32, mask: i32) -> Attributes {
    let mut header = [0; HEADER];
    header[IFINDEX..FLAGS].copy_from_slice(&index.to_ne_bytes());
    header[FLAGS..CHANGE].copy_from_slice(&flags.to_ne_bytes());
    header[CHANGE..].copy_from_slice(&mask.to_ne_bytes());
    Attributes::after(&header)
}

/// Reads a link's message; broken attributes are left out.
fn parse(message: &Raw) -> Option<Link> {
    if message.kind != libc::RTM_NEWLINK {
        return None;
    }
    let payload = &message.payload;
    let flags = u32_at(payload, FLAGS)? as i32;
    let is_set = |flag: i32| flags & flag != 0;
    let read = Read::new(payload.get(HEADER..)?);
    let alt_names = each(read.get(libc::IFLA_PROP_LIST).unwrap_or_default())
        .filter(|(kind, _)| *kind == libc::IFLA_ALT_IFNAME)
        .map(|(_, value)| text(value))
        .collect();
    Some(Link {
        index: u32_at(payload, IFINDEX)?,
        name: read.text(libc::IFLA_IFNAME).unwrap_or_default(),
        alt_names,
        address: read.array(libc::IFLA_ADDRESS).map(MacAddr),
        device: read.text(libc::IFLA_PARENT_DEV_NAME),
        up: is_set(libc::IFF_UP),
        running: is_set(libc::IFF_UP) && is_set(libc::IFF_RUNNING) && is_set(libc::IFF_LOWER_UP),
        master: read.u32(libc::IFLA_MASTER),
        has_xdp: read.nested(libc::IFLA_XDP).u8(XDP_ATTACHED).is_some_and(|mode| mode != 0),
        bond: bond(&read.nested(libc::IFLA_LINKINFO)),
    })
}

/// The details of a bond; `None` if it is something else.
fn bond(information: &Read<'_>) -> Option<Bond> {
    if information.text(libc::IFLA_INFO_KIND)? != "bond" {
        return None;
    }
    let details = information.nested(libc::IFLA_INFO_DATA);
    Some(Bond {
        mode: details.u8(BOND_MODE).unwrap_or_default(),
        active: details.u32(BOND_ACTIVE),
        primary: details.u32(BOND_PRIMARY),
        reselect: details.u8(BOND_PRIMARY_RESELECT).unwrap_or_default(),
        miimon: details.u32(BOND_MIIMON).unwrap_or_default(),
        arp_interval: details.u32(BOND_ARP_INTERVAL).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bond_is_read_with_its_details() {
        let details = Attributes::default()
            .put(BOND_MODE, &[ACTIVE_BACKUP])
            .put(BOND_ACTIVE, &7_u32.to_ne_bytes())
            .put(BOND_MIIMON, &100_u32.to_ne_bytes())
            .put(BOND_PRIMARY, &8_u32.to_ne_bytes());
        let info =
            Attributes::default().text(libc::IFLA_INFO_KIND, "bond").nest(libc::IFLA_INFO_DATA, &details);
        let names =
            Attributes::default().text(libc::IFLA_ALT_IFNAME, "one").text(libc::IFLA_ALT_IFNAME, "two");
        let payload = flagged(5, libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_LOWER_UP, 0)
            .text(libc::IFLA_IFNAME, "bond0")
            .put(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .nest(libc::IFLA_PROP_LIST | NESTED, &names)
            .nest(libc::IFLA_LINKINFO, &info);
        let expected = Link {
            index: 5,
            name: "bond0".into(),
            alt_names: vec!["one".into(), "two".into()],
            address: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            up: true,
            running: true,
            bond: Some(Bond {
                mode: ACTIVE_BACKUP,
                active: Some(7),
                primary: Some(8),
                miimon: 100,
                ..Bond::default()
            }),
            ..Link::default()
        };
        let message = |kind, payload| Raw { kind, payload };
        let bytes = payload.into_bytes();
        assert_eq!(parse(&message(libc::RTM_NEWLINK, bytes.clone())), Some(expected));
        assert_eq!(parse(&message(libc::RTM_DELLINK, bytes.clone())), None);
        assert_eq!(parse(&message(libc::RTM_NEWLINK, bytes[..HEADER - 1].to_vec())), None);
    }

    #[test]
    fn the_kernel_lists_links_and_says_what_it_refuses() {
        let own = Namespace::own().expect("a namespace");
        let mut links = own.links().expect("a connection");
        let list = links.list().expect("links");
        assert!(list.iter().any(|link| link.name == "lo" && link.index == 1), "{list:?}");
        let refused = links.rename(u32::from(u16::MAX), "other").expect_err("there is no such interface");
        assert!(!refused.is_clash() && !refused.to_string().is_empty(), "{refused}");
        let no_namespace = Namespace::open(Path::new("/proc/self/status")).expect_err("it is a file");
        assert_eq!(no_namespace.kind(), io::ErrorKind::InvalidInput);
    }
}
