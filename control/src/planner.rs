//! What a change would do: differences between two desired states, and between two images of the tables.
//!
//! Pure. An unchanged world has no differences, so a plan after an apply is empty.

use std::collections::BTreeSet;

use serde_json::Value;
use sluice_pipeline::tables::{PortConfig, port_flag};
use sluice_policy::image::{Behind, GroupImage, Image, PortImage};
use sluice_proto::v1::{Change, FieldChange, change::Action};

use crate::convert::{self, Spec};
use crate::json;
use crate::resource::Key;
use crate::store::State;

/// Most list items that are listed one by one; a count stands for the rest.
const ITEMS_MAX: usize = 20;

/// Changes of the desired state.
pub fn desired(old: &State, new: &State) -> Vec<Change> {
    let mut changes = Vec::new();
    for (key, entry) in &new.resources {
        let before = old.resources.get(key);
        if before.is_some_and(|before| before.spec == entry.spec) {
            continue;
        }
        let action = if before.is_some() { Action::Update } else { Action::Create };
        let fields = fields(before.map(|before| before.spec.as_ref()), Some(&entry.spec));
        changes.push(change(action, key.to_string(), fields, String::new()));
    }
    for (key, entry) in old.resources.iter().filter(|(key, _)| !new.resources.contains_key(*key)) {
        let mut note = String::new();
        if let Spec::AclGroup(group) = entry.spec.as_ref() {
            note = format!("with its {} rules", group.rules.len());
        }
        changes.push(change(Action::Delete, key.to_string(), Vec::new(), note));
    }
    changes
}

/// The same in short, for the audit log: what is done to which resource.
pub fn summary(old: &State, new: &State) -> Vec<(&'static str, Key)> {
    let mut changes = Vec::new();
    for (key, entry) in &new.resources {
        match old.resources.get(key) {
            None => changes.push(("create", key.clone())),
            Some(before) if before.spec != entry.spec => changes.push(("update", key.clone())),
            Some(_) => {}
        }
    }
    let gone = old.resources.keys().filter(|key| !new.resources.contains_key(*key));
    changes.extend(gone.map(|key| ("delete", key.clone())));
    changes
}

fn change(action: Action, target: String, fields: Vec<FieldChange>, note: String) -> Change {
    Change { action: action.into(), target, fields, note, uncovered: Vec::new() }
}

/// The JSON mapping of a spec.
fn spec_json(spec: &Spec) -> Value {
    let resource = json::to_json(&convert::resource(spec, 0), "sluice.v1.Resource");
    match resource {
        Value::Object(fields) => fields.into_values().next().unwrap_or(Value::Null),
        other => other,
    }
}

fn fields(before: Option<&Spec>, after: Option<&Spec>) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    let json = |spec: Option<&Spec>| spec.map(spec_json).unwrap_or_else(|| Value::Object(Default::default()));
    differences("", &json(before), &json(after), &mut changes);
    changes.retain(|change| change.path != "name");
    changes
}

fn differences(path: &str, before: &Value, after: &Value, changes: &mut Vec<FieldChange>) {
    match (before, after) {
        (Value::Object(old), Value::Object(new)) => {
            for name in old.keys().chain(new.keys().filter(|name| !old.contains_key(*name))) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let side = |object: &serde_json::Map<String, Value>| {
                    object.get(name).cloned().unwrap_or(Value::Null)
                };
                differences(&path, &side(old), &side(new), changes);
            }
        }
        (Value::Null, Value::Object(_)) => {
            differences(path, &Value::Object(Default::default()), after, changes)
        }
        (Value::Object(_), Value::Null) => {
            differences(path, before, &Value::Object(Default::default()), changes)
        }
        (old, new) if has_objects(old) || has_objects(new) => items(path, old, new, changes),
        (old, new) if old != new => {
            changes.push(FieldChange { path: path.to_owned(), before: text(old), after: text(new) })
        }
        _ => {}
    }
}

fn has_objects(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().any(Value::is_object))
}

/// Differences of lists of messages, whose order does not matter: what went and what came.
fn items(path: &str, before: &Value, after: &Value, changes: &mut Vec<FieldChange>) {
    let set = |value: &Value| -> BTreeSet<String> {
        value.as_array().map(|items| items.iter().map(Value::to_string).collect()).unwrap_or_default()
    };
    let (old, new) = (set(before), set(after));
    let gone = old.difference(&new).map(|item| (item.clone(), String::new()));
    let come = new.difference(&old).map(|item| (String::new(), item.clone()));
    let all: Vec<(String, String)> = gone.chain(come).collect();
    let path = format!("{path}[]");
    let rest = all.len().saturating_sub(ITEMS_MAX);
    for (before, after) in all.into_iter().take(ITEMS_MAX) {
        changes.push(FieldChange { path: path.clone(), before, after });
    }
    if rest > 0 {
        changes.push(FieldChange { path, before: String::new(), after: format!("and {rest} more") });
    }
}

fn text(value: &Value) -> String {
    if value.is_null() { String::new() } else { value.to_string() }
}

/// Whether a port's policy changes, whatever becomes of its attachment.
fn is_reprogrammed(before: &PortImage, after: &PortImage) -> bool {
    let policy = |port: &PortImage| {
        let mut config = port.config;
        config.flags &= !port_flag::ATTACHED;
        config
    };
    policy(before) != policy(after) || before.trunk != after.trunk
}

/// What the data plane would do to get from one image to the other.
pub fn data_plane(old: &Image, new: &Image) -> Vec<Change> {
    let mut changes = Vec::new();
    for (id, port) in &new.ports {
        if let Behind::VhostUser(rings) = &port.behind {
            let before = old.ports.get(id).filter(|before| before.name == port.name);
            if before.is_none_or(|before| before.behind != port.behind) {
                let note = format!("to the guest at {}", rings.path);
                changes.push(change(Action::Attach, port.name.clone(), Vec::new(), note));
            } else if before.is_some_and(|before| is_reprogrammed(before, port)) {
                changes.push(change(Action::Program, port.name.clone(), Vec::new(), "its policy".to_owned()));
            }
            continue;
        }
        let before = old.ports.get(id).filter(|before| before.name == port.name);
        let attached = |config: &PortConfig| config.flags & port_flag::ATTACHED != 0;
        let was = before.filter(|before| attached(&before.config));
        match (was, attached(&port.config)) {
            (None, true) => changes.push(change(
                Action::Attach,
                port.name.clone(),
                Vec::new(),
                format!("to {} (ifindex {})", port.netdev, port.config.ifindex),
            )),
            (Some(was), false) => {
                changes.push(change(
                    Action::Detach,
                    port.name.clone(),
                    Vec::new(),
                    format!("from {}", was.netdev),
                ));
            }
            (Some(was), true) if was.config.ifindex != port.config.ifindex => changes.push(change(
                Action::Attach,
                port.name.clone(),
                Vec::new(),
                format!("to {} (ifindex {}) in place of {}", port.netdev, port.config.ifindex, was.netdev),
            )),
            (Some(was), true) if was.hook != port.hook => {
                changes.push(change(
                    Action::Attach,
                    port.name.clone(),
                    Vec::new(),
                    "by another hook".to_owned(),
                ));
            }
            (None, false) if before.is_none() => changes.push(change(
                Action::Program,
                port.name.clone(),
                Vec::new(),
                format!("its policy; attached when {} appears", port.netdev),
            )),
            _ if before.is_some_and(|before| before.config != port.config || before.trunk != port.trunk) => {
                changes.push(change(Action::Program, port.name.clone(), Vec::new(), "its policy".to_owned()));
            }
            _ => {}
        }
    }
    let live: BTreeSet<&str> = new.ports.values().map(|port| port.name.as_str()).collect();
    for port in old.ports.values().filter(|port| !live.contains(port.name.as_str())) {
        changes.push(change(Action::Detach, port.name.clone(), Vec::new(), format!("from {}", port.netdev)));
    }
    let tables = [
        ("switches", count(&old.switches, &new.switches)),
        ("static addresses", count(&old.macs, &new.macs)),
        ("IP guard", set_count(&old.ip_guard, &new.ip_guard)),
        ("flood lists", count(&old.flood, &new.flood)),
        ("ACL rules", rules(old, new)),
    ];
    for (table, (written, removed)) in tables {
        if written + removed > 0 {
            let note = format!("{written} written, {removed} removed");
            changes.push(change(Action::Program, table.to_owned(), Vec::new(), note));
        }
    }
    changes
}

type Map<K, V> = std::collections::BTreeMap<K, V>;

fn count<K: Ord, V: PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> (usize, usize) {
    let written = new.iter().filter(|(key, value)| old.get(key) != Some(value)).count();
    (written, old.keys().filter(|key| !new.contains_key(key)).count())
}

fn set_count<K: Ord>(old: &BTreeSet<K>, new: &BTreeSet<K>) -> (usize, usize) {
    (new.difference(old).count(), old.difference(new).count())
}

fn rules(old: &Image, new: &Image) -> (usize, usize) {
    let empty = GroupImage::default();
    let ids: BTreeSet<&u32> = old.groups.keys().chain(new.groups.keys()).collect();
    ids.into_iter().fold((0, 0), |(written, removed), id| {
        let (before, after) = (old.groups.get(id).unwrap_or(&empty), new.groups.get(id).unwrap_or(&empty));
        let (w, r) = count(&before.rules, &after.rules);
        (written + w, removed + r)
    })
}

#[cfg(test)]
mod tests;
