//! What a run has seen, and whether that is enough to prove something.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use sluice_pipeline::Stage;
use sluice_policy::oracle::Outcome;
use sluice_policy::placement::Target;

use crate::setting::{Case, Setting};
use crate::wires::Fate;

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) cases: u64,
    programs: u64,
    rules: u64,
    pub(crate) programming: Duration,
    from_wire: u64,
    malformed: u64,
    dropped: u64,
    sent_to_wire: u64,
    sent_to_vfs: u64,
    /// Of the last two, with a tag more or less than before.
    retagged: u64,
    software: u64,
    decidable: u64,
    /// Of these, decided by rules.
    decided: u64,
    pub(crate) failures: Vec<String>,
}

/// Whether the pipeline drops it before it looks at any policy.
pub(crate) fn is_malformed(outcome: &Outcome) -> bool {
    outcome.dropped.is_some() && outcome.steps.last().is_some_and(|step| step.stage == Stage::Parse)
}

impl Tally {
    pub(crate) fn program(&mut self, setting: &Setting) {
        self.programs += setting.programs.len() as u64;
        self.rules += setting.programs.values().map(|program| program.rules().len() as u64).sum::<u64>();
    }

    pub(crate) fn count(&mut self, setting: &Setting, case: &Case, outcome: &Outcome, real: &Fate) {
        self.cases += 1;
        self.from_wire += u64::from(case.from == Target::Uplink);
        if is_malformed(outcome) {
            self.malformed += 1;
            return;
        }
        match real {
            Fate::Dropped => self.dropped += 1,
            Fate::Software => self.software += 1,
            Fate::Sent(Target::Uplink, _) => self.sent_to_wire += 1,
            Fate::Sent(Target::Vf(_), _) => self.sent_to_vfs += 1,
        }
        if let Fate::Sent(_, bytes) = real {
            self.retagged += u64::from(bytes.len() != case.frame.len());
        }
        if setting.is_decidable(case, outcome) {
            self.decidable += 1;
            self.decided += u64::from(*real != Fate::Software);
        }
    }

    /// A run that compared too little proves too little.
    pub(crate) fn must_have_seen_enough(&self) -> Result<()> {
        let share = |part: u64, percent: u64| part * 100 >= self.cases * percent;
        ensure!(share(self.from_wire, 5), "only {} frames came from the wire", self.from_wire);
        ensure!(share(self.dropped, 5), "only {} frames were dropped by rules", self.dropped);
        ensure!(share(self.sent_to_wire, 1), "only {} frames were sent to the wire", self.sent_to_wire);
        ensure!(share(self.sent_to_vfs, 1), "only {} frames were sent to VFs", self.sent_to_vfs);
        ensure!(share(self.decidable, 20), "rules can decide only {} cases", self.decidable);
        ensure!(
            self.decided * 100 >= self.decidable * 60,
            "rules have decided only {} of {} cases that they can decide",
            self.decided,
            self.decidable
        );
        Ok(())
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} cases under {} programs of {} rules (written in {:.1?}); {} from the wire, {} malformed",
            self.cases, self.programs, self.rules, self.programming, self.from_wire, self.malformed
        )?;
        write!(
            f,
            "dropped {}, sent to the wire {}, to VFs {} ({} with another tag), left to software {}; rules decided {} of {} that they can",
            self.dropped,
            self.sent_to_wire,
            self.sent_to_vfs,
            self.retagged,
            self.software,
            self.decided,
            self.decidable
        )
    }
}
