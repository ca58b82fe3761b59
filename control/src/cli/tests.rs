//! What the commands print: of hand-made answers, and of a served API whose engine is a fake.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::rc::Rc;

use clap::{CommandFactory, Parser};
use sluice_proto::v1;
use sluice_proto::v1::path_status::{Path, Reason};
use sluice_proto::v1::resource::Spec;
use sluice_proto::v1::vf_request::Action;

use super::client::CliError;
use super::output::Output;
use super::{Cli, Format, commands, render};
use crate::server::tests::Bench;
use crate::vf::manager::{Outlook, Report};

/// What was printed.
#[derive(Clone, Default)]
struct Paper(Rc<RefCell<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn text(&self) -> String {
        String::from_utf8(self.0.borrow().clone()).expect("text")
    }
}

/// What `print` prints in a format.
fn printed_as(format: Format, print: impl FnOnce(&Output)) -> String {
    let paper = Paper::default();
    print(&Output::to(format, false, Box::new(paper.clone())));
    paper.text()
}

fn printed(print: impl FnOnce(&Output)) -> String {
    printed_as(Format::Table, print)
}

const AT: u64 = 1_795_181_999_000;

fn on_vf() -> v1::PathStatus {
    let mut path = v1::PathStatus {
        since_unix_ms: AT,
        cause: "the guest is active".to_owned(),
        vf: Some(v1::VfRef { pf: "pf0".to_owned(), index: 3, pci: "0000:01:10.6".to_owned() }),
        ..v1::PathStatus::default()
    };
    path.set_path(Path::Hardware);
    path
}

fn uncovered() -> v1::PathStatus {
    let mut path = v1::PathStatus {
        since_unix_ms: AT,
        message: "pf0 cannot enforce: vlan-trunk".to_owned(),
        uncovered: vec![v1::Uncovered {
            feature: "vlan-trunk".to_owned(),
            text: "one VLAN per VF".to_owned(),
            remedy: "use switchdev mode".to_owned(),
        }],
        ..v1::PathStatus::default()
    };
    path.set_path(Path::Software);
    path.set_reason(Reason::Uncovered);
    path
}

fn asked() -> v1::PathStatus {
    let mut request = v1::VfRequest { ticket: 7, deadline_unix_ms: AT, ..v1::VfRequest::default() };
    request.set_action(Action::Plug);
    let mut path = v1::PathStatus { request: Some(request), ..on_vf() };
    path.set_path(Path::Attaching);
    path.set_reason(Reason::InTransition);
    path
}

fn vnic(name: &str, path: v1::PathStatus) -> v1::Resource {
    let mac = "02:00:00:00:00:01".to_owned();
    let spec = v1::Vnic { name: name.to_owned(), switch: "blue".to_owned(), mac, ..v1::Vnic::default() };
    let mut status = v1::Status { path: Some(path), ..v1::Status::default() };
    status.set_state(v1::status::State::Ready);
    v1::Resource { spec: Some(Spec::Vnic(spec)), revision: 4, status: Some(status) }
}

fn nic() -> v1::NicStatus {
    let capability = |feature: &str, evidence: &str, sufficient| v1::NicCapability {
        feature: feature.to_owned(),
        evidence: evidence.to_owned(),
        sufficient,
    };
    v1::NicStatus {
        pf: "pf0".to_owned(),
        driver: "igb".to_owned(),
        firmware: "3.4".to_owned(),
        mode: "legacy".to_owned(),
        vfs: 7,
        vfs_used: 2,
        capabilities: vec![
            capability("macGuard", "refuted", false),
            capability("rateFromVm", "attested", true),
            capability("accessVlan", "probed", true),
        ],
        writes: 40,
        ..v1::NicStatus::default()
    }
}

#[test]
fn commands_and_words_fit_each_other() {
    Cli::command().debug_assert();
    let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
    for line in [
        "sluice get vnic",
        "sluice get vnic/a switch/b --spec",
        "sluice delete vnic a b",
        "sluice stats",
        "sluice stats vnic/a",
        "sluice explain vnic a",
        "sluice revoke vnic/a --reason migration --hold 0",
        "sluice acknowledge vnic a --ticket 7 --done --lost 3",
        "sluice acknowledge vnic/a --ticket 7 --refused busy",
        "sluice probe uplink blue",
        "sluice workers",
        "sluice workers -o json",
        "sluice workers cores 2-3,5",
        "sluice workers move vnic/a 0 3",
        "sluice workers auto vnic/a",
    ] {
        assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
    }
    for line in [
        "sluice get",
        "sluice acknowledge vnic a --done",
        "sluice acknowledge vnic a --ticket 7",
        "sluice acknowledge vnic a --ticket 7 --done --refused busy",
        "sluice revoke vnic a --hold -1",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn completion_offers_kinds_and_commands() {
    for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
        let script = printed(|output| output.completions(shell, &mut Cli::command()));
        for word in ["explain", "revoke", "release", "acknowledge", "probe", "ticket"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let script = printed(|output| output.completions(clap_complete::Shell::Zsh, &mut Cli::command()));
    for kinds in ["(switch aclGroup vnic all)", "(switch aclGroup vnic)", "(vnic)", "(uplink)"] {
        assert!(script.contains(kinds), "{kinds}");
    }
}

#[test]
fn a_list_says_where_each_vnic_is_and_why() {
    let mut attested = on_vf();
    attested.attested.push("macGuard".to_owned());
    let switch = v1::Switch { name: "blue".to_owned(), ..v1::Switch::default() };
    let switch = v1::Resource { spec: Some(Spec::Switch(switch)), ..v1::Resource::default() };
    let all = [switch, vnic("vm1", attested), vnic("vm2", uncovered()), vnic("vm3", asked())];
    let text = printed(|output| render::resources(output, &all));
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    assert_eq!(lines[0][..4], ["KIND", "NAME", "STATE", "PATH"], "{text}");
    assert_eq!(lines[2][3], "VF 3 of pf0", "{text}");
    assert_eq!(lines[2].last(), Some(&"attested, not proven: macGuard"), "{text}");
    assert_eq!(
        (lines[3][3], lines[3].last()),
        ("software", Some(&"pf0 cannot enforce: vlan-trunk")),
        "{text}"
    );
    assert_eq!(lines[4][3], "attaching", "{text}");
    let request = "asks its orchestrator for PLUG, ticket 7, until 2026-11-20 13:39:59 UTC";
    assert_eq!(lines[4].last(), Some(&request), "{text}");
    let text = printed(|output| render::resources(output, &all[..1]));
    assert!(!text.contains("PATH"), "there is no vNIC: {text}");
    let change = v1::WatchResponse { resource: Some(all[3].clone()), ..v1::WatchResponse::default() };
    let text = printed(|output| render::change(output, &change));
    assert_eq!(text, format!("existing vnic vm3: ready, attaching (02:00:00:00:00:01 on blue); {request}\n"));
}

#[test]
fn a_headline_says_since_when_or_why() {
    let line = |path: v1::PathStatus| printed(|output| render::vf::headline(output, "vm1", &path));
    assert_eq!(line(on_vf()), "vm1 is on VF 3 of pf0 (0000:01:10.6) since 2026-11-20 13:39:59 UTC\n");
    assert_eq!(line(uncovered()), "vm1 is on its software path: pf0 cannot enforce: vlan-trunk\n");
}

#[test]
fn details_are_the_path_of_a_vnic_and_the_nic_of_a_switch() {
    let text = printed(|output| render::vf::details(output, &vnic("vm1", uncovered())));
    assert!(text.contains("note vlan-trunk: one VLAN per VF\n"), "{text}");
    assert!(text.contains("-> use switchdev mode\n"), "{text}");
    let mut path = v1::PathStatus::default();
    path.set_reason(Reason::NotWanted);
    assert_eq!(printed(|output| render::vf::details(output, &vnic("vm1", path))), "");

    let status = v1::Status {
        nic: Some(v1::NicStatus { message: "pf0 has no carrier".to_owned(), ..nic() }),
        ..v1::Status::default()
    };
    let switch = v1::Resource { status: Some(status), ..v1::Resource::default() };
    let text = printed(|output| render::resources(output, std::slice::from_ref(&switch)));
    assert!(text.trim_end().ends_with("pf0 has no carrier"), "{text}");
    let text = printed(|output| render::vf::details(output, &switch));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[1],
        "NIC pf0: driver igb, firmware 3.4, legacy mode, 2 of 7 VFs in use, 40 writes since the daemon started"
    );
    assert_eq!(lines[2], "warn pf0 has no carrier");
    let row =
        |feature: &str| lines.iter().find(|line| line.starts_with(feature)).expect("listed").to_string();
    assert!(row("macGuard").contains("refuted") && row("macGuard").contains("no  "), "{text}");
    assert!(row("macGuard").contains("<== the NIC takes the setting and does not enforce it"), "{text}");
    assert!(row("rateFromVm").contains("<== by the operator's word: attested, not proven"), "{text}");
    assert!(!row("accessVlan").contains("<=="), "{text}");
}

#[test]
fn vfs_that_nobody_counts_are_not_listed() {
    let silent = v1::VfCounters { vnic: "vm1".to_owned(), ..v1::VfCounters::default() };
    let counted = v1::VfCounters { vnic: "vm2".to_owned(), tx_dropped: Some(0), ..v1::VfCounters::default() };
    let stats = |vfs: &[&v1::VfCounters]| {
        let vfs = vfs.iter().map(|vf| (*vf).clone()).collect();
        let answer = v1::GetStatsResponse { vfs, ..v1::GetStatsResponse::default() };
        printed(|output| assert!(render::stats(output, &answer).expect("printed")))
    };
    assert_eq!(stats(&[&silent]), stats(&[]));
    let text = stats(&[&silent, &counted]);
    assert!(
        text.ends_with("\nvnic/vm2  -           -         -           -         -           0\n"),
        "{text}"
    );
    assert!(!text.contains("vm1"), "{text}");
}

#[test]
fn a_probe_says_for_which_nics_it_holds() {
    use v1::probe_finding::Verdict;
    let finding = |feature: &str, verdict: Verdict, text: &str| v1::ProbeFinding {
        feature: feature.to_owned(),
        verdict: verdict.into(),
        text: text.to_owned(),
    };
    let answer = v1::ProbeUplinkResponse {
        identity: "driver igb, device 8086:10c9, firmware 3.4".to_owned(),
        findings: vec![
            finding("macGuard", Verdict::Refuted, "a foreign source got out"),
            finding("accessVlan", Verdict::Enforced, "other VLANs stayed away"),
            finding("untagged", Verdict::Inconclusive, "the port has no carrier"),
        ],
    };
    let text = printed(|output| assert!(render::vf::probed(output, "blue", &answer).expect("printed")));
    let lines: Vec<&str> = text.lines().collect();
    let cells = |line: &str| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).count();
    assert_eq!(cells(lines[1]), 3, "{text}");
    assert!(lines[1].starts_with("macGuard") && lines[1].contains("refuted"), "{text}");
    assert!(lines[3].contains("inconclusive"), "{text}");
    assert!(lines[4].starts_with("uplink/blue: ") && lines[4].ends_with(&answer.identity), "{text}");
}

#[test]
fn a_move_in_a_plan_has_its_reasons_and_remedies() {
    let mut change = v1::Change {
        target: "vnics/vm1".to_owned(),
        note: "to its software path: the NIC cannot enforce its policy".to_owned(),
        uncovered: uncovered().uncovered,
        ..v1::Change::default()
    };
    change.set_action(v1::change::Action::Move);
    change.uncovered.push(v1::Uncovered {
        feature: "ra-guard".to_owned(),
        text: "no rules".to_owned(),
        ..Default::default()
    });
    let answer = v1::PlanResponse { changes: vec![change], revision: 4 };
    let text = printed(|output| assert!(render::plan(output, &answer).expect("printed")));
    assert_eq!(
        text,
        "~ move vnics/vm1: to its software path: the NIC cannot enforce its policy\n    \
             vlan-trunk: one VLAN per VF\n      \
               -> use switchdev mode\n    \
             ra-guard: no rules\n"
    );
}

/// A command over the socket: what it printed, and whether all is well.
async fn sluice(bench: &Bench, line: &str) -> Result<(String, bool), CliError> {
    let socket = bench.socket();
    let words =
        ["sluice", "--socket", socket.to_str().expect("text")].into_iter().chain(line.split_whitespace());
    let cli = Cli::try_parse_from(words).expect("good words");
    let paper = Paper::default();
    let output = Output::to(cli.output, false, Box::new(paper.clone()));
    let well = commands::run(cli, &output).await?;
    Ok((paper.text(), well))
}

const TWO: &str = "
switches: [{name: blue, uplink: {netdev: up0}}]
vnics:
- {name: vm1, switch: blue, attach: {veth: p1}, mac: '02:00:00:00:00:01', sriov: {attach: {external: {}}}}
- {name: vm2, switch: blue, attach: {veth: p2}, mac: '02:00:00:00:00:02'}
";

/// What a NIC's thread would report.
fn report() -> Report {
    Report {
        switch: "blue".to_owned(),
        revision: 1,
        paths: BTreeMap::from([("vm1".to_owned(), on_vf())]),
        nic: nic(),
        counters: vec![v1::VfCounters { vnic: "vm1".to_owned(), rx_packets: Some(12), ..Default::default() }],
        outlook: Outlook::default(),
        events: vec![(crate::events::Severity::Info, "vnic/vm1: on VF 3 of pf0".to_owned())],
    }
}

#[tokio::test]
async fn what_a_nic_reports_is_shown_where_it_belongs() {
    let bench = Bench::start().await;
    bench.apply(TWO).await;
    let taken = bench.handle.call(|core| {
        core.take_report(report());
        Ok(())
    });
    taken.await.expect("taken over");

    let (text, _) = sluice(&bench, "get vnic").await.expect("listed");
    assert!(text.contains("VF 3 of pf0") && text.contains("software"), "{text}");
    let (text, _) = sluice(&bench, "get switch blue").await.expect("found");
    assert!(text.contains("NIC pf0: driver igb") && text.contains("refuted"), "{text}");
    let (text, _) = sluice(&bench, "get vnic/vm1").await.expect("found");
    assert!(text.contains("ok   path: on VF 3 of pf0 (0000:01:10.6) since"), "{text}");
    let (text, well) = sluice(&bench, "explain vnic vm1").await.expect("explained");
    assert!(well && text.starts_with("vm1 is on VF 3 of pf0 (0000:01:10.6) since 2026-"), "{text}");
    assert!(
        text.contains("ok   NIC: pf0: driver igb") && text.contains("vnic/vm1: on VF 3 of pf0"),
        "{text}"
    );
    let (text, _) = sluice(&bench, "explain vnic/vm1 -o json").await.expect("explained");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["vnic"]["status"]["path"]["vf"]["index"], 3, "{text}");
    let (text, _) = sluice(&bench, "explain vnic vm2").await.expect("explained");
    assert!(text.starts_with("vm2 is on its software path: it does not ask for a VF"), "{text}");
    let (text, _) = sluice(&bench, "stats").await.expect("counted");
    let line = text.lines().last().expect("the VF's");
    let cells: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(cells, ["vnic/vm1", "12", "-", "-", "-", "-", "-"], "{text}");
    let (text, _) = sluice(&bench, "stats vnic vm2").await.expect("counted");
    assert!(!text.contains("VF OF"), "{text}");
}

#[tokio::test]
async fn vf_commands_say_what_came_of_them() {
    let bench = Bench::start().await;
    bench.apply(TWO).await;
    let (text, well) = sluice(&bench, "revoke vnic vm2 --reason test").await.expect("revoked");
    assert!(well && text.starts_with("vm2 is on its software path"), "{text}");
    let (text, well) = sluice(&bench, "release vnic/vm2 -o json").await.expect("released");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(well && json["path"]["path"] == "SOFTWARE", "{text}");
    let (text, well) = sluice(&bench, "acknowledge vnic vm1 --ticket 7 --done").await.expect("answered");
    assert!(!well && text.starts_with("ticket 7 of vm1 is not awaited"), "{text}");
    // Where a NIC's thread does not serve it, a revoke has done nothing, and must not pretend.
    let taken = bench.handle.call(|core| {
        core.take_report(report());
        Ok(())
    });
    taken.await.expect("taken over");
    let (text, well) = sluice(&bench, "revoke vnic vm1").await.expect("answered");
    assert!(!well && text.starts_with("vm1 is on VF 3"), "{text}");
    for line in [
        "explain vnic x",
        "revoke vnic x",
        "release vnic x",
        "acknowledge vnic x --ticket 1 --done",
        "probe uplink x",
    ] {
        let error = sluice(&bench, line).await.expect_err("no such thing");
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("there is no such"), "{line}: {error}");
    }
    for uplink in ["blue", "up0"] {
        let error =
            sluice(&bench, &format!("probe uplink {uplink}")).await.expect_err("nobody looks after it");
        assert!(error.to_string().contains("nobody looks after the NIC of switch blue"), "{error}");
    }
}

#[tokio::test]
async fn several_resources_are_read_and_deleted_at_once() {
    let bench = Bench::start().await;
    bench.apply(TWO).await;
    let (text, _) = sluice(&bench, "get vnic/vm2 switch/blue vnic/vm1 -o json").await.expect("found");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let names: Vec<&str> = json["resources"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|resource| {
            resource["vnic"]["name"].as_str().or_else(|| resource["switch"]["name"].as_str())
        })
        .collect();
    assert_eq!((names, json["revision"].as_u64()), (vec!["vm2", "blue", "vm1"], Some(1)));
    let error = sluice(&bench, "get vnic vm1 vm9").await.expect_err("one is missing");
    assert!(error.to_string().starts_with("vnics/vm9: there is no such vnic"), "{error}");
    for line in ["delete vnic vm1 vm2 --revision 1", "delete vnic", "delete all", "get all vm1"] {
        assert_eq!(sluice(&bench, line).await.expect_err(line).exit_code(), 2, "{line}");
    }
    assert!(sluice(&bench, "delete vnic vm1 vm9").await.is_err(), "all or none");
    let (text, _) = sluice(&bench, "delete vnic/vm1 vnic/vm2 switch/blue").await.expect("deleted");
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.contains("switches/blue deleted (revision 2)"), "{text}");
}

fn workers() -> v1::WorkersStatus {
    let queue = |port: &str, queue, load, pin| v1::WorkerQueue {
        port: port.to_owned(),
        queue,
        load,
        frames_per_second: 1234.5,
        frames: 9_876,
        pin,
        ..v1::WorkerQueue::default()
    };
    let worker = |core, state: v1::worker::State, load, queues| v1::Worker {
        core,
        state: state.into(),
        load,
        frames_per_second: 2_000_000.4,
        polls: 77,
        wakeups: 8,
        queues,
        ..v1::Worker::default()
    };
    let queues = vec![queue("vnic/vm2", 0, 0.0, Some(9)), queue("vnic/vm1", 1, 0.25, Some(3))];
    let workers = vec![
        worker(3, v1::worker::State::Spinning, 0.5, queues),
        worker(7, v1::worker::State::Asleep, 0.0, vec![queue("vnic/vm1", 0, 0.125, None)]),
    ];
    v1::WorkersStatus { workers, allowed_cores: vec![0, 3, 7], ..v1::WorkersStatus::default() }
}

#[test]
fn workers_and_queues_are_tables() {
    let text = printed(|output| {
        render::workers::status(output, &workers()).expect("printed");
    });
    assert_eq!(
        text,
        "\
CORE  STATE     LOAD    FRAMES/S  POLLS  WAKE-UPS  QUEUES
3     spinning  50.0 %  2000000   77     8         2
7     asleep    0.0 %   2000000   77     8         1

PORT      QUEUE  CORE  LOAD    FRAMES/S  PLACED
vnic/vm1  0      7     12.5 %  1234      by load
vnic/vm1  1      3     25.0 %  1234      pinned
vnic/vm2  0      3     0.0 %   1234      pinned to core 9, where no worker is
"
    );
    let trouble = v1::WorkersStatus { trouble: "too few files".to_owned(), ..v1::WorkersStatus::default() };
    let text = printed(|output| {
        render::workers::status(output, &trouble).expect("printed");
    });
    assert!(text.starts_with("too few files\nno workers: "), "{text}");
    let json = printed_as(Format::Json, |output| {
        render::workers::status(output, &workers()).expect("printed");
    });
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["workers"][1]["state"], "ASLEEP");
    assert_eq!(json["workers"][1]["queues"][0]["load"], 0.125);
    assert_eq!(json["workers"][0]["queues"][0]["pin"], 9);
    assert!(json["workers"][1]["queues"][0].get("pin").is_none_or(serde_json::Value::is_null));
}

#[tokio::test]
async fn workers_are_asked_for_and_set_over_the_api() {
    let bench = Bench::start().await;
    let (text, well) = sluice(&bench, "workers").await.expect("listed");
    assert!(well && text.starts_with("no workers"), "{text}");
    let (text, _) = sluice(&bench, "workers cores auto -o json").await.expect("set");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["allowedCores"], serde_json::json!([]), "the fake has none");
    for (line, code) in [
        ("workers cores 4000", 1),
        ("workers move vnic/x 0 1", 1),
        ("workers auto vnic/x", 1),
        ("workers cores 3-1", 2),
        ("workers move vnic/x -- -1 1", 2),
    ] {
        let error = sluice(&bench, line).await.expect_err("it is refused");
        assert_eq!(error.exit_code(), code, "{line}: {error}");
    }
}
