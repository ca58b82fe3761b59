//! The plug into a network namespace: the VF's interface is moved there, and into a bond if one is named.
//!
//! With a bond (active-backup, with the software attachment as its other slave) connections survive: the VF becomes its
//! primary, so the bond uses it whenever it has a link; taken out of it, the bond uses the software attachment at once
//! and says so to the neighbours. Without a bond the interface is only moved, and whoever lives there sets it up.
//!
//! The namespace is the guest's, who may be root in there and hostile: names taken, the interface renamed or moved on,
//! the bond changed or gone, the namespace deleted at any moment. So everything goes by the VF's device, which no guest
//! can fake, is found anew at every call, and comes back to the daemon's namespace under its own name or, where that is
//! taken, under another. What cannot be fetched is taken by force with its driver: an interface without a driver is gone
//! from wherever it is. [`Netns::plug`] binds a driver again. So does an XDP program that a guest has left on the
//! interface, which would see the frames of the next guest.
//!
//! Where a VF is no PCI function, name and address have to do, and one that is not found counts as gone.
//!
//! Used by the NIC's thread, which needs `CAP_SYS_ADMIN` to enter namespaces and `CAP_NET_ADMIN`. Only threads that end
//! at once ever enter one.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_eswitch::links::{Link, LinkError, Links, Namespace};

use super::driver::Function;
use super::{Candidate, Plug, PlugError, Progress};

/// How long an interface may be nowhere: while a driver makes it, or while a namespace is being deleted.
const LIMBO: Duration = Duration::from_secs(2);
/// Longest name of an interface.
const NAME_MAX: usize = 15;

/// The namespaces of the host.
#[derive(Debug)]
pub struct Host {
    /// The daemon's own.
    home: io::Result<Namespace>,
    /// The kernel's first, where interfaces appear that a driver has made or whose namespace was deleted; if it is
    /// another one.
    initial: Option<Namespace>,
}

impl Host {
    /// Opens them: the calling thread's, and that of process 1. The latter demands every privilege that process 1 has
    /// (or `CAP_SYS_PTRACE`), and is done without otherwise: so a daemon in a namespace of its own calls this before it
    /// gives privileges up.
    pub fn open() -> Host {
        let home = Namespace::own();
        let is_home = |initial: &Namespace| home.as_ref().is_ok_and(|home| initial.is(home));
        let initial = Namespace::open(Path::new("/proc/1/ns/net")).ok().filter(|initial| !is_home(initial));
        Host { home, initial }
    }

    fn home(&self) -> Result<&Namespace, PlugError> {
        self.home.as_ref().map_err(|error| PlugError::Failed {
            operation: "opening the daemon's own network namespace".into(),
            detail: error.to_string(),
        })
    }
}

/// The plug of one vNIC into one namespace.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    netdev: String,
    bond: Option<String>,
    host: Arc<Host>,
    /// What interfaces were called before they were moved, by PF and number of the VF.
    names: HashMap<(String, u16), String>,
    /// Since when an interface is nowhere.
    missing_since: Option<Instant>,
}

/// An interface, and the namespace that it is in.
struct Found {
    links: Links,
    link: Link,
}

impl Netns {
    /// A plug into the namespace `path`, or of that name in /run/netns; the interface is called `netdev` there.
    pub fn new(path: &str, netdev: &str, bond: Option<&str>, host: Arc<Host>) -> Netns {
        let path = if path.contains('/') { path.into() } else { Path::new("/run/netns").join(path) };
        Netns {
            path,
            netdev: netdev.to_owned(),
            bond: bond.map(str::to_owned),
            host,
            names: HashMap::new(),
            missing_since: None,
        }
    }

    /// The guest's namespace.
    fn guest(&self) -> Result<Namespace, PlugError> {
        let guest = match Namespace::open(&self.path) {
            Ok(guest) => guest,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Err(PlugError::Refused(format!(
                    "{} is not a network namespace; name one of `ip netns`, or a path such as /proc/PID/ns/net",
                    self.path.display()
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(PlugError::Absent { path: self.path.clone(), error });
            }
            Err(error) => return Err(self.failed("opening", error)),
        };
        if guest.is(self.host.home()?) || self.host.initial.as_ref().is_some_and(|initial| guest.is(initial))
        {
            let path = self.path.display();
            return Err(PlugError::Refused(format!(
                "{path} is the host's network namespace; a guest has its own"
            )));
        }
        Ok(guest)
    }

    fn failed(&self, operation: &str, error: impl std::fmt::Display) -> PlugError {
        PlugError::Failed {
            operation: format!("{operation} {}", self.path.display()),
            detail: error.to_string(),
        }
    }

    fn enter(&self, namespace: &Namespace) -> Result<Links, PlugError> {
        namespace.links().map_err(|error| self.failed("looking for interfaces from", error))
    }

    fn inside(&self, namespace: &Namespace, vf: &Candidate) -> Result<(Links, Option<Link>), PlugError> {
        let mut links = self.enter(namespace)?;
        let list = links.list().map_err(|error| self.failed("listing interfaces in", error))?;
        let is_it = |link: &Link| match &vf.pci {
            Some(pci) => link.device.as_ref() == Some(pci),
            None => link.name == self.netdev && link.address == Some(vf.mac),
        };
        let found = list.into_iter().filter(is_it).min_by_key(|link| link.index);
        Ok((links, found))
    }

    /// The interface where it is not the guest's.
    fn outside(&self, vf: &Candidate) -> Result<Option<Found>, PlugError> {
        for namespace in std::iter::once(self.host.home()?).chain(&self.host.initial) {
            let mut links = self.enter(namespace)?;
            let list =
                links.list().map_err(|error| self.failed("listing interfaces of the host, for", error))?;
            let names = [vf.netdev.as_ref(), self.names.get(&key(vf))];
            let is_it = |link: &Link| match &vf.pci {
                Some(pci) => link.device.as_ref() == Some(pci),
                None => names.contains(&Some(&link.name)),
            };
            if let Some(link) = list.into_iter().filter(is_it).min_by_key(|link| link.index) {
                return Ok(Some(Found { links, link }));
            }
        }
        Ok(None)
    }

    /// Moves the interface to the guest, who has no interface of that name.
    fn bring(&mut self, vf: &Candidate, guest: &Namespace) -> Result<Option<Found>, PlugError> {
        let Some(Found { links: mut outside, link }) = self.outside(vf)? else { return Ok(None) };
        let mut inside = self.enter(guest)?;
        self.check_name(&mut inside, None)?;
        self.names.insert(key(vf), link.name.clone());
        outside.move_to(link.index, guest, &self.netdev).map_err(|error| {
            let operation = format!("moving {} into", link.name);
            if error.is_clash() { self.taken(&link.name) } else { self.failed(&operation, error) }
        })?;
        let (links, found) = self.inside(guest, vf)?;
        match found {
            Some(link) => Ok(Some(Found { links, link })),
            None => Err(self.failed("moving the VF into", "it is not there; somebody moved it on")),
        }
    }

    /// Whether the name is free in there, or has this index.
    fn check_name(&self, links: &mut Links, index: Option<u32>) -> Result<(), PlugError> {
        let list = links.list().map_err(|error| self.failed("listing interfaces in", error))?;
        let has_it = |link: &Link| link.name == self.netdev || link.alt_names.contains(&self.netdev);
        if list.iter().any(|link| has_it(link) && Some(link.index) != index) {
            return Err(self.taken(&self.netdev));
        }
        Ok(())
    }

    fn taken(&self, name: &str) -> PlugError {
        PlugError::Refused(format!(
            "another interface is called {name} in {}; rename it, or have the VF called otherwise",
            self.path.display()
        ))
    }

    /// The bond, fit to take a VF with the vNIC's address.
    fn bond(&self, list: &[Link], vf: Option<&Candidate>) -> Result<Option<Link>, PlugError> {
        let Some(name) = &self.bond else { return Ok(None) };
        let place = self.path.display();
        let refused = |text: String| Err(PlugError::Refused(text));
        let Some(link) = list.iter().find(|link| link.name == *name) else {
            return refused(format!(
                "there is no bond {name} in {place}; make it, with the software attachment in it"
            ));
        };
        let Some(bond) = &link.bond else {
            return refused(format!("{name} in {place} is not a bond"));
        };
        if !bond.is_active_backup() {
            return refused(format!("bond {name} in {place} is not in mode active-backup; set it so"));
        }
        // It would use the VF before it has a link.
        if !bond.is_watching() {
            return refused(format!("bond {name} in {place} does not watch links; set its miimon to 100"));
        }
        if let Some(vf) = vf {
            let has_others = list.iter().any(|slave| {
                slave.master == Some(link.index) && (vf.pci.is_none() || slave.device != vf.pci)
            });
            if has_others && link.address != Some(vf.mac) {
                let found = link.address.map_or_else(|| "none".to_owned(), |address| address.to_string());
                return refused(format!(
                    "bond {name} in {place} has the address {found}, and the vNIC {}; give it that",
                    vf.mac
                ));
            }
        }
        Ok(Some(link.clone()))
    }

    /// Puts the interface into the bond.
    fn enslave(&self, found: &mut Found, vf: &Candidate) -> Result<(), PlugError> {
        let Found { links, link } = found;
        let failed = |operation: &'static str| move |error: LinkError| self.failed(operation, error);
        let list = links.list().map_err(failed("listing interfaces in"))?;
        let Some(bond) = self.bond(&list, Some(vf))? else { return Ok(()) };
        if link.master != Some(bond.index) {
            if link.master.is_some() {
                links.set_master(link.index, 0).map_err(failed("taking the VF out of another bond in"))?;
            }
            links.down(link.index).map_err(failed("setting the VF down in"))?;
            links.set_master(link.index, bond.index).map_err(failed("putting the VF into the bond in"))?;
        }
        let details = bond.bond.unwrap_or_default();
        if details.primary != Some(link.index) || details.reselect != 0 {
            links
                .set_primary(bond.index, link.index)
                .map_err(failed("making the VF the primary of the bond in"))?;
        }
        links.up(link.index).map_err(failed("setting the VF up in"))
    }

    /// Gives the VF a driver that makes an interface, where it has none.
    fn bind(&mut self, vf: &Candidate) -> Result<Progress, PlugError> {
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        let Some(function) = vf.pci.as_deref().map(Function::new) else {
            return Err(
                self.failed("plugging into", "the VF has no interface in the daemon's network namespace")
            );
        };
        if !function.exists() {
            return Err(self.failed("plugging into", "the VF is gone"));
        }
        let bound = match function.driver() {
            // It was given to VMs before.
            Some(_) if function.is_for_vms() => {
                function.take_driver().and_then(|()| function.give_driver(None))
            }
            Some(driver) if since.elapsed() > LIMBO => {
                return Err(PlugError::Refused(format!(
                    "the VF has driver {driver}, and its interface is in a namespace that is neither the host's nor {}: \
                     somebody else uses it",
                    self.path.display()
                )));
            }
            Some(_) => Ok(()),
            None => function.give_driver(None),
        };
        bound.map_err(|error| self.failed("binding a driver to the VF for", error))?;
        Ok(Progress::Pending)
    }

    /// Brings the interface back from the guest.
    fn fetch(&self, found: &mut Found, vf: &Candidate, by_force: bool) -> Result<(), PlugError> {
        let Found { links, link } = found;
        let home = self.host.home()?;
        let failed = |operation: &'static str| move |error: LinkError| self.failed(operation, error);
        let step = |result: Result<(), PlugError>| if by_force { Ok(()) } else { result };
        if link.master.is_some() {
            step(links.set_master(link.index, 0).map_err(failed("taking the VF out of the bond in")))?;
        }
        step(links.down(link.index).map_err(failed("setting the VF down in")))?;
        let mut moved = Ok(());
        for name in self.names_at_home(vf) {
            moved = links.move_to(link.index, home, &name);
            if moved.as_ref().is_err_and(LinkError::is_clash) && !link.alt_names.is_empty() {
                // The guest can give it names that the host uses.
                step(links.drop_names(link.index, &link.alt_names).map_err(failed("renaming the VF in")))?;
                moved = links.move_to(link.index, home, &name);
            }
            if !moved.as_ref().is_err_and(LinkError::is_clash) {
                break;
            }
        }
        // With a name that is taken it is at home all the same.
        match self.outside(vf)? {
            Some(Found { link, .. }) => self.clean(&link, vf),
            None => Err(match moved {
                Err(error) => self.failed("moving the VF out of", error),
                Ok(()) => self.failed("moving the VF out of", "it is not there; somebody moved it on"),
            }),
        }
    }

    /// Names to try for the interface at home.
    fn names_at_home(&self, vf: &Candidate) -> impl Iterator<Item = String> {
        let usual = format!("{}v{}", vf.pf, vf.index);
        let known = self.names.get(&key(vf)).cloned();
        let named = known.into_iter().chain(Some(usual)).filter(|name| name.len() <= NAME_MAX);
        // The kernel puts the number in.
        named.chain(Some("dev%d".to_owned()))
    }

    /// Sees to it that nothing of the guest's is left on an interface that came back.
    fn clean(&self, link: &Link, vf: &Candidate) -> Result<(), PlugError> {
        match &vf.pci {
            Some(pci) if link.has_xdp => Function::new(pci)
                .take_driver()
                .map_err(|error| self.failed("taking the driver of the VF that came out of", error)),
            _ => Ok(()),
        }
    }

    /// Takes the driver from a VF whose interface cannot be had, and with it the interface.
    fn seize(&self, vf: &Candidate) -> Result<Progress, PlugError> {
        let Some(pci) = &vf.pci else {
            return Err(
                self.failed("taking the VF by force out of", "it is no PCI function with a driver to take")
            );
        };
        let taken = Function::new(pci).take_driver();
        taken.map_err(|error| self.failed("taking the driver of the VF in", error))?;
        tracing::warn!(pci, namespace = %self.path.display(), "a VF was taken by force: it has no driver now");
        Ok(Progress::Done)
    }
}

fn key(vf: &Candidate) -> (String, u16) {
    (vf.pf.clone(), vf.index)
}

impl Plug for Netns {
    fn check(&mut self) -> Result<(), PlugError> {
        let guest = self.guest()?;
        let list = self.enter(&guest)?.list().map_err(|error| self.failed("listing interfaces in", error))?;
        self.bond(&list, None).map(drop)
    }

    fn plug(&mut self, vf: &Candidate) -> Result<Progress, PlugError> {
        let guest = self.guest()?;
        let (links, found) = self.inside(&guest, vf)?;
        let mut found = match found {
            Some(link) => Found { links, link },
            None => match self.bring(vf, &guest)? {
                Some(found) => found,
                None => return self.bind(vf),
            },
        };
        self.missing_since = None;
        if found.link.name != self.netdev {
            let Found { links, link } = &mut found;
            self.check_name(links, Some(link.index))?;
            let failed = |error| self.failed("renaming the VF in", error);
            links.down(link.index).map_err(failed)?;
            links.rename(link.index, &self.netdev).map_err(failed)?;
        }
        self.enslave(&mut found, vf)?;
        Ok(Progress::Done)
    }

    fn is_active(&mut self, vf: &Candidate) -> Result<bool, PlugError> {
        let guest = self.guest()?;
        let (mut links, found) = self.inside(&guest, vf)?;
        let Some(link) = found else { return Ok(false) };
        let Some(name) = &self.bond else { return Ok(link.running) };
        let list = links.list().map_err(|error| self.failed("listing interfaces in", error))?;
        let uses_it = |bond: &Link| {
            let active = bond.bond.as_ref().and_then(|details| details.active);
            bond.name == *name && bond.up && active == Some(link.index)
        };
        Ok(link.running && list.iter().any(uses_it))
    }

    fn unplug(&mut self, vf: &Candidate, by_force: bool) -> Result<Progress, PlugError> {
        let function = vf.pci.as_deref().map(Function::new);
        // Closing a VF by its driver takes the interface away, wherever it is.
        if function.as_ref().is_some_and(|function| function.driver().is_none() || function.is_for_vms()) {
            self.missing_since = None;
            return Ok(Progress::Done);
        }
        let inside = match self.guest() {
            Ok(guest) => {
                self.inside(&guest, vf).map(|(links, found)| found.map(|link| Found { links, link }))
            }
            // It was deleted, or became something else.
            Err(PlugError::Absent { .. } | PlugError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        };
        let outcome = match inside {
            Ok(Some(mut found)) => self.fetch(&mut found, vf, by_force).map(|()| Some(Progress::Done)),
            Ok(None) => self.outside(vf).map(|found| found.map(|_| Progress::Done)),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(Some(progress)) => {
                self.missing_since = None;
                Ok(progress)
            }
            Ok(None) if function.is_none() => Ok(Progress::Done),
            Ok(None) => {
                let since = *self.missing_since.get_or_insert_with(Instant::now);
                if since.elapsed() < LIMBO {
                    return Ok(Progress::Pending);
                }
                if by_force {
                    return self.seize(vf);
                }
                Err(PlugError::Refused(format!(
                    "the guest has moved the VF out of {}, where it cannot be followed; it is taken by force",
                    self.path.display()
                )))
            }
            Err(error) if by_force => {
                tracing::warn!(%error, "a VF does not come back from its guest");
                self.seize(vf)
            }
            Err(error) => Err(error),
        }
    }
}
