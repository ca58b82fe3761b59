//! The daemon's heart without its thread: desired state, engine, statuses, and the passes that bring them together.
//!
//! [`reconcile`](crate::reconcile) runs one of these in a thread of its own; tests call it directly. Every change
//! goes the same way: make the new desired state beside the old, validate the whole, number and lower it, store it,
//! and only then let a pass program it.

mod change;
mod counters;
mod status;
mod vfs;
mod workers;

use std::collections::BTreeMap;
use std::sync::Arc;

use sluice_kernel::{Observation, SyncReport};
use sluice_policy::config::Config;
use sluice_policy::image::{Backings, Image};
use sluice_policy::lower;
use sluice_proto::v1;
use tokio::sync::watch;

use crate::engine::{self, DataPlane, Wake};
use crate::error::Error;
use crate::events::{EventLog, Severity};
use crate::resource::Key;
use crate::store::{Origin, Repair, State, Store};

pub use change::Outcome;

/// Events of one kind and one moment that are noted one by one.
const ALIKE_SHOWN: usize = 8;
/// How often a pass may start over because attaching changed what interfaces accept.
const ROUNDS_MAX: usize = 3;

/// What everybody may see: resources with their statuses, as of the last pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Revision of the desired state.
    pub revision: u64,
    /// Resources.
    pub resources: BTreeMap<Key, Arc<v1::Resource>>,
    /// Revision that every NIC has acted upon.
    pub settled: u64,
}

/// How the daemon started, which the event log may have forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether anything was amiss.
    pub severity: Severity,
    /// In words.
    pub text: String,
}

/// Desired state, engine, and what is known of how they agree.
pub struct Core {
    store: Store,
    state: State,
    config: Config,
    engine: Box<dyn DataPlane>,
    /// Where vNICs' frames go, as far as VFs are concerned.
    backings: Backings,
    vfs: vfs::Vfs,
    /// What the engine was last told.
    image: Image,
    ports: BTreeMap<String, v1::PortStatus>,
    /// Tables of an unknown past are left alone until the first apply.
    untouched: bool,
    /// The last pass failed; the tables are not as they should be.
    failed: bool,
    start: Start,
    events: EventLog,
    view: watch::Sender<Arc<View>>,
}

impl Core {
    /// Brings a store and an engine together, and says in the event log where both came from. Programs nothing yet.
    pub fn new(store: Store, state: State, origin: Origin, engine: Box<dyn DataPlane>) -> Core {
        let mut events = EventLog::default();
        let (revision, count) = (state.revision, state.resources.len());
        let adoption = engine.adoption();
        let untouched = origin == Origin::Nowhere && adoption.found_tables;
        let (severity, start) = match origin {
            Origin::StateDir if count > 0 && !adoption.found_tables => (
                Severity::Warning,
                format!(
                    "started with {count} resources at revision {revision}, but no tables were pinned, and all are made \
                     anew: so it is after a reboot; else somebody removed the pins, and traffic stood still until now"
                ),
            ),
            Origin::StateDir => (Severity::Info, format!("started with {count} resources at revision {revision}")),
            Origin::RuntimeCopy => (
                Severity::Warning,
                format!(
                    "the state directory was empty: recovered {count} resources at revision {revision} from the copy beside the pins"
                ),
            ),
            Origin::Nowhere if untouched => (
                Severity::Warning,
                "neither the state directory nor the runtime directory had a state, but tables of an earlier daemon are \
                 pinned: they stay as they are, and in force, until the first apply"
                    .to_owned(),
            ),
            Origin::Nowhere => (Severity::Info, "started with an empty state".to_owned()),
        };
        events.note(severity, start.clone());
        for line in adoption.lines {
            events.note(Severity::Info, line);
        }
        let config = state.config();
        let mut core = Core {
            store,
            state,
            config,
            engine,
            backings: Backings::default(),
            vfs: vfs::Vfs::default(),
            image: Image::default(),
            ports: BTreeMap::new(),
            untouched,
            failed: false,
            start: Start { severity, text: start },
            events,
            view: watch::Sender::new(Arc::new(View::default())),
        };
        core.publish();
        core
    }

    /// Has the engine tell `wake` when a pass is due.
    pub fn watch(&mut self, wake: Wake) {
        self.engine.watch(wake);
    }

    /// The published state, and notice of its changes.
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// The event log.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// How the daemon started.
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// The store, to read.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Statuses of ports, as of the last pass.
    pub fn ports(&self) -> &BTreeMap<String, v1::PortStatus> {
        &self.ports
    }

    /// Whether tables of an unknown past are being left alone.
    pub fn is_untouched(&self) -> bool {
        self.untouched
    }

    /// Names of the interfaces that ports are, or will be, attached to.
    pub fn netdevs(&self) -> impl Iterator<Item = &str> {
        self.image.ports.values().map(|port| port.netdev.as_str())
    }

    /// Whether a port is attached to this interface.
    pub fn is_bound(&self, ifindex: u32) -> bool {
        self.image.ifindexes.contains_key(&ifindex)
    }

    /// Brings the data plane in line with the desired state. Says what was done; nothing on an unchanged world.
    ///
    /// Whatever fails is in the statuses and the event log, and is tried again by the next pass.
    pub fn pass(&mut self) -> Vec<String> {
        if self.untouched {
            return Vec::new();
        }
        let programmed = self.program();
        self.failed = programmed.is_err();
        let done = match programmed {
            Ok(done) => done,
            Err(error) => {
                self.events.note(Severity::Error, format!("programming failed: {error}"));
                let ports = lower::ports_with(&self.config, &self.backings);
                self.ports = status::failed(&ports, &self.state.ids, &error.to_string());
                Vec::new()
            }
        };
        self.publish();
        self.tell_fleet(false);
        done
    }

    fn program(&mut self) -> Result<Vec<String>, Error> {
        let ports = lower::ports_with(&self.config, &self.backings);
        self.tell_workers();
        let mut done = self.engine.ensure_internal(&ports)?;
        for line in &done {
            self.events.note(Severity::Info, line.clone());
        }
        for round in 0.. {
            let observation = self.engine.observe(&ports)?;
            let image =
                lower::lower_with(&self.config, &self.state.ids, &observation.bindings, &self.backings)?;
            let report = self.engine.sync(&image)?;
            self.image = image;
            done.extend(report.link_changes.iter().cloned());
            if report.writes.total() > 0 {
                done.push(format!("tables: {}", report.writes));
            }
            let again = report.observe_again && round < ROUNDS_MAX;
            self.note_pass(&observation, report);
            if !again {
                break;
            }
        }
        Ok(done)
    }

    /// Takes statuses over, and notes what changed.
    fn note_pass(&mut self, observation: &Observation, report: SyncReport) {
        self.note_many(Severity::Info, report.link_changes);
        let ports = status::ports(&self.image, observation, &report.ports);
        let mut attached = Vec::new();
        let mut pending = Vec::new();
        for (name, port) in &ports {
            let before = self.ports.get(name);
            let known: &[String] = before.map_or(&[], |before| &before.notes);
            // Of what is no interface, notes say what its guest can do, not what it lacks.
            let is_rings = port.netdev.is_empty();
            for note in port.notes.iter().filter(|note| !known.contains(note)) {
                let is_fine = is_rings || engine::is_fine(note);
                let severity = if is_fine { Severity::Info } else { Severity::Warning };
                self.events.note(severity, format!("{name}: {note}"));
            }
            if before.is_some_and(|before| before.state == port.state && before.ifindex == port.ifindex) {
                continue;
            }
            match port.state() {
                v1::port_status::State::Attached if is_rings => {
                    attached.push(format!("{name} is attached: its guest is there"));
                }
                v1::port_status::State::Attached => {
                    attached
                        .push(format!("{name} is attached to {} (ifindex {})", port.netdev, port.ifindex));
                }
                v1::port_status::State::Pending => {
                    pending.push(format!("{name} is pending: {}", port.message))
                }
                _ => self.events.note(Severity::Error, format!("{name} failed: {}", port.message)),
            }
        }
        self.note_many(Severity::Info, attached);
        self.note_many(Severity::Info, pending);
        self.ports = ports;
    }

    /// Whether the last pass failed, so that another should follow soon.
    pub const fn failed(&self) -> bool {
        self.failed
    }

    /// A pass that looks at everything, also at what nobody announces: files, pins and links that were removed.
    pub fn full_pass(&mut self) {
        self.check_file();
        match self.store.ensure_copy(&self.state) {
            Ok(false) => {}
            Ok(true) => self
                .events
                .note(Severity::Warning, "the runtime copy of the state was missing: written again"),
            Err(error) => self.events.note(Severity::Error, format!("runtime copy: {error}")),
        }
        if !self.untouched {
            match self.engine.repair() {
                Ok(repaired) => self.note_many(Severity::Warning, repaired),
                Err(error) => self.events.note(Severity::Error, format!("repair failed: {error}")),
            }
        }
        self.pass();
        self.tell_fleet(true);
    }

    /// Sees to it that the state file is there and works.
    fn check_file(&mut self) {
        let path = self.store.path().display().to_string();
        match self.store.ensure_file(&self.state) {
            Ok(Repair::None) => {}
            Ok(Repair::Reopened) => self
                .events
                .note(Severity::Warning, format!("the state file {path} was opened again after an error")),
            Ok(Repair::Remade) => self
                .events
                .note(Severity::Warning, format!("the state file was deleted: written again at {path}")),
            Err(error) => self.events.note(Severity::Error, error.to_string()),
        }
    }

    /// Notes things of one kind that happened together: what concerns a thousand ports is not a thousand events.
    fn note_many(&mut self, severity: Severity, mut lines: Vec<String>) {
        let rest = lines.split_off(lines.len().min(ALIKE_SHOWN));
        for line in lines {
            self.events.note(severity, line);
        }
        if !rest.is_empty() {
            self.events.note(severity, format!("and {} more like these", rest.len()));
        }
    }

    /// Forgets learnt addresses that are too old.
    pub fn age_fdb(&mut self) {
        if self.untouched {
            return;
        }
        if let Err(error) = self.engine.age_fdb() {
            self.events.note(Severity::Error, format!("ageing failed: {error}"));
        }
        self.tell_fleet(false);
    }

    /// Publishes resources and statuses, keeping what did not change.
    fn publish(&mut self) {
        let before = self.view.borrow().clone();
        let mut view = View {
            revision: self.state.revision,
            resources: BTreeMap::new(),
            settled: self.settled_revision(),
        };
        for (key, entry) in &self.state.resources {
            let resource = status::resource(entry, &self.ports, &self.vfs, &self.config);
            let shared = match before.resources.get(key) {
                Some(known) if **known == resource => known.clone(),
                _ => Arc::new(resource),
            };
            view.resources.insert(key.clone(), shared);
        }
        if *before != view {
            self.view.send_replace(Arc::new(view));
        }
    }
}

#[cfg(test)]
mod tests;
