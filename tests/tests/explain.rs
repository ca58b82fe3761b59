//! What the CLI tells: plans before changes, traces of packets, the doctor, and that none of it changes anything.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_tests::api::{list, text};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{carries, mac, note};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Vm, scenario};

/// A trace of one packet from a vNIC; it must agree with itself.
fn trace(lab: &Lab, vm: &Vm, words: &[&str]) -> Result<Value> {
    let answer = lab.sluice().json(&[&["trace", "--vnic", &vm.name], words].concat())?;
    let answer = list(&answer).first().cloned().unwrap_or(answer);
    ensure!(answer["agree"] == true, "oracle and live tables differ: {answer}");
    Ok(answer)
}

#[test]
fn a_trace_tells_what_would_happen_and_then_happens() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let rule = "{priority: 7, direction: TO_VM, match: {ipProto: udp, dstPorts: [\"53\"]}, action: DENY}";
        lab.apply(&format!("vnics:\n{}", vm2.vnic(&format!("policy: {{acl: {{rules: [{rule}]}}}}"))))?;
        let (destination, address) =
            (format!("dstMac={}", sluice_tests::wire::mac_text(vm2.mac())), format!("dstIp={}", vm2.ip4()));
        let source = format!("srcIp={}", vm1.ip4());
        let udp = |port| [destination.as_str(), address.as_str(), source.as_str(), "ipProto=udp", port];

        let denied = trace(lab, &vm1, &udp("dstPort=53"))?;
        ensure!(text(&denied["liveVerdict"]).contains("acl-to-vm"), "port 53 is denied: {denied}");
        let allowed = trace(lab, &vm1, &udp("dstPort=54"))?;
        ensure!(
            text(&allowed["liveVerdict"]).contains("vnic/vm2"),
            "port 54 is forwarded to VM 2: {allowed}"
        );

        let spoofed = note(vm2.mac(), mac(66), &[], "spoofed");
        let hex: String = spoofed.iter().map(|byte| format!("{byte:02x}")).collect();
        let dropped = trace(lab, &vm1, &["--hex", &hex])?;
        ensure!(text(&dropped["liveVerdict"]).contains("mac-guard"), "a spoofed MAC drops: {dropped}");

        // Nothing of this was sent or counted.
        ensure!(lab.sluice().drops()?.is_empty(), "tracing counted drops: {:?}", lab.sluice().drops()?);
        // And it was true.
        let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
        let from = PacketSocket::open(&vm1.netns, INTERFACE)?;
        from.send(&spoofed)?;
        from.send(&note(vm2.mac(), vm1.mac(), &[], "honest"))?;
        to.expect("the honest note", PATIENCE, |frame| carries(frame, "honest"))?;
        ensure!(lab.sluice().dropped("vnic/vm1", "mac-guard")? == 1, "{:?}", lab.sluice().drops()?);
        Ok(())
    })
}

#[test]
fn a_plan_shows_each_change_and_makes_none() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let same = format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vm1.vnic(""), vm2.vnic(""));
        let plan = lab.sluice().plan(&same)?;
        ensure!(list(&plan["changes"]).is_empty(), "nothing changes, but the plan says {plan}");

        let change = format!("vnics:\n{}", vm1.vnic("policy: {vlan: {access: 20}}"));
        let before = lab.sluice().json(&["get", "vnic"])?;
        let plan = lab.sluice().plan(&change)?;
        let named = list(&plan["changes"]).iter().any(|change| {
            change["target"] == "vnics/vm1"
                && list(&change["fields"]).iter().any(|field| text(&field["path"]).starts_with("policy.vlan"))
        });
        ensure!(named, "the plan does not name the change: {plan}");
        ensure!(lab.sluice().json(&["get", "vnic"])? == before, "planning changed something");
        vm1.ping(&vm2)?;

        lab.apply(&change)?;
        vm1.no_ping(&vm2)?;
        let plan = lab.sluice().plan(&change)?;
        ensure!(list(&plan["changes"]).is_empty(), "it is applied, but the plan says {plan}");
        Ok(())
    })
}

#[test]
fn the_packaged_example_is_accepted() -> Result<()> {
    scenario(|lab| {
        lab.sluice().apply(include_str!("../../packaging/example.yaml"))?;
        lab.sluice().wait_state("vnic", "vm1", "PENDING", PATIENCE)?;
        let settings = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/sluiced.yaml");
        std::fs::metadata(settings).context("the packaged settings")?;
        Ok(())
    })
}
