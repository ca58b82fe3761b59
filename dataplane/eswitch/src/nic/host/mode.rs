//! Changing the mode of an eSwitch and the number of its VFs, in the order that the NIC wants, with a way back.
//!
//! What is to be done is planned first ([`plan`]), without loops: at most six steps there, and as many back, so that it ends whatever a driver does.

use std::thread;
use std::time::{Duration, Instant};

use sluice_policy::placement::{Feature, Mode};

use super::{Backend, HostNic, look};
use crate::contract::{Enforced, EswitchError, VfIndex};
use crate::legacy::errors;
use crate::nic::Nic;
use crate::quirks::{ModeOrder, Quirk};
use crate::switchdev::devlink::EswitchMode;

/// How long drivers may take until the representors of new VFs are there.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const PERIOD: Duration = Duration::from_millis(20);

/// A state of the eSwitch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    mode: EswitchMode,
    vfs: u16,
}

/// One thing to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Write `sriov_numvfs`.
    Vfs(u16),
    /// Legacy mode.
    Legacy,
    /// Switchdev mode, unless it is; with traffic held, or where there is no such thing, without.
    Switchdev,
    /// Close all VFs.
    Close,
    /// Let traffic go, where it is held.
    Release,
}

/// From one state to another.
fn plan(order: ModeOrder, from: State, mode: Mode, vfs: u16) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut now = from.vfs;
    let set_vfs = |steps: &mut Vec<Step>, now: &mut u16, count: u16| {
        // The kernel goes from one number to another only through none.
        if *now != count && *now != 0 {
            steps.push(Step::Vfs(0));
        }
        if *now != count && count != 0 {
            steps.push(Step::Vfs(count));
        }
        *now = count;
    };
    let is_flip = from.mode.mode() != mode;
    match (mode, order) {
        _ if !is_flip && from.vfs == vfs => {}
        // Some drivers leave the mode with the last VF, so it is seen to even where it was right.
        (Mode::Switchdev, ModeOrder::WithoutVfs) => {
            set_vfs(&mut steps, &mut now, 0);
            steps.push(Step::Switchdev);
        }
        (Mode::Switchdev, ModeOrder::WithVfs) => {
            set_vfs(&mut steps, &mut now, vfs);
            steps.push(Step::Switchdev);
        }
        (Mode::Legacy, _) if !is_flip => {}
        (Mode::Legacy, ModeOrder::WithoutVfs) => {
            set_vfs(&mut steps, &mut now, 0);
            steps.push(Step::Legacy);
        }
        (Mode::Legacy, ModeOrder::WithVfs) => steps.push(Step::Legacy),
    }
    set_vfs(&mut steps, &mut now, vfs);
    if !steps.is_empty() && vfs != 0 {
        steps.push(Step::Close);
    }
    if mode == Mode::Switchdev && (from.mode == EswitchMode::Held || !steps.is_empty()) {
        steps.push(Step::Release);
    }
    steps
}

impl HostNic {
    /// Brings mode and number of VFs to what is wanted; or back to what they were, if that fails.
    pub(super) fn change_to(&mut self, mode: Mode, vfs: u16) -> Result<(), EswitchError> {
        let before = self.state()?;
        let order = self.mode_order();
        let steps = plan(order, before, mode, vfs);
        if steps.is_empty() {
            return Ok(());
        }
        self.refuse_if_in_use()?;
        let Err(error) = self.run(&steps).and_then(|()| self.verify(mode, vfs)) else { return Ok(()) };
        // What is back may be less than what was: programs are lost in any case.
        match self.state().and_then(|now| self.run(&plan(order, now, before.mode.mode(), before.vfs))) {
            Ok(()) => Err(error),
            Err(unwinding) => Err(EswitchError::Broken {
                operation: format!("putting {} back into its mode after a failure", self.netdev()),
                detail: format!("{unwinding}; the failure was: {error}"),
            }),
        }
    }

    fn mode_order(&self) -> ModeOrder {
        let driver = self.device.driver().unwrap_or_default();
        Quirk::of(&driver, self.device.pci_id()).map_or(ModeOrder::WithoutVfs, Quirk::mode_order)
    }

    /// Mode and number of VFs now, with the right back-end for them.
    fn state(&mut self) -> Result<State, EswitchError> {
        let (device, netdev) = self.find().ok_or_else(|| EswitchError::DeviceGone {
            detail: format!("{} is gone", self.seen.netdev.name),
        })?;
        let now = look(&device, netdev, &mut self.devlink)?;
        let state = State { mode: now.mode, vfs: now.vf_count };
        let is_new = now.node != self.seen.node || now.netdev.ifindex != self.seen.netdev.ifindex;
        self.note(device, now, is_new)?;
        Ok(state)
    }

    /// VFs go with their guests' traffic when the number or the mode changes; those of ours are to be revoked first.
    fn refuse_if_in_use(&mut self) -> Result<(), EswitchError> {
        for vf in self.eswitch().vfs()? {
            let is_ours = match &mut self.backend {
                Backend::Legacy(legacy) => legacy.is_programmed(vf.index),
                Backend::Switchdev(_) => match self.eswitch().read_back(vf.index)?.enforced {
                    Enforced::Switchdev { program, .. } => !program.rules().is_empty(),
                    Enforced::Legacy(_) => false,
                },
            };
            if is_ours {
                let (vf, netdev) = (vf.index, self.netdev());
                let detail =
                    format!("{vf} of {netdev} runs a program; give it back before the VFs are removed");
                return Err(EswitchError::Busy { detail });
            }
        }
        Ok(())
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), EswitchError> {
        steps.iter().try_for_each(|step| self.step(*step))
    }

    fn step(&mut self, step: Step) -> Result<(), EswitchError> {
        match step {
            Step::Vfs(count) => self.write_vf_count(count),
            Step::Legacy => self.write_mode(EswitchMode::Legacy),
            Step::Switchdev if self.state()?.mode.mode() == Mode::Switchdev => Ok(()),
            Step::Switchdev => match self.write_mode(EswitchMode::Held) {
                // Older kernels do not know the mode, and most drivers have not got it.
                Err(EswitchError::Uncovered { .. }) => self.write_mode(EswitchMode::Switchdev),
                result => result,
            },
            Step::Release => match self.state()?.mode {
                EswitchMode::Held => self.write_mode(EswitchMode::Switchdev),
                EswitchMode::Switchdev | EswitchMode::Legacy => Ok(()),
            },
            Step::Close => self.close_all(),
        }
    }

    fn write_vf_count(&mut self, count: u16) -> Result<(), EswitchError> {
        // Without drivers, new VFs are closed where they have no link state, and nobody uses them anywhere.
        if count != 0 && self.device.is_pci() && self.device.autoprobe() {
            self.writes += 1;
            let written = self.device.set_autoprobe(false);
            written.map_err(|error| errors::of_sysfs("sriov_drivers_autoprobe", &error))?;
        }
        self.writes += 1;
        self.device.set_vf_count(count).map_err(|error| errors::of_sysfs("sriov_numvfs", &error))
    }

    fn write_mode(&mut self, mode: EswitchMode) -> Result<(), EswitchError> {
        let handle = super::handle(&self.device);
        let Some(devlink) = &mut self.devlink else {
            let detail = "the kernel has no devlink, and so no other mode than legacy".to_owned();
            return Err(EswitchError::Uncovered { feature: Feature::Offload, detail });
        };
        self.writes += 1;
        match devlink.set_mode(&handle, mode) {
            Ok(()) => self.state().map(drop),
            Err(refusal) => Err(errors::of_mode(&refusal, self.device.node().is_some())),
        }
    }

    /// Closes all VFs; in switchdev mode, when their representors have come.
    fn close_all(&mut self) -> Result<(), EswitchError> {
        let wanted = usize::from(self.state()?.vfs);
        let deadline = Instant::now() + PATIENCE;
        let vfs: Vec<VfIndex> = loop {
            let vfs = self.eswitch().vfs()?;
            if vfs.len() == wanted {
                break vfs.into_iter().map(|vf| vf.index).collect();
            }
            if Instant::now() > deadline {
                let detail = format!("{} of {wanted} VFs have representors", vfs.len());
                return Err(EswitchError::Busy { detail });
            }
            thread::sleep(PERIOD);
        };
        vfs.into_iter().try_for_each(|vf| self.eswitch().disable(vf))
    }

    fn verify(&mut self, mode: Mode, vfs: u16) -> Result<(), EswitchError> {
        let now = self.state()?;
        if now.vfs == vfs && (now.mode == mode.into()) {
            return Ok(());
        }
        let detail = format!("it was told {mode:?} with {vfs} VFs, and is {:?} with {}", now.mode, now.vfs);
        Err(EswitchError::Broken { operation: format!("changing the mode of {}", self.netdev()), detail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EswitchMode::Held;
    use ModeOrder::{WithVfs, WithoutVfs};
    use Step::{Close, Legacy, Release, Switchdev, Vfs};

    fn steps(order: ModeOrder, from: (EswitchMode, u16), mode: Mode, vfs: u16) -> Vec<Step> {
        plan(order, State { mode: from.0, vfs: from.1 }, mode, vfs)
    }

    #[test]
    fn nothing_is_done_where_nothing_is_to_be_done() {
        for order in [WithoutVfs, WithVfs] {
            assert_eq!(steps(order, (EswitchMode::Legacy, 3), Mode::Legacy, 3), []);
            assert_eq!(steps(order, (EswitchMode::Switchdev, 0), Mode::Switchdev, 0), []);
            assert_eq!(steps(order, (Held, 3), Mode::Switchdev, 3), [Release]);
        }
    }

    #[test]
    fn vfs_are_made_before_or_after_the_mode() {
        let to_switchdev = |order| steps(order, (EswitchMode::Legacy, 2), Mode::Switchdev, 3);
        assert_eq!(to_switchdev(WithoutVfs), [Vfs(0), Switchdev, Vfs(3), Close, Release]);
        assert_eq!(to_switchdev(WithVfs), [Vfs(0), Vfs(3), Switchdev, Close, Release]);
        let more = |order| steps(order, (EswitchMode::Switchdev, 2), Mode::Switchdev, 3);
        assert_eq!(more(WithoutVfs), [Vfs(0), Switchdev, Vfs(3), Close, Release]);
        assert_eq!(more(WithVfs), [Vfs(0), Vfs(3), Switchdev, Close, Release]);
        let to_legacy = |order| steps(order, (EswitchMode::Switchdev, 3), Mode::Legacy, 3);
        assert_eq!(to_legacy(WithoutVfs), [Vfs(0), Legacy, Vfs(3), Close]);
        assert_eq!(to_legacy(WithVfs), [Legacy, Close]);
        assert_eq!(steps(WithoutVfs, (EswitchMode::Legacy, 0), Mode::Legacy, 3), [Vfs(3), Close]);
    }

    #[test]
    fn traffic_that_is_held_is_let_go_last() {
        for order in [WithoutVfs, WithVfs] {
            for from in [EswitchMode::Legacy, EswitchMode::Switchdev, Held] {
                for (before, after) in [(0, 0), (0, 2), (2, 0), (2, 2), (2, 5)] {
                    for mode in [Mode::Legacy, Mode::Switchdev] {
                        let steps = steps(order, (from, before), mode, after);
                        assert!(steps.len() <= 6, "{steps:?}");
                        let may_be_held =
                            mode == Mode::Switchdev && (steps.contains(&Switchdev) || from == Held);
                        assert_eq!(steps.last() == Some(&Release), may_be_held, "{steps:?}");
                    }
                }
            }
        }
    }
}
