//! The engine on a real kernel: attaching, adopting, repairing. Needs root and the eBPF object.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use common::*;
use sluice_kernel::{
    Engine, EngineError, EngineOptions, HooksInUse, LinkEvent, LinkMonitor, MapsOutcome, PortState,
    ProgramsOutcome,
};
use sluice_policy::config::Hook;

fn is_attached(report: &sluice_kernel::SyncReport, port: &str) -> bool {
    report.ports[port].state == PortState::Attached
}

#[test]
fn frames_pass_between_attached_ports_and_a_second_pass_writes_nothing() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let (mut engine, report) = lab.open();
        assert_eq!(report.maps, MapsOutcome::Created);
        assert_eq!(report.programs, ProgramsOutcome::Loaded);
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let first = lab.sync(&mut engine, &config);
        assert!(is_attached(&first, "vnic/vm1") && is_attached(&first, "vnic/vm2"), "{first:?}");
        assert!(first.writes.total() > 0);
        assert!(reaches(&one, 2));
        let second = lab.sync(&mut engine, &config);
        assert_eq!(second.writes.total(), 0, "{}", second.writes);
        assert_eq!(second.link_changes, Vec::<String>::new());

        let id = lab.ids.ports.get("vnic/vm1").expect("the port has a number");
        let stats = engine.port_stats(id).expect("counters can be read");
        assert!(stats.rx_packets > 0 && stats.tx_packets > 0, "{stats:?}");

        // A port that goes is detached, and its peer is not reached any more.
        let without = common::config(vec![vnic(1, "p1")]);
        let third = lab.sync(&mut engine, &without);
        assert!(third.link_changes.iter().any(|change| change.contains("vnic/vm2")), "{third:?}");
        assert!(!reaches(&one, 2));
        engine.detach_all().expect("everything can be removed");
        assert!(!lab.options.pin_dir.exists());
    });
}

#[test]
fn a_successor_adopts_and_no_frame_is_lost() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        eventually("the first ping", || reaches(&one, 2));
        let mut pinging = Command::new("ip")
            .args(["netns", "exec", &one, "ping", "-n", "-q", "-i", "0.002", "-c", "1000", "10.0.0.2"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("`ping` is installed");
        for _ in 0..3 {
            drop(engine); // what a kill leaves: pins
            let (successor, report) = lab.open();
            engine = successor;
            assert_eq!(report.maps, MapsOutcome::Adopted);
            assert_eq!(report.programs, ProgramsOutcome::Adopted);
            assert_eq!(report.links, ["vnic/vm1", "vnic/vm2"]);
            let pass = lab.sync(&mut engine, &config);
            assert_eq!(pass.writes.total(), 0, "{}", pass.writes);
            assert_eq!(pass.link_changes, Vec::<String>::new());
            assert!(is_attached(&pass, "vnic/vm1"));
        }
        assert_eq!(pinging.try_wait().expect("the child is ours"), None, "the restarts outlasted the pings");
        let output = pinging.wait_with_output().expect("ping ends");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("1000 received"), "{text}");
    });
}

#[test]
fn a_second_process_is_refused() {
    in_lab(|lab| {
        let (engine, _) = lab.open();
        let error = Engine::open(&lab.options).expect_err("the pins are in use");
        assert!(matches!(error, EngineError::Locked(_)), "{error}");
        drop(engine);
        lab.open();
    });
}

#[test]
fn an_interface_that_comes_goes_and_comes_back_is_attached_again() {
    in_lab(|lab| {
        let one = lab.guest("p1", 1);
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        let report = lab.sync(&mut engine, &config);
        assert!(matches!(report.ports["vnic/vm2"].state, PortState::Pending { .. }), "{report:?}");
        let monitor = LinkMonitor::open().expect("link notifications can be had");
        let mut seen = Vec::new();
        lab.guest("p2", 2);
        eventually("notice of p2", || {
            seen.extend(monitor.next_timeout(Duration::from_millis(100)).expect("the monitor works"));
            seen.iter().any(|event| matches!(event, LinkEvent::Changed { name, .. } if name == "p2"))
        });
        assert!(is_attached(&lab.sync(&mut engine, &config), "vnic/vm2"));
        assert!(reaches(&one, 2));

        for _ in 0..2 {
            ip("link del p2");
            eventually("notice that p2 is gone", || {
                seen.extend(monitor.next_timeout(Duration::from_millis(100)).expect("the monitor works"));
                seen.iter().any(|event| matches!(event, LinkEvent::Gone { name, .. } if name == "p2"))
            });
            seen.clear();
            lab.plug("p2", 2);
            // Back before anybody looked: the link is dead and the index another one.
            assert!(is_attached(&lab.sync(&mut engine, &config), "vnic/vm2"));
            assert!(reaches(&one, 2));
            assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
        }

        // The same while no engine lives.
        drop(engine);
        ip("link del p2");
        lab.plug("p2", 2);
        let (mut engine, report) = lab.open();
        assert_eq!(report.dead_links, ["vnic+vm2-tcx"]);
        assert!(is_attached(&lab.sync(&mut engine, &config), "vnic/vm2"));
        assert!(reaches(&one, 2));
    });
}

/// A veth takes redirected frames while its other end polls, which may be in a namespace that nobody here looks into.
#[test]
fn notice_is_given_when_a_driver_takes_redirected_frames_no_more() {
    in_lab(|lab| {
        let guest = lab.guest("p1", 1);
        let monitor = LinkMonitor::open().expect("link notifications can be had");
        for gro in ["on", "off"] {
            ip(&format!("netns exec {guest} ethtool -K eth0 gro {gro}"));
            let mut seen = Vec::new();
            eventually("notice of p1", || {
                seen.extend(monitor.next_timeout(Duration::from_millis(100)).expect("the monitor works"));
                seen.iter().any(|event| matches!(event, LinkEvent::Changed { name, .. } if name == "p1"))
            });
        }
    });
}

#[test]
fn deleted_pins_are_made_again() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        assert_eq!(engine.repair().expect("repair works"), Vec::<String>::new());
        std::fs::remove_dir_all(&lab.options.pin_dir).expect("pins can be deleted");
        assert!(reaches(&one, 2), "descriptors hold what pins do not");
        let repaired = engine.repair().expect("repair works");
        assert!(repaired.iter().any(|text| text.contains("PORTS")), "{repaired:?}");
        assert!(repaired.iter().any(|text| text.contains("vnic+vm1-tcx")), "{repaired:?}");
        assert_eq!(engine.repair().expect("repair works"), Vec::<String>::new());
        drop(engine);
        assert!(reaches(&one, 2));
        let (mut engine, report) = lab.open();
        assert_eq!(report.maps, MapsOutcome::Adopted);
        assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);

        // Nobody lives to repair: everything is detached, and the successor starts anew.
        drop(engine);
        std::fs::remove_dir_all(&lab.options.pin_dir).expect("pins can be deleted");
        // The kernel lets go of a link a moment after its last reference.
        eventually("everything is detached", || !reaches(&one, 2));
        let (mut engine, report) = lab.open();
        assert_eq!(report.maps, MapsOutcome::Created);
        lab.sync(&mut engine, &config);
        assert!(reaches(&one, 2));
    });
}

#[test]
fn maps_of_another_shape_are_replaced_without_a_gap() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        eventually("the first ping", || reaches(&one, 2));
        drop(engine);
        std::fs::remove_file(lab.options.pin_dir.join("maps/FLOOD")).expect("a pin can be deleted");
        let mut pinging = Command::new("ip")
            .args(["netns", "exec", &one, "ping", "-n", "-q", "-i", "0.002", "-c", "1000", "10.0.0.2"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("`ping` is installed");
        let (mut engine, report) = lab.open();
        assert!(matches!(report.maps, MapsOutcome::Replaced { .. }), "{report:?}");
        let pass = lab.sync(&mut engine, &config);
        assert!(pass.link_changes.iter().any(|change| change.contains("replaced")), "{pass:?}");
        assert!(lab.options.pin_dir.join("maps/FLOOD").exists());
        assert!(!lab.options.pin_dir.join("maps-new").exists());
        assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
        assert_eq!(pinging.try_wait().expect("the child is ours"), None, "the change outlasted the pings");
        let output = pinging.wait_with_output().expect("ping ends");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("1000 received"), "{text}");
        drop(engine);
        assert_eq!(lab.open().1.maps, MapsOutcome::Adopted);
    });
}

#[test]
fn xdp_on_a_veth_is_refused_until_checksums_are_full() {
    in_lab(|lab| {
        let (one, two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let wanting = |attested| {
            let mut wanting = vnic(1, "p1");
            wanting.hook = Hook::Xdp;
            wanting.full_checksums = attested;
            config(vec![wanting, vnic(2, "p2")])
        };
        let (mut engine, _) = lab.open();
        let report = lab.sync(&mut engine, &wanting(false));
        let status = &report.ports["vnic/vm1"];
        assert_eq!(status.hooks, HooksInUse::Tcx);
        assert!(status.notes.iter().any(|note| note.contains("tx off")), "{status:?}");
        assert!(reaches(&one, 2));

        // The peer is looked at in its namespace.
        let off = Command::new("ip")
            .args(["netns", "exec", &one, "ethtool", "-K", "eth0", "tx", "off", "txvlan", "off"])
            .output()
            .expect("`ethtool` is installed");
        assert!(off.status.success());
        let report = lab.sync(&mut engine, &wanting(false));
        assert_eq!(report.ports["vnic/vm1"].hooks, HooksInUse::XdpAndTcx, "{report:?}");
        assert!(report.observe_again);
        assert!(reaches(&one, 2) && reaches(&two, 1));

        let report = lab.sync(&mut engine, &config(vec![vnic(1, "p1"), vnic(2, "p2")]));
        assert_eq!(report.ports["vnic/vm1"].hooks, HooksInUse::Tcx);
        let report = lab.sync(&mut engine, &wanting(true));
        assert_eq!(report.ports["vnic/vm1"].hooks, HooksInUse::XdpAndTcx, "{report:?}");
    });
}

#[test]
fn a_link_detached_by_force_is_noticed() {
    in_lab(|lab| {
        let one = lab.guest("p1", 1);
        lab.guest("p2", 2);
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        ip("link del p2");
        let repaired = engine.repair().expect("repair works");
        assert!(repaired.iter().any(|text| text.starts_with("vnic/vm2")), "{repaired:?}");
        assert!(!lab.options.pin_dir.join("links/vnic+vm2-tcx").exists());
        lab.plug("p2", 2);
        lab.sync(&mut engine, &config);
        assert!(reaches(&one, 2));
    });
}

/// The test binary runs itself, so that a whole process can be killed at any point of a sync.
#[test]
fn a_process_killed_while_syncing_leaves_what_the_next_one_can_finish() {
    const ROLE: &str = "SLUICE_KILLED_CHILD";
    let name = "a_process_killed_while_syncing_leaves_what_the_next_one_can_finish";
    let plan = |round: u32| {
        let mut config = config(vec![]);
        config.acl_groups.push(deny_ports("web", 2000 + 500 * (round % 2) as u16));
        config.vnics =
            (1..=200).map(|number| with_group(vnic(number, &format!("absent{number}")), "web")).collect();
        if round.is_multiple_of(2) {
            config.vnics.truncate(100);
        }
        config
    };
    if let Ok(pin_dir) = std::env::var(ROLE) {
        in_lab(move |lab| {
            lab.options.pin_dir = pin_dir.into();
            let (mut engine, _) = lab.open();
            for round in 0.. {
                lab.sync(&mut engine, &plan(round));
                std::io::stderr().write_all(b"synced\n").expect("the parent listens");
            }
        });
    }
    in_lab(move |lab| {
        for round in 0..12 {
            let mut child = Command::new(std::env::current_exe().expect("a test has a path"))
                .args(["--exact", name, "--nocapture"])
                .env(ROLE, &lab.options.pin_dir)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("the test can run itself");
            let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
            let mut lines = stderr.lines().map_while(Result::ok); // open until the child is dead
            let syncing = lines.any(|line| line == "synced");
            assert!(syncing, "the child failed before its first sync was done");
            let moment = Instant::now() + Duration::from_millis(5 * round);
            eventually("the moment", || Instant::now() >= moment);
            child.kill().expect("the child is ours");
            child.wait().expect("the child is ours");
            drop(lines);
            let (mut engine, report) = lab.open();
            assert_eq!(report.maps, MapsOutcome::Adopted, "{report:?}");
            for config in [plan(1), plan(0)] {
                lab.sync(&mut engine, &config);
                assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
                drop(engine);
                engine = lab.open().0;
                let again = lab.sync(&mut engine, &config);
                assert_eq!(again.writes.total(), 0, "the mirror and the maps differ: {}", again.writes);
            }
        }
    });
}

/// A killed process may have changed tables without announcing it: what is cached from before must not outlive it.
#[test]
fn adoption_outdates_every_cached_verdict() {
    in_lab(|lab| {
        let (_one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        let globals = lab.options.pin_dir.join("maps/GLOBALS");
        let epoch = || {
            let map = MapData::from_pin(&globals).expect("the map is pinned");
            let globals: Array<MapData, [u64; 2]> = Map::Array(map).try_into().expect("it is an array");
            globals.get(&0, 0).expect("it has an element")[0]
        };
        let before = epoch();
        drop(engine);
        let (mut engine, report) = lab.open();
        assert_eq!(report.maps, MapsOutcome::Adopted);
        assert!(epoch() > before);
        assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
        engine.detach_all().expect("everything can be removed");
    });
}

#[test]
fn an_interface_that_another_sluice_serves_is_left_to_it() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let config = config(vec![vnic(1, "p1"), vnic(2, "p2")]);
        let (mut first, _) = lab.open();
        lab.sync(&mut first, &config);
        eventually("the first ping", || reaches(&one, 2));
        let elsewhere = EngineOptions { pin_dir: lab.options.pin_dir.join("other") };
        let (mut second, _) = Engine::open(&elsewhere).expect("it is another directory");
        let report = lab.sync(&mut second, &config);
        for port in report.ports.values() {
            assert!(
                matches!(&port.state, PortState::Failed { error } if error.contains("another Sluice")),
                "{port:?}"
            );
        }
        assert!(reaches(&one, 2));
        second.detach_all().expect("everything can be removed");
        assert!(reaches(&one, 2));
        first.detach_all().expect("everything can be removed");
    });
}
