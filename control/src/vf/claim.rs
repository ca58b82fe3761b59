//! One vNIC that may have a VF: its lifecycle, its plug, what is waited for, and how that reads.

use std::collections::VecDeque;

use sluice_eswitch::contract::{EswitchError, Vf};
use sluice_eswitch::lifecycle::{Lifecycle, Path, Timing};
use sluice_policy::config::{Sriov, Vnic};
use sluice_policy::image::Backing;
use sluice_policy::placement::{Capabilities, Feature, Program, Uncovered};
use sluice_proto::v1;

use super::knowledge;
use super::plug::{Candidate, Plug};

/// So many drifts in such a time, in milliseconds, and the NIC is not trusted for as long.
const DRIFTS_MAX: usize = 4;
const DRIFT_WINDOW: u64 = 60_000;

/// What is being waited for, by asking the plug again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// The VF is being given to the guest, by this command.
    Plug(u64),
    /// The VF is open; where it has an interface only now, it is being given to the guest.
    PlugOpen,
    /// The guest has the VF, and is to use it.
    Guest,
    /// The VF is being taken from the guest.
    Unplug { ticket: u64, by_force: bool },
}

/// Somebody wants the vNIC to stay on its software path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    pub(super) reason: String,
    /// Milliseconds on the thread's clock; `None` means until it is released.
    pub(super) until: Option<u64>,
}

/// A vNIC with a claim to a VF, or one that has lost it and still holds a VF.
pub(super) struct Claim {
    pub(super) vnic: Vnic,
    pub(super) sriov: Sriov,
    /// It is on this switch and asks for a VF.
    pub(super) is_wanted: bool,
    pub(super) plug: Box<dyn Plug>,
    pub(super) lifecycle: Lifecycle,
    pub(super) placed: Result<Program, Vec<Uncovered>>,
    /// What the VF that it holds was programmed with, until it is clean again.
    pub(super) program: Option<Program>,
    /// What the NIC refused of the last program, though it had promised to take it.
    pub(super) refused: Option<Uncovered>,
    pub(super) waiting: Option<Waiting>,
    /// What it holds, as it was when it was granted.
    pub(super) vf: Option<Vf>,
    pub(super) backing: Option<Backing>,
    pub(super) hold: Option<Hold>,
    drifts: VecDeque<u64>,
    /// Since when the guest is seen not to use its VF.
    pub(super) idle_since: Option<u64>,
    /// When the VF stopped passing packets in this transition, if it did before the software path was ready.
    pub(super) dark_since: Option<u64>,
    /// The path and reason that were last told.
    pub(super) told: (Path, String),
}

impl Claim {
    pub(super) fn new(vnic: &Vnic, sriov: &Sriov, plug: Box<dyn Plug>, lifecycle: Lifecycle) -> Claim {
        let told = (lifecycle.path(), String::new());
        Claim {
            vnic: vnic.clone(),
            sriov: sriov.clone(),
            is_wanted: true,
            plug,
            lifecycle,
            placed: Err(Vec::new()),
            program: None,
            refused: None,
            waiting: None,
            vf: None,
            backing: None,
            hold: None,
            drifts: VecDeque::new(),
            idle_since: None,
            dark_since: None,
            told,
        }
    }

    /// How the VF is described to the plug.
    pub(super) fn candidate(&self, pf: &str) -> Candidate {
        let vf = self.vf.as_ref();
        Candidate {
            pf: pf.to_owned(),
            index: vf.map_or(0, |vf| vf.index.0),
            pci: vf.and_then(|vf| vf.pci.clone()),
            netdev: vf.and_then(|vf| vf.netdev.clone()),
            mac: self.vnic.mac,
        }
    }

    /// Notes a drift.
    pub(super) fn drifted(&mut self, now: u64) {
        self.drifts.push_back(now);
        while self.drifts.len() > DRIFTS_MAX {
            self.drifts.pop_front();
        }
    }

    /// Whether the NIC changes under it so often that it had better stay away for a while.
    pub(super) fn is_unsteady(&self, now: u64) -> bool {
        let recent = |at: &&u64| now.saturating_sub(**at) < DRIFT_WINDOW;
        self.drifts.iter().filter(recent).count() >= DRIFTS_MAX
    }

    /// Keeps what the NIC's answer says of its abilities.
    pub(super) fn learn(&mut self, result: &Result<(), EswitchError>) {
        let remedy = "it is tried again after a while, and at once when the policy changes or `sluice release` is called";
        self.refused = match result {
            Ok(()) => None,
            Err(EswitchError::Uncovered { feature, detail }) => {
                Some(Uncovered::new(*feature, detail.clone(), remedy))
            }
            Err(EswitchError::TableFull { detail }) => {
                let remedy = "use fewer or simpler ACL rules, or fewer VFs";
                Some(Uncovered::new(Feature::TableSpace, detail.clone(), remedy))
            }
            Err(_) => self.refused.take(),
        };
    }

    /// Forgets everything that keeps it waiting.
    pub(super) fn forgive(&mut self, now: u64) {
        self.refused = None;
        self.hold = None;
        self.drifts.clear();
        self.lifecycle.forgive(now);
    }

    /// Whether it may be granted a VF, or keep the one that it has.
    pub(super) fn is_eligible(&self, now: u64, nic_is_well: bool) -> bool {
        let waits = self.lifecycle.vf().is_none()
            && (now < self.lifecycle.not_before() || self.is_unsteady(now) || !nic_is_well);
        self.is_wanted && self.placed.is_ok() && self.hold.is_none() && !waits
    }
}

/// What a status is made of besides the claim.
pub(super) struct Surroundings<'a> {
    pub(super) pf: &'a str,
    pub(super) trouble: Option<&'a str>,
    pub(super) capabilities: &'a Capabilities,
    pub(super) timing: Timing,
    /// Milliseconds: the thread's clock, and the time since 1970 at its zero.
    pub(super) now: u64,
    pub(super) epoch: u64,
}

impl Claim {
    /// Where it is and why, for the API.
    pub(super) fn status(&self, around: &Surroundings<'_>) -> v1::PathStatus {
        let lifecycle = &self.lifecycle;
        let path = path(lifecycle.path());
        let (reason, message, uncovered) = self.reason(around);
        let attested = match (&self.placed, lifecycle.path()) {
            (Ok(_), _) => self.rests_on_words(around.capabilities),
            _ => Vec::new(),
        };
        let mut status = v1::PathStatus {
            path: path.into(),
            since_unix_ms: around.epoch + lifecycle.since(),
            cause: lifecycle.reason().to_owned(),
            reason: reason.into(),
            message,
            uncovered,
            attested,
            counters: Some(self.counters()),
            ..v1::PathStatus::default()
        };
        if let Some(vf) = lifecycle.vf() {
            let pci = self.vf.as_ref().and_then(|vf| vf.pci.clone()).unwrap_or_default();
            status.vf = Some(v1::VfRef { pf: around.pf.to_owned(), index: vf.0.into(), pci });
        }
        let deadline = lifecycle.since()
            + if lifecycle.path() == Path::Draining { around.timing.drain } else { around.timing.attach };
        status.request = self
            .plug
            .request()
            .map(|request| v1::VfRequest { deadline_unix_ms: around.epoch + deadline, ..request });
        status
    }

    /// Features of its policy that the NIC enforces by the operator's word only.
    fn rests_on_words(&self, capabilities: &Capabilities) -> Vec<String> {
        use sluice_policy::config::{Attestable, VlanMode};
        let policy = &self.vnic.policy;
        let needs = |ability: &Attestable| match ability {
            Attestable::MacGuard => !policy.allow_spoofing,
            Attestable::Untagged => policy.vlan == VlanMode::Untagged,
            Attestable::RateFromVm => policy.rate_from_vm.is_some(),
            Attestable::AccessVlan => matches!(policy.vlan, VlanMode::Access(_)),
            Attestable::TunnelVlan => matches!(policy.vlan, VlanMode::Tunnel(_)),
            Attestable::UnknownUnicast => true,
        };
        knowledge::attested(capabilities)
            .into_iter()
            .filter(needs)
            .map(|ability| ability.name().to_owned())
            .collect()
    }

    /// Why it has no VF, in type, in words, and in detail.
    fn reason(&self, around: &Surroundings<'_>) -> (v1::path_status::Reason, String, Vec<v1::Uncovered>) {
        use v1::path_status::Reason;
        let plain = |reason: Reason, message: String| (reason, message, Vec::new());
        match self.lifecycle.path() {
            Path::Hardware => return plain(Reason::Unspecified, String::new()),
            Path::Software => {}
            Path::Programming | Path::Attaching | Path::Draining => {
                return plain(Reason::InTransition, self.lifecycle.reason().to_owned());
            }
        }
        if !self.is_wanted {
            return plain(
                Reason::NotWanted,
                "it does not ask for a VF: give it `sriov` with a weight above 0".to_owned(),
            );
        }
        if let Some(hold) = &self.hold {
            let until = match hold.until {
                None => "until it is released (sluice release)".to_owned(),
                Some(until) => format!("for {} s more", until.saturating_sub(around.now).div_ceil(1000)),
            };
            return plain(Reason::Held, format!("it is held there {until}: {}", hold.reason));
        }
        if let Some(trouble) = around.trouble {
            return plain(Reason::NicUnavailable, trouble.to_owned());
        }
        if let Err(uncovered) = &self.placed {
            let list: Vec<v1::Uncovered> = uncovered.iter().map(uncovered_to_proto).collect();
            let names: Vec<&str> = list.iter().map(|one| one.feature.as_str()).collect();
            let message = format!("{} cannot enforce: {}", around.pf, names.join(", "));
            return (Reason::Uncovered, message, list);
        }
        if self.is_unsteady(around.now) {
            let message = format!(
                "{} did not hold what was programmed {DRIFTS_MAX} times within a minute; find out who changes it, \
                 then `sluice release vnic {}`",
                around.pf, self.vnic.name
            );
            return plain(Reason::Drifted, message);
        }
        if let Some(refused) = &self.refused {
            let message = format!("{} refused: {}", around.pf, refused.text);
            return (Reason::Uncovered, message, vec![uncovered_to_proto(refused)]);
        }
        if around.now < self.lifecycle.not_before() {
            let wait = (self.lifecycle.not_before() - around.now).div_ceil(1000);
            let message = format!(
                "the last grant came to nothing ({}); tried again in {wait} s",
                self.lifecycle.reason()
            );
            return plain(Reason::BackingOff, message);
        }
        plain(
            Reason::NoFreeVf,
            format!(
                "no VF of {} is free for weight {}; make more (sriov_numvfs), or raise its weight",
                around.pf, self.sriov.weight
            ),
        )
    }

    fn counters(&self) -> v1::PathCounters {
        let counters = self.lifecycle.counters();
        let transitions = counters.transitions.iter().map(|((from, to, cause), count)| v1::PathTransitions {
            from: path(*from).into(),
            to: path(*to).into(),
            cause: cause.name().to_owned(),
            count: *count,
        });
        v1::PathCounters {
            transitions: transitions.collect(),
            failures: counters.failures,
            retries: counters.retries,
            forced: counters.forced,
            lost: counters.losses.lost,
            duplicated: counters.losses.duplicated,
            reordered: counters.losses.reordered,
            blackout_ms: counters.losses.blackout,
        }
    }
}

/// A path, for the API.
pub(super) const fn path(path: Path) -> v1::path_status::Path {
    match path {
        Path::Software => v1::path_status::Path::Software,
        Path::Programming => v1::path_status::Path::Programming,
        Path::Attaching => v1::path_status::Path::Attaching,
        Path::Hardware => v1::path_status::Path::Hardware,
        Path::Draining => v1::path_status::Path::Draining,
    }
}

/// What an eSwitch cannot enforce, for the API.
pub fn uncovered_to_proto(uncovered: &Uncovered) -> v1::Uncovered {
    v1::Uncovered {
        feature: uncovered.feature.code().to_owned(),
        text: uncovered.text.clone(),
        remedy: uncovered.remedy.clone(),
    }
}
