//! The engine and the oracle, on generated cases: verdict, ports, bytes, drops, rules and learning.
//!
//! The suite of all engines (`tests/tests/conformance`) has a lane of this engine too, but wants root.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use sluice_policy::conformance::{compare, port_id};
use sluice_policy::generate::{Rng, frame, scenario};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings};
use sluice_policy::lower::{assign_ids, lower_with, ports};
use sluice_policy::oracle;
use sluice_user::memory::Probe;
use sluice_user::port::Accepts;

const SETTINGS: u64 = 120;
const FRAMES: u64 = 100;

#[test]
fn the_engine_agrees_with_the_oracle() {
    let mut rng = Rng::new(4);
    let mut probe = Probe::new().expect("memory");
    let mut ids = Ids::default();
    let (mut sent, mut learnt, mut rules) = (0, 0, 0);
    for setting in 0..SETTINGS {
        let scenario = scenario(&mut rng);
        assign_ids(&scenario.config, &mut ids).expect("numbers");
        let mut bindings = Bindings::new();
        let mut attached = BTreeSet::new();
        for (ifindex, spec) in (1..).zip(ports(&scenario.config)) {
            if !scenario.state.unattached.contains(&spec.name) {
                attached.insert(port_id(&ids, &spec.name));
                bindings.insert(spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false });
            }
        }
        let image =
            lower_with(&scenario.config, &ids, &bindings, &scenario.state.backings).expect("an image");
        probe.configure(&image, &attached, Accepts::default()).expect("ports");
        for number in 0..FRAMES {
            let (ingress, bytes) = frame(&mut rng, &scenario);
            probe.adopt(&ids, &scenario.state);
            let observed = probe.run(port_id(&ids, &ingress), &bytes).expect("memory");
            let outcome = oracle::evaluate(&scenario.config, &scenario.state, &ingress, &bytes);
            if let Err(difference) = compare(&scenario.config, &ids, &ingress, &outcome, &observed) {
                panic!("setting {setting}, frame {number} from {ingress}: {difference}\n{bytes:02x?}");
            }
            sent += observed.frames.len();
            learnt += usize::from(observed.learnt.flatten().is_some());
            rules += observed.rules.map_or(0, |rules| rules.len());
        }
        assert_eq!(probe.outstanding(), 0, "setting {setting}: frames are missing");
    }
    let cases = (SETTINGS * FRAMES) as usize;
    assert!(sent > cases / 5, "only {sent} frames of {cases} left");
    assert!(learnt > cases / 50, "only {learnt} addresses of {cases} frames were learnt");
    assert!(rules > cases / 20, "only {rules} rules were hit");
}
