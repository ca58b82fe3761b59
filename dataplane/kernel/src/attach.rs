//! The links: which program runs on which interface. Each is pinned, so that it outlives the process.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::EngineError;
use crate::loader::{self, Program};
use crate::pins::{self, Pins};
use crate::syscall::{self, LinkInfo, LinkKind};

/// A link and what it was attached to when last looked at.
#[derive(Debug)]
struct Link {
    fd: OwnedFd,
    info: LinkInfo,
}

impl Link {
    /// Detaches for good.
    fn detach(self) {
        // The only way to fail is that its interface is gone, and it detached with it.
        if let Err(error) = syscall::link_detach(self.fd.as_fd()) {
            tracing::debug!(%error, ifindex = self.info.ifindex, "a link was already detached");
        }
    }
}

/// All links, by port and hook.
#[derive(Debug, Default)]
pub(crate) struct Attachments {
    links: BTreeMap<(String, LinkKind), Link>,
}

/// What [`Attachments::attach`] had to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attached {
    /// It was as wanted.
    Already,
    /// Its program was replaced.
    Replaced,
    /// It was made.
    New,
}

impl Attachments {
    /// Opens every pinned link. Dead ones (their device is gone) are unpinned and returned by name.
    pub(crate) fn adopt(pins: &Pins) -> Result<(Attachments, Vec<String>), EngineError> {
        let mut attachments = Attachments::default();
        let mut dead = Vec::new();
        let directory = pins.links();
        let failed = || EngineError::io(format!("reading {}", directory.display()));
        for entry in fs::read_dir(&directory).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let link = pins::parse_link_name(&name).and_then(|key| {
                let fd = syscall::open_pin(&path).ok()?;
                let info = syscall::link_info(fd.as_fd()).ok()?;
                (info.ifindex != 0).then_some((key, Link { fd, info }))
            });
            match link {
                Some((key, link)) => drop(attachments.links.insert(key, link)),
                None => {
                    pins::unpin(&path)?;
                    dead.push(name);
                }
            }
        }
        Ok((attachments, dead))
    }

    /// Names of ports that have a link.
    pub(crate) fn ports(&self) -> Vec<String> {
        let mut ports: Vec<String> = self.links.keys().map(|(port, _)| port.clone()).collect();
        ports.dedup();
        ports
    }

    /// Whether the port has such a link on this interface.
    pub(crate) fn is_attached(&self, port: &str, kind: LinkKind, ifindex: u32) -> bool {
        self.links.get(&(port.to_owned(), kind)).is_some_and(|link| link.info.ifindex == ifindex)
    }

    /// Every port that has a link, and the interface.
    pub(crate) fn interfaces(&self) -> impl Iterator<Item = (&str, u32)> {
        self.links.iter().map(|((port, _), link)| (port.as_str(), link.info.ifindex))
    }

    /// Reads what every link is attached to; they change when devices go.
    pub(crate) fn refresh(&mut self) -> Result<(), EngineError> {
        for ((port, _), link) in &mut self.links {
            link.info = syscall::link_info(link.fd.as_fd())
                .map_err(EngineError::io(format!("reading the link of {port}")))?;
        }
        Ok(())
    }

    /// Gives every link to the port that now owns its interface, however ports and interfaces were exchanged, so that no
    /// interface is ever without a program. `wanted` is the interface of every wanted port. Links that nobody inherits
    /// stay with their ports; those that stand in the way of an heir are detached.
    pub(crate) fn hand_over(&mut self, wanted: &BTreeMap<&str, u32>, pins: &Pins) -> Result<(), EngineError> {
        let heirs: BTreeMap<u32, &str> = wanted.iter().map(|(port, ifindex)| (*ifindex, *port)).collect();
        let moves: Vec<(String, LinkKind, &str)> = self
            .links
            .iter()
            .filter_map(|((port, kind), link)| {
                let heir = *heirs.get(&link.info.ifindex)?;
                (heir != port && !self.is_attached(heir, *kind, link.info.ifindex))
                    .then(|| (port.clone(), *kind, heir))
            })
            .collect();
        // Two steps, as the name one of them leaves may be the name that another takes.
        let mut moving = Vec::new();
        for (number, (port, kind, heir)) in moves.into_iter().enumerate() {
            let Some(link) = self.links.remove(&(port.clone(), kind)) else { continue };
            let aside = pins.links().join(format!("moving-{number}"));
            pins::unpin(&aside)?;
            loader::repin(link.fd.as_fd(), &pins.link(&port, kind))?; // in case somebody took the pin away
            pins::rename(&pins.link(&port, kind), &aside)?;
            moving.push((heir.to_owned(), kind, link, aside));
        }
        for (heir, kind, link, aside) in moving {
            let path = pins.link(&heir, kind);
            pins::unpin(&path)?;
            pins::rename(&aside, &path)?;
            if let Some(displaced) = self.links.insert((heir, kind), link) {
                displaced.detach();
            }
        }
        Ok(())
    }

    /// Makes a port's link run `program` on `ifindex`, whatever it did before. At no time is an interface that had a
    /// program without one.
    pub(crate) fn attach(
        &mut self,
        port: &str,
        ifindex: u32,
        kind: LinkKind,
        program: &Program,
        pins: &Pins,
    ) -> io::Result<Attached> {
        let key = (port.to_owned(), kind);
        if let Some(link) = self.links.get_mut(&key)
            && link.info.ifindex == ifindex
        {
            if link.info.program == program.id {
                return Ok(Attached::Already);
            }
            syscall::link_update(link.fd.as_fd(), program.fd())?;
            link.info.program = program.id;
            return Ok(Attached::Replaced);
        }
        let fd = syscall::link_create(program.fd(), ifindex, kind)?;
        let path = pins.link(port, kind);
        fs::create_dir_all(pins.links())?; // somebody may have deleted it
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        syscall::pin(fd.as_fd(), &path)?;
        let link = Link { fd, info: LinkInfo { program: program.id, ifindex } };
        if let Some(old) = self.links.insert(key, link) {
            old.detach();
        }
        Ok(Attached::New)
    }

    /// Detaches; `false` if there was nothing to detach.
    pub(crate) fn detach(&mut self, port: &str, kind: LinkKind, pins: &Pins) -> Result<bool, EngineError> {
        let Some(link) = self.links.remove(&(port.to_owned(), kind)) else { return Ok(false) };
        link.detach();
        pins::unpin(&pins.link(port, kind))?;
        Ok(true)
    }

    /// Detaches every hook of a port.
    pub(crate) fn detach_port(&mut self, port: &str, pins: &Pins) -> Result<(), EngineError> {
        for kind in [LinkKind::Xdp, LinkKind::Tcx] {
            self.detach(port, kind, pins)?;
        }
        Ok(())
    }

    /// Pins again what lost its pin, and tells which links are detached.
    pub(crate) fn repair(&mut self, pins: &Pins) -> Result<Vec<String>, EngineError> {
        self.refresh()?;
        let mut done = Vec::new();
        let mut dead = Vec::new();
        for ((port, kind), link) in &self.links {
            if link.info.ifindex == 0 {
                dead.push((port.clone(), *kind));
            } else {
                done.extend(loader::repin(link.fd.as_fd(), &pins.link(port, *kind))?);
            }
        }
        for (port, kind) in dead {
            self.detach(&port, kind, pins)?;
            done.push(format!(
                "{port}: its {kind} link was detached, or its interface is gone; the next sync attaches it again"
            ));
        }
        Ok(done)
    }
}
