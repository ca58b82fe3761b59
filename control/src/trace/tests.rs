//! The trace against generated policies and packets, over simulated tables.

use sluice_policy::generate::{self, Rng};
use sluice_policy::ids::Ids;
use sluice_policy::image::Image;
use sluice_policy::lower;
use sluice_policy::sim::Simulator;

use super::*;

/// A generated configuration, lowered.
struct World {
    scenario: generate::Scenario,
    ids: Ids,
    image: Image,
}

fn world(rng: &mut Rng) -> World {
    let scenario = generate::scenario(rng);
    let mut ids = Ids::default();
    lower::assign_ids(&scenario.config, &mut ids).expect("generated configurations fit");
    let image = lower::lower_with(&scenario.config, &ids, &scenario.bindings(), &scenario.state.backings)
        .expect("valid");
    World { scenario, ids, image }
}

fn rows(world: &World) -> Vec<FdbRow> {
    let rows = world.scenario.state.fdb.iter().map(|(station, sighting)| {
        let key = conformance::fdb_key(&world.ids, station);
        FdbRow {
            switch: key.switch,
            vlan: key.vlan,
            mac: station.mac,
            port: conformance::port_id(&world.ids, &sighting.port),
            age_seconds: sighting.age_seconds,
        }
    });
    rows.collect()
}

/// Traces a frame over tables that hold `image`, while the oracle is told the truth.
fn trace(world: &World, image: &Image, ingress: &str, frame: &[u8]) -> v1::TraceResponse {
    let mut simulator = Simulator::new(image.clone());
    simulator.adopt(&world.ids, &world.scenario.state);
    let id = conformance::port_id(&world.ids, ingress);
    let live = simulator.with_view(|tables| live(tables, id, frame));
    let around = Surroundings {
        config: &world.scenario.config,
        ids: &world.ids,
        fdb: rows(world),
        unattached: world.scenario.state.unattached.clone(),
        backings: world.scenario.state.backings.clone(),
    };
    compare(&around, ingress, frame, &live)
}

#[test]
fn traces_of_generated_packets_agree_stage_by_stage() {
    const SEED: u64 = 2;
    let mut rng = Rng::new(SEED);
    let (mut passed, mut dropped) = (0, 0);
    for case in 0..60 {
        let world = world(&mut rng);
        for _ in 0..20 {
            let (ingress, frame) = generate::frame(&mut rng, &world.scenario);
            if world.ids.ports.get(&ingress).is_none() {
                continue;
            }
            let answer = trace(&world, &world.image, &ingress, &frame);
            assert!(answer.agree, "seed {SEED}, case {case}, from {ingress}, {frame:02x?}: {answer:#?}");
            assert_eq!(answer.stages[0].stage, "parse");
            if answer.live_verdict.contains("out ") { passed += 1 } else { dropped += 1 }
        }
    }
    assert!(
        passed > 50 && dropped > 50,
        "{passed} passed, {dropped} dropped: too one-sided to mean anything"
    );
}

#[test]
fn tables_that_somebody_changed_are_shouted_about() {
    let mut rng = Rng::new(3);
    let mut shouts = 0;
    for _ in 0..60 {
        let world = world(&mut rng);
        let mut open = world.image.clone();
        for port in open.ports.values_mut() {
            port.config.flags &= !sluice_pipeline::tables::port_flag::MAC_GUARD;
        }
        for _ in 0..20 {
            let (ingress, frame) = generate::frame(&mut rng, &world.scenario);
            if world.ids.ports.get(&ingress).is_none() {
                continue;
            }
            let truth = trace(&world, &world.image, &ingress, &frame);
            let answer = trace(&world, &open, &ingress, &frame);
            let guarded = truth.oracle_verdict.contains("(mac-guard)");
            if !truth.oracle_verdict.contains("guard") {
                assert!(answer.agree, "{answer:#?}");
            }
            if guarded {
                assert!(!answer.agree, "{answer:#?}");
                shouts += 1;
                assert!(
                    answer.stages.iter().any(|stage| stage.stage == "mac-guard" && !stage.agree),
                    "{answer:#?}"
                );
                assert!(!answer.difference.is_empty());
            }
        }
    }
    assert!(shouts > 10, "only {shouts} packets met the MAC guard");
}
