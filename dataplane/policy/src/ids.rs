//! The small numbers that stand for names in the tables, and stay the same as long as the name lives.
//!
//! They are stored with the desired state: the tables outlive the daemon, so a restarted daemon must give the same
//! numbers to the same names, or it would have to rebuild what it should adopt.

use std::collections::BTreeMap;

/// Numbers by name, for one kind of thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdSpace {
    /// Name to number. Numbers start at 1.
    pub by_name: BTreeMap<String, u32>,
}

impl IdSpace {
    /// The number of `name`, if it has one.
    pub fn get(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Forgets the names that are not in `wanted` and numbers the new ones, lowest free number first.
    pub fn assign<'a>(&mut self, wanted: impl IntoIterator<Item = &'a str>) {
        let wanted: std::collections::BTreeSet<&str> = wanted.into_iter().collect();
        self.by_name.retain(|name, _| wanted.contains(name.as_str()));
        let mut used: std::collections::BTreeSet<u32> = self.by_name.values().copied().collect();
        let mut next = 1;
        for name in wanted {
            if self.by_name.contains_key(name) {
                continue;
            }
            while used.contains(&next) {
                next += 1;
            }
            used.insert(next);
            self.by_name.insert(name.to_owned(), next);
        }
    }
}

/// All numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Ports, by `vnic/NAME`, `uplink/SWITCH`, `internal/SWITCH`.
    pub ports: IdSpace,
    /// Switches, by name.
    pub switches: IdSpace,
    /// ACL groups, by `group/NAME` and `vnic/NAME` (a vNIC's own rules).
    pub groups: IdSpace,
    /// Rule counters, by `GROUP-KEY#` and a hash of the rule (see [`rule_name`](crate::lower::rule_name)).
    pub rules: IdSpace,
}
