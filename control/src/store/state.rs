//! The desired state in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sluice_policy::config::Config;
use sluice_policy::ids::{IdSpace, Ids};
use sluice_proto::v1;

use crate::convert::{self, Spec};
use crate::resource::Key;

/// A resource's desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Revision of the whole state at which it last changed.
    pub revision: u64,
    /// What is desired.
    pub spec: Arc<Spec>,
}

/// A queue of a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pin {
    /// The port's name.
    pub port: String,
    /// Counts from 0.
    pub queue: u32,
}

/// What somebody wants of the userspace engine's workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkersWanted {
    /// Cores that they run on; none: the daemon chooses.
    pub cores: BTreeSet<u32>,
    /// Queues that are where they are by hand, and on which core that is.
    pub pins: BTreeMap<Pin, u32>,
}

impl WorkersWanted {
    /// As it is stored.
    pub(super) fn to_message(&self) -> v1::WorkersSettings {
        let pin = |(pin, core): (&Pin, &u32)| v1::QueuePin {
            port: pin.port.clone(),
            queue: pin.queue,
            core: *core,
        };
        v1::WorkersSettings {
            cores: self.cores.iter().copied().collect(),
            pins: self.pins.iter().map(pin).collect(),
        }
    }

    pub(super) fn of_message(message: v1::WorkersSettings) -> WorkersWanted {
        let pin = |pin: v1::QueuePin| (Pin { port: pin.port, queue: pin.queue }, pin.core);
        WorkersWanted {
            cores: message.cores.into_iter().collect(),
            pins: message.pins.into_iter().map(pin).collect(),
        }
    }
}

/// Everything that is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Counts changes.
    pub revision: u64,
    /// Resources.
    pub resources: BTreeMap<Key, Entry>,
    /// Numbers that stand for names.
    pub ids: Ids,
    /// What is wanted of workers.
    pub workers: WorkersWanted,
}

/// A number that stands for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdName<'a> {
    /// Which kind of name.
    pub space: &'static str,
    /// The name.
    pub name: &'a str,
    /// Its number.
    pub id: u32,
}

impl State {
    /// The whole as one configuration.
    pub fn config(&self) -> Config {
        convert::collect(self.resources.values().map(|entry| entry.spec.as_ref()))
    }

    fn spaces(&self) -> [(&'static str, &IdSpace); 4] {
        let Ids { ports, switches, groups, rules } = &self.ids;
        [("ports", ports), ("switches", switches), ("groups", groups), ("rules", rules)]
    }

    /// Every number.
    pub(super) fn id_names(&self) -> impl Iterator<Item = IdName<'_>> {
        self.spaces().into_iter().flat_map(|(space, names)| {
            names.by_name.iter().map(move |(name, id)| IdName { space, name, id: *id })
        })
    }

    /// One number.
    pub(super) fn id(&self, space: &str, name: &str) -> Option<u32> {
        self.spaces().into_iter().find(|(known, _)| *known == space)?.1.get(name)
    }

    /// Sets a number. Unknown spaces, of a newer version, are ignored.
    pub(super) fn set_id(&mut self, space: &str, name: String, id: u32) {
        let Ids { ports, switches, groups, rules } = &mut self.ids;
        let space = match space {
            "ports" => ports,
            "switches" => switches,
            "groups" => groups,
            "rules" => rules,
            _ => return,
        };
        space.by_name.insert(name, id);
    }
}
