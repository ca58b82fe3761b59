//! The engine and the oracle, on generated cases: verdict, ports, bytes, drops, rules and learning.
//!
//! `SLUICE_SEED` replays a run of the flows, `SLUICE_CASES` makes it longer.
//! The suite of all engines (`tests/tests/conformance`) has a lane of this engine too, but wants root.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // figures, for whoever reads the run

use std::collections::BTreeSet;

use sluice_policy::conformance::{Observed, compare, port_id};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings};
use sluice_policy::lower::{assign_ids, lower_with, ports};
use sluice_policy::oracle;
use sluice_user::memory::Probe;
use sluice_user::port::Accepts;

const SETTINGS: u64 = 120;
const FRAMES: u64 = 100;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The engine and the oracle in the same setting.
struct Bench {
    rng: Rng,
    probe: Probe,
    ids: Ids,
}

impl Bench {
    fn new(seed: u64) -> Bench {
        Bench { rng: Rng::new(seed), probe: Probe::new().expect("memory"), ids: Ids::default() }
    }

    /// Brings the engine to a generated configuration.
    fn set(&mut self) -> Scenario {
        let Bench { rng, probe, ids } = self;
        let scenario = scenario(rng);
        assign_ids(&scenario.config, ids).expect("numbers");
        let mut bindings = Bindings::new();
        let mut attached = BTreeSet::new();
        for (ifindex, spec) in (1..).zip(ports(&scenario.config)) {
            if !scenario.state.unattached.contains(&spec.name) {
                attached.insert(port_id(ids, &spec.name));
                bindings.insert(spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false });
            }
        }
        let image = lower_with(&scenario.config, ids, &bindings, &scenario.state.backings).expect("an image");
        probe.configure(&image, &attached, Accepts::default()).expect("ports");
        scenario
    }

    /// Has both decide on a frame, and wants them to agree. What the engine did.
    fn try_frame(&mut self, scenario: &Scenario, ingress: &str, bytes: &[u8], what: &str) -> Observed {
        let Bench { probe, ids, .. } = self;
        probe.adopt(ids, &scenario.state);
        let observed = probe.run(port_id(ids, ingress), bytes).expect("memory");
        let outcome = oracle::evaluate(&scenario.config, &scenario.state, ingress, bytes);
        if let Err(difference) = compare(&scenario.config, ids, ingress, &outcome, &observed) {
            panic!("{what} from {ingress}: {difference}\n{bytes:02x?}");
        }
        observed
    }
}

#[test]
fn the_engine_agrees_with_the_oracle() {
    let mut bench = Bench::new(4);
    let (mut sent, mut learnt, mut rules) = (0, 0, 0);
    for setting in 0..SETTINGS {
        let scenario = bench.set();
        for number in 0..FRAMES {
            let (ingress, bytes) = frame(&mut bench.rng, &scenario);
            let what = format!("setting {setting}, frame {number}");
            let observed = bench.try_frame(&scenario, &ingress, &bytes, &what);
            sent += observed.frames.len();
            learnt += usize::from(observed.learnt.flatten().is_some());
            rules += observed.rules.map_or(0, |rules| rules.len());
        }
        assert_eq!(bench.probe.outstanding(), 0, "setting {setting}: frames are missing");
    }
    let cases = (SETTINGS * FRAMES) as usize;
    assert!(sent > cases / 5, "only {sent} frames of {cases} left");
    assert!(learnt > cases / 50, "only {learnt} addresses of {cases} frames were learnt");
    assert!(rules > cases / 20, "only {rules} rules were hit");
}

/// A frame whose flow is known, and others that are nearly of that flow: each has some bytes changed that the pipeline may go by,
/// or another length.
#[test]
fn a_known_flow_is_no_cover_for_other_frames() {
    let mut bench = Bench::new(from_env("SLUICE_SEED", 5));
    let (mut known, mut others) = (0, 0);
    for setting in 0..from_env("SLUICE_CASES", 24_000) / 400 {
        let scenario = bench.set();
        for number in 0..40 {
            let (ingress, bytes) = frame(&mut bench.rng, &scenario);
            let what = format!("setting {setting}, frame {number}");
            let first = bench.try_frame(&scenario, &ingress, &bytes, &what);
            if first.frames.len() != 1 || bytes.len() < 42 {
                continue;
            }
            let again = bench.try_frame(&scenario, &ingress, &bytes, &format!("{what}, again"));
            assert_eq!(again.frames, first.frames, "{what}");
            known += 1;
            for variant in 0..40 {
                let mut changed = bytes.clone();
                for _ in 0..1 + bench.rng.below(2) {
                    let at = bench.rng.below(48.min(changed.len()));
                    match bench.rng.below(3) {
                        0 => changed[at] ^= 1 << bench.rng.below(8),
                        1 => changed[at] = bench.rng.below(256) as u8,
                        _ => changed[at] = changed[bench.rng.below(changed.len())],
                    }
                }
                if bench.rng.chance(15) {
                    let length = bench.rng.below(changed.len() + 8);
                    changed.resize(length, 0);
                }
                let what = format!("{what}, variant {variant}");
                others += bench.try_frame(&scenario, &ingress, &changed, &what).frames.len();
            }
        }
    }
    println!("{known} flows, {others} copies of frames that were nearly of them");
    assert!(known > 100 && others > 10 * known, "{known} flows, {others} others");
}
