//! Failures by seed, over any eSwitch: what NICs, firmware and other people do to a program that trusts them.
//!
//! Every fault is drawn from one seed, so a run is replayed by its number. [`Chaos::calm`] ends the faults; then a
//! program that keeps the contract must find its way. A NIC that lied for ever could not be helped: a stale answer is
//! never given twice in a row for one VF.

use std::collections::{BTreeMap, BTreeSet};

use sluice_policy::generate::Rng;
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Capabilities, FlowerProgram, Program, VfSettings};

use crate::contract::{Enforced, Eswitch, EswitchError, Observed, Vf, VfIndex, VfStats};

/// So many writes back a stale reading may be.
const HISTORY_MAX: usize = 6;

/// How often each fault happens, in percent of the calls that it can happen to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// An error, and nothing was done.
    pub error_before: usize,
    /// An error, and all was done.
    pub error_after: usize,
    /// An error, and a part was done.
    pub error_halfway: usize,
    /// Success, and nothing was done.
    pub lost_effect: usize,
    /// A reading from before one of the last writes.
    pub stale_reading: usize,
    /// No room.
    pub table_full: usize,
    /// The device goes, for some calls; when it is back, its VFs are new or as they were.
    pub device_gone: usize,
    /// A VF is reset behind our back: closed, and everything is forgotten.
    pub reset: usize,
    /// Somebody else weakens a VF's settings.
    pub tamper: usize,
}

impl Faults {
    /// All of them, each in so many percent.
    pub const fn all(percent: usize) -> Self {
        Faults {
            error_before: percent,
            error_after: percent,
            error_halfway: percent,
            lost_effect: percent,
            stale_reading: percent,
            table_full: percent,
            device_gone: percent,
            reset: percent,
            tamper: percent,
        }
    }
}

/// An eSwitch that fails.
#[derive(Clone, Debug)]
pub struct Chaos<E> {
    inner: E,
    rng: Rng,
    faults: Faults,
    /// Calls until the device is back.
    gone_for: usize,
    /// What each VF was before the last writes to it, latest last.
    before: BTreeMap<VfIndex, Vec<Observed>>,
    /// VFs whose last reading was stale.
    lied: BTreeSet<VfIndex>,
    /// VFs that were touched behind our back, and whether a true reading has been given since.
    touched: BTreeMap<VfIndex, bool>,
    injected: u64,
}

/// What happens to a write.
enum Fate {
    Fails,
    FailsAfter,
    FailsHalfway,
    IsLost,
    Succeeds,
}

impl<E: Eswitch> Chaos<E> {
    /// Faults over `inner`, as `seed` has it.
    pub const fn new(inner: E, seed: u64, faults: Faults) -> Self {
        Chaos {
            inner,
            rng: Rng::new(seed),
            faults,
            gone_for: 0,
            before: BTreeMap::new(),
            lied: BTreeSet::new(),
            touched: BTreeMap::new(),
            injected: 0,
        }
    }

    /// No more faults; the device is back.
    pub fn calm(&mut self) {
        self.faults = Faults::default();
        self.gone_for = 0;
    }

    /// The eSwitch inside.
    pub const fn inner(&self) -> &E {
        &self.inner
    }

    /// The same, to change the world from outside.
    pub const fn inner_mut(&mut self) -> &mut E {
        &mut self.inner
    }

    /// Faults so far.
    pub const fn injected(&self) -> u64 {
        self.injected
    }

    /// Whether the VF was touched behind our back and not closed or programmed since; and if so, whether a true
    /// reading has been given meanwhile.
    pub fn touched(&self, vf: VfIndex) -> Option<bool> {
        self.touched.get(&vf).copied()
    }

    /// The VF is safe again: to be called by whoever keeps the books.
    pub fn forget_touched(&mut self, vf: VfIndex) {
        self.touched.remove(&vf);
    }

    fn chance(&mut self, percent: usize) -> bool {
        let happens = percent > 0 && self.rng.chance(percent);
        self.injected += u64::from(happens);
        happens
    }

    /// Before each call: is the device there, and has somebody touched its VFs?
    fn weather(&mut self) -> Result<(), EswitchError> {
        let vfs: Vec<VfIndex> = self.inner.vfs()?.iter().map(|vf| vf.index).collect();
        if self.gone_for == 0 && self.chance(self.faults.device_gone) {
            self.gone_for = 1 + self.rng.below(6);
            if self.rng.chance(50) {
                for vf in &vfs {
                    self.touch(*vf, |inner, vf| inner.unprogram(vf));
                }
            }
        }
        if self.gone_for > 0 {
            self.gone_for -= 1;
            return Err(EswitchError::DeviceGone { detail: "No such device".into() });
        }
        if vfs.is_empty() {
            return Ok(());
        }
        let vf = *self.rng.pick(&vfs);
        if self.chance(self.faults.reset) {
            self.touch(vf, |inner, vf| inner.unprogram(vf));
        }
        if self.chance(self.faults.tamper) {
            let which = self.rng.below(3);
            self.touch(vf, |inner, vf| match inner.read_back(vf)?.enforced {
                Enforced::Legacy(settings) => inner.program(vf, &Program::Legacy(weakened(settings, which))),
                Enforced::Switchdev { program, .. } => {
                    let rules = program.rules().iter().skip(1).cloned().collect();
                    inner.program(vf, &Program::Switchdev(FlowerProgram::new(rules)))
                }
            });
        }
        Ok(())
    }

    /// Somebody else changes a VF behind our back; what he does not succeed in is his affair.
    pub fn touch(&mut self, vf: VfIndex, change: impl FnOnce(&mut E, VfIndex) -> Result<(), EswitchError>) {
        if change(&mut self.inner, vf).is_ok() {
            self.touched.insert(vf, false);
        }
    }

    fn fate(&mut self) -> Fate {
        if self.chance(self.faults.error_before) {
            Fate::Fails
        } else if self.chance(self.faults.error_after) {
            Fate::FailsAfter
        } else if self.chance(self.faults.error_halfway) {
            Fate::FailsHalfway
        } else if self.chance(self.faults.lost_effect) {
            Fate::IsLost
        } else {
            Fate::Succeeds
        }
    }

    fn failure(&mut self, operation: &str) -> EswitchError {
        if self.rng.chance(50) {
            EswitchError::Busy { detail: "Device or resource busy".into() }
        } else {
            EswitchError::Broken { operation: operation.into(), detail: "Input/output error".into() }
        }
    }

    /// A write that is done, or not, or in part.
    fn write(
        &mut self,
        operation: &str,
        vf: Option<VfIndex>,
        whole: impl Fn(&mut E) -> Result<(), EswitchError>,
        part: impl Fn(&mut E, &mut Rng) -> Result<(), EswitchError>,
    ) -> Result<(), EswitchError> {
        self.weather()?;
        if let Some(vf) = vf
            && let Ok(observed) = self.inner.read_back(vf)
        {
            let history = self.before.entry(vf).or_default();
            if history.len() == HISTORY_MAX {
                history.remove(0);
            }
            history.push(observed);
        }
        match self.fate() {
            Fate::Succeeds => whole(&mut self.inner),
            Fate::IsLost => Ok(()),
            Fate::Fails => Err(self.failure(operation)),
            Fate::FailsAfter => {
                whole(&mut self.inner)?;
                Err(self.failure(operation))
            }
            Fate::FailsHalfway => {
                part(&mut self.inner, &mut self.rng)?;
                Err(self.failure(operation))
            }
        }
    }
}

fn weakened(settings: VfSettings, which: usize) -> VfSettings {
    match which {
        0 => VfSettings { spoofchk: false, ..settings },
        1 => VfSettings { vlan: None, ..settings },
        _ => VfSettings { trust: true, mac: MacAddr([2, 0, 0, 0, 0xbb, 1]), ..settings },
    }
}

/// Some settings of one, some of the other.
fn mixture(old: VfSettings, new: VfSettings, rng: &mut Rng) -> VfSettings {
    let mut coin = || rng.chance(50);
    VfSettings {
        mac: if coin() { old.mac } else { new.mac },
        vlan: if coin() { old.vlan } else { new.vlan },
        spoofchk: if coin() { old.spoofchk } else { new.spoofchk },
        trust: if coin() { old.trust } else { new.trust },
        min_rate_mbps: if coin() { old.min_rate_mbps } else { new.min_rate_mbps },
        max_rate_mbps: if coin() { old.max_rate_mbps } else { new.max_rate_mbps },
        query_rss: if coin() { old.query_rss } else { new.query_rss },
    }
}

fn half_programmed<E: Eswitch>(
    inner: &mut E,
    vf: VfIndex,
    program: &Program,
    rng: &mut Rng,
) -> Result<(), EswitchError> {
    let half = match (inner.read_back(vf)?.enforced, program) {
        (Enforced::Legacy(old), Program::Legacy(new)) => Program::Legacy(mixture(old, *new, rng)),
        (_, Program::Switchdev(new)) => {
            let rules = new.rules()[..rng.below(new.rules().len() + 1)].to_vec();
            Program::Switchdev(FlowerProgram::new(rules))
        }
        _ => return Err(EswitchError::WrongMode),
    };
    inner.program(vf, &half)
}

impl<E: Eswitch> Eswitch for Chaos<E> {
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError> {
        self.weather()?;
        self.inner.capabilities()
    }

    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError> {
        self.weather()?;
        self.inner.vfs()
    }

    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
        if self.chance(self.faults.table_full) {
            return Err(EswitchError::TableFull { detail: "No space left on device".into() });
        }
        self.write(
            "programming",
            Some(vf),
            |inner| inner.program(vf, program),
            |inner, rng| half_programmed(inner, vf, program, rng),
        )
    }

    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError> {
        self.weather()?;
        if self.chance(self.faults.error_before) {
            return Err(self.failure("reading"));
        }
        if !self.lied.contains(&vf) && self.before.contains_key(&vf) && self.chance(self.faults.stale_reading)
        {
            self.lied.insert(vf);
            return Ok(self.rng.pick(&self.before[&vf]).clone());
        }
        self.lied.remove(&vf);
        if let Some(seen) = self.touched.get_mut(&vf) {
            *seen = true;
        }
        self.inner.read_back(vf)
    }

    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError> {
        self.weather()?;
        self.inner.stats(vf)
    }

    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        // Half of it: the contract has the VF closed first.
        self.write("unprogramming", Some(vf), |inner| inner.unprogram(vf), |inner, _| inner.disable(vf))
    }

    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.write("enabling", Some(vf), |inner| inner.enable(vf), |inner, _| inner.enable(vf))
    }

    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.write("disabling", Some(vf), |inner| inner.disable(vf), |_, _| Ok(()))
    }

    fn sync_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError> {
        let half: BTreeSet<MacAddr> = macs.iter().take(macs.len() / 2).copied().collect();
        self.write(
            "setting the unicast filter",
            None,
            |inner| inner.sync_unicast_filter(macs),
            |inner, _| inner.sync_unicast_filter(&half),
        )
    }

    fn writes(&self) -> u64 {
        self.inner.writes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soft::{Flaws, Soft};
    use sluice_policy::placement::Evidence;

    fn soft() -> Soft {
        let capabilities =
            Capabilities { mac_guard: Evidence::Probed, max_vfs: 2, ..Capabilities::default() };
        Soft::new(capabilities, 2, Flaws::default())
    }

    fn guarded() -> Program {
        Program::Legacy(VfSettings { mac: MacAddr([2; 6]), spoofchk: true, ..VfSettings::default() })
    }

    /// What a run of calls says, as text.
    fn story(seed: u64, faults: Faults) -> Vec<String> {
        let mut chaos = Chaos::new(soft(), seed, faults);
        let vf = VfIndex(0);
        let mut story = Vec::new();
        for _ in 0..50 {
            story.push(format!("{:?}", chaos.program(vf, &guarded())));
            story.push(format!("{:?}", chaos.enable(vf)));
            story.push(format!("{:?}", chaos.read_back(vf)));
            story.push(format!("{:?}", chaos.disable(vf)));
        }
        story
    }

    #[test]
    fn the_seed_is_the_whole_story() {
        let faults = Faults::all(10);
        assert_eq!(story(7, faults), story(7, faults));
        assert_ne!(story(7, faults), story(8, faults));
        assert_eq!(story(7, Faults::default()), story(8, Faults::default()));
    }

    #[test]
    fn each_fault_is_what_it_is_called() {
        let vf = VfIndex(0);
        let with = |faults| Chaos::new(soft(), 1, faults);
        let enabled = |chaos: &Chaos<Soft>| chaos.inner().truth(vf).is_some_and(|truth| truth.enabled);

        let mut before = with(Faults { error_before: 100, ..Faults::default() });
        assert!(before.enable(vf).is_err() && !enabled(&before));
        let mut after = with(Faults { error_after: 100, ..Faults::default() });
        assert!(after.enable(vf).is_err() && enabled(&after));
        let mut lost = with(Faults { lost_effect: 100, ..Faults::default() });
        assert!(lost.enable(vf).is_ok() && !enabled(&lost));
        let mut full = with(Faults { table_full: 100, ..Faults::default() });
        assert!(matches!(full.program(vf, &guarded()), Err(EswitchError::TableFull { .. })));
        let mut gone = with(Faults { device_gone: 100, ..Faults::default() });
        assert!(matches!(gone.read_back(vf), Err(EswitchError::DeviceGone { .. })));
        gone.calm();
        assert!(gone.read_back(vf).is_ok());

        let mut stale = with(Faults { stale_reading: 100, ..Faults::default() });
        stale.enable(vf).expect("no fault of writing");
        assert_eq!(stale.read_back(vf).map(|observed| observed.enabled), Ok(false));
        assert_eq!(stale.read_back(vf).map(|observed| observed.enabled), Ok(true), "never twice in a row");

        let mut tampered = with(Faults { tamper: 100, ..Faults::default() });
        tampered.program(vf, &guarded()).expect("no fault of writing");
        for _ in 0..20 {
            tampered.read_back(vf).expect("no fault of reading");
        }
        assert_ne!(tampered.inner().truth(vf).map(|truth| truth.differences(&guarded())), Some(Vec::new()));
        assert_eq!(tampered.touched(vf), Some(true));
    }
}
