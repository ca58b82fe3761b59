#![no_main]
//! Headers and the pipeline: the input picks a configuration and a port, and is a frame from there, to which the addresses of vNICs
//! are given if it asks for that. The pipeline must do what the oracle says, whatever the frame is.

use std::cell::RefCell;
use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use sluice_policy::conformance::{compare, port_id};
use sluice_policy::generate::{Rng, Scenario, scenario};
use sluice_policy::ids::Ids;
use sluice_policy::lower::{assign_ids, lower_with, ports};
use sluice_policy::net::MacAddr;
use sluice_policy::oracle::evaluate;
use sluice_policy::sim::{Simulator, TagPlace};

struct Setting {
    scenario: Scenario,
    ids: Ids,
    ports: Vec<String>,
    macs: Vec<MacAddr>,
    simulator: Simulator,
}

impl Setting {
    fn new(seed: u8) -> Setting {
        let scenario = scenario(&mut Rng::new(seed.into()));
        let mut ids = Ids::default();
        assign_ids(&scenario.config, &mut ids).expect("a generated configuration fits");
        let image = lower_with(&scenario.config, &ids, &scenario.bindings(), &scenario.state.backings)
            .expect("a generated configuration is valid");
        let ports = ports(&scenario.config).into_iter().map(|port| port.name).collect();
        let macs = scenario.config.vnics.iter().map(|vnic| vnic.mac).collect();
        Setting { scenario, ids, ports, macs, simulator: Simulator::new(image) }
    }
}

thread_local!(static SETTINGS: RefCell<HashMap<u8, Setting>> = RefCell::default());

fuzz_target!(|bytes: &[u8]| {
    let [seed, port, how, addresses, frame @ ..] = bytes else { return };
    SETTINGS.with_borrow_mut(|settings| {
        let Setting { scenario, ids, ports, macs, simulator } =
            settings.entry(*seed).or_insert_with(|| Setting::new(*seed));
        let ingress = &ports[usize::from(*port) % ports.len()];
        let place = if how & 1 == 0 { TagPlace::Inline } else { TagPlace::Beside };
        let mut frame = frame.to_vec();
        for (bit, at, number) in [(2, 0, addresses >> 4), (4, 6, addresses & 15)] {
            if let (true, Some(field)) = (how & bit != 0 && !macs.is_empty(), frame.get_mut(at..at + 6)) {
                field.copy_from_slice(&macs[usize::from(number) % macs.len()].0);
            }
        }
        let frame = frame.as_slice();
        let outcome = evaluate(&scenario.config, &scenario.state, ingress, frame);
        simulator.adopt(ids, &scenario.state);
        let run = simulator.run(port_id(ids, ingress), frame, place);
        if let Err(text) = compare(&scenario.config, ids, ingress, &outcome, &run.observed()) {
            panic!("from {ingress}: {text}\n{frame:02x?}\n{outcome:?}\n{:?}", scenario.config);
        }
    });
});
