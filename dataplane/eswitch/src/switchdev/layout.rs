//! Where the chains and priorities of a program are on a representor that other programs use too.
//!
//! A VF's own representor is its program's alone. On the uplink's, VF `n` has the priorities from `256 n` to
//! `256 n + 255` of chain 0 and the chains from `256 (n + 1)` to `256 (n + 1) + 255`, so that any number of programs lie
//! side by side and each can be told from the others by its place as well as by its cookie.

use sluice_policy::placement::{RulePort, VfIndex};

/// Chains, and priorities in chain 0, that a VF has on the uplink's representor.
const ROOM: u32 = 256;

/// The places of one program on one representor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    port: RulePort,
    vf: VfIndex,
}

impl Layout {
    /// The places of `vf`'s rules.
    pub(super) const fn new(port: RulePort, vf: VfIndex) -> Layout {
        Layout { port, vf }
    }

    /// The chain in the kernel; `None` if there is no room for it.
    pub(super) fn real_chain(self, chain: u32) -> Option<u32> {
        match (self.port, chain) {
            (RulePort::Own, _) | (_, 0) => Some(chain),
            (RulePort::Uplink, _) => (chain < ROOM).then(|| ROOM * (u32::from(self.vf.0) + 1) + chain),
        }
    }

    /// The program's chain.
    pub(super) fn chain(self, real: u32) -> Option<u32> {
        match (self.port, real) {
            (RulePort::Own, _) | (_, 0) => Some(real),
            (RulePort::Uplink, _) => {
                let chain = real.checked_sub(ROOM * (u32::from(self.vf.0) + 1))?;
                (1..ROOM).contains(&chain).then_some(chain)
            }
        }
    }

    /// The priority in the kernel; `None` if there is no room for it.
    pub(super) fn real_priority(self, chain: u32, priority: u16) -> Option<u16> {
        match (self.port, chain) {
            (RulePort::Uplink, 0) if u32::from(priority) < ROOM => {
                u16::try_from(ROOM * u32::from(self.vf.0) + u32::from(priority)).ok()
            }
            (RulePort::Uplink, 0) => None,
            _ => Some(priority),
        }
        .filter(|priority| *priority > 0)
    }

    /// The program's priority.
    pub(super) fn priority(self, chain: u32, real: u16) -> Option<u16> {
        match (self.port, chain) {
            (RulePort::Uplink, 0) => {
                let priority = u32::from(real).checked_sub(ROOM * u32::from(self.vf.0))?;
                u16::try_from(priority).ok().filter(|_| priority < ROOM)
            }
            _ => Some(real),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_on_the_uplink_do_not_meet() {
        let mut places = std::collections::BTreeSet::new();
        for vf in [0, 1, 7, 254] {
            let layout = Layout::new(RulePort::Uplink, VfIndex(vf));
            for (chain, priority) in [(0, 1), (0, 255), (1, 1), (255, 60_000)] {
                let real_chain = layout.real_chain(chain).expect("room");
                let real = layout.real_priority(chain, priority).expect("room");
                assert!(places.insert((real_chain, real)), "VF {vf}, chain {chain}, priority {priority}");
                assert_eq!(layout.chain(real_chain), Some(chain));
                assert_eq!(layout.priority(chain, real), Some(priority));
            }
        }
        let layout = Layout::new(RulePort::Uplink, VfIndex(3));
        assert_eq!(layout.real_chain(256), None);
        assert_eq!(layout.real_priority(0, 256), None);
        assert_eq!(
            layout.chain(Layout::new(RulePort::Uplink, VfIndex(4)).real_chain(1).expect("room")),
            None
        );
        assert_eq!(Layout::new(RulePort::Uplink, VfIndex(256)).real_priority(0, 1), None);
    }

    #[test]
    fn a_vfs_own_representor_is_its_own() {
        let layout = Layout::new(RulePort::Own, VfIndex(3));
        assert_eq!((layout.real_chain(900), layout.chain(900)), (Some(900), Some(900)));
        assert_eq!((layout.real_priority(0, 900), layout.priority(0, 900)), (Some(900), Some(900)));
        assert_eq!(layout.real_priority(0, 0), None);
    }
}
