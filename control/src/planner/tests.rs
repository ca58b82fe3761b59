use super::*;
use crate::store::Entry;

fn state(yaml: &str) -> State {
    let message = json::read_config(yaml).expect("good YAML");
    let specs = convert::config(&message).expect("good configuration");
    let entry = |spec: Spec| (spec.key(), Entry { revision: 1, spec: spec.into() });
    State { revision: 1, resources: specs.into_iter().map(entry).collect(), ..State::default() }
}

fn group(rules: impl Iterator<Item = u32>) -> State {
    let rules: Vec<String> = rules
        .map(|port| {
            format!(
                "{{priority: 1, direction: TO_VM, action: DENY, match: {{ipProto: udp, dstPorts: [{port}]}}}}"
            )
        })
        .collect();
    state(&format!("aclGroups: [{{name: g, rules: [{}]}}]", rules.join(",")))
}

#[test]
fn an_unchanged_world_has_no_differences() {
    let one = group(1..50);
    assert!(desired(&one, &one.clone()).is_empty());
    assert!(data_plane(&Image::default(), &Image::default()).is_empty());
}

#[test]
fn changed_rules_are_listed_and_the_rest_counted() {
    let changes = desired(&group(1..50), &group(2..51));
    assert_eq!(changes.len(), 1);
    let fields = &changes[0].fields;
    assert_eq!(fields.len(), 2);
    assert!(fields[0].before.contains("\"1\"") && fields[0].after.is_empty());
    assert!(fields[1].after.contains("\"50\"") && fields[1].before.is_empty());
    let changes = desired(&group(1..2), &group(1..102));
    let fields = &changes[0].fields;
    assert_eq!(fields.len(), ITEMS_MAX + 1);
    assert_eq!(fields[ITEMS_MAX].after, "and 80 more");
}

#[test]
fn fields_that_come_and_go_are_named_by_path() {
    let before = state("switches: [{name: s, uplink: {netdev: a, trunk: ['1-5']}}]");
    let after = state("switches: [{name: s, ageingSeconds: 60, uplink: {netdev: b, native: 7}}]");
    let changes = desired(&before, &after);
    let mut fields: Vec<(&str, &str, &str)> =
        changes[0].fields.iter().map(|f| (f.path.as_str(), f.before.as_str(), f.after.as_str())).collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            ("ageingSeconds", "", "60"),
            ("uplink.native", "", "7"),
            ("uplink.netdev", "\"a\"", "\"b\""),
            ("uplink.trunk", "[\"1-5\"]", ""),
        ]
    );
    let gone = desired(&before, &State::default());
    assert_eq!((gone[0].action(), gone[0].target.as_str()), (Action::Delete, "switches/s"));
    assert_eq!(summary(&before, &after), [("update", "switches/s".parse().expect("a key"))]);
}

#[test]
fn a_guest_with_rings_is_attached_once_and_reprogrammed_after() {
    let image = |rest: &str| {
        let config = state(&format!(
            "switches: [{{name: s}}]\nvnics: [{{name: v, switch: s, mac: \"02:00:00:00:00:01\", {rest}}}]"
        ))
        .config();
        let mut ids = sluice_policy::ids::Ids::default();
        sluice_policy::lower::assign_ids(&config, &mut ids).expect("numbers");
        sluice_policy::lower::lower(&config, &ids, &Default::default()).expect("an image")
    };
    let of_it = |old: &Image, new: &Image| -> Vec<(Action, String)> {
        let changes = data_plane(old, new).into_iter().filter(|change| change.target == "vnic/v");
        changes.map(|change| (change.action(), change.note)).collect()
    };
    let first = image("attach: {vhostUser: {path: /a}}");
    let attach = |path: &str| vec![(Action::Attach, format!("to the guest at {path}"))];
    assert_eq!(of_it(&Image::default(), &first), attach("/a"));
    let mut open = first.clone();
    open.ports.values_mut().for_each(|port| port.config.flags |= port_flag::ATTACHED);
    assert_eq!(of_it(&open, &first), [], "guests come and go without a plan");
    let guarded = image("attach: {vhostUser: {path: /a}}, policy: {dhcpGuard: true}");
    assert_eq!(of_it(&open, &guarded), [(Action::Program, "its policy".to_owned())]);
    assert_eq!(of_it(&open, &image("attach: {vhostUser: {path: /b}}")), attach("/b"));
}
