//! A VF only under the whole policy: attested or not, and with rules that the NIC cannot enforce.

use std::time::Duration;

use anyhow::{Result, ensure};
use sluice_tests::api::{list, text};
use sluice_tests::lab::{INTERFACE, Vm};
use sluice_tests::vf_lab::{BOND, VF, scenario};
use sluice_tests::wire::{carries, udp4};
use sluice_tests::{PATIENCE, PacketSocket};

use super::{ATTESTED, in_vlan};

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_is_only_attested_is_said_to_be_so_and_without_it_there_is_no_vf() -> Result<()> {
    scenario(4, |lab| {
        let vm1 = lab.guest(1)?;
        let soft = lab.software(4)?;
        let machines = lab.vnic(&vm1, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch("attest: [untagged]")))?;
        let path = lab.wait_reason(&vm1, "UNCOVERED")?;
        let guard = list(&path["uncovered"]).iter().find(|one| text(&one["feature"]) == "mac-guard");
        ensure!(guard.is_some_and(|one| !text(&one["remedy"]).is_empty()), "{path}");
        lab.wait_explain(&vm1, "mac-guard")?;
        println!("not attested: {}", text(&path["message"]));
        vm1.ping(&soft)?;

        lab.lab.apply(&lab.switch(ATTESTED))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        let path = lab.path(&vm1)?;
        ensure!(list(&path["attested"]).iter().any(|one| text(one) == "macGuard"), "{path}");
        lab.wait_explain(&vm1, "attested, not proven")?;
        vm1.ping(&soft)?;

        // The word is taken back.
        lab.lab.apply(&lab.switch("attest: [untagged]"))?;
        lab.wait_reason(&vm1, "UNCOVERED")?;
        vm1.ping(&soft)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_a_probe_finds_is_kept_and_placement_goes_by_it() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2, soft) = (lab.guest(1)?, lab.guest(2)?, lab.software(4)?);
        // The second has a VF all the while, and must not notice.
        let guarded = "policy: {vlan: {access: 100}}, sriov: {attach: {external: {}}}";
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}",
            lab.switch(""),
            vm1.vnic(guarded),
            lab.vnic(&vm2, &in_vlan(100), 50),
            soft.vnic(&format!("policy: {{{}}}", in_vlan(100))),
        ))?;
        lab.wait_path(&vm2, "HARDWARE")?;
        let answer = lab.lab.sluice().json(&["probe", "uplink", "blue"])?;
        let verdict = |feature: &str| {
            let found = list(&answer["findings"]).iter().find(|one| text(&one["feature"]) == feature);
            found.map(|one| text(&one["verdict"]).to_owned()).unwrap_or_default()
        };
        println!("{}: {}", text(&answer["identity"]), answer["findings"]);
        ensure!(verdict("macGuard") == "REFUTED" && verdict("accessVlan") == "ENFORCED", "{answer}");
        let kept = std::fs::read_to_string(lab.lab.places().state.join("probes.json"))?;
        ensure!(kept.contains(text(&answer["identity"])) && kept.contains("refuted"), "{kept}");

        lab.lab.stop()?;
        lab.lab.start()?;
        let path = lab.wait_reason(&vm1, "UNCOVERED")?;
        ensure!(list(&path["uncovered"]).iter().any(|one| text(&one["feature"]) == "mac-guard"), "{path}");
        lab.wait_explain(&vm1, "a probe found")?;
        lab.wait_path(&vm2, "HARDWARE")?;
        vm2.ping(&soft)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_rule_that_the_nic_cannot_enforce_is_enforced_when_apply_returns() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, soft, outside) = (lab.guest(1)?, lab.software(4)?, lab.outside(None)?);
        let machines = lab.vnic(&vm1, "", 50) + &soft.vnic("");
        lab.lab.apply(&format!("{}vnics:\n{machines}", lab.switch(ATTESTED)))?;
        lab.wait_path(&vm1, "HARDWARE")?;
        vm1.ping(&outside)?;
        let ears = PacketSocket::open(&outside.netns, INTERFACE)?;
        // A guest may send on its VF itself, for as long as it has it.
        let mouths = [PacketSocket::open(&vm1.netns, BOND)?, PacketSocket::open(&vm1.netns, VF)?];
        speak(&mouths, &vm1, &outside, DENIED, "before");
        ears.expect("a datagram before the rule", PATIENCE, |frame| carries(frame, "before"))?;

        let rule = format!(
            "{{priority: 9, direction: FROM_VM, match: {{ipProto: udp, dstPorts: [\"{DENIED}\"]}}, action: DENY}}"
        );
        let policy = format!("acl: {{rules: [{rule}]}}");
        lab.lab.sluice().apply(&format!("vnics:\n{}", lab.vnic(&vm1, &policy, 50)))?;
        let path = lab.path(&vm1)?;
        for _ in 0..20 {
            speak(&mouths, &vm1, &outside, DENIED, "forbidden");
        }
        lab.wait_reason(&vm1, "UNCOVERED")?;
        // What comes behind them shows that they would have come.
        wait_heard(&ears, &mouths, &vm1, &outside)?;
        println!("when apply returned: {} ({})", text(&path["path"]), text(&path["cause"]));
        let path = lab.path(&vm1)?;
        ensure!(list(&path["uncovered"]).iter().any(|one| text(&one["feature"]) == "acl-from-vm"), "{path}");

        lab.lab.apply(&format!("vnics:\n{}", lab.vnic(&vm1, "", 50)))?;
        let time = lab.wait_path(&vm1, "HARDWARE")?;
        println!("without the rule it is on a VF again after {time:.1?}");
        vm1.ping(&outside)?;
        vm1.ping(&soft)
    })
}

const DENIED: u16 = 7009;
const ALLOWED: u16 = 7010;

/// Sends the same datagram wherever it can.
fn speak(mouths: &[PacketSocket], from: &Vm, to: &Vm, port: u16, words: &str) {
    let frame = udp4(to.mac(), from.mac(), (from.ip4(), to.ip4()), (7000, port), words.as_bytes());
    for mouth in mouths {
        // The VF may have been taken.
        let _ = mouth.send(&frame);
    }
}

/// Sends what is allowed until it is heard, and wants nothing forbidden to be heard before or after.
fn wait_heard(ears: &PacketSocket, mouths: &[PacketSocket], from: &Vm, to: &Vm) -> Result<()> {
    let mut forbidden = 0;
    let mut listen = |patience: Duration| {
        let mut allowed = false;
        while let Some(frame) = ears.receive(patience)? {
            forbidden += u32::from(carries(&frame, "forbidden"));
            allowed |= carries(&frame, "allowed");
        }
        anyhow::Ok(allowed)
    };
    sluice_tests::wait_until("what is allowed is heard", PATIENCE, || {
        speak(mouths, from, to, ALLOWED, "allowed");
        Ok(listen(Duration::from_millis(300))?.then_some(()))
    })?;
    listen(Duration::from_millis(300))?;
    ensure!(forbidden == 0, "{forbidden} datagrams came through after apply had returned");
    Ok(())
}
