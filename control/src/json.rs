//! The JSON mapping of the protocol, and YAML as another spelling of it.
//!
//! This is how the command line reads configurations and prints answers, and how the planner finds out which fields
//! differ. Reading is stricter than usual about names (an unknown field is an error that names its path and what was
//! perhaps meant) and kinder about spelling: enum values in any case, and numbers where a text is wanted (`80` for
//! `"80"`).

use prost::Message;
use prost_reflect::{
    DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, SerializeOptions,
};
use serde_json::Value;
use sluice_proto::{POOL, v1};

/// Why a text is not a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not YAML at all.
    #[error("this is not valid YAML: {0}")]
    Yaml(#[from] serde_yaml_ng::Error),
    /// A field that does not exist.
    #[error("{path}: unknown field `{field}` in {message}{}; it has: {known}", suggestion(.meant.as_deref()))]
    UnknownField {
        /// Where.
        path: String,
        /// The field.
        field: String,
        /// The message that does not have it.
        message: String,
        /// The nearest field that it does have.
        meant: Option<String>,
        /// All that it does have.
        known: String,
    },
    /// A value of the wrong shape.
    #[error("{path}: {problem}")]
    Value {
        /// Where.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

fn suggestion(meant: Option<&str>) -> String {
    meant.map(|meant| format!("; did you mean `{meant}`?")).unwrap_or_default()
}

/// Reads a configuration from YAML (of which JSON is a part). Several documents are put together.
///
/// # Errors
/// [`ReadError`], at the first mistake.
pub fn read_config(text: &str) -> Result<v1::Config, ReadError> {
    let mut whole = v1::Config::default();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let mut value = <serde_yaml_ng::Value as serde::Deserialize>::deserialize(document)?;
        if value.is_null() {
            continue;
        }
        value.apply_merge()?;
        let names = Names::of(&value);
        let part: v1::Config = plain(value, "")
            .and_then(|value| from_json(value, "sluice.v1.Config"))
            .map_err(|error| names.tell(error))?;
        whole.switches.extend(part.switches);
        whole.acl_groups.extend(part.acl_groups);
        whole.vnics.extend(part.vnics);
    }
    Ok(whole)
}

/// Names of a configuration's resources, by collection and index: people know resources by name, not by place.
struct Names(Vec<(String, Vec<Option<String>>)>);

impl Names {
    fn of(config: &serde_yaml_ng::Value) -> Names {
        use serde_yaml_ng::Value as Yaml;
        let name = |resource: &Yaml| Some(resource.get("name")?.as_str()?.to_owned());
        let collections = config.as_mapping().into_iter().flatten().filter_map(|(key, value)| {
            Some((key.as_str()?.to_owned(), value.as_sequence()?.iter().map(name).collect()))
        });
        Names(collections.collect())
    }

    /// `vnics[1].policy.vlan` as `vnics/vm1: policy.vlan`, like the daemon's violations.
    fn place(&self, path: &str) -> Option<String> {
        let (collection, rest) = path.split_once('[')?;
        let (index, field) = rest.split_once(']')?;
        let (_, names) = self.0.iter().find(|(known, _)| known == collection)?;
        let name = names.get(index.parse::<usize>().ok()?)?.as_ref()?;
        let field = field.strip_prefix('.').unwrap_or(field);
        Some(if field.is_empty() {
            format!("{collection}/{name}")
        } else {
            format!("{collection}/{name}: {field}")
        })
    }

    fn tell(&self, error: ReadError) -> ReadError {
        let named = |path: String| self.place(&path).unwrap_or(path);
        match error {
            ReadError::Value { path, problem } => ReadError::Value { path: named(path), problem },
            ReadError::UnknownField { path, field, message, meant, known } => {
                ReadError::UnknownField { path: named(path), field, message, meant, known }
            }
            error @ ReadError::Yaml(_) => error,
        }
    }
}

/// YAML values as JSON values.
fn plain(value: serde_yaml_ng::Value, path: &str) -> Result<Value, ReadError> {
    use serde_yaml_ng::Value as Yaml;
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(value) => Value::Bool(value),
        Yaml::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), _, _) => number.into(),
            (_, Some(number), _) => number.into(),
            (_, _, number) => number.into(),
        },
        Yaml::String(text) => Value::String(text),
        Yaml::Sequence(values) => {
            let values = values.into_iter().enumerate();
            Value::Array(
                values.map(|(i, value)| plain(value, &format!("{path}[{i}]"))).collect::<Result<_, _>>()?,
            )
        }
        Yaml::Mapping(entries) => {
            let mut object = serde_json::Map::new();
            for (key, value) in entries {
                let Yaml::String(key) = key else {
                    return Err(ReadError::Value {
                        path: printable(path),
                        problem: format!("{key:?} is not the name of a field"),
                    });
                };
                let value = plain(value, &join(path, &key))?;
                object.insert(key, value);
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => plain(tagged.value, path)?,
    })
}

/// A message from its JSON mapping. `name` is the message's full name.
///
/// # Errors
/// [`ReadError`], at the first mistake.
pub fn from_json<M: Message + Default>(mut value: Value, name: &str) -> Result<M, ReadError> {
    let descriptor = POOL.get_message_by_name(name).expect("callers name messages of our own files");
    tidy(&mut value, &descriptor, "")?;
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let message =
        DynamicMessage::deserialize_with_options(descriptor, tracked, &options).map_err(|error| {
            ReadError::Value { path: printable(&track.path().to_string()), problem: error.to_string() }
        })?;
    message
        .transcode_to()
        .map_err(|error| ReadError::Value { path: String::new(), problem: error.to_string() })
}

/// The JSON mapping of a message; fields at their default are left out. `name` is the message's full name.
pub fn to_json<M: Message>(message: &M, name: &str) -> Value {
    to_json_as(message, name, SerializeOptions::new())
}

/// The same with fields at their default present, as programs that read answers like it.
pub fn to_json_with_defaults<M: Message>(message: &M, name: &str) -> Value {
    to_json_as(message, name, SerializeOptions::new().skip_default_fields(false))
}

fn to_json_as<M: Message>(message: &M, name: &str, options: SerializeOptions) -> Value {
    let descriptor = POOL.get_message_by_name(name).expect("callers name messages of our own files");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("the descriptor is that of the message");
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options.stringify_64_bit_integers(false))
        .expect("every message of ours has a JSON mapping")
}

/// Checks names and rewrites spellings, along the message's descriptor.
fn tidy(value: &mut Value, message: &MessageDescriptor, path: &str) -> Result<(), ReadError> {
    let Value::Object(object) = value else {
        return Err(ReadError::Value {
            path: printable(path),
            problem: format!("expected the fields of {}, found {}", message.name(), describe(value)),
        });
    };
    for (name, value) in object.iter_mut() {
        let field = message.get_field_by_json_name(name).or_else(|| message.get_field_by_name(name));
        let Some(field) = field else {
            return Err(unknown_field(message, name, path));
        };
        tidy_field(value, &field, &join(path, field.json_name()))?;
    }
    Ok(())
}

fn tidy_field(value: &mut Value, field: &FieldDescriptor, path: &str) -> Result<(), ReadError> {
    match value {
        Value::Null => Ok(()),
        Value::Array(values) if field.is_list() => values
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, value)| tidy_value(value, &field.kind(), &format!("{path}[{index}]"))),
        other if field.is_list() => Err(ReadError::Value {
            path: path.to_owned(),
            problem: format!("expected a list, found {}", describe(other)),
        }),
        _ if field.is_map() => Ok(()),
        value => tidy_value(value, &field.kind(), path),
    }
}

fn tidy_value(value: &mut Value, kind: &Kind, path: &str) -> Result<(), ReadError> {
    match (kind, value) {
        (Kind::Message(message), value) => tidy(value, message, path),
        (Kind::Enum(names), Value::String(text)) => {
            let known = names.values().find(|known| known.name().eq_ignore_ascii_case(text));
            let Some(known) = known else {
                let names: Vec<String> = names.values().map(|known| known.name().to_owned()).collect();
                let names: Vec<String> =
                    names.into_iter().filter(|name| !name.ends_with("UNSPECIFIED")).collect();
                return Err(ReadError::Value {
                    path: path.to_owned(),
                    problem: format!("`{text}` is not one of {}", names.join(", ")),
                });
            };
            *text = known.name().to_owned();
            Ok(())
        }
        (Kind::String, value @ Value::Number(_)) => {
            *value = Value::String(value.to_string());
            Ok(())
        }
        _ => Ok(()),
    }
}

fn unknown_field(message: &MessageDescriptor, name: &str, path: &str) -> ReadError {
    let known: Vec<String> = message.fields().map(|field| field.json_name().to_owned()).collect();
    let nearest = known.iter().map(|known| (distance(known, name), known)).min();
    ReadError::UnknownField {
        path: printable(path),
        field: name.to_owned(),
        message: message.name().to_owned(),
        meant: nearest
            .filter(|(distance, _)| *distance <= 2.max(name.len() / 3))
            .map(|(_, known)| known.clone()),
        known: known.join(", "),
    }
}

/// Edit distance (Levenshtein), ignoring case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
        scalar => format!("`{scalar}`"),
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn printable(path: &str) -> String {
    if path.is_empty() || path == "." { "top level".to_owned() } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"
switches:  [{name: blue, uplink: {netdev: up0, hook: xdp}}]
aclGroups: [{name: web, rules: [{priority: 100, direction: TO_VM, match: {ipProto: tcp, dstPorts: [80,"8000-8080"]}, action: allow}]}]
vnics:
- name: vm1
  switch: blue
  attach: {veth: p1}
  mac: 02:00:00:00:00:01
  policy: {vlan: {access: 10}, ipGuard: ["10.77.0.1"], dhcpGuard: true, raGuard: true,
           acl: {groups: [web], default: {fromVm: ALLOW, toVm: DENY}}, rate: {fromVm: {bps: 100000000, burstBytes: 65536}}}
"#;

    #[test]
    fn the_example_of_the_readme_is_read() {
        let config = read_config(EXAMPLE).expect("valid");
        let rule = &config.acl_groups[0].rules[0];
        assert_eq!(rule.r#match.as_ref().expect("given").dst_ports, ["80", "8000-8080"]);
        assert_eq!(rule.action(), v1::acl_rule::Action::Allow);
        assert_eq!(config.switches[0].uplink.as_ref().expect("given").hook(), v1::Hook::Xdp);
        let policy = config.vnics[0].policy.as_ref().expect("given");
        assert_eq!(policy.rate.as_ref().and_then(|rate| rate.from_vm).expect("given").burst_bytes, 65536);
        assert_eq!(config.vnics[0].mac, "02:00:00:00:00:01");
        let again: v1::Config =
            from_json(to_json(&config, "sluice.v1.Config"), "sluice.v1.Config").expect("own output");
        assert_eq!(again, config);
    }

    fn complaint(text: &str) -> String {
        read_config(text).expect_err("must be refused").to_string()
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path_and_what_was_meant() {
        let text = complaint("vnics: [{name: a}, {name: b, policy: {ipGaurd: [10.0.0.1]}}]");
        assert!(
            text.starts_with("vnics/b: policy: unknown field `ipGaurd` in Policy; did you mean `ipGuard`?"),
            "{text}"
        );
        let text = complaint("vnics: [{name: a}, {name: b, colour: green}]");
        assert!(text.starts_with("vnics/b: unknown field `colour`"), "{text}");
        let text = complaint("vms: []");
        assert!(text.starts_with("top level: unknown field `vms`"), "{text}");
    }

    #[test]
    fn wrong_shapes_are_named_with_their_path() {
        let text = complaint("vnics: [{policy: {vlan: {access: ten}}}]");
        assert!(text.starts_with("vnics[0].policy.vlan.access: "), "{text}");
        let text = complaint("vnics: [{hook: fast}]");
        assert_eq!(text, "vnics[0].hook: `fast` is not one of AUTO, TCX, XDP", "it has no name");
        let rule = "{priority: 1, direction: SIDEWAYS}";
        let text = complaint(&format!("aclGroups: [{{name: a}}, {{name: web, rules: [{{}}, {rule}]}}]"));
        assert!(text.starts_with("aclGroups/web: rules[1].direction: `SIDEWAYS` is not"), "{text}");
        let text = complaint("vnics: [{name: a, 7: b}]");
        assert!(text.starts_with("vnics/a: ") && text.contains("not the name of a field"), "{text}");
        let text = complaint("vnics: [{name: [x], hook: fast}, {name: a, policy: {vlan: {access: ten}}}]");
        assert!(text.starts_with("vnics[0].hook: "), "{text}");
        let text = complaint("vnics: {name: a}");
        assert_eq!(text, "vnics: expected a list, found a mapping");
        let text = complaint("vnics: [{policy: {vlan: {access: 1, tunnel: 2}}}]");
        assert!(text.starts_with("vnics[0].policy.vlan"), "{text}");
        assert!(complaint("vnics: [{name: a, name: b}]").contains("duplicate"));
        assert!(complaint("vnics: [").contains("not valid YAML"));
        assert!(complaint("vnics: [{mac: [1]}]").starts_with("vnics[0].mac"));
    }

    #[test]
    fn documents_are_put_together_and_empty_ones_skipped() {
        let config =
            read_config("---\nswitches: [{name: a}]\n---\n---\nswitches: [{name: b}]\n").expect("valid");
        assert_eq!(config.switches.len(), 2);
        assert_eq!(read_config("").expect("valid"), v1::Config::default());
    }
}
