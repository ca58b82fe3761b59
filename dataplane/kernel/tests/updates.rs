//! Changes under traffic: what every version of a policy allows is never dropped, what every version denies never
//! passes. Needs root and the eBPF object.

mod common;

use std::process::{Child, Command, Stdio};

use common::*;
use sluice_kernel::Engine;
use sluice_pipeline::DropReason;
use sluice_policy::config::{Acl, AclAction, AclGroup, AclMatch, AclRule, Config, Direction};

fn pings(guest: &str) -> Child {
    Command::new("ip")
        .args(["netns", "exec", guest, "ping", "-n", "-q", "-i", "0.002", "-c", "1000", "10.0.0.2"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("`ping` is installed")
}

/// Syncs one configuration after the other as long as the child lives; returns how often, and what it printed.
fn churn(lab: &mut Lab, engine: &mut Engine, configs: &[Config], mut child: Child) -> (usize, String) {
    let mut syncs = 0;
    while child.try_wait().expect("the child is ours").is_none() {
        lab.sync(engine, &configs[syncs % configs.len()]);
        syncs += 1;
    }
    let output = child.wait_with_output().expect("ping ends");
    (syncs, String::from_utf8_lossy(&output.stdout).into_owned())
}

fn allow(priority: u32, matches: AclMatch) -> AclRule {
    AclRule { priority, direction: Direction::ToVm, matches, action: AclAction::Allow }
}

/// Lets ARP and, by one rule or another, ICMP through, and nothing else.
fn policies() -> Vec<Config> {
    let icmp = AclMatch { ip_proto: Some(1), ..AclMatch::default() };
    let from = |prefix: &str| Some(prefix.parse().expect("it is a prefix"));
    let ways = [
        icmp.clone(),
        AclMatch { src_ip: from("10.0.0.0/24"), ..icmp.clone() },
        AclMatch { dst_ip: from("10.0.0.2/32"), ..icmp.clone() },
        AclMatch { src_ip: from("10.0.0.1/32"), dst_ip: from("10.0.0.0/8"), ..icmp },
    ];
    ways.into_iter()
        .enumerate()
        .map(|(number, way)| {
            let arp = AclMatch { ethertype: Some(0x0806), ..AclMatch::default() };
            let mut rules = vec![allow(7, arp), allow(40_000 + number as u32, way)];
            rules.extend((1..=300).map(|port| rule(100 + number as u32, port, AclAction::Deny)));
            let mut receiver = vnic(2, "p2");
            receiver.policy.acl =
                Acl { groups: vec!["web".into()], default_to_vm: AclAction::Deny, ..Acl::default() };
            let mut config = config(vec![vnic(1, "p1"), receiver]);
            config.acl_groups.push(AclGroup { name: "web".into(), rules });
            config
        })
        .collect()
}

#[test]
fn a_group_changes_as_a_whole_under_traffic() {
    in_lab(|lab| {
        let (one, two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let policies = policies();
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &policies[0]);
        eventually("the first ping", || reaches(&one, 2));
        let (syncs, text) = churn(lab, &mut engine, &policies, pings(&one));
        assert!(syncs >= 8, "only {syncs} syncs");
        assert!(text.contains("1000 received"), "in {syncs} syncs: {text}");

        // And the rules do decide: without one for ICMP, nothing comes through.
        let mut closed = policies[0].clone();
        closed.acl_groups[0].rules.remove(1);
        lab.sync(&mut engine, &closed);
        assert!(!reaches(&one, 2));
        let id = lab.ids.ports.get("vnic/vm2").expect("the port has a number");
        let drops = engine.drops(id).expect("counters can be read");
        assert!(
            drops.iter().any(|(reason, count)| *reason == DropReason::AclToVm && *count > 0),
            "{drops:?}"
        );
        drop(two);
    });
}

#[test]
fn a_port_changes_as_a_whole_under_traffic() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let guarded = |addresses: &[&str], dhcp_guard| {
            let mut sender = vnic(1, "p1");
            sender.policy.ip_guard =
                addresses.iter().map(|text| text.parse().expect("it is an address")).collect();
            sender.policy.dhcp_guard = dhcp_guard;
            config(vec![sender, vnic(2, "p2")])
        };
        let configs = [
            guarded(&[], false),
            guarded(&["10.0.0.1"], true),
            guarded(&["10.0.0.1", "10.0.0.7", "2001:db8::1"], false),
            guarded(&["10.0.0.1", "10.0.0.9"], true),
        ];
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &configs[0]);
        eventually("the first ping", || reaches(&one, 2));
        let (syncs, text) = churn(lab, &mut engine, &configs, pings(&one));
        assert!(syncs >= 8, "only {syncs} syncs");
        assert!(text.contains("1000 received"), "in {syncs} syncs: {text}");
        lab.sync(&mut engine, &guarded(&["10.0.0.7"], false));
        assert!(!reaches(&one, 2));
    });
}
