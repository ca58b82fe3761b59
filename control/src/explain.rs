//! The explanation behind `sluice explain`: which path a vNIC takes, since when, and why not the other.
//!
//! It says for people what the vNIC's status says in types; made from statuses alone, in the reconciler's thread.

use std::time::Duration;

use sluice_proto::v1;
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;
use sluice_proto::v1::path_status::{Path, Reason};

use crate::doctor::finding;
use crate::events::{Event, Severity, print_time};

/// Events that are shown, at most.
const EVENTS_SHOWN: usize = 20;

/// Explains a path, given the NIC of the vNIC's uplink, if that has one that is looked after, and the events that name
/// the vNIC, newest first.
pub fn explain<'a>(
    path: &v1::PathStatus,
    nic: Option<&v1::NicStatus>,
    events: impl Iterator<Item = &'a Event>,
) -> Vec<Finding> {
    let mut findings = vec![where_it_is(path), why_not(path)];
    findings.extend(path.request.as_ref().map(request));
    if !path.attested.is_empty() {
        findings.push(finding(
            Level::Note,
            "attested, not proven",
            format!("its NIC enforces by the operator's word only: {}", path.attested.join(", ")),
            "`sluice probe uplink` finds out what can be found out; remove it from `attest` if you are not sure",
        ));
    }
    findings.extend(nic.map(of_nic));
    findings.extend(path.counters.as_ref().map(counters));
    let mut lines: Vec<Finding> = events
        .take(EVENTS_SHOWN)
        .map(|event| {
            let level = if event.severity == Severity::Info { Level::Ok } else { Level::Note };
            let times = if event.count > 1 { format!(" ({} times)", event.count) } else { String::new() };
            finding(level, print_time(event.at), format!("{}{times}", event.text), "")
        })
        .collect();
    lines.reverse();
    if !lines.is_empty() {
        let mut events = finding(Level::Ok, "what happened", "UTC, oldest first", "");
        events.children = lines;
        findings.push(events);
    }
    findings
}

/// A path in words.
pub fn path_in_words(path: &v1::PathStatus) -> String {
    let vf = path.vf.as_ref().map(|vf| {
        let pci = if vf.pci.is_empty() { String::new() } else { format!(" ({})", vf.pci) };
        format!("VF {} of {}{pci}", vf.index, vf.pf)
    });
    let vf = vf.unwrap_or_else(|| "its VF".to_owned());
    match path.path() {
        Path::Unspecified | Path::Software => "on its software path".to_owned(),
        Path::Programming => format!("on its software path, while {vf} is being programmed"),
        Path::Attaching => format!("on its software path, while {vf} is on its way into the guest"),
        Path::Hardware => format!("on {vf}"),
        Path::Draining => format!("on its way from {vf} to its software path"),
    }
}

fn where_it_is(path: &v1::PathStatus) -> Finding {
    let since = match path.since_unix_ms {
        0 => String::new(),
        ms => format!(" since {} UTC", print_time(Duration::from_millis(ms))),
    };
    let cause = if path.cause.is_empty() { String::new() } else { format!(": {}", path.cause) };
    finding(Level::Ok, "path", format!("{}{since}{cause}", path_in_words(path)), "")
}

fn why_not(path: &v1::PathStatus) -> Finding {
    match path.reason() {
        Reason::Unspecified => finding(
            Level::Ok,
            "policy",
            "its NIC enforces all of it: programmed, read back, and looked at every second",
            "",
        ),
        Reason::NotWanted => finding(Level::Ok, "no VF", &path.message, ""),
        Reason::Uncovered => {
            let mut found = finding(Level::Note, "no VF", &path.message, "");
            found.children = path
                .uncovered
                .iter()
                .map(|one| finding(Level::Note, &one.feature, &one.text, &one.remedy))
                .collect();
            found
        }
        Reason::NicUnavailable | Reason::Drifted => finding(Level::Warning, "no VF", &path.message, ""),
        Reason::NoNic | Reason::NoFreeVf | Reason::BackingOff | Reason::Held => {
            finding(Level::Note, "no VF", &path.message, "")
        }
        Reason::InTransition => finding(Level::Note, "in transition", &path.message, ""),
    }
}

fn request(request: &v1::VfRequest) -> Finding {
    finding(
        Level::Note,
        "waiting for the orchestrator",
        format!(
            "{} until {} UTC, ticket {}",
            request.action().as_str_name(),
            print_time(Duration::from_millis(request.deadline_unix_ms)),
            request.ticket
        ),
        "do it and answer with AcknowledgeVf (sluice acknowledge)",
    )
}

fn of_nic(nic: &v1::NicStatus) -> Finding {
    let firmware =
        if nic.firmware.is_empty() { String::new() } else { format!(", firmware {}", nic.firmware) };
    let detail = format!(
        "{}: driver {}{firmware}, {} mode, {} of {} VFs in use, {} writes",
        nic.pf, nic.driver, nic.mode, nic.vfs_used, nic.vfs, nic.writes
    );
    let level = if nic.message.is_empty() { Level::Ok } else { Level::Warning };
    let mut found = finding(level, "NIC", detail, &nic.message);
    found.children = nic
        .capabilities
        .iter()
        .map(|one| {
            let is_proven = one.sufficient && one.evidence != "attested";
            let level = if is_proven { Level::Ok } else { Level::Note };
            let detail = match one.evidence.as_str() {
                "attested" => "attested, not proven".to_owned(),
                "refuted" => {
                    "refuted: frames showed that the NIC takes the setting and does not enforce it".to_owned()
                }
                other => other.to_owned(),
            };
            finding(level, &one.feature, detail, "")
        })
        .chain(nic.foreign.iter().map(|text| finding(Level::Note, "not ours", text, "")))
        .collect();
    found
}

fn counters(counters: &v1::PathCounters) -> Finding {
    let detail = format!(
        "lost {}, duplicated {}, reordered {} packets, {} ms of darkness, where that was seen; \
         {} steps failed, {} were repeated, {} guests were cut off",
        counters.lost,
        counters.duplicated,
        counters.reordered,
        counters.blackout_ms,
        counters.failures,
        counters.retries,
        counters.forced
    );
    let mut found = finding(Level::Ok, "transitions", detail, "");
    found.children = counters
        .transitions
        .iter()
        .map(|one| {
            let title = format!("{} -> {}", one.from().as_str_name(), one.to().as_str_name());
            finding(Level::Ok, title, format!("{} times: {}", one.count, one.cause), "")
        })
        .collect();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_uncovered_feature_has_its_remedy() {
        let mut path = v1::PathStatus {
            message: "pf0 cannot enforce: vlan-trunk".into(),
            uncovered: vec![v1::Uncovered {
                feature: "vlan-trunk".into(),
                text: "one VLAN per VF".into(),
                remedy: "use switchdev mode".into(),
            }],
            ..v1::PathStatus::default()
        };
        path.set_path(Path::Software);
        path.set_reason(Reason::Uncovered);
        let found = explain(&path, None, std::iter::empty());
        let why = found.iter().find(|one| one.title == "no VF").expect("it has none");
        assert_eq!(
            (why.children[0].title.as_str(), why.children[0].remedy.as_str()),
            ("vlan-trunk", "use switchdev mode")
        );
    }

    #[test]
    fn what_is_attested_is_not_called_proven() {
        let mut path = v1::PathStatus { attested: vec!["macGuard".into()], ..v1::PathStatus::default() };
        path.set_path(Path::Hardware);
        let found = explain(&path, None, std::iter::empty());
        assert!(
            found.iter().any(|one| one.title == "attested, not proven" && one.detail.contains("macGuard"))
        );
    }
}
