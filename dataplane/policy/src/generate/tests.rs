use std::collections::BTreeMap;

use sluice_pipeline::DropReason;

use super::*;
use crate::oracle;
use crate::validate::validate;

#[test]
fn the_same_seed_makes_the_same_cases() {
    let run = |seed| {
        let mut rng = Rng::new(seed);
        let scenario = scenario(&mut rng);
        let frames: Vec<_> = (0..20).map(|_| frame(&mut rng, &scenario)).collect();
        (scenario.config, scenario.state, frames)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7).2, run(8).2);
}

#[test]
fn configurations_are_valid() {
    let mut rng = Rng::new(1);
    for case in 0..2_000 {
        let scenario = scenario(&mut rng);
        if let Err(violations) = validate(&scenario.config) {
            panic!("case {case}: {violations:#?}");
        }
    }
}

/// Every reason for which a frame can be dropped is met often, and enough frames get through.
#[test]
fn frames_meet_every_reason() {
    const CASES: usize = 50_000;
    let mut rng = Rng::new(2);
    let (mut reasons, mut stages) = (BTreeMap::<DropReason, usize>::new(), BTreeMap::new());
    let (mut delivered, mut learnt) = (0, 0);
    for _ in 0..CASES / 20 {
        let scenario = scenario(&mut rng);
        for _ in 0..20 {
            let (ingress, bytes) = frame(&mut rng, &scenario);
            let outcome = oracle::evaluate(&scenario.config, &scenario.state, &ingress, &bytes);
            let refused = outcome.deliveries.values().filter_map(|result| result.as_ref().err());
            for reason in outcome.dropped.iter().chain(refused) {
                *reasons.entry(*reason).or_default() += 1;
            }
            for step in &outcome.steps {
                *stages.entry(step.stage).or_insert(0usize) += 1;
            }
            delivered += usize::from(outcome.deliveries.values().any(Result::is_ok));
            learnt += usize::from(outcome.learnt.is_some());
        }
    }
    for reason in DropReason::ALL {
        let seen = reasons.get(reason).copied().unwrap_or(0);
        match reason {
            // No decision of the pipeline's: the kernel's.
            DropReason::EgressFailed => assert_eq!(seen, 0),
            _ => assert!(seen >= 25, "{}: only {seen}; {reasons:#?}", reason.name()),
        }
    }
    assert_eq!(stages.len(), 12, "{stages:?}");
    assert!(delivered * 6 > CASES, "{delivered}");
    assert!(learnt * 20 > CASES, "{learnt}");
}
