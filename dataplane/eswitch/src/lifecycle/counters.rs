//! What transitions happened, why, and what they cost.

use std::collections::BTreeMap;

use super::Path;

/// Why a vNIC changed its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// It was granted a VF.
    Granted,
    /// The program was read back.
    Verified,
    /// The guest became active on the VF.
    GuestActive,
    /// The NIC turned out not to cover the policy.
    Uncovered,
    /// Something that should have worked did not, or the device went.
    Failed,
    /// The guest could not be given the VF.
    Refused,
    /// The guest took too long.
    Timeout,
    /// The VF was revoked.
    Revoked,
    /// The NIC did not hold what was programmed.
    Drift,
    /// The policy changed.
    Policy,
    /// The VF is free.
    Drained,
}

impl Cause {
    /// Stable name in `lower-kebab-case`, for machines.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Granted => "granted",
            Cause::Verified => "verified",
            Cause::GuestActive => "guest-active",
            Cause::Uncovered => "uncovered",
            Cause::Failed => "failed",
            Cause::Refused => "refused",
            Cause::Timeout => "timeout",
            Cause::Revoked => "revoked",
            Cause::Drift => "drift",
            Cause::Policy => "policy",
            Cause::Drained => "drained",
        }
    }
}

/// What a transition cost, where that could be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Packets lost.
    pub lost: u64,
    /// Packets seen twice.
    pub duplicated: u64,
    /// Packets out of order.
    pub reordered: u64,
    /// Milliseconds without a packet.
    pub blackout: u64,
}

impl Losses {
    /// Adds another's.
    pub const fn add(&mut self, other: Losses) {
        self.lost = self.lost.saturating_add(other.lost);
        self.duplicated = self.duplicated.saturating_add(other.duplicated);
        self.reordered = self.reordered.saturating_add(other.reordered);
        self.blackout = self.blackout.saturating_add(other.blackout);
    }
}

/// Counters of one vNIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Transitions, by where from, where to and why.
    pub transitions: BTreeMap<(Path, Path, Cause), u64>,
    /// Commands that failed.
    pub failures: u64,
    /// Commands that were repeated.
    pub retries: u64,
    /// Guests that were cut off.
    pub forced: u64,
    /// What transitions cost.
    pub losses: Losses,
}

impl Counters {
    pub(super) fn transition(&mut self, from: Path, to: Path, cause: Cause) {
        *self.transitions.entry((from, to, cause)).or_default() += 1;
    }
}
