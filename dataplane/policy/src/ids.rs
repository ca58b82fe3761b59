//! The small numbers that stand for names in the tables, and stay the same as long as the name lives.
//!
//! They are stored with the desired state: the tables outlive the daemon, so a restarted daemon must give the same
//! numbers to the same names, or it would have to rebuild what it should adopt.

use std::collections::{BTreeMap, BTreeSet};

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

    /// Forgets the names that are not in `wanted` and numbers the new ones, lowest free number below `limit` first.
    ///
    /// A number that becomes free is not given to another name in the same call, unless no other is left: so whoever
    /// keeps state by number sees the old name go before the new one comes. There must be room for all names.
    pub fn assign<'a>(&mut self, wanted: impl IntoIterator<Item = &'a str>, limit: u32) {
        let wanted: BTreeSet<&str> = wanted.into_iter().collect();
        let before: BTreeSet<u32> = self.by_name.values().copied().collect();
        self.by_name.retain(|name, _| wanted.contains(name.as_str()));
        let kept: BTreeSet<u32> = self.by_name.values().copied().collect();
        let fresh = (1..limit).filter(|number| !before.contains(number));
        let freed = before.iter().copied().filter(|number| !kept.contains(number));
        let mut free = fresh.chain(freed);
        for name in wanted {
            if !self.by_name.contains_key(name)
                && let Some(number) = free.next()
            {
                self.by_name.insert(name.to_owned(), number);
            }
        }
    }
}

/// All numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Ports, by `vnic/NAME`, `uplink/SWITCH`, `internal/SWITCH`, `user/SWITCH`.
    pub ports: IdSpace,
    /// Switches, by name.
    pub switches: IdSpace,
    /// ACL groups, by `group/NAME` and `vnic/NAME` (a vNIC's own rules).
    pub groups: IdSpace,
    /// Rule counters, by `GROUP-KEY#` and a hash of the rule (see [`rule_name`](crate::lower::rule_name)).
    pub rules: IdSpace,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(space: &IdSpace) -> Vec<(&str, u32)> {
        space.by_name.iter().map(|(name, number)| (name.as_str(), *number)).collect()
    }

    #[test]
    fn names_keep_their_numbers_and_freed_ones_rest_for_a_while() {
        let mut space = IdSpace::default();
        space.assign(["b", "a", "c", "a"], 10);
        assert_eq!(numbers(&space), [("a", 1), ("b", 2), ("c", 3)]);
        space.assign(["a", "c", "d"], 10);
        assert_eq!(numbers(&space), [("a", 1), ("c", 3), ("d", 4)]);
        space.assign(["a", "c", "d", "e"], 10);
        assert_eq!(numbers(&space), [("a", 1), ("c", 3), ("d", 4), ("e", 2)]);
        assert_eq!(space.get("e"), Some(2));
        assert_eq!(space.get("b"), None);
    }

    #[test]
    fn a_full_space_gives_freed_numbers_at_once() {
        let mut space = IdSpace::default();
        space.assign(["a", "b", "c"], 4);
        space.assign(["b", "x", "y"], 4);
        assert_eq!(numbers(&space), [("b", 2), ("x", 1), ("y", 3)]);
    }
}
