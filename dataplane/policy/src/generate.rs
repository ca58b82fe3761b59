//! Seeded configurations, states and frames for conformance tests, the same on every machine.
//!
//! [`scenario`] makes a valid configuration and a state; [`frame`] makes frames that are interesting for it: most pass
//! many stages, each stage stops some, and some are broken in every way that comes to mind. The universes are small on
//! purpose, so that addresses, VLANs and rules meet. Engines of every kind are tested with it; it is no use elsewhere.

mod frames;
mod packets;
mod policies;

use std::collections::BTreeMap;

use crate::config::Config;
use crate::image::{Binding, Bindings};
use crate::lower;
use crate::oracle::State;

pub use frames::frame;
pub use policies::scenario;

/// A generator of random numbers (SplitMix64): small, fast, and the same for ever.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Numbers that depend on `seed` alone.
    pub const fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// 64 random bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub const fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True in `percent` of 100 cases.
    pub const fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `items`, which are not empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A random byte.
    pub const fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}

/// A configuration, and what else the answer depends on.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Valid.
    pub config: Config,
    /// Refers to its ports and switches (and, seldom, to a port that is gone).
    pub state: State,
}

impl Scenario {
    /// Bindings of all ports that are attached, with interface indexes from 101 up and XDP accepted on some.
    pub fn bindings(&self) -> Bindings {
        let specs: BTreeMap<String, _> =
            lower::ports(&self.config).into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        (101..)
            .zip(specs)
            .filter(|(_, (name, _))| !self.state.unattached.contains(name))
            .map(|(ifindex, (name, _))| {
                let binding =
                    Binding { ifindex, peer_redirect: ifindex % 2 == 0, xdp_target: ifindex % 3 == 0 };
                (name, binding)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
