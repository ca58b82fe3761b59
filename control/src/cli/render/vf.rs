//! What is about VFs: paths of vNICs, NICs of uplinks, and what probes found.

use std::time::Duration;

use sluice_proto::v1;
use sluice_proto::v1::path_status::{Path, Reason};
use sluice_proto::v1::probe_finding::Verdict;
use sluice_proto::v1::resource::Spec;

use super::branch;
use crate::cli::client::CliError;
use crate::cli::output::{Output, Tone};
use crate::events::print_time;
use crate::explain;

/// A path in a table's cell.
pub(super) fn path_cell(output: &Output, path: &v1::PathStatus) -> String {
    match path.path() {
        Path::Unspecified => output.paint(Tone::Faint, "unknown"),
        Path::Software => "software".to_owned(),
        Path::Programming => output.paint(Tone::Warn, "programming"),
        Path::Attaching => output.paint(Tone::Warn, "attaching"),
        Path::Hardware => {
            let text = path.vf.as_ref().map(|vf| format!("VF {} of {}", vf.index, vf.pf));
            output.paint(Tone::Good, &text.unwrap_or_else(|| "VF".to_owned()))
        }
        Path::Draining => output.paint(Tone::Warn, "draining"),
    }
}

/// What a list should say of a path besides where it is: why a vNIC that asks for a VF has none, and what is asked of the
/// orchestrator.
pub(super) fn path_notes(path: &v1::PathStatus) -> Vec<String> {
    let mut notes: Vec<String> = path.request.iter().map(request).collect();
    if !matches!(path.reason(), Reason::Unspecified | Reason::NotWanted) && !path.message.is_empty() {
        notes.push(path.message.clone());
    }
    if !path.attested.is_empty() {
        notes.push(format!("attested, not proven: {}", path.attested.join(", ")));
    }
    notes
}

/// What is asked of the orchestrator.
pub(super) fn request(request: &v1::VfRequest) -> String {
    let action = request.action().as_str_name();
    format!(
        "asks its orchestrator for {action}, ticket {}, until {}",
        request.ticket,
        time(request.deadline_unix_ms)
    )
}

fn time(unix_ms: u64) -> String {
    format!("{} UTC", print_time(Duration::from_millis(unix_ms)))
}

/// One sentence: where a vNIC is, and since when or why.
pub(in crate::cli) fn headline(output: &Output, vnic: &str, path: &v1::PathStatus) {
    let place = explain::path_in_words(path);
    let why = if path.message.is_empty() { &path.cause } else { &path.message };
    let more = match (path.path(), path.since_unix_ms) {
        (Path::Hardware, 1..) => format!(" since {}", time(path.since_unix_ms)),
        _ if !why.is_empty() => format!(": {why}"),
        _ => String::new(),
    };
    output.line(&format!("{vnic} is {place}{more}"));
}

/// The tree of an explanation, headline first.
pub(in crate::cli) fn explained(output: &Output, answer: &v1::ExplainResponse) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "ExplainResponse")?;
        return Ok(true);
    }
    if let Some(v1::Resource { spec: Some(Spec::Vnic(vnic)), status: Some(status), .. }) = &answer.vnic
        && let Some(path) = &status.path
    {
        headline(output, &vnic.name, path);
    }
    for finding in &answer.findings {
        branch(output, finding, 0);
    }
    Ok(true)
}

/// What a table has no room for, of a single resource: the path of a vNIC, the NIC of a switch.
pub(in crate::cli) fn details(output: &Output, resource: &v1::Resource) {
    let Some(status) = &resource.status else { return };
    let path = status.path.as_ref().filter(|path| path.vf.is_some() || path.reason() != Reason::NotWanted);
    if let Some(path) = path {
        output.line("");
        for finding in explain::explain(path, None, std::iter::empty()) {
            branch(output, &finding, 0);
        }
    }
    if let Some(status) = &status.nic {
        output.line("");
        nic(output, status);
    }
}

fn nic(output: &Output, nic: &v1::NicStatus) {
    let firmware =
        if nic.firmware.is_empty() { String::new() } else { format!(", firmware {}", nic.firmware) };
    output.line(&format!(
        "NIC {}: driver {}{firmware}, {} mode, {} of {} VFs in use, {} writes since the daemon started",
        nic.pf, nic.driver, nic.mode, nic.vfs_used, nic.vfs, nic.writes
    ));
    if !nic.message.is_empty() {
        output.line(&format!("{} {}", output.paint(Tone::Warn, "warn"), nic.message));
    }
    for foreign in &nic.foreign {
        output.line(&format!("{} not ours, and left alone: {foreign}", output.paint(Tone::Faint, "note")));
    }
    if nic.capabilities.is_empty() {
        return;
    }
    let rows = nic.capabilities.iter().map(|one| {
        let (tone, meaning) = match (one.evidence.as_str(), one.sufficient) {
            ("refuted", _) => {
                (Tone::Bad, "<== the NIC takes the setting and does not enforce it: frames showed it")
            }
            ("attested", _) => (Tone::Warn, "<== by the operator's word: attested, not proven"),
            (_, true) => (Tone::Good, ""),
            (_, false) => (Tone::Faint, ""),
        };
        let enough = if one.sufficient { "yes" } else { "no" };
        vec![one.feature.clone(), output.paint(tone, &one.evidence), enough.to_owned(), meaning.to_owned()]
    });
    output.table(&["capability", "evidence", "enough", ""], rows.collect());
}

/// What a probe found.
pub(in crate::cli) fn probed(
    output: &Output,
    switch: &str,
    answer: &v1::ProbeUplinkResponse,
) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "ProbeUplinkResponse")?;
        return Ok(true);
    }
    let rows = answer.findings.iter().map(|found| {
        let (verdict, tone) = match found.verdict() {
            Verdict::Enforced => ("enforced", Tone::Good),
            Verdict::Refuted => ("refuted", Tone::Bad),
            Verdict::Inconclusive | Verdict::Unspecified => ("inconclusive", Tone::Warn),
        };
        vec![found.feature.clone(), output.paint(tone, verdict), found.text.clone()]
    });
    output.table(&["feature", "verdict", "what frames showed"], rows.collect());
    output.line(&format!(
        "uplink/{switch}: what is enforced or refuted is kept, for every NIC of this kind: {}",
        answer.identity
    ));
    Ok(true)
}

/// Counters of VFs whose NICs count; a dash where one counts other things only.
pub(super) fn counters(output: &Output, vfs: &[v1::VfCounters]) {
    let rows = vfs.iter().filter_map(|vf| {
        let numbers = [vf.rx_packets, vf.rx_bytes, vf.tx_packets, vf.tx_bytes, vf.rx_dropped, vf.tx_dropped];
        numbers.iter().any(Option::is_some).then(|| {
            let cell =
                |number: &Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
            std::iter::once(format!("vnic/{}", vf.vnic)).chain(numbers.iter().map(cell)).collect()
        })
    });
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() {
        return;
    }
    output.line("");
    let headers = ["vf of", "rx packets", "rx bytes", "tx packets", "tx bytes", "rx dropped", "tx dropped"];
    output.table(&headers, rows);
}
