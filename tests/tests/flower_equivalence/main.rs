//! Rules of placed policies in the kernel's own traffic control, on real frames, against the oracle.
//!
//! Placement turns generated policies into flower programs; the encoders of the switchdev back-end write them, just as
//! they are but without `skip_sw`, to veth pairs in the lab that stand for representors. Each generated frame is sent
//! from the far end of its pair and its fate is told from what comes out of all pairs, byte by byte, and from the
//! rules' own counters. Then
//! - what a rule drops, the oracle drops for what the sender may not do;
//! - what a rule sends, the oracle delivers there, with the same bytes, and to nobody else;
//! - what is given to software is right by itself, but most of what rules can decide they must decide;
//! - the model eSwitch (`sluice_eswitch::soft`), on which placement is tested far more widely, does the same.
//!
//! `SLUICE_SEED` replays a run, `SLUICE_CASES` sets the number of frames.

#![forbid(unsafe_code)]
// The seed and what was covered are what one wants to read.
#![allow(clippy::print_stderr)]

mod provoke;
mod setting;
mod tally;
mod wires;

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sluice_eswitch::switchdev::Counters;
use sluice_policy::config::Rate;
use sluice_policy::generate::Rng;
use sluice_policy::oracle::Outcome;
use sluice_policy::placement::Target;
use sluice_tests::lab_guest;

use crate::setting::{ADVERTISEMENT_LENGTH, Case, Setting, is_senders_fault};
use crate::tally::Tally;
use crate::wires::{Fate, Wires};

/// Frames per run, unless told.
const CASES: u64 = 2_160;
/// Frames for one set of policies.
const FRAMES: u64 = 36;
/// Extension headers that the pipeline walks through.
const EXTENSIONS: [u8; 8] = [0, 43, 44, 51, 60, 135, 139, 140];
/// Their lengths in units of eight bytes, the first eight not counted.
const UNITS: [u8; 13] = [0, 1, 2, 7, 14, 15, 18, 19, 20, 31, 63, 127, 255];
/// Disagreements after which there is nothing more to learn.
const FAILURES_MAX: usize = 5;

#[test]
fn rules_in_the_kernel_agree_with_the_oracle_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

fn number(variable: &str, default: impl FnOnce() -> u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number: {text}")),
        Err(_) => Ok(default()),
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn generated_frames_fare_as_the_oracle_says() -> Result<()> {
    lab_guest::require()?;
    let seed = number("SLUICE_SEED", || {
        std::time::UNIX_EPOCH.elapsed().map_or(1, |elapsed| elapsed.as_nanos() as u64)
    })?;
    let wanted = number("SLUICE_CASES", || CASES)?;
    eprintln!("SLUICE_SEED={seed} SLUICE_CASES={wanted}");
    let begin = Instant::now();
    let mut rng = Rng::new(seed);
    let mut wires = Wires::new()?;
    let mut tally = Tally::default();
    while tally.cases < wanted && tally.failures.len() < FAILURES_MAX {
        let setting = Setting::draw(&mut rng)?;
        tally.program(&setting);
        let cases = tally.cases;
        let replay = || format!("SLUICE_SEED={seed} SLUICE_CASES={wanted}, after {cases} cases");
        let programming = Instant::now();
        wires.program(&setting.programs).with_context(replay)?;
        tally.programming += programming.elapsed();
        for _ in 0..FRAMES {
            let case = setting.case(&mut rng)?;
            let real = wires.pass(case.from, &case.frame);
            let (model, outcome) = (setting.model(&case)?, setting.oracle(&case));
            let judged = real.and_then(|real| {
                judge(&setting, &case, &outcome, &real, &model)?;
                tally.count(&setting, &case, &outcome, &real);
                Ok(())
            });
            if let Err(error) = judged {
                tally.failures.push(describe(&setting, &case, &outcome, &model, &error));
            }
        }
        if tally.failures.is_empty() {
            wires.settle().with_context(replay)?;
        }
    }
    eprintln!("{tally}\n{:.1?}", begin.elapsed());
    ensure!(
        tally.failures.is_empty(),
        "replay with SLUICE_SEED={seed} SLUICE_CASES={wanted}\n{}",
        tally.failures.join("\n\n")
    );
    tally.must_have_seen_enough()
}

/// Compares a frame's fate with what the oracle and the model say.
fn judge(setting: &Setting, case: &Case, outcome: &Outcome, real: &Fate, model: &Fate) -> Result<()> {
    if real != model {
        bail!("the kernel's rules and the model differ: {real:02x?} and {model:02x?}");
    }
    if tally::is_malformed(outcome) {
        // Not a matter of policy: no NIC looks at it (docs/eswitch.md). Whoever sent it is no other all the same.
        let is_sent = matches!(real, Fate::Sent(..));
        ensure!(!is_sent || setting.is_own_source(case), "a rule sent what another has sent, and malformed");
        return Ok(());
    }
    match real {
        Fate::Software => {}
        Fate::Dropped => ensure!(is_senders_fault(outcome), "a rule dropped what its sender may send"),
        Fate::Sent(target, bytes) => {
            let port = setting.name(*target).context("it left where nobody is")?;
            ensure!(outcome.dropped.is_none(), "a rule sent to {port} what must be dropped");
            let delivered: Vec<(&String, &Vec<u8>)> = outcome
                .deliveries
                .iter()
                .filter_map(|(port, result)| Some((port, result.as_ref().ok()?)))
                .collect();
            let is_right = matches!(delivered[..], [(to, wanted)] if to == port && wanted == bytes);
            ensure!(is_right, "a rule sent to {port} {bytes:02x?}");
            let is_new = outcome.learnt.as_ref().is_some_and(|station| !setting.is_known(case, station));
            ensure!(!is_new, "a rule sent to {port} what the switch would learn from");
        }
    }
    Ok(())
}

fn describe(
    setting: &Setting,
    case: &Case,
    outcome: &Outcome,
    model: &Fate,
    error: &anyhow::Error,
) -> String {
    let hex: String = case.frame.iter().take(300).map(|byte| format!("{byte:02x}")).collect();
    let steps = outcome.steps.iter();
    let steps: String =
        steps.map(|step| format!("\n    {} {} {}", step.stage.name(), step.port, step.text)).collect();
    let policies = setting.scenario.config.vnics.iter();
    let policies: String = policies.map(|vnic| format!("\n    {vnic:?}")).collect();
    let programs = setting.programs.keys().map(|vf| (*vf, setting.name(Target::Vf(*vf))));
    format!(
        "{error:#}\n  from {} {} bytes {hex}\n  model {model:02x?}\n  oracle{steps}\n  delivers {:02x?}\n  {:?}{policies}\n  {:?}",
        case.ingress,
        case.frame.len(),
        outcome.deliveries,
        setting.scenario.config.switches[0],
        programs.collect::<Vec<_>>(),
    )
}

/// A guard must find what it looks for behind any extension header (RFC 8200, section 4), or leave it to software.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn no_header_hides_a_router_advertisement() -> Result<()> {
    lab_guest::require()?;
    let mut rng = Rng::new(2);
    let mut wires = Wires::new()?;
    let (setting, vf) = setting::guarded(&mut rng)?;
    wires.program(&setting.programs)?;
    let (mut dropped, mut software) = (0, 0);
    let headers =
        EXTENSIONS.into_iter().flat_map(|kind| UNITS.map(|units| (kind, units, ADVERTISEMENT_LENGTH)));
    let cut_off = (4..=ADVERTISEMENT_LENGTH).map(|length| (60, 0, length));
    for (kind, units, length) in headers.chain(cut_off) {
        let case = setting.advertisement(vf, Some((kind, units)), length).context("nobody to talk to")?;
        let what = || format!("{length} bytes behind header {kind} of {units} units");
        let (real, model) = (wires.pass(case.from, &case.frame).with_context(what)?, setting.model(&case)?);
        ensure!(real == model, "{}: {real:02x?}, and the model has {model:02x?}", what());
        match real {
            Fate::Dropped => dropped += 1,
            Fate::Software => software += 1,
            Fate::Sent(..) => bail!("{}: {real:02x?}", what()),
        }
    }
    eprintln!("{dropped} advertisements dropped, {software} left to software");
    ensure!(dropped >= UNITS.len() && software > 0, "{dropped} dropped, {software} left to software");
    wires.settle()
}

/// A bucket is the one part of a policy whose outcome is no function of the frame.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_is_over_the_rate_is_dropped() -> Result<()> {
    const SENT: u64 = 20;
    const PASS_MAX: u64 = 10;
    lab_guest::require()?;
    let mut rng = Rng::new(1);
    let mut wires = Wires::new()?;
    // A frame that a rule sends on.
    let (mut scenario, case) = loop {
        let setting = Setting::draw(&mut rng)?;
        let case = setting.case(&mut rng)?;
        if let (Target::Vf(_), Fate::Sent(..)) = (case.from, setting.model(&case)?) {
            break (setting.scenario, case);
        }
    };
    // A bucket for three of them, which takes almost a second to get room for one more.
    let length = case.frame.len() as u64;
    let rate = Rate { bits_per_second: length * 8, burst_bytes: length * 3 };
    for vnic in &mut scenario.config.vnics {
        vnic.policy.rate_from_vm = Some(rate);
    }
    let setting = Setting::place(scenario)?.context("nothing is placed any more")?;
    let Target::Vf(vf) = case.from else { bail!("{:?} is no VF", case.from) };
    wires.program(&setting.programs)?;
    for _ in 0..SENT {
        wires.send(vf, &case.frame)?;
    }
    let arrived = wires.arrived()?.len() as u64;
    let counters = wires.counters(vf)?;
    ensure!((1..=PASS_MAX).contains(&arrived), "{arrived} of {SENT} frames have passed");
    let wanted = Counters { dropped: SENT - arrived, software: 0, sent: arrived };
    ensure!(counters == wanted, "{arrived} frames have passed, and the rules have counted {counters:?}");
    Ok(())
}
