//! Round trips through messages, JSON and YAML.

use sluice_policy::config::Config;
use sluice_policy::generate::{self, Rng};

use super::*;
use crate::json;

fn specs(config: &Config) -> Vec<Spec> {
    let switches = config.switches.iter().cloned().map(Spec::Switch);
    let groups = config.acl_groups.iter().cloned().map(Spec::AclGroup);
    switches.chain(groups).chain(config.vnics.iter().cloned().map(Spec::Vnic)).collect()
}

fn message(specs: &[Spec]) -> v1::Config {
    let mut message = v1::Config::default();
    for spec in specs {
        match resource(spec, 0).spec.expect("every resource has a spec") {
            v1::resource::Spec::Switch(spec) => message.switches.push(spec),
            v1::resource::Spec::AclGroup(spec) => message.acl_groups.push(spec),
            v1::resource::Spec::Vnic(spec) => message.vnics.push(spec),
        }
    }
    message
}

#[test]
fn generated_configurations_survive_messages_and_yaml() {
    let mut rng = Rng::new(1);
    for case in 0..200 {
        let specs = specs(&generate::scenario(&mut rng).config);
        let message = message(&specs);
        assert_eq!(config(&message).as_ref(), Ok(&specs), "case {case}");
        let yaml = serde_yaml_ng::to_string(&json::to_json(&message, "sluice.v1.Config")).expect("printable");
        let read = json::read_config(&yaml).expect("own output");
        assert_eq!(config(&read).as_ref(), Ok(&specs), "case {case}:\n{yaml}");
        for one in &specs {
            assert_eq!(spec(&resource(one, 7)).as_ref(), Ok(one), "case {case}");
        }
    }
}

fn rule(matches: &str) -> Result<String, String> {
    let yaml = format!(
        "aclGroups: [{{name: g, rules: [{{direction: TO_VM, action: DENY, match: {{{matches}}}}}]}}]"
    );
    let read = json::read_config(&yaml).map_err(|error| error.to_string())?;
    let specs = config(&read).map_err(|found| format!("{}: {}", found[0].field, found[0].message))?;
    let Some(v1::resource::Spec::AclGroup(group)) = resource(&specs[0], 0).spec else {
        return Err("not a group".to_owned());
    };
    let json = json::to_json(&group.rules[0].r#match.clone().unwrap_or_default(), "sluice.v1.AclMatch");
    Ok(json.to_string())
}

#[test]
fn every_spelling_of_a_match_has_one_meaning() {
    for (spellings, canonical) in [
        (["ethertype: arp", "ethertype: 0x0806", "ethertype: 2054"], r#"{"ethertype":"arp"}"#),
        (["ethertype: 0x88cc", "ethertype: '0x88CC'", "ethertype: 35020"], r#"{"ethertype":"0x88cc"}"#),
        (["ipProto: tcp", "ipProto: TCP", "ipProto: 6"], r#"{"ipProto":"tcp"}"#),
        (["tcpFlags: syn", "tcpFlags: syn/syn", "tcpFlags: SYN"], r#"{"tcpFlags":"syn"}"#),
        (
            ["tcpFlags: 'syn/syn,ack'", "tcpFlags: 'syn/ack,syn'", "tcpFlags: 'syn / syn, ack'"],
            r#"{"tcpFlags":"syn/syn,ack"}"#,
        ),
        (
            [
                "dstMac: '02:00:00:00:00:01'",
                "dstMac: 02-00-00-00-00-01",
                "dstMac: '02:00:00:00:00:01/ff:ff:ff:ff:ff:ff'",
            ],
            r#"{"dstMac":"02:00:00:00:00:01"}"#,
        ),
        (["srcIp: 10.0.0.1", "srcIp: 10.0.0.1/32", "srcIp: ' 10.0.0.1'"], r#"{"srcIp":"10.0.0.1/32"}"#),
    ] {
        for spelling in spellings {
            assert_eq!(rule(spelling).as_deref(), Ok(canonical), "{spelling}");
        }
    }
}

#[test]
fn wrong_matches_say_where_and_what_to_do() {
    for (matches, place, remedy) in [
        ("ethertype: apr", "rules[0].match.ethertype", "0x0806"),
        ("ipProto: 256", "rules[0].match.ipProto", "0-255"),
        ("tcpFlags: xmas", "rules[0].match.tcpFlags", "use fin"),
        ("tcpFlags: syn/ack", "rules[0].match.tcpFlags", "list them after the slash"),
        (
            "dstMac: '02:00:00:00:00:01/ff:00:00:00:00:00'",
            "rules[0].match.dstMac",
            "did you mean 02:00:00:00:00:00/",
        ),
        ("srcIp: 10.0.0.1/8", "rules[0].match.srcIp", "did you mean 10.0.0.0/8"),
        ("dstPorts: ['1', '70000']", "rules[0].match.dstPorts[1]", "8000-8080"),
        ("vlan: 0", "rules[0].match.vlan", "1 to 4094"),
        ("icmpType: 256", "rules[0].match.icmpType", "0-255"),
    ] {
        let error = rule(matches).expect_err(matches);
        assert!(error.starts_with(place) && error.contains(remedy), "{matches}: {error}");
    }
}

#[test]
fn rings_survive_messages_and_leave_out_what_is_usual() {
    let read = |rings: &str| {
        let yaml = format!(
            "vnics: [{{name: vm1, switch: blue, mac: \"02:00:00:00:00:01\", attach: {{vhostUser: {rings}}}}}]"
        );
        config(&json::read_config(&yaml).expect("good YAML"))
    };
    for (spelling, canonical) in [
        ("{path: /a}", r#"{"path":"/a"}"#),
        ("{path: /a, mode: SERVER, queues: 1}", r#"{"path":"/a"}"#),
        ("{path: /a, mode: CLIENT, queues: 4}", r#"{"mode":"CLIENT","path":"/a","queues":4}"#),
    ] {
        let specs = read(spelling).expect("good values");
        let message = message(&specs);
        assert_eq!(config(&message).as_ref(), Ok(&specs), "{spelling}");
        let json = json::to_json(&message, "sluice.v1.Config");
        let given: serde_json::Value = serde_json::from_str(canonical).expect("JSON");
        assert_eq!(json["vnics"][0]["attach"]["vhostUser"], given, "{spelling}");
    }
    assert_eq!(read("{path: /a, mode: 7}").expect_err("no such mode")[0].field, "attach.vhostUser.mode");
}
