//! Changes under traffic: what every version of a policy allows is never dropped, what every version denies never
//! passes. Needs root and the eBPF object.

mod common;

use std::fs::File;
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use common::*;
use nix::sched::{CloneFlags, setns};
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

/// Lets ARP, IPv6 and, by one rule or another, UDP through, and nothing else.
fn policies() -> Vec<Config> {
    let udp = AclMatch { ip_proto: Some(17), ..AclMatch::default() };
    let prefix = |text: &str| Some(text.parse().expect("it is a prefix"));
    let ways = [
        udp.clone(),
        AclMatch { src_ip: prefix("10.0.0.0/24"), ..udp.clone() },
        AclMatch { dst_ip: prefix("10.0.0.2/32"), ..udp.clone() },
        AclMatch { src_ip: prefix("10.0.0.1/32"), dst_ip: prefix("10.0.0.0/8"), ..udp },
    ];
    ways.into_iter()
        .enumerate()
        .map(|(number, way)| {
            let arp = AclMatch { ethertype: Some(0x0806), ..AclMatch::default() };
            // Guests look for routers and neighbours on their own.
            let ipv6 = AclMatch { ethertype: Some(0x86dd), ..AclMatch::default() };
            let mut rules = vec![allow(7, arp), allow(40_000 + number as u32, way), allow(8, ipv6)];
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

/// Sends datagrams to one destination port after the other, so that hardly any verdict is found in a cache, until told
/// to stop. Returns how many.
fn shower(guest: String, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/{guest}")).expect("the guest's namespace has a name");
        setns(&namespace, CloneFlags::CLONE_NEWNET).expect("it can be entered");
        let socket = UdpSocket::bind("10.0.0.1:0").expect("the guest has its address");
        let mut sent = 0;
        for port in (1024..=u16::MAX).cycle() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            sent += u64::from(socket.send_to(b"drop", ("10.0.0.2", port)).is_ok());
        }
        sent
    })
}

#[test]
fn a_group_changes_as_a_whole_under_traffic() {
    in_lab(|lab| {
        let (one, _two) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let policies = policies();
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &policies[0]);
        let id = lab.ids.ports.get("vnic/vm2").expect("the port has a number");
        let denied = |engine: &Engine| -> u64 {
            let drops = engine.drops(id).expect("counters can be read");
            drops.iter().filter(|(reason, _)| *reason == DropReason::AclToVm).map(|(_, count)| count).sum()
        };
        let stop = Arc::new(AtomicBool::new(false));
        let shower = shower(one.clone(), stop.clone());
        eventually("datagrams", || engine.port_stats(id).is_ok_and(|stats| stats.tx_packets > 1000));
        for round in 0..100 {
            lab.sync(&mut engine, &policies[round % policies.len()]);
            assert_eq!(denied(&engine), 0, "in round {round}");
        }
        stop.store(true, Ordering::Relaxed);
        let sent = shower.join().expect("the sender ends well");
        let stats = engine.port_stats(id).expect("counters can be read");
        assert!(sent > 10_000 && stats.tx_packets > 10_000, "{sent} sent, {stats:?}");

        // And the rules do decide.
        let mut closed = policies[0].clone();
        closed.acl_groups[0].rules.remove(1);
        lab.sync(&mut engine, &closed);
        assert!(!reaches(&one, 2));
        assert!(denied(&engine) > 0);
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
