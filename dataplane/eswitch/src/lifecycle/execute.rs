//! Carries the lifecycle's commands out on an eSwitch, and believes only what it reads back.
//!
//! Mailboxes and caches may answer once from before the last write, so a state counts as seen when two readings in a
//! row show it.

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Program, VfIndex, VfSettings};

use super::Action;
use crate::contract::{Enforced, Eswitch, EswitchError, Observed};

/// Readings until two in a row must have been good.
const READINGS_MAX: usize = 4;

/// Carries an action out, if it is one for the NIC; `None` if it is for a guest or the software path.
pub fn execute<E: Eswitch + ?Sized>(eswitch: &mut E, action: &Action) -> Option<Result<(), EswitchError>> {
    match action {
        Action::Close(vf) => Some(close(eswitch, *vf)),
        Action::Program { vf, program, is_open } => Some(run(eswitch, *vf, program, *is_open)),
        Action::Open { vf, program } => Some(open(eswitch, *vf, program)),
        Action::Clean(vf) => Some(clean(eswitch, *vf)),
        Action::Plug(_) | Action::UseHardware(_) | Action::UseSoftware | Action::Unplug { .. } => None,
    }
}

/// Whether an open VF still holds its program: two readings in a row, at most four in all. Drift is what the last bad
/// one showed.
///
/// # Errors
/// Of class passing or gone if it could not be read; otherwise broken, with the differences.
pub fn check<E: Eswitch + ?Sized>(
    eswitch: &mut E,
    vf: VfIndex,
    program: &Program,
) -> Result<(), EswitchError> {
    see(eswitch, vf, "checking the VF", |observed| {
        if observed.enabled { held(observed, program) } else { Err("its link is forced down".into()) }
    })
}

fn close<E: Eswitch + ?Sized>(eswitch: &mut E, vf: VfIndex) -> Result<(), EswitchError> {
    absent_is_fine(eswitch.disable(vf))?;
    absent_is_fine(see(eswitch, vf, "closing the VF", is_closed))
}

fn run<E: Eswitch + ?Sized>(
    eswitch: &mut E,
    vf: VfIndex,
    program: &Program,
    is_open: bool,
) -> Result<(), EswitchError> {
    eswitch.program(vf, program)?;
    see(eswitch, vf, "programming the VF", |observed| {
        if !is_open {
            is_closed(observed)?;
        }
        held(observed, program)
    })
}

fn open<E: Eswitch + ?Sized>(eswitch: &mut E, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
    eswitch.enable(vf)?;
    check(eswitch, vf, program)
}

fn clean<E: Eswitch + ?Sized>(eswitch: &mut E, vf: VfIndex) -> Result<(), EswitchError> {
    absent_is_fine(eswitch.unprogram(vf))?;
    absent_is_fine(see(eswitch, vf, "unprogramming the VF", |observed| {
        is_closed(observed)?;
        let is_empty = match &observed.enforced {
            // Drivers have spoof checking on in new VFs, so it may be on: it only forbids. And some know no way back to "no
            // address", which does no harm in a closed VF.
            Enforced::Legacy(settings) => {
                let plain = VfSettings { spoofchk: false, mac: MacAddr::default(), ..*settings };
                plain == VfSettings::default()
            }
            Enforced::Switchdev { program, .. } => program.rules().is_empty(),
        };
        if is_empty { Ok(()) } else { Err("it still has a part of its program".into()) }
    }))
}

/// A VF that does not exist is closed and clean.
fn absent_is_fine(result: Result<(), EswitchError>) -> Result<(), EswitchError> {
    match result {
        Err(EswitchError::NoSuchVf(_)) => Ok(()),
        result => result,
    }
}

fn is_closed(observed: &Observed) -> Result<(), String> {
    if observed.enabled { Err("its link is still up".into()) } else { Ok(()) }
}

fn held(observed: &Observed, program: &Program) -> Result<(), String> {
    let differences: Vec<String> = observed.differences(program).iter().map(ToString::to_string).collect();
    if differences.is_empty() { Ok(()) } else { Err(differences.join("; ")) }
}

/// Reads until two readings in a row are as they should be.
fn see<E: Eswitch + ?Sized>(
    eswitch: &mut E,
    vf: VfIndex,
    operation: &str,
    judge: impl Fn(&Observed) -> Result<(), String>,
) -> Result<(), EswitchError> {
    let (mut good_in_a_row, mut complaint) = (0, String::new());
    for _ in 0..READINGS_MAX {
        let observed = match eswitch.read_back(vf) {
            Ok(observed) => observed,
            // What was wrong is worth more than why it cannot be read again.
            Err(_) if !complaint.is_empty() => break,
            Err(error) => return Err(error),
        };
        match judge(&observed) {
            Ok(()) => good_in_a_row += 1,
            Err(text) => {
                good_in_a_row = 0;
                complaint = text;
            }
        }
        if good_in_a_row == 2 {
            return Ok(());
        }
    }
    Err(EswitchError::Broken { operation: operation.into(), detail: format!("{vf}: {complaint}") })
}
