//! A packet's way through the stages, twice: in the oracle, from the configuration, and in the pipeline, over the live
//! tables. Nothing is sent, learnt or counted.
//!
//! The two share no code but the names of stages and drop reasons, so a difference means a bug or tables that
//! somebody changed.

mod record;

use std::collections::{BTreeMap, BTreeSet};

use sluice_kernel::FdbRow;
use sluice_pipeline::{DropReason, Stage, Vlan};
use sluice_policy::config::Config;
use sluice_policy::conformance;
use sluice_policy::ids::Ids;
use sluice_policy::image::Backings;
use sluice_policy::net::VlanId;
use sluice_policy::oracle::{self, Domain, Outcome, Sighting, Station};
use sluice_proto::v1;

pub use record::{LiveTrace, Step, live};

/// What the oracle needs to know besides the frame.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// The desired state.
    pub config: &'a Config,
    /// Names of the numbers in the tables.
    pub ids: &'a Ids,
    /// Learnt addresses.
    pub fdb: Vec<FdbRow>,
    /// Ports whose interface is absent.
    pub unattached: BTreeSet<String>,
    /// vNICs that have VFs, and uplinks whose NICs are told what to receive.
    pub backings: Backings,
}

/// How one stage ended for one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Pass,
    Drop(DropReason),
    /// A port that turned out not to be among a flood's destinations.
    NoMember,
}

/// A stage of one port in one of the two.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    stage: Stage,
    port: String,
    end: End,
    text: String,
}

/// Compares what the live tables did with what the oracle says.
pub fn compare(
    around: &Surroundings<'_>,
    ingress: &str,
    frame: &[u8],
    live: &LiveTrace,
) -> v1::TraceResponse {
    let names: BTreeMap<u32, &str> =
        around.ids.ports.by_name.iter().map(|(name, id)| (*id, name.as_str())).collect();
    let name = |id: u32| names.get(&id).map_or_else(|| format!("port {id}"), |name| (*name).to_owned());
    let outcome = oracle::evaluate(around.config, &state(around, live, &name), ingress, frame);
    let (wanted, found) = (oracle_rows(&outcome, ingress), live_rows(live, around.ids, ingress, &name));

    let mut stages = Vec::new();
    let mut rest: Vec<Row> = found;
    for row in wanted {
        let at = rest.iter().position(|other| other.stage == row.stage && other.port == row.port);
        let other = at.map(|at| rest.remove(at));
        let agree = match &other {
            Some(other) => other.end == row.end,
            // The live flood lists leave out ports that cannot be members.
            None => row.end == End::NoMember,
        };
        stages.push(stage(
            &row,
            row.text.clone(),
            other.map(|other| other.text).unwrap_or_default(),
            agree,
            ingress,
        ));
    }
    for row in rest {
        stages.push(stage(&row, String::new(), row.text.clone(), row.end == End::NoMember, ingress));
    }

    let sent: BTreeMap<String, &Vec<u8>> =
        live.frames.iter().map(|(port, bytes)| (name(*port), bytes)).collect();
    let wanted: BTreeMap<String, &Vec<u8>> = outcome
        .deliveries
        .iter()
        .filter_map(|(port, delivery)| Some((port.clone(), delivery.as_ref().ok()?)))
        .collect();
    let whole = conformance::compare(around.config, around.ids, ingress, &outcome, &live.observed());
    let row = stages.iter().find(|stage| !stage.agree).map(|stage| format!("at {}", stage.stage));
    let difference = whole.err().or(row);
    let drops = outcome
        .deliveries
        .iter()
        .filter_map(|(port, delivery)| Some((port.clone(), delivery.clone().err()?)));
    let oracle_drops = outcome.dropped.map(|reason| (ingress.to_owned(), reason)).into_iter().chain(drops);
    let live_drops = live.steps.iter().filter_map(|step| match step {
        Step::Drop(port, reason) => Some((name(*port), *reason)),
        _ => None,
    });
    v1::TraceResponse {
        oracle_verdict: verdict(&wanted, oracle_drops),
        live_verdict: verdict(&sent, live_drops),
        agree: difference.is_none(),
        difference: difference.unwrap_or_default(),
        summary: outcome
            .steps
            .iter()
            .find(|step| step.stage == Stage::Parse)
            .map(|step| step.text.clone())
            .unwrap_or_default(),
        stages,
    }
}

fn stage(row: &Row, oracle: String, live: String, agree: bool, ingress: &str) -> v1::TraceStage {
    let stage = if row.port == ingress {
        row.stage.name().to_owned()
    } else {
        format!("{} {}", row.stage.name(), row.port)
    };
    v1::TraceStage { stage, oracle, live, agree }
}

/// The state that the oracle is to assume: that of the live tables.
fn state(around: &Surroundings<'_>, live: &LiveTrace, name: &dyn Fn(u32) -> String) -> oracle::State {
    let switches: BTreeMap<u32, &String> =
        around.ids.switches.by_name.iter().map(|(name, id)| (*id, name)).collect();
    let fdb = around.fdb.iter().filter_map(|row| {
        let switch = (*switches.get(&row.switch)?).clone();
        let station = Station { switch, domain: domain(row.vlan)?, mac: row.mac };
        Some((station, Sighting { port: name(row.port), age_seconds: row.age_seconds }))
    });
    let empty = live.steps.iter().filter_map(|step| match step {
        Step::OverRate(port, direction) => Some((name(*port), *direction)),
        _ => None,
    });
    oracle::State {
        fdb: fdb.collect(),
        empty_buckets: empty.collect(),
        unattached: around.unattached.clone(),
        backings: around.backings.clone(),
    }
}

fn domain(vlan: Vlan) -> Option<Domain> {
    if vlan == Vlan::UNTAGGED {
        return Some(Domain::Untagged);
    }
    let vid = VlanId::new(vlan.vid().into()).ok()?;
    Some(if vlan.is_service() { Domain::Service(vid) } else { Domain::Customer(vid) })
}

fn oracle_rows(outcome: &Outcome, ingress: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = outcome
        .steps
        .iter()
        .map(|step| Row {
            stage: step.stage,
            port: step.port.clone(),
            end: End::Pass,
            text: step.text.clone(),
        })
        .collect();
    if let Some(reason) = outcome.dropped {
        drop_at(&mut rows, ingress, reason);
    }
    let others: BTreeSet<String> =
        rows.iter().filter(|row| row.port != ingress).map(|row| row.port.clone()).collect();
    for port in others {
        let end = match outcome.deliveries.get(&port) {
            Some(Ok(_)) => continue,
            Some(Err(reason)) => End::Drop(*reason),
            None => End::NoMember,
        };
        if let Some(row) = rows.iter_mut().rev().find(|row| row.port == port) {
            row.end = end;
        }
    }
    rows
}

/// Marks the last row of a port as the one that dropped.
fn drop_at(rows: &mut Vec<Row>, port: &str, reason: DropReason) {
    let text = format!("drop ({})", reason.name());
    match rows.iter_mut().rev().find(|row| row.port == port) {
        Some(row) => {
            row.end = End::Drop(reason);
            if !row.text.starts_with("drop") {
                row.text = if row.text == "pass" { text } else { format!("{}; {text}", row.text) };
            }
        }
        // An unknown port has no stages.
        None => rows.push(Row { stage: Stage::Parse, port: port.to_owned(), end: End::Drop(reason), text }),
    }
}

fn live_rows(live: &LiveTrace, ids: &Ids, ingress: &str, name: &dyn Fn(u32) -> String) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for step in &live.steps {
        match step {
            Step::Enter(stage, port) => {
                let port = name(*port);
                // Whoever enters the destination's first stage and no further was not a member.
                let end = if *stage == Stage::Egress { End::NoMember } else { End::Pass };
                let text = if end == End::NoMember { "not a member" } else { "pass" };
                if *stage != Stage::Egress
                    && let Some(egress) =
                        rows.iter_mut().find(|row| row.stage == Stage::Egress && row.port == port)
                {
                    egress.end = End::Pass;
                    egress.text = "pass".to_owned();
                }
                rows.push(Row { stage: *stage, port, end, text: text.to_owned() });
            }
            Step::Drop(port, reason) => drop_at(&mut rows, &name(*port), *reason),
            Step::Rule(counter) => {
                if let Some(row) = rows.last_mut() {
                    row.text = format!("pass; {}", rule_text(ids, *counter));
                }
            }
            Step::Learn => {
                if let Some(row) = rows.iter_mut().rev().find(|row| row.port == ingress) {
                    row.text.push_str("; learns the source");
                }
            }
            Step::Out(port) => {
                let port = name(*port);
                if let Some(row) = rows.iter_mut().rev().find(|row| row.port == port) {
                    row.text.push_str("; out");
                }
            }
            Step::OverRate(..) => {}
        }
    }
    rows
}

/// A rule's counter in words. Only names are searched, as a trace has few rules.
fn rule_text(ids: &Ids, counter: u32) -> String {
    let name = ids.rules.by_name.iter().find(|(_, id)| **id == counter).map(|(name, _)| name.as_str());
    let group = name.and_then(|name| name.split_once('#')).map_or("unknown group", |(group, _)| group);
    format!("rule of {group} (counter {counter})")
}

fn verdict(sent: &BTreeMap<String, &Vec<u8>>, drops: impl Iterator<Item = (String, DropReason)>) -> String {
    let mut parts: Vec<String> = sent.keys().map(|port| format!("out {port}")).collect();
    let drops: BTreeSet<(String, DropReason)> = drops.collect();
    parts.extend(drops.into_iter().map(|(port, reason)| format!("drop on {port} ({})", reason.name())));
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
}

#[cfg(test)]
mod tests;
