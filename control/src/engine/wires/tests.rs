use sluice_policy::ids::Ids;
use sluice_policy::image::{Bindings, Image};
use sluice_policy::lower;

use super::*;
use crate::engine::{UserEngine, UserPlane};
use crate::json;

/// The userspace engine's part of a host with a guest's rings at this path.
fn image(path: &str) -> Image {
    let yaml = format!(
        "switches: [{{name: blue}}]\nvnics:\n- {{name: vm1, switch: blue, mac: \"02:00:00:00:00:01\", \
         attach: {{vhostUser: {{path: {path}}}}}}}"
    );
    let specs = crate::convert::config(&json::read_config(&yaml).expect("good YAML")).expect("good values");
    let config = crate::convert::collect(&specs);
    let mut ids = Ids::default();
    lower::assign_ids(&config, &mut ids).expect("numbers");
    lower::split(&lower::lower(&config, &ids, &Bindings::new()).expect("an image")).user
}

#[test]
fn an_uplink_that_cannot_be_opened_says_why_and_takes_the_tap() {
    let wire = Wire { uplink: 9, trunk: 1, ifindex: 1_000_000, queues: 1, mtu: 1500, redirect: false };
    let mut steered = |_: u32, _: u32, _: BorrowedFd<'_>| panic!("there is no socket");
    let mut engine = UserEngine::default();
    let report = engine.serve_wires(std::slice::from_ref(&wire), &mut steered);
    assert_eq!(report, WireReport::default(), "nothing runs for nobody");
    let folder = tempfile::tempdir().expect("a folder");
    engine.sync(&image(&folder.path().join("vm1.sock").display().to_string()));
    let report = engine.serve_wires(std::slice::from_ref(&wire), &mut steered);
    assert_eq!(report.changes, [""; 0]);
    let [note] = &report.notes[&9][..] else { panic!("{report:?}") };
    assert!(note.starts_with("its frames for guests with rings take the tap: "), "{note}");
    // It is left alone for a while, and said all the same; until it is another.
    let again = engine.serve_wires(std::slice::from_ref(&wire), &mut steered);
    assert_eq!(again, report);
    assert_eq!(engine.serve_wires(&[], &mut steered), WireReport::default());
}

#[test]
fn a_host_has_so_many_sockets() {
    let layout = super::super::user::LAYOUT;
    // To come, come, and to be sent; and as many for guests' own traffic as one socket has.
    assert!(layout.small as usize >= (3 * SOCKETS_MAX + 1) * ENTRIES as usize);
}
