use sluice_pipeline::tables::port_flag;
use sluice_policy::config::Attestable;
use sluice_policy::placement::{Capabilities, Evidence, Neighbours, Program, place};
use sluice_proto::v1::apply_result::Outcome as Did;
use sluice_proto::v1::path_status::Reason;
use sluice_proto::v1::violation::Code;
use tempfile::TempDir;

use super::*;
use crate::engine::fake::FakeEngine;
use crate::server::Identity;
use crate::store::small_disk::SmallDisk;
use crate::vf::knowledge;
use crate::vf::manager::{Outlook, Report};
use crate::{doctor, json};

const BASE: &str = r#"
switches: [{name: blue, uplink: {netdev: up0}}]
aclGroups: [{name: web, rules: [{priority: 100, direction: TO_VM, match: {ipProto: tcp, dstPorts: ["80"]}, action: ALLOW}]}]
vnics:
- {name: vm1, switch: blue, attach: {veth: p1}, mac: "02:00:00:00:00:01", policy: {vlan: {access: 10}, acl: {groups: [web], default: {toVm: DENY}}}}
- {name: vm2, switch: blue, attach: {veth: p2}, mac: "02:00:00:00:00:02", policy: {vlan: {access: 10}}}
"#;

struct Bench {
    dir: TempDir,
    engine: FakeEngine,
}

impl Bench {
    fn new(netdevs: &[&str]) -> Bench {
        Bench { dir: tempfile::tempdir().expect("a directory"), engine: FakeEngine::with_netdevs(netdevs) }
    }

    fn open(&self) -> Core {
        let (store, state, origin) =
            Store::open(&self.dir.path().join("state"), &self.dir.path().join("run")).expect("a store");
        Core::new(store, state, origin, Box::new(self.engine.clone()))
    }
}

fn request(yaml: &str) -> v1::ApplyRequest {
    let config = Some(json::read_config(yaml).expect("good YAML"));
    v1::ApplyRequest { config, ..v1::ApplyRequest::default() }
}

fn apply(core: &mut Core, yaml: &str) -> Result<Outcome, Error> {
    core.apply(&request(yaml), "test")
}

fn plan(core: &Core, yaml: &str) -> Vec<v1::Change> {
    let request = v1::PlanRequest { config: request(yaml).config, delete: Vec::new() };
    core.plan(&request).expect("a valid plan").changes
}

fn delete(core: &mut Core, kind: &str, name: &str) -> Result<Outcome, Error> {
    let resources = vec![v1::ResourceRef { kind: kind.to_owned(), name: name.to_owned() }];
    core.delete(&v1::DeleteRequest { resources, ..v1::DeleteRequest::default() }, "test")
}

fn state_of(core: &Core, key: &str) -> v1::status::State {
    let view = core.view().borrow().clone();
    let resource = &view.resources[&key.parse().expect("a key")];
    resource.status.as_ref().expect("every resource has a status").state()
}

#[track_caller]
fn refused(result: Result<Outcome, Error>) -> Vec<(String, String, Code)> {
    let violations = match result.expect_err("must be refused") {
        Error::Invalid(found)
        | Error::Revision(found)
        | Error::StillReferenced(found)
        | Error::NotFound(found) => found,
        other => panic!("refused for another reason: {other}"),
    };
    violations.into_iter().map(|found| (found.resource.clone(), found.field.clone(), found.code())).collect()
}

#[test]
fn an_apply_is_programmed_and_reported_item_by_item() {
    let bench = Bench::new(&["up0", "p1"]);
    let mut core = bench.open();
    let outcome = apply(&mut core, BASE).expect("valid");
    assert_eq!(outcome.revision, 1);
    let results: Vec<(&str, Did, v1::status::State)> = outcome
        .results
        .iter()
        .map(|result| {
            (result.resource.as_str(), result.outcome(), result.status.as_ref().expect("a status").state())
        })
        .collect();
    use v1::status::State::{Pending, Ready};
    assert_eq!(
        results,
        [
            ("switches/blue", Did::Created, Ready),
            ("aclGroups/web", Did::Created, Ready),
            ("vnics/vm1", Did::Created, Ready),
            ("vnics/vm2", Did::Created, Pending),
        ]
    );
    let world = bench.engine.world();
    assert_eq!(world.image.ports.len(), 3);
    let attached = world.image.ports.values().filter(|port| port.config.flags & port_flag::ATTACHED != 0);
    assert_eq!(attached.count(), 2);
}

#[test]
fn a_second_pass_and_a_second_apply_change_nothing() {
    let bench = Bench::new(&["up0", "p1", "p2"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    let again = apply(&mut core, BASE).expect("valid");
    assert_eq!(again.revision, 1);
    assert!(again.results.iter().all(|result| result.outcome() == Did::Unchanged));
    assert!(again.data_plane.is_empty());
    core.full_pass();
    assert_eq!(bench.engine.world().changes, 1);
    assert!(plan(&core, BASE).is_empty());
    assert!(plan(&core, "").is_empty());
}

#[test]
fn a_plan_says_what_an_apply_then_does() {
    let bench = Bench::new(&["up0", "p1"]);
    let mut core = bench.open();
    let planned = plan(&core, BASE);
    let targets: Vec<&str> = planned.iter().map(|change| change.target.as_str()).collect();
    for target in ["switches/blue", "aclGroups/web", "vnics/vm1", "vnic/vm1", "ACL rules"] {
        assert!(targets.contains(&target), "{target} is not in {targets:?}");
    }
    assert_eq!(bench.engine.world().syncs, 0, "a plan programs nothing");
    apply(&mut core, BASE).expect("valid");

    let changed = BASE.replace("access: 10}, acl", "access: 20}, acl").replace("\"80\"", "\"443\"");
    let planned = plan(&core, &changed);
    let fields: Vec<(&str, &str, &str, &str)> = planned
        .iter()
        .flat_map(|change| change.fields.iter().map(move |field| (change, field)))
        .map(|(change, field)| {
            (change.target.as_str(), field.path.as_str(), field.before.as_str(), field.after.as_str())
        })
        .collect();
    assert!(fields.contains(&("vnics/vm1", "policy.vlan.access", "10", "20")), "{fields:?}");
    assert!(
        fields
            .iter()
            .any(|field| field.0 == "aclGroups/web" && field.1 == "rules[]" && field.3.contains("443"))
    );
    assert_eq!(fields.iter().filter(|field| field.0 == "vnics/vm2").count(), 0);
}

#[test]
fn an_apply_is_all_or_nothing_and_names_every_failing_item() {
    let bench = Bench::new(&["up0", "p1", "p2", "p3"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    let before = core.view().borrow().clone();
    let wrong = r#"
vnics:
- {name: fine, switch: blue, attach: {veth: p3}, mac: "02:00:00:00:00:03"}
- {name: twin, switch: blue, attach: {veth: p4}, mac: "02:00:00:00:00:01"}
- {name: lost, switch: red, attach: {veth: p5}, mac: "02:00:00:00:00:05"}
"#;
    let found = refused(apply(&mut core, wrong));
    assert!(found.contains(&("vnics/twin".to_owned(), "mac".to_owned(), Code::Duplicate)), "{found:?}");
    assert!(
        found.contains(&("vnics/lost".to_owned(), "switch".to_owned(), Code::UnknownReference)),
        "{found:?}"
    );
    assert!(!found.iter().any(|(resource, ..)| resource == "vnics/fine"), "{found:?}");
    assert_eq!(core.view().borrow().clone(), before);
    drop(core);
    let core = bench.open();
    assert_eq!(core.state.resources.len(), 4);
}

#[test]
fn malformed_fields_are_named_with_their_paths() {
    let bench = Bench::new(&[]);
    let mut core = bench.open();
    let wrong = r#"
vnics:
- {name: a, switch: blue, attach: {veth: p1}, mac: "zz", policy: {vlan: {access: 5000}, acl: {rules: [{direction: TO_VM, action: ALLOW, match: {dstPorts: ["9-1"]}}]}}}
- {name: b}
- {name: b, switch: blue}
"#;
    let found = refused(apply(&mut core, wrong));
    assert_eq!(found, [("vnics/b".to_owned(), "name".to_owned(), Code::Duplicate)]);
    let found = refused(apply(&mut core, &wrong.replace("- {name: b, switch: blue}", "")));
    let fields: Vec<(&str, &str)> =
        found.iter().map(|(resource, field, _)| (resource.as_str(), field.as_str())).collect();
    for expected in [
        ("vnics/a", "mac"),
        ("vnics/a", "policy.vlan.access"),
        ("vnics/a", "policy.acl.rules[0].match.dstPorts[0]"),
        ("vnics/b", "attach"),
        ("vnics/b", "switch"),
        ("vnics/b", "mac"),
    ] {
        assert!(fields.contains(&expected), "{expected:?} is not in {fields:?}");
    }
}

#[test]
fn expected_revisions_are_checked() {
    let bench = Bench::new(&[]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    let mut request = request(&BASE.replace("access: 10", "access: 11"));
    for (expected, well) in [(0, false), (7, false), (1, true), (1, false), (2, true)] {
        request.expected_revisions = [("vnics/vm1".to_owned(), expected)].into();
        let result = core.apply(&request, "test");
        assert_eq!(result.is_ok(), well, "{expected}");
        if well {
            let config = request.config.as_mut().expect("given");
            let policy = config.vnics[0].policy.as_mut().expect("given");
            policy.dhcp_guard = !policy.dhcp_guard;
        } else {
            assert_eq!(refused(result), [("vnics/vm1".to_owned(), String::new(), Code::RevisionMismatch)]);
        }
    }
}

#[test]
fn what_is_referred_to_is_not_deleted() {
    let bench = Bench::new(&[]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    for (kind, name, key) in [("switch", "blue", "switches/blue"), ("aclGroup", "web", "aclGroups/web")] {
        let error = delete(&mut core, kind, name).expect_err("must be refused");
        assert!(error.to_string().contains("vnics/vm1"), "{error}");
        assert_eq!(refused(Err(error)), [(key.to_owned(), String::new(), Code::StillReferenced)]);
    }
    assert_eq!(
        refused(delete(&mut core, "vnic", "vm9")),
        [("vnics/vm9".to_owned(), String::new(), Code::NotFound)]
    );
    for (kind, name) in [("vnic", "vm1"), ("aclGroup", "web"), ("vnic", "vm2"), ("switch", "blue")] {
        delete(&mut core, kind, name).expect("unreferenced now");
    }
    assert_eq!(bench.engine.world().image, Image::default());
}

#[test]
fn an_interface_that_comes_is_attached_and_one_that_goes_is_pending() {
    let bench = Bench::new(&["up0", "p1"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    assert_eq!(state_of(&core, "vnics/vm2"), v1::status::State::Pending);
    bench.engine.world().netdevs.insert("p2".to_owned(), 99);
    core.pass();
    assert_eq!(state_of(&core, "vnics/vm2"), v1::status::State::Ready);
    bench.engine.world().netdevs.remove("p1");
    core.pass();
    assert_eq!(state_of(&core, "vnics/vm1"), v1::status::State::Pending);
    let events: Vec<&str> = core.events().newest().map(|event| event.text.as_str()).collect();
    assert!(events[0].starts_with("vnic/vm1 is pending"), "{events:?}");
    assert!(events[1].starts_with("vnic/vm2 is attached to p2"), "{events:?}");
}

#[test]
fn numbers_outlive_the_daemon() {
    let bench = Bench::new(&["up0", "p1", "p2"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    delete(&mut core, "vnic", "vm1").expect("unreferenced");
    let image = bench.engine.world().image.clone();
    drop(core);
    let mut core = bench.open();
    core.full_pass();
    assert_eq!(bench.engine.world().image, image);
    assert_eq!(bench.engine.world().changes, 2, "adopting wrote nothing");
}

#[test]
fn a_deleted_state_directory_is_recovered_from_the_runtime_copy() {
    let bench = Bench::new(&["up0", "p1", "p2"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    let image = bench.engine.world().image.clone();
    drop(core);
    std::fs::remove_dir_all(bench.dir.path().join("state")).expect("removed");
    bench.engine.world().found_tables = true;
    let mut core = bench.open();
    core.full_pass();
    assert_eq!(bench.engine.world().image, image);
    assert!(core.events().newest().any(|event| event.text.contains("recovered 4 resources at revision 1")));
}

#[test]
fn without_any_state_found_tables_stay_until_the_first_apply() {
    let bench = Bench::new(&["up0", "p1", "p2"]);
    bench.engine.world().found_tables = true;
    let mut core = bench.open();
    core.full_pass();
    core.age_fdb();
    assert_eq!(bench.engine.world().syncs, 0);
    assert!(core.is_untouched());
    apply(&mut core, BASE).expect("valid");
    assert_eq!(bench.engine.world().syncs, 1);
    assert!(!core.is_untouched());
}

#[test]
fn a_state_file_deleted_under_the_daemon_is_written_again() {
    let bench = Bench::new(&["up0"]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    std::fs::remove_dir_all(bench.dir.path().join("state")).expect("removed");
    std::fs::remove_file(bench.dir.path().join("run/state.pb")).expect("removed");
    core.full_pass();
    drop(core);
    std::fs::remove_file(bench.dir.path().join("run/state.pb")).expect("written again");
    assert_eq!(bench.open().state.resources.len(), 4);
}

#[test]
fn a_full_disk_refuses_a_change_and_needs_no_restart() {
    SmallDisk::with(|disk| {
        let (state_dir, runtime_dir) = (disk.dir().join("state"), disk.dir().join("run"));
        let (store, state, origin) = Store::open(&state_dir, &runtime_dir).expect("a store");
        let engine = FakeEngine::with_netdevs(&["up0", "p1", "p2"]);
        let mut core = Core::new(store, state, origin, Box::new(engine.clone()));
        let identity = Identity {
            instance: "test".to_owned(),
            pin_dir: disk.dir().join("pins"),
            socket: disk.dir().join("socket"),
            state_dir,
            runtime_dir,
        };
        let complaint = |core: &Core| {
            let daemon = doctor::examine(core, &identity).swap_remove(1);
            daemon.children.into_iter().find(|finding| finding.title == "last change")
        };
        apply(&mut core, BASE).expect("valid");
        let before = engine.world().image.clone();
        let vnics = (256..1256).map(|n| {
            let mac = format!("02:00:00:00:{:02x}:{:02x}", n >> 8, n & 255);
            format!("- {{name: vm{n}, switch: blue, attach: {{veth: q{n}}}, mac: '{mac}'}}")
        });
        let many = format!("vnics:\n{}", vnics.collect::<Vec<_>>().join("\n"));
        assert!(complaint(&core).is_none());
        disk.fill();
        for _ in 0..3 {
            let error = apply(&mut core, &many).expect_err("it does not fit");
            assert!(matches!(error, Error::Store(_)), "{error}");
            core.full_pass();
        }
        assert_eq!(engine.world().image, before, "what is not stored is not programmed");
        let found = complaint(&core).expect("doctor tells");
        assert!(found.detail.contains("No space left"), "{}", found.detail);
        let noted = |event: &crate::events::Event| {
            event.severity == Severity::Error && event.text.contains("revision 2 by test could not be stored")
        };
        assert!(core.events().newest().any(noted));
        disk.free();
        assert_eq!(apply(&mut core, &many).expect("it fits again").revision, 2);
        assert!(complaint(&core).is_none());
    });
}

#[test]
fn a_broken_engine_is_a_status_and_recovers() {
    let bench = Bench::new(&["up0", "p1", "p2"]);
    let mut core = bench.open();
    bench.engine.world().broken = true;
    let outcome = apply(&mut core, BASE).expect("the desired state is stored all the same");
    let vnic = outcome.results[2].status.as_ref().expect("a status");
    assert_eq!(vnic.state(), v1::status::State::Failed);
    assert_eq!(vnic.ports[0].reason(), v1::port_status::Reason::EngineFailed);
    bench.engine.world().broken = false;
    core.pass();
    assert_eq!(state_of(&core, "vnics/vm1"), v1::status::State::Ready);
}

#[test]
fn changes_are_in_the_audit_log() {
    let bench = Bench::new(&[]);
    let mut core = bench.open();
    apply(&mut core, BASE).expect("valid");
    apply(&mut core, BASE).expect("valid, and no change");
    delete(&mut core, "vnic", "vm2").expect("unreferenced");
    let audit = core.store().audit(10).expect("readable");
    let changes: Vec<&[String]> = audit.iter().map(|entry| entry.changes.as_slice()).collect();
    assert_eq!(changes.len(), 2);
    assert!(changes[0].contains(&"create vnics/vm1".to_owned()));
    assert_eq!(changes[1], ["delete vnics/vm2"]);
    assert_eq!(audit[1].actor, "test");
}

#[test]
fn a_plan_goes_by_the_operators_word_as_it_would_be() {
    let yaml = |attest: &str| {
        format!(
            "switches: [{{name: blue, uplink: {{netdev: up0, attest: [{attest}]}}}}]\nvnics: [{{name: vm1, switch: blue, \
             attach: {{veth: p1}}, mac: \"02:00:00:00:00:01\", sriov: {{attach: {{external: {{}}}}}}}}]"
        )
    };
    let bench = Bench::new(&["up0", "p1"]);
    let mut core = bench.open();
    apply(&mut core, &yaml("")).expect("accepted");
    let capabilities = Capabilities {
        max_vfs: 2,
        mac_guard: Evidence::Refuted,
        access_vlan: Evidence::Probed,
        untagged_only: Evidence::Probed,
        unknown_unicast_to_pf: Evidence::Probed,
        ..Capabilities::default()
    };
    let path_with = |reason: Reason| {
        let mut path = v1::PathStatus::default();
        path.set_reason(reason);
        BTreeMap::from([("vm1".to_owned(), path)])
    };
    let report = |programs: &[(&str, Program)], reason: Reason| Report {
        switch: "blue".to_owned(),
        revision: 1,
        paths: path_with(reason),
        nic: v1::NicStatus::default(),
        counters: Vec::new(),
        outlook: Outlook {
            capabilities: Some(capabilities.clone()),
            neighbours: Neighbours::default(),
            programs: programs.iter().map(|(name, program)| ((*name).to_owned(), program.clone())).collect(),
        },
        events: Vec::new(),
    };
    let moves = |core: &Core, attest: &str| {
        let moving = |change: &v1::Change| change.action() == v1::change::Action::Move;
        plan(core, &yaml(attest)).into_iter().find(moving)
    };

    core.take_report(report(&[], Reason::Uncovered));
    assert_eq!(moves(&core, ""), None, "nothing changes");
    let to_vf = moves(&core, "macGuard").expect("the guard is vouched for");
    assert!(to_vf.note.starts_with("to a VF"), "{to_vf:?}");

    apply(&mut core, &yaml("macGuard")).expect("accepted");
    let mut attested = capabilities.clone();
    knowledge::attest(&mut attested, &[Attestable::MacGuard]);
    let program =
        place(&core.config, &core.config.vnics[0], &attested, &Neighbours::default()).expect("covered");
    core.take_report(report(&[("vm1", program)], Reason::Unspecified));
    assert_eq!(moves(&core, "macGuard"), None, "nothing changes");
    let back = moves(&core, "").expect("nobody vouches for the guard");
    assert!(back.note.starts_with("to its software path"), "{back:?}");
    assert_eq!(back.uncovered.len(), 1, "{back:?}");
}
