//! The pin directory: that it is on a bpffs, that only one process uses it, and what is called what in it.
//!
//! ```text
//! PIN_DIR/maps/NAME         the maps
//! PIN_DIR/maps-new/NAME     maps of another layout, while the first sync fills them
//! PIN_DIR/progs/NAME        the programs
//! PIN_DIR/links/PORT-HOOK   the links; PORT is escaped, as a bpffs knows neither `/` nor `.` in names
//! PIN_DIR/promisc/IFINDEX   an empty directory per interface that we made promiscuous
//! PIN_DIR/allmulti/IFINDEX  an empty directory per interface that we had receive all group addresses
//! PIN_DIR/rxvlan/IFINDEX    an empty directory per interface whose receive VLAN offload we switched off
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::EngineError;
use crate::promisc::Reception;
use crate::syscall::LinkKind;

/// Where the kernel wants its bpffs.
const BPFFS: &str = "/sys/fs/bpf";

/// The pin directory of this process.
#[derive(Debug)]
pub(crate) struct Pins {
    root: PathBuf,
    /// Held as long as the engine lives; the kernel lets go of it when the process dies.
    _lock: Flock<File>,
}

impl Pins {
    /// Makes the directory, mounting a bpffs if there is none, and takes possession of it.
    pub(crate) fn open(root: &Path) -> Result<Pins, EngineError> {
        ensure_bpffs(root)?;
        let making = |path: &Path| {
            let operation = format!("making {}", path.display());
            fs::create_dir_all(path).map_err(EngineError::io(operation))
        };
        making(root)?;
        let directory = File::open(root).map_err(EngineError::io(format!("opening {}", root.display())))?;
        let lock = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EAGAIN)) => return Err(EngineError::Locked(root.to_owned())),
            Err((_, error)) => {
                return Err(EngineError::io(format!("locking {}", root.display()))(error.into()));
            }
        };
        let pins = Pins { root: root.to_owned(), _lock: lock };
        making(&pins.links())?;
        making(&pins.programs())?;
        Ok(pins)
    }

    /// Makes the directories again if somebody deleted them, and locks the new one.
    pub(crate) fn repair(&mut self) -> Result<Vec<String>, EngineError> {
        if self.root.exists() {
            return Ok(Vec::new());
        }
        *self = Pins::open(&self.root.clone())?;
        Ok(vec![format!("the pin directory {} was gone; made again", self.root.display())])
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(crate) fn new_maps(&self) -> PathBuf {
        self.root.join("maps-new")
    }

    fn old_maps(&self) -> PathBuf {
        self.root.join("maps-old")
    }

    pub(crate) fn programs(&self) -> PathBuf {
        self.root.join("progs")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(crate) fn reception(&self, reception: Reception) -> PathBuf {
        self.root.join(match reception {
            Reception::All => "promisc",
            Reception::Groups => "allmulti",
        })
    }

    pub(crate) fn receive_vlan(&self) -> PathBuf {
        self.root.join("rxvlan")
    }

    pub(crate) fn link(&self, port: &str, kind: LinkKind) -> PathBuf {
        self.links().join(link_name(port, kind))
    }

    /// Ends a replacement of maps that a killed process left half done.
    pub(crate) fn settle_maps(&self) -> Result<(), EngineError> {
        if !self.maps().exists() && self.new_maps().exists() {
            rename(&self.new_maps(), &self.maps())?;
        }
        remove_tree(&self.new_maps())?;
        remove_tree(&self.old_maps())
    }

    /// Makes the new maps the maps.
    pub(crate) fn promote_new_maps(&self) -> Result<(), EngineError> {
        if self.maps().exists() {
            rename(&self.maps(), &self.old_maps())?;
        }
        rename(&self.new_maps(), &self.maps())?;
        remove_tree(&self.old_maps())
    }

    /// Removes every pin.
    pub(crate) fn remove_all(&self) -> Result<(), EngineError> {
        remove_tree(&self.root)
    }
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), EngineError> {
    let operation = format!("renaming {} to {}", from.display(), to.display());
    fs::rename(from, to).map_err(EngineError::io(operation))
}

fn remove_tree(path: &Path) -> Result<(), EngineError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(EngineError::io(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Removes a pin; it is no error if there is none.
pub(crate) fn unpin(path: &Path) -> Result<(), EngineError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(EngineError::io(format!("removing the pin {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Mounts a bpffs at its usual place if `root` is meant to be below that and is not on one.
fn ensure_bpffs(root: &Path) -> Result<(), EngineError> {
    let error = |source: io::Error| EngineError::NotBpffs { path: root.to_owned(), source };
    let on_bpffs = || -> io::Result<bool> {
        let existing = root
            .ancestors()
            .find(|path| path.exists())
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(statfs(existing)?.filesystem_type() == BPF_FS_MAGIC)
    };
    if on_bpffs().map_err(error)? {
        return Ok(());
    }
    if !root.starts_with(BPFFS) {
        return Err(error(io::Error::other(format!(
            "it is not below {BPFFS}, the only place where Sluice mounts one"
        ))));
    }
    fs::create_dir_all(BPFFS).map_err(error)?;
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None::<&str>,
    )
    .map_err(|errno| error(errno.into()))
}

const TCX: &str = "-tcx";
const XDP: &str = "-xdp";

/// A link's file name: letters, digits, `-` and `_` stand for themselves, `+` for `/`, `%XX` for any other byte.
fn link_name(port: &str, kind: LinkKind) -> String {
    let mut name = String::with_capacity(port.len() + TCX.len());
    for byte in port.bytes() {
        match byte {
            b'/' => name.push('+'),
            b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(byte)),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    name.push_str(match kind {
        LinkKind::Tcx => TCX,
        LinkKind::Xdp => XDP,
    });
    name
}

/// Undoes [`link_name`]; `None` if it is no such name.
pub(crate) fn parse_link_name(name: &str) -> Option<(String, LinkKind)> {
    let (escaped, kind) = match name.strip_suffix(TCX) {
        Some(escaped) => (escaped, LinkKind::Tcx),
        None => (name.strip_suffix(XDP)?, LinkKind::Xdp),
    };
    let mut port = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => port.push(b'/'),
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                port.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            _ => port.push(byte),
        }
    }
    Some((String::from_utf8(port).ok()?, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_survive_the_round_trip_and_suit_a_bpffs() {
        for port in ["vnic/vm1", "uplink/blue", "vnic/a.b-tcx", "vnic/ä+%/x", "internal/_"] {
            for kind in [LinkKind::Tcx, LinkKind::Xdp] {
                let name = link_name(port, kind);
                assert!(!name.contains(['/', '.']), "{name}");
                assert_eq!(parse_link_name(&name), Some((port.to_owned(), kind)));
            }
        }
        assert_eq!(parse_link_name("vnic+vm1"), None);
        assert_eq!(parse_link_name("vnic%2-tcx"), None);
    }
}
