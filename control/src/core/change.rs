//! Changes of the desired state: apply, delete, and the plans of both.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sluice_policy::config::Config;
use sluice_policy::image::Image;
use sluice_policy::{lower, validate};
use sluice_proto::v1;
use sluice_proto::v1::violation::Code;

use super::Core;
use crate::convert::{self, Spec};
use crate::error::{Error, from_policy, violation};
use crate::events::{self, Severity};
use crate::planner;
use crate::resource::{Key, Kind};
use crate::store::{Entry, State};

/// What a change did.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Revision afterwards.
    pub revision: u64,
    /// Per resource of the request, in its order: what happened to it, and its status after the pass.
    pub results: Vec<v1::ApplyResult>,
    /// What the pass did to the data plane.
    pub data_plane: Vec<String>,
}

/// A desired state that would be valid, and what comes with it.
struct Candidate {
    state: State,
    config: Config,
    image: Image,
}

impl Core {
    /// Creates or replaces resources, all or none, and waits for the pass that follows. `actor` goes into the audit
    /// log.
    ///
    /// # Errors
    /// Everything that is wrong with the request, or why it could not be stored.
    pub fn apply(&mut self, request: &v1::ApplyRequest, actor: &str) -> Result<Outcome, Error> {
        let keys = check_once(request.config.as_ref())?;
        let specs = read_specs(request.config.as_ref())?;
        self.check_revisions(&request.expected_revisions)?;
        let candidate = self.candidate(specs, &[])?;
        let results: Vec<(Key, v1::apply_result::Outcome)> = keys
            .into_iter()
            .map(|key| {
                let (old, new) = (self.state.resources.get(&key), candidate.state.resources.get(&key));
                let outcome = match old {
                    None => v1::apply_result::Outcome::Created,
                    Some(_) if old == new => v1::apply_result::Outcome::Unchanged,
                    Some(_) => v1::apply_result::Outcome::Updated,
                };
                (key, outcome)
            })
            .collect();
        let data_plane = self.adopt_candidate(candidate, actor)?;
        let view = self.view.borrow().clone();
        let results = results.into_iter().map(|(key, outcome)| v1::ApplyResult {
            resource: key.to_string(),
            outcome: outcome.into(),
            status: view.resources.get(&key).and_then(|resource| resource.status.clone()),
        });
        Ok(Outcome { revision: self.state.revision, results: results.collect(), data_plane })
    }

    /// Deletes resources, all or none, and waits for the pass that follows.
    ///
    /// # Errors
    /// If one does not exist or is still referred to, or the change could not be stored.
    pub fn delete(&mut self, request: &v1::DeleteRequest, actor: &str) -> Result<Outcome, Error> {
        let keys = self.existing(&request.resources)?;
        self.check_revisions(&request.expected_revisions)?;
        let candidate = self.candidate(Vec::new(), &keys)?;
        let data_plane = self.adopt_candidate(candidate, actor)?;
        Ok(Outcome { revision: self.state.revision, results: Vec::new(), data_plane })
    }

    /// What an apply and a delete would change, without changing anything.
    ///
    /// # Errors
    /// What would be wrong with them, or the engine's if interfaces cannot be read.
    pub fn plan(&self, request: &v1::PlanRequest) -> Result<v1::PlanResponse, Error> {
        check_once(request.config.as_ref())?;
        let specs = read_specs(request.config.as_ref())?;
        let keys = self.existing(&request.delete)?;
        let candidate = self.candidate(specs, &keys)?;
        let mut changes = planner::desired(&self.state, &candidate.state);
        changes.extend(planner::data_plane(&self.image, &candidate.image));
        changes.extend(self.plan_paths(&candidate.config));
        Ok(v1::PlanResponse { changes, revision: self.state.revision })
    }

    fn existing(&self, references: &[v1::ResourceRef]) -> Result<Vec<Key>, Error> {
        let keys = references.iter().map(|reference| {
            let key = Key::new(reference.kind.parse()?, &reference.name);
            if self.state.resources.contains_key(&key) { Ok(key) } else { Err(Error::no_such(&key)) }
        });
        keys.collect()
    }

    fn check_revisions(&self, expected: &HashMap<String, u64>) -> Result<(), Error> {
        let mut found = Vec::new();
        for (resource, expected) in expected {
            let key: Key = resource.parse()?;
            let actual = self.state.resources.get(&key).map_or(0, |entry| entry.revision);
            if actual != *expected {
                let message = match (actual, expected) {
                    (0, _) => format!("expected at revision {expected} but it does not exist; read it again"),
                    (_, 0) => {
                        format!("expected not to exist but it does, at revision {actual}; read it again")
                    }
                    _ => format!("expected at revision {expected} but it is at {actual}; read it again"),
                };
                found.push(violation(key.to_string(), message, Code::RevisionMismatch));
            }
        }
        found.sort_by(|a, b| a.resource.cmp(&b.resource));
        if found.is_empty() { Ok(()) } else { Err(Error::Revision(found)) }
    }

    /// The desired state after a change, if it would be valid.
    fn candidate(&self, specs: Vec<Spec>, deleted: &[Key]) -> Result<Candidate, Error> {
        let mut state = self.state.clone();
        let revision = state.revision + 1;
        for key in deleted {
            state.resources.remove(key);
        }
        for spec in specs {
            let key = spec.key();
            if state.resources.get(&key).is_none_or(|entry| *entry.spec != spec) {
                state.resources.insert(key, Entry { revision, spec: spec.into() });
            }
        }
        if state.resources != self.state.resources {
            state.revision = revision;
        }
        check_references(&state, deleted)?;
        // Validation blames the later of two that clash: that must be the one of this request.
        let mut by_age: Vec<&Entry> = state.resources.values().collect();
        by_age.sort_by_key(|entry| entry.revision);
        let by_age = convert::collect(by_age.into_iter().map(|entry| entry.spec.as_ref()));
        validate::validate(&by_age)
            .map_err(|found| Error::Invalid(found.into_iter().map(from_policy).collect()))?;
        let config = state.config();
        lower::assign_ids(&config, &mut state.ids)?;
        // A port that is gone takes its pins along: another of the same name is another.
        state.workers.pins.retain(|pin, _| state.ids.ports.get(&pin.port).is_some());
        let backings = self.backings_for(&config);
        let observation = self.engine.observe(&lower::ports_with(&config, &backings))?;
        let image = lower::lower_with(&config, &state.ids, &observation.bindings, &backings)?;
        Ok(Candidate { state, config, image })
    }

    /// Makes this the state, durably, with an entry in the audit log.
    pub(super) fn store_state(
        &mut self,
        state: State,
        changes: Vec<String>,
        actor: &str,
    ) -> Result<(), Error> {
        let audit = v1::AuditEntry {
            unix_ms: u64::try_from(events::now().as_millis()).unwrap_or(u64::MAX),
            actor: actor.to_owned(),
            revision: state.revision,
            changes,
        };
        self.check_file();
        match self.store.commit(&self.state, &state, &audit) {
            Ok(None) => {}
            Ok(Some(warning)) => {
                self.events.note(Severity::Warning, format!("runtime copy: {warning}"));
            }
            Err(error) => {
                let text = format!("revision {} by {actor} could not be stored: {error}", state.revision);
                self.events.note(Severity::Error, text);
                return Err(error.into());
            }
        }
        self.events.note(Severity::Info, brief(&audit));
        self.state = state;
        Ok(())
    }

    /// Stores a candidate and lets a pass program it.
    fn adopt_candidate(&mut self, candidate: Candidate, actor: &str) -> Result<Vec<String>, Error> {
        let Candidate { state, config, .. } = candidate;
        if state != self.state {
            let changes: Vec<String> = planner::summary(&self.state, &state)
                .into_iter()
                .map(|(verb, key)| format!("{verb} {key}"))
                .collect();
            self.store_state(state, changes, actor)?;
            self.config = config;
            self.backings = self.backings_for(&self.config);
        }
        if self.untouched {
            self.untouched = false;
            self.events.note(Severity::Warning, "first apply: taking over the tables of the earlier daemon");
        }
        Ok(self.pass())
    }
}

/// An audit entry as one line.
fn brief(audit: &v1::AuditEntry) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<&str> = audit.changes.iter().take(SHOWN).map(String::as_str).collect();
    let rest = audit.changes.len().saturating_sub(SHOWN);
    let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("revision {} by {}: {}{rest}", audit.revision, audit.actor, shown.join(", "))
}

fn read_specs(config: Option<&v1::Config>) -> Result<Vec<Spec>, Error> {
    let Some(config) = config else {
        return Ok(Vec::new());
    };
    convert::config(config).map_err(|found| Error::Invalid(found.into_iter().map(from_policy).collect()))
}

/// The keys of a request, each of which may be there once.
fn check_once(config: Option<&v1::Config>) -> Result<Vec<Key>, Error> {
    let Some(config) = config else {
        return Ok(Vec::new());
    };
    let switches = config.switches.iter().map(|switch| Key::new(Kind::Switch, &switch.name));
    let groups = config.acl_groups.iter().map(|group| Key::new(Kind::AclGroup, &group.name));
    let vnics = config.vnics.iter().map(|vnic| Key::new(Kind::Vnic, &vnic.name));
    let keys: Vec<Key> = switches.chain(groups).chain(vnics).collect();
    let mut seen = BTreeSet::new();
    let twice: Vec<v1::Violation> = keys
        .iter()
        .filter(|key| !key.name.is_empty() && !seen.insert(*key))
        .map(|key| v1::Violation {
            resource: key.to_string(),
            field: "name".to_owned(),
            message: "it is given more than once; remove or rename one of them".to_owned(),
            code: Code::Duplicate.into(),
        })
        .collect();
    if twice.is_empty() { Ok(keys) } else { Err(Error::Invalid(twice)) }
}

/// Refuses a deletion that would leave references behind, and names the referrers.
fn check_references(state: &State, deleted: &[Key]) -> Result<(), Error> {
    let mut referrers: BTreeMap<&Key, Vec<String>> = BTreeMap::new();
    for (key, entry) in &state.resources {
        let Spec::Vnic(vnic) = entry.spec.as_ref() else {
            continue;
        };
        for target in deleted.iter().filter(|target| !state.resources.contains_key(*target)) {
            let refers = match target.kind {
                Kind::Switch => vnic.switch == target.name,
                Kind::AclGroup => vnic.policy.acl.groups.contains(&target.name),
                Kind::Vnic => false,
            };
            if refers {
                referrers.entry(target).or_default().push(key.to_string());
            }
        }
    }
    if referrers.is_empty() {
        return Ok(());
    }
    let found = referrers.into_iter().map(|(target, referrers)| {
        const SHOWN: usize = 10;
        let shown = referrers.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let rest = referrers.len().saturating_sub(SHOWN);
        let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        let message = format!("still used by {shown}{rest}; delete or change those first");
        violation(target.to_string(), message, Code::StillReferenced)
    });
    Err(Error::StillReferenced(found.collect()))
}
