//! A look at the far end of a veth, in whatever namespace it is: what it leaves to the receiver to fill in.
//!
//! XDP loses what travels beside a frame in memory: the note "checksum still to be filled in", so that a redirected frame
//! arrives with a wrong checksum and TCP stalls; and the tag of a VLAN device, so that the frame passes for an untagged one.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sched::{CloneFlags, setns};

use crate::ethtool;
use crate::links::Link;
use crate::netlink::Connection;

/// Most processes whose namespaces are looked at.
const PROCESSES_MAX: usize = 4096;

/// Transmit offloads of an interface that XDP at the other end does not survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// Checksums are left to be filled in.
    pub(crate) checksums: bool,
    /// VLAN tags travel beside the bytes.
    pub(crate) tags: bool,
}

impl Offloads {
    fn read(ifindex: u32) -> io::Result<Offloads> {
        Ok(Offloads {
            checksums: ethtool::transmit_checksum_offload(ifindex)?,
            tags: ethtool::transmit_vlan_offload(ifindex)?,
        })
    }
}

/// The transmit offloads of a veth's peer.
///
/// # Errors
/// Text that says why it cannot be told.
pub(crate) fn offloads(link: &Link) -> Result<Offloads, String> {
    let peer = link.peer.ok_or("it has no peer")?;
    let told = match link.peer_namespace {
        None => Offloads::read(peer),
        Some(number) => {
            let namespace = find_namespace(number)
                .map_err(|error| format!("its peer's namespace cannot be looked for: {error}"))?
                .ok_or("its peer's namespace is neither in /run/netns nor that of a process")?;
            // Namespaces belong to threads: this one ends with the question.
            std::thread::scope(|scope| {
                let asked = scope.spawn(|| {
                    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                    Offloads::read(peer)
                });
                asked.join().unwrap_or_else(|_| Err(io::Error::other("the helper thread panicked")))
            })
        }
    };
    told.map_err(|error| format!("its peer does not tell: {error}"))
}

/// The namespace that ours has this number for.
fn find_namespace(number: i32) -> io::Result<Option<File>> {
    let mut connection = Connection::open(NETLINK_ROUTE)?;
    let mut seen = HashSet::new();
    for path in candidates() {
        let Ok(file) = File::open(&path) else { continue };
        let Ok(metadata) = file.metadata() else { continue };
        if seen.insert((metadata.dev(), metadata.ino())) && number_of(&mut connection, &file)? == Some(number)
        {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Named namespaces, then those of processes.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let entries = |directory: &str| fs::read_dir(directory).into_iter().flatten().flatten();
    let named = entries("/run/netns").map(|entry| entry.path());
    let of_processes = entries("/proc")
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .take(PROCESSES_MAX)
        .map(|entry| entry.path().join("ns/net"));
    named.chain(of_processes)
}

/// The number that our namespace has for another; `None` if it has none.
fn number_of(connection: &mut Connection, namespace: &File) -> io::Result<Option<i32>> {
    let mut question = NsidMessage::default();
    question.attributes.push(NsidAttribute::Fd(namespace.as_raw_fd() as u32));
    let answers = match connection.request(RouteNetlinkMessage::GetNsId(question), 0) {
        Ok(answers) => answers,
        // Something else than a namespace lies in /run/netns.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(answers.iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => {
            message.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(number) if *number >= 0 => Some(*number),
                _ => None,
            })
        }
        _ => None,
    }))
}
