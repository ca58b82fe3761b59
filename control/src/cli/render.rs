//! Answers as tables.

pub(super) mod vf;
pub(super) mod workers;

use sluice_proto::v1;

use super::client::CliError;
use super::output::{Output, Tone};
use crate::resource::{Key, Kind};

/// Most fields of one change that are printed.
const CELL_MAX: usize = 100;
/// Where the path stands in a table of resources: behind the state.
const PATH_COLUMN: usize = 3;

fn short(text: &str) -> String {
    if text.chars().count() <= CELL_MAX {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(CELL_MAX).collect();
    cut.push('…');
    cut
}

fn state_word(status: Option<&v1::Status>) -> (&'static str, Tone) {
    match status.map(v1::Status::state) {
        Some(v1::status::State::Ready) => ("ready", Tone::Good),
        Some(v1::status::State::Pending) => ("pending", Tone::Warn),
        Some(v1::status::State::Failed) => ("failed", Tone::Bad),
        Some(v1::status::State::Unspecified) | None => ("unknown", Tone::Faint),
    }
}

/// One per resource; `false` if one failed.
pub(super) fn applied(output: &Output, answer: &v1::ApplyResponse) -> Result<bool, CliError> {
    let failed = |result: &v1::ApplyResult| {
        result.status.as_ref().is_some_and(|status| status.state() == v1::status::State::Failed)
    };
    let well = !answer.results.iter().any(failed);
    if !output.is_table() {
        output.message(answer, "ApplyResponse")?;
        return Ok(well);
    }
    for result in &answer.results {
        let outcome = match result.outcome() {
            v1::apply_result::Outcome::Created => "created",
            v1::apply_result::Outcome::Updated => "updated",
            v1::apply_result::Outcome::Unchanged | v1::apply_result::Outcome::Unspecified => "unchanged",
        };
        let (state, tone) = state_word(result.status.as_ref());
        let message = result.status.as_ref().map(|status| status.message.as_str()).unwrap_or_default();
        let message = if message.is_empty() { String::new() } else { format!(": {message}") };
        output.line(&format!("{} {outcome}, {}{message}", result.resource, output.paint(tone, state)));
    }
    output.line(&output.paint(Tone::Faint, &format!("revision {}", answer.revision)));
    Ok(well)
}

pub(super) fn plan(output: &Output, answer: &v1::PlanResponse) -> Result<bool, CliError> {
    use v1::change::Action;
    if !output.is_table() {
        output.message(answer, "PlanResponse")?;
        return Ok(true);
    }
    if answer.changes.is_empty() {
        output.line("nothing to do");
        return Ok(true);
    }
    for change in &answer.changes {
        let (sign, verb, tone) = match change.action() {
            Action::Create => ("+", "create", Tone::Good),
            Action::Update => ("~", "update", Tone::Warn),
            Action::Delete => ("-", "delete", Tone::Bad),
            Action::Attach => ("+", "attach", Tone::Good),
            Action::Detach => ("-", "detach", Tone::Bad),
            Action::Move => ("~", "move", Tone::Warn),
            Action::Program | Action::Unspecified => ("~", "program", Tone::Warn),
        };
        let note = if change.note.is_empty() { String::new() } else { format!(": {}", change.note) };
        output.line(&format!("{} {}{note}", output.paint(tone, &format!("{sign} {verb}")), change.target));
        for field in &change.fields {
            let text = match (field.before.as_str(), field.after.as_str()) {
                ("", after) => format!("+ {}: {}", field.path, short(after)),
                (before, "") => format!("- {}: {}", field.path, short(before)),
                (before, after) => format!("~ {}: {} -> {}", field.path, short(before), short(after)),
            };
            output.line(&format!("    {text}"));
        }
        for one in &change.uncovered {
            output.line(&format!("    {}: {}", one.feature, one.text));
            if !one.remedy.is_empty() {
                output.line(&format!("      -> {}", one.remedy));
            }
        }
    }
    Ok(true)
}

fn resource_key(resource: &v1::Resource) -> (&'static str, &str, String) {
    match &resource.spec {
        Some(v1::resource::Spec::Switch(spec)) => {
            let uplink = spec.uplink.as_ref().map_or("none", |uplink| uplink.netdev.as_str());
            ("switch", &spec.name, format!("uplink {uplink}"))
        }
        Some(v1::resource::Spec::AclGroup(spec)) => {
            ("aclGroup", &spec.name, format!("{} rules", spec.rules.len()))
        }
        Some(v1::resource::Spec::Vnic(spec)) => {
            ("vnic", &spec.name, format!("{} on {}", spec.mac, spec.switch))
        }
        None => ("unknown", "", String::new()),
    }
}

/// What names a resource; none if it is of a kind that this version does not know.
pub(super) fn key(resource: &v1::Resource) -> Option<Key> {
    match resource.spec.as_ref()? {
        v1::resource::Spec::Switch(spec) => Some(Key::new(Kind::Switch, &spec.name)),
        v1::resource::Spec::AclGroup(spec) => Some(Key::new(Kind::AclGroup, &spec.name)),
        v1::resource::Spec::Vnic(spec) => Some(Key::new(Kind::Vnic, &spec.name)),
    }
}

fn path(resource: &v1::Resource) -> Option<&v1::PathStatus> {
    resource.status.as_ref()?.path.as_ref()
}

fn hooks(port: &v1::PortStatus) -> String {
    let names: Vec<&str> = port.hooks().map(|hook| hook.as_str_name()).collect();
    names.join("+")
}

/// One line per resource. Paths have a column where there are vNICs.
pub(super) fn resources(output: &Output, resources: &[v1::Resource]) {
    let has_paths = resources.iter().any(|resource| path(resource).is_some());
    let rows = resources.iter().map(|resource| {
        let (kind, name, about) = resource_key(resource);
        let (state, tone) = state_word(resource.status.as_ref());
        let ports = resource.status.as_ref().map(|status| status.ports.as_slice()).unwrap_or_default();
        let netdevs: Vec<&str> = ports.iter().map(|port| port.netdev.as_str()).collect();
        let in_use: Vec<String> = ports.iter().map(hooks).filter(|hooks| !hooks.is_empty()).collect();
        let path = path(resource);
        let mut notes: Vec<String> = resource.status.iter().map(|status| status.message.clone()).collect();
        notes.extend(path.into_iter().flat_map(vf::path_notes));
        let nic = resource.status.iter().filter_map(|status| status.nic.as_ref());
        notes.extend(nic.map(|nic| nic.message.clone()));
        notes.extend(ports.iter().flat_map(|port| port.notes.iter().cloned()));
        notes.retain(|note| !note.is_empty());
        let mut row = vec![
            kind.to_owned(),
            name.to_owned(),
            output.paint(tone, state),
            about,
            netdevs.join(","),
            in_use.join(","),
            resource.revision.to_string(),
            notes.join("; "),
        ];
        if has_paths {
            row.insert(PATH_COLUMN, path.map(|path| vf::path_cell(output, path)).unwrap_or_default());
        }
        row
    });
    let mut headers = vec!["kind", "name", "state", "spec", "netdev", "hook", "revision", "notes"];
    if has_paths {
        headers.insert(PATH_COLUMN, "path");
    }
    output.table(&headers, rows.collect());
}

pub(super) fn change(output: &Output, change: &v1::WatchResponse) {
    let Some(resource) = &change.resource else {
        return;
    };
    let (kind, name, about) = resource_key(resource);
    let (state, tone) = state_word(resource.status.as_ref());
    let verb = match change.kind() {
        v1::watch_response::Kind::Existing | v1::watch_response::Kind::Unspecified => "existing",
        v1::watch_response::Kind::Created => "created",
        v1::watch_response::Kind::Changed => "changed",
        v1::watch_response::Kind::Deleted => "deleted",
    };
    let path = path(resource);
    let place = path.map(|path| format!(", {}", vf::path_cell(output, path))).unwrap_or_default();
    let request = path.and_then(|path| path.request.as_ref());
    let request = request.map(|request| format!("; {}", vf::request(request))).unwrap_or_default();
    output.line(&format!("{verb} {kind} {name}: {}{place} ({about}){request}", output.paint(tone, state)));
}

pub(super) fn stats(output: &Output, answer: &v1::GetStatsResponse) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "GetStatsResponse")?;
        return Ok(true);
    }
    let rows = answer.ports.iter().map(|port| {
        let numbers = [
            port.rx_packets,
            port.rx_bytes,
            port.tx_packets,
            port.tx_bytes,
            port.dropped,
            port.flooded,
            port.learn_limited,
            port.fdb_full,
            port.cache_misses,
        ];
        std::iter::once(port.port.clone()).chain(numbers.iter().map(u64::to_string)).collect()
    });
    let headers = [
        "port",
        "rx packets",
        "rx bytes",
        "tx packets",
        "tx bytes",
        "dropped",
        "flooded",
        "learn limited",
        "fdb full",
        "cache misses",
    ];
    output.table(&headers, rows.collect());
    if !answer.rules.is_empty() {
        output.line("");
        let rows = answer.rules.iter().map(|counted| {
            let rule = counted.rule.as_ref();
            vec![
                counted.group.clone(),
                rule.map(rule_text).unwrap_or_default(),
                counted.packets.to_string(),
                counted.bytes.to_string(),
            ]
        });
        output.table(&["group", "rule", "packets", "bytes"], rows.collect());
    }
    vf::counters(output, &answer.vfs);
    if let Some(frames) = answer.frames {
        output.line(&format!("frames of the userspace engine in use: {} of {}", frames.in_use, frames.total));
    }
    Ok(true)
}

fn rule_text(rule: &v1::AclRule) -> String {
    let matches = rule.r#match.as_ref().map(|matches| crate::json::to_json(matches, "sluice.v1.AclMatch"));
    let words: Vec<String> = match matches {
        Some(serde_json::Value::Object(fields)) => fields
            .into_iter()
            .map(|(name, value)| {
                let text = match value {
                    serde_json::Value::String(text) => text,
                    serde_json::Value::Array(items) => {
                        let items: Vec<String> =
                            items.iter().map(|item| item.as_str().unwrap_or_default().to_owned()).collect();
                        items.join(",")
                    }
                    other => other.to_string(),
                };
                format!("{name}={text}")
            })
            .collect(),
        _ => vec!["everything".to_owned()],
    };
    format!(
        "{} {} {} {}",
        rule.priority,
        rule.direction().as_str_name(),
        words.join(" "),
        rule.action().as_str_name()
    )
}

pub(super) fn fdb(output: &Output, answer: &v1::GetFdbResponse) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "GetFdbResponse")?;
        return Ok(true);
    }
    let rows = answer.entries.iter().map(|entry| {
        let vlan = match (entry.permanent, entry.vlan, entry.service_vlan) {
            (true, ..) => "any".to_owned(),
            (false, 0, _) => "untagged".to_owned(),
            (false, vid, true) => format!("s{vid}"),
            (false, vid, false) => vid.to_string(),
        };
        let age = if entry.permanent { "own".to_owned() } else { format!("{} s", entry.age_seconds) };
        vec![entry.switch.clone(), vlan, entry.mac.clone(), entry.port.clone(), age]
    });
    output.table(&["switch", "vlan", "mac", "port", "age"], rows.collect());
    Ok(true)
}

pub(super) fn drops(output: &Output, answer: &v1::GetDropsResponse) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "GetDropsResponse")?;
        return Ok(true);
    }
    if answer.drops.is_empty() {
        output.line("nothing was dropped");
        return Ok(true);
    }
    let rows = answer.drops.iter().map(|drop| {
        vec![drop.port.clone(), drop.reason.clone(), drop.packets.to_string(), drop.description.clone()]
    });
    output.table(&["port", "reason", "packets", "meaning"], rows.collect());
    Ok(true)
}

pub(super) fn trace(output: &Output, port: &str, answer: &v1::TraceResponse) -> Result<(), CliError> {
    if !output.is_table() {
        return output.message(answer, "TraceResponse");
    }
    output.line(&format!("from {port}: {}", answer.summary));
    let rows = answer.stages.iter().map(|stage| {
        let mark = if stage.agree { String::new() } else { output.paint(Tone::Bad, "<== DIFFERENT") };
        vec![stage.stage.clone(), stage.oracle.clone(), stage.live.clone(), mark]
    });
    output.table(&["stage", "oracle", "live tables", ""], rows.collect());
    output.line(&format!("oracle:      {}", answer.oracle_verdict));
    output.line(&format!("live tables: {}", answer.live_verdict));
    if !answer.agree {
        let text = "THE LIVE TABLES DO NOT DO WHAT THE POLICY SAYS. This is a bug, or somebody changed the tables: \
                    run `sluice doctor`, keep this output, and report it.";
        output.line(&output.paint(Tone::Bad, text));
        output.line(&format!("they differ in: {}", answer.difference));
    }
    Ok(())
}

/// The tree; `false` if there is a problem in it.
pub(super) fn doctor(output: &Output, answer: &v1::DoctorResponse) -> Result<bool, CliError> {
    let well = !answer.findings.iter().any(has_problem);
    if !output.is_table() {
        output.message(answer, "DoctorResponse")?;
        return Ok(well);
    }
    for finding in &answer.findings {
        branch(output, finding, 0);
    }
    Ok(well)
}

fn has_problem(finding: &v1::Finding) -> bool {
    finding.level() == v1::finding::Level::Problem || finding.children.iter().any(has_problem)
}

fn branch(output: &Output, finding: &v1::Finding, depth: usize) {
    let (mark, tone) = match finding.level() {
        v1::finding::Level::Ok => ("ok  ", Tone::Good),
        v1::finding::Level::Note | v1::finding::Level::Unspecified => ("note", Tone::Faint),
        v1::finding::Level::Warning => ("warn", Tone::Warn),
        v1::finding::Level::Problem => ("FAIL", Tone::Bad),
    };
    let indent = "  ".repeat(depth);
    let detail = if finding.detail.is_empty() { String::new() } else { format!(": {}", finding.detail) };
    output.line(&format!("{indent}{} {}{detail}", output.paint(tone, mark), finding.title));
    if !finding.remedy.is_empty() {
        output.line(&format!("{indent}     -> {}", finding.remedy));
    }
    for child in &finding.children {
        branch(output, child, depth + 1);
    }
}

pub(super) fn version(output: &Output, answer: &v1::GetVersionResponse) -> Result<bool, CliError> {
    let own = env!("CARGO_PKG_VERSION");
    if !output.is_table() {
        let daemon = crate::json::to_json_with_defaults(answer, "sluice.v1.GetVersionResponse");
        output.value(&serde_json::json!({"client": {"version": own}, "daemon": daemon}))?;
        return Ok(true);
    }
    output.line(&format!("sluice  {own}"));
    output.line(&format!(
        "sluiced {} (pid {}, instance {}, revision {}, table layout {})",
        answer.version, answer.pid, answer.instance, answer.revision, answer.layout
    ));
    Ok(true)
}
