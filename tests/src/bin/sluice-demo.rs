//! The demo that `cargo xtask demo` runs: two VMs, an outside, and `sluiced` between them. Each line on screen is a
//! claim that has just been tried; the first that is false ends the demo, and it exits non-zero.

#![forbid(unsafe_code)]
// It is all about what is on screen.
#![allow(clippy::print_stdout)]

use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_tests::lab::INTERFACE;
use sluice_tests::screen::{bold, claim, paint};
use sluice_tests::tools::{Running, iperf3_server, ping, pings_answered};
use sluice_tests::wire::{carries, mac, note};
use sluice_tests::{Flow, Lab, PATIENCE, PacketSocket, Vm};

fn main() -> ExitCode {
    println!("{}", bold("Sluice: a virtual switch in eBPF, one policy per VM interface"));
    println!("Two network namespaces play VMs, one the outside; sluiced runs between them.\n");
    let start = Instant::now();
    match play() {
        Ok(()) => {
            println!("\n{} in {:.0?}", paint("1;32", "All of it is true"), start.elapsed());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\n{} {error:#}", paint("1;31", "False:"));
            ExitCode::FAILURE
        }
    }
}

fn play() -> Result<()> {
    let lab = Lab::new()?;
    let (vm1, vm2, outside) = (lab.vm(1)?, lab.vm(2)?, lab.outside(3)?);
    claim("sluiced starts and answers", || {
        lab.start()?;
        Ok((format!("pid {}", lab.daemon_pid()), ()))
    })?;
    claim("sluice apply: a switch, an uplink, two vNICs", || {
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up3}}}}]\nvnics:\n{}{}",
            vm1.vnic(""),
            vm2.vnic("")
        ))?;
        Ok(("all ready".to_owned(), ()))
    })?;
    forwards(&vm1, &vm2, &outside)?;
    guards(&lab, &vm1, &vm2)?;
    separates(&lab, &vm1, &vm2)?;
    blocks(&lab, &vm1, &vm2)?;
    survives(&lab, [&vm1, &vm2, &outside])
}

fn forwards(vm1: &Vm, vm2: &Vm, outside: &Vm) -> Result<()> {
    claim("ping works: VM 1 to VM 2 and to the outside, IPv4 and IPv6", || {
        for other in [vm2, outside] {
            ping(&vm1.netns, &other.ip4().to_string())?;
            ping(&vm1.netns, &other.ip6().to_string())?;
        }
        Ok(("each answers 3 of 3".to_owned(), ()))
    })
}

fn guards(lab: &Lab, vm1: &Vm, vm2: &Vm) -> Result<()> {
    claim("a spoofed MAC is dropped", || {
        let (from, to) =
            (PacketSocket::open(&vm1.netns, INTERFACE)?, PacketSocket::open(&vm2.netns, INTERFACE)?);
        from.send(&note(vm2.mac(), mac(66), &[], "spoofed"))?;
        from.send(&note(vm2.mac(), vm1.mac(), &[], "honest"))?;
        let mut spoofed = 0;
        to.expect("the honest frame after it", PATIENCE, |frame| {
            spoofed += u32::from(carries(frame, "spoofed"));
            carries(frame, "honest")
        })?;
        let dropped = lab.sluice().dropped("vnic/vm1", "mac-guard")?;
        ensure!(spoofed == 0 && dropped == 1, "{spoofed} spoofed frames arrived, {dropped} were dropped");
        Ok(("the honest frame after it arrives; drops: vnic/vm1 mac-guard 1".to_owned(), ()))
    })
}

fn separates(lab: &Lab, vm1: &Vm, vm2: &Vm) -> Result<()> {
    let access = |vm: &Vm, vlan: u16| vm.vnic(&format!("policy: {{vlan: {{access: {vlan}}}}}"));
    claim("a VLAN separates", || {
        lab.apply(&format!("vnics:\n{}{}", access(vm1, 10), access(vm2, 20)))?;
        let answered = pings_answered(&vm1.netns, &vm2.ip4().to_string(), 3)?;
        ensure!(answered == 0, "{answered} of 3 pings were answered across VLANs");
        lab.apply(&format!("vnics:\n{}", access(vm2, 10)))?;
        vm1.ping(vm2)?;
        Ok(("VLAN 10 to 20: 0 of 3 answered; 10 to 10: 3 of 3".to_owned(), ()))
    })
}

fn blocks(lab: &Lab, vm1: &Vm, vm2: &Vm) -> Result<()> {
    claim("an ACL blocks, and its counter rises", || {
        let rule = "{priority: 100, direction: TO_VM, match: {ipProto: icmp, icmpType: 8}, action: DENY}";
        lab.apply(&format!(
            "aclGroups: [{{name: quiet, rules: [{rule}]}}]\nvnics:\n{}",
            vm2.vnic("policy: {vlan: {access: 10}, acl: {groups: [quiet]}}")
        ))?;
        let before = lab.sluice().rule_packets("group/quiet", 100)?;
        let answered = pings_answered(&vm1.netns, &vm2.ip4().to_string(), 3)?;
        let after = lab.sluice().rule_packets("group/quiet", 100)?;
        ensure!(
            answered == 0 && after == before + 3,
            "{answered} of 3 answered; the rule has {before} and then {after} hits"
        );
        lab.apply(&format!("vnics:\n{}", vm2.vnic("policy: {vlan: {access: 10}}")))?;
        vm1.ping(vm2)?;
        Ok((format!("0 of 3 answered; the rule's hits went from {before} to {after}"), ()))
    })
}

/// `kill -9` and restart while iperf3 and a sequence-numbered stream run from VM 1 to VM 2.
fn survives(lab: &Lab, [vm1, vm2, outside]: [&Vm; 3]) -> Result<()> {
    const LONG: Duration = Duration::from_secs(60);
    const PACKETS: u64 = 200_000;
    lab.apply(&format!("vnics:\n{}{}", vm1.vnic(""), vm2.vnic("")))?;
    vm1.ping(vm2)?;
    let _server = iperf3_server(&vm2.netns)?;
    let iperf3 = vm1
        .netns
        .command("iperf3")
        .args(["-J", "-t", "5", "-b", "500M", "-c", &vm2.ip4().to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .context("starting iperf3")?;
    let mut iperf3 = Running(iperf3);
    let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
    flow.wait_received(PACKETS, LONG)?;

    claim("kill -9 of the daemon: new flows work while it is dead", || {
        lab.kill()?;
        let output = lab.sluice().attempt(&["version"])?;
        ensure!(lab.sluice().daemon_pid().is_err(), "somebody still answers: {output:?}");
        vm2.ping(outside)?;
        outside.ping(vm1)?;
        let received = flow.received();
        flow.wait_received(received + PACKETS, LONG)?;
        Ok(("VM 2 to the outside, the outside to VM 1".to_owned(), ()))
    })?;
    claim("a restart adopts what is running", || {
        lab.start()?;
        for vm in [vm1, vm2] {
            lab.sluice().wait_ready("vnic", &vm.name, PATIENCE)?;
        }
        lab.sluice().wait_doctor("adopted", PATIENCE)?;
        let received = flow.received();
        flow.wait_received(received + PACKETS, LONG)?;
        Ok((format!("pid {}", lab.daemon_pid()), ()))
    })?;
    claim("and under iperf3 nothing was lost across both", || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut iperf3.0.stdout.take().context("iperf3's output")?, &mut text)?;
        let report: Value = serde_json::from_str(&text).context("reading iperf3's report")?;
        let sent = &report["end"]["sum_sent"];
        let (bytes, again) =
            (sent["bytes"].as_u64().unwrap_or(0), sent["retransmits"].as_u64().unwrap_or(u64::MAX));
        let stream = flow.finish()?;
        ensure!(
            bytes > 0 && again == 0 && stream.lost() == 0,
            "iperf3 sent {bytes} bytes with {again} retransmits; of the stream {} were lost: {stream:?}",
            stream.lost()
        );
        let said = format!(
            "{} MB over TCP without a retransmit; 0 lost of {} numbered packets",
            bytes / 1_000_000,
            stream.sent
        );
        Ok((said, ()))
    })
}
