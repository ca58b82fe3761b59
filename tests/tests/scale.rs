//! Many of everything. Times are printed; the bounds are generous, since they are checked on small busy machines.

#![forbid(unsafe_code)]
// The times are what one wants to read.
#![allow(clippy::print_stdout)]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use sluice_tests::api::{list, text};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{self, carries, mac_text, note};
use sluice_tests::{PATIENCE, PacketSocket, scenario, tools};

/// "Seconds, not minutes": in the dev profile, on two cores.
const SECONDS: Duration = Duration::from_secs(30);

#[test]
fn sixty_four_vnics_on_one_switch() -> Result<()> {
    scenario(|lab| {
        let vms = (1..=64).map(|number| lab.vm(number)).collect::<Result<Vec<_>>>()?;
        let vnics: String = vms.iter().map(|vm| vm.vnic("")).collect();
        lab.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{vnics}"))?;

        let sockets =
            vms.iter().map(|vm| PacketSocket::open(&vm.netns, INTERFACE)).collect::<Result<Vec<_>>>()?;
        sockets[0].send(&note(wire::BROADCAST, vms[0].mac(), &[], "to everybody"))?;
        for (vm, socket) in vms.iter().zip(&sockets).skip(1) {
            socket.expect(&format!("{} gets the broadcast", vm.name), PATIENCE, |frame| {
                carries(frame, "to everybody")
            })?;
        }
        // Nobody gets it twice, and the sender not at all: a ping of all neighbours afterwards flushes the pipes.
        for pair in vms.windows(2) {
            pair[0].ping(&pair[1])?;
        }
        for (vm, socket) in vms.iter().zip(&sockets) {
            let again = socket.drain(|frame| carries(frame, "to everybody"))?;
            ensure!(again.is_empty(), "{} got the broadcast {} times too often", vm.name, again.len());
        }
        let first = &vms[0];
        let last = vms.last().expect("64 of them");
        let end = tools::iperf3(&first.netns, &last.netns, &last.ip4().to_string(), &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 1.0, "TCP on a switch of 64: {end}");
        Ok(())
    })
}

#[test]
fn a_thousand_vnics_are_applied_in_seconds() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
        let mut yaml = format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vm1.vnic(""), vm2.vnic(""));
        for number in 3..=1000u16 {
            let [high, low] = number.to_be_bytes();
            // Writing to a string does not fail.
            let _ = writeln!(
                yaml,
                "- {{name: vm{number}, switch: blue, attach: {{veth: p{number}}}, mac: \"{}\", \
                 policy: {{vlan: {{access: {}}}, ipGuard: [\"10.77.{high}.{low}\"], dhcpGuard: true}}}}",
                mac_text([2, 0, 0, 0, high, low]),
                number % 4000 + 1,
            );
        }
        let start = Instant::now();
        lab.sluice().apply(&yaml)?;
        let took = start.elapsed();
        println!("1 000 vNICs applied in {took:.2?}");
        ensure!(took < SECONDS, "applying 1 000 vNICs took {took:?}");
        lab.sluice().wait_ready("vnic", "vm1", PATIENCE)?;
        lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
        lab.sluice().wait_state("vnic", "vm1000", "PENDING", PATIENCE)?;
        vm1.ping(&vm2)?;

        let start = Instant::now();
        lab.sluice().apply(&yaml)?;
        println!("applied again, unchanged, in {:.2?}", start.elapsed());
        let start = Instant::now();
        let answer = lab.sluice().apply(&format!("vnics:\n{}", vm1.vnic("policy: {dhcpGuard: true}")))?;
        println!("one of them changed in {:.2?}: {}", start.elapsed(), answer["dataPlane"]);
        ensure!(written(&answer) <= 8, "one changed vNIC wrote {}", answer["dataPlane"]);
        vm2.ping(&vm1)
    })
}

#[test]
fn ten_thousand_rules_are_applied_in_seconds_and_edited_one_by_one() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let group = |last_action: &str| {
            let mut yaml = String::from("aclGroups:\n- name: big\n  rules:\n");
            for number in 0..9_999u32 {
                let [_, a, b, c] = number.to_be_bytes();
                let action = if number % 3 == 0 { "DENY" } else { "ALLOW" };
                // Writing to a string does not fail.
                let _ = writeln!(
                    yaml,
                    "  - {{priority: {}, direction: TO_VM, action: {action}, \
                     match: {{srcIp: 192.{a}.{b}.{c}/32, ipProto: tcp, dstPorts: [\"{}\"]}}}}",
                    1 + number % 1000,
                    1 + number % 60_000,
                );
            }
            let _ = writeln!(
                yaml,
                "  - {{priority: 2000, direction: TO_VM, action: {last_action}, match: {{ipProto: icmp, srcIp: {}}}}}",
                vm1.ip4()
            );
            yaml
        };
        let start = Instant::now();
        lab.sluice().apply(&group("DENY"))?;
        lab.apply(&format!("vnics:\n{}", vm2.vnic("policy: {acl: {groups: [big]}}")))?;
        let took = start.elapsed();
        println!("10 000 rules applied and in force in {took:.2?}");
        ensure!(took < SECONDS, "applying 10 000 rules took {took:?}");
        vm1.no_ping(&vm2)?;
        let hits = lab.sluice().rule_packets("group/big", 2000)?;
        ensure!(hits == 3, "the rule has {hits} hits");

        let start = Instant::now();
        let answer = lab.sluice().apply(&group("ALLOW"))?;
        println!("one rule changed in {:.2?}: {}", start.elapsed(), answer["dataPlane"]);
        ensure!(written(&answer) < 100, "one changed rule wrote {}", answer["dataPlane"]);
        vm1.ping(&vm2)?;
        let end = tools::iperf3(&vm1.netns, &vm2.netns, &vm2.ip4().to_string(), &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 1.0, "TCP under 10 000 rules: {end}");
        Ok(())
    })
}

/// How many table entries an apply wrote, summed over the numbers in what it says about the data plane.
fn written(answer: &Value) -> u64 {
    let lines = list(&answer["dataPlane"]).iter().map(text).filter(|line| line.starts_with("tables:"));
    lines
        .flat_map(|line| line.split(|c: char| !c.is_ascii_digit()))
        .filter_map(|word| word.parse::<u64>().ok())
        .sum()
}
