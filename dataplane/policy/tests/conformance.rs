//! The oracle against the native pipeline, on generated configurations and frames.
//!
//! `SLUICE_SEED` replays a run, `SLUICE_CASES` makes it longer.

use sluice_pipeline::Verdict;
use sluice_policy::conformance::{NO_PORT, compare, port_id};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::ids::Ids;
use sluice_policy::lower::{assign_ids, lower_with};
use sluice_policy::oracle::{Outcome, evaluate};
use sluice_policy::sim::{Run, Simulator, TagPlace};

const FRAMES_PER_SCENARIO: usize = 25;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The time makes a new seed for each run; what failed is replayed by number.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    from_env("SLUICE_SEED", now.as_nanos() as u64)
}

#[test]
#[allow(clippy::print_stderr)] // the seed is for whoever replays the run
fn the_pipeline_does_what_the_oracle_says() {
    let (seed, cases) = (seed(), from_env("SLUICE_CASES", 60_000) as usize);
    eprintln!("SLUICE_SEED={seed} SLUICE_CASES={cases}");
    let mut rng = Rng::new(seed);
    let mut failures = 0;
    for number in 0..cases.div_ceil(FRAMES_PER_SCENARIO) {
        let scenario = scenario(&mut rng);
        let mut ids = Ids::default();
        assign_ids(&scenario.config, &mut ids).expect("a generated configuration fits");
        let image = lower_with(&scenario.config, &ids, &scenario.bindings(), &scenario.state.backings)
            .expect("a generated configuration is valid");
        let mut simulator = Simulator::new(image);
        for index in 0..FRAMES_PER_SCENARIO {
            let (ingress, bytes) = frame(&mut rng, &scenario);
            let outcome = evaluate(&scenario.config, &scenario.state, &ingress, &bytes);
            if let Err(text) = check(&mut simulator, &scenario, &ids, &ingress, &bytes, &outcome) {
                failures += 1;
                if failures <= 5 {
                    report(&scenario, &ids, &ingress, &bytes, &outcome, &format!("{number}.{index}: {text}"));
                }
            }
        }
    }
    assert_eq!(failures, 0, "of {cases} cases; replay with SLUICE_SEED={seed} SLUICE_CASES={cases}");
}

/// Runs one frame through every view of the pipeline, each with the same state to begin with.
fn check(
    simulator: &mut Simulator,
    scenario: &Scenario,
    ids: &Ids,
    ingress: &str,
    bytes: &[u8],
    outcome: &Outcome,
) -> Result<(), String> {
    let id = port_id(ids, ingress);
    // The second time, verdicts come from the cache.
    for place in [TagPlace::Inline, TagPlace::Beside] {
        simulator.adopt(ids, &scenario.state);
        let run = simulator.run(id, bytes, place);
        compare(&scenario.config, ids, ingress, outcome, &run.observed())
            .map_err(|text| format!("{place:?}: {text}"))?;
        compare_stages(outcome, &run).map_err(|text| format!("{place:?}: {text}"))?;
    }
    simulator.adopt(ids, &scenario.state);
    let run = simulator.run_partial(id, bytes);
    if run.verdict == Verdict::Defer {
        let silent =
            run.drops.is_empty() && run.frames.is_empty() && run.rules.is_empty() && run.learnt.is_empty();
        return if silent { Ok(()) } else { Err(format!("deferred, but not without effect: {run:?}")) };
    }
    compare(&scenario.config, ids, ingress, outcome, &run.observed())
        .map_err(|text| format!("partial: {text}"))
}

/// The stages up to the choice of destinations, and after it those of a single destination.
fn compare_stages(outcome: &Outcome, run: &Run) -> Result<(), String> {
    let wanted: Vec<_> = outcome.steps.iter().map(|step| step.stage).collect();
    let is_flood = run.verdict == Verdict::Flood;
    let until = |stages: &[sluice_pipeline::Stage]| {
        let forward = stages.iter().position(|stage| *stage == sluice_pipeline::Stage::Forward);
        forward.filter(|_| is_flood).map_or(stages.len(), |at| at + 1)
    };
    let (wanted, found) = (&wanted[..until(&wanted)], &run.stages[..until(&run.stages)]);
    if wanted == found { Ok(()) } else { Err(format!("stages: wanted {wanted:?}, found {found:?}")) }
}

#[allow(clippy::print_stderr)] // what a failing test has to say
fn report(scenario: &Scenario, ids: &Ids, ingress: &str, bytes: &[u8], outcome: &Outcome, text: &str) {
    let hex: String = bytes.iter().take(320).map(|byte| format!("{byte:02x}")).collect();
    let id = port_id(ids, ingress);
    eprintln!(
        "case {text}\n  from {ingress} ({}): {hex}",
        if id == NO_PORT { "none".into() } else { id.to_string() }
    );
    for step in &outcome.steps {
        eprintln!("  {:<13} {:<12} {}", step.stage.name(), step.port, step.text);
    }
    eprintln!("  ports {:?}", ids.ports.by_name);
    for vnic in &scenario.config.vnics {
        if outcome.deliveries.contains_key(&format!("vnic/{}", vnic.name)) || ingress.ends_with(&vnic.name) {
            eprintln!("  {vnic:?}");
        }
    }
    eprintln!("  {:?}", scenario.config.switches);
}
