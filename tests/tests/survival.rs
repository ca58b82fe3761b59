//! The switch outlives its daemon, and the daemon outlives whatever is done to its files.

#![forbid(unsafe_code)]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sluice_tests::api::{list, number};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{self, TPID_CUSTOMER, carries, mac, mac_text, note, tags};
use sluice_tests::{Daemon, Flow, Lab, PATIENCE, PacketSocket, Vm, scenario, wait_until};

const LONG: Duration = Duration::from_secs(120);
const PACKETS: u64 = 1_000_000;

/// VMs 1, 2 and 4 in VLAN 10, and VM 3 a trunk of it behind which addresses are learnt.
fn network(lab: &Lab) -> Result<[Vm; 4]> {
    let vms = [lab.vm(1)?, lab.vm(2)?, lab.bare_vm(3)?, lab.vm(4)?];
    let access = "policy: {vlan: {access: 10}}";
    lab.apply(&format!(
        "switches: [{{name: blue}}]\nvnics:\n{}{}{}{}",
        vms[0].vnic(access),
        vms[1].vnic(access),
        vms[2].vnic("policy: {allowSpoofing: true, vlan: {trunk: {allowed: [\"10\"]}}}"),
        vms[3].vnic(access),
    ))?;
    Ok(vms)
}

/// An address that nobody has used appears behind VM 3 and is found there by VM 1.
fn a_new_address_is_learnt(vm1: &Vm, vm3: &Vm, number: u8) -> Result<()> {
    let (access, trunk) =
        (PacketSocket::open(&vm1.netns, INTERFACE)?, PacketSocket::open(&vm3.netns, INTERFACE)?);
    let stranger = mac(number);
    let hello = format!("hello from {number}");
    trunk.send(&note(wire::BROADCAST, stranger, &[(TPID_CUSTOMER, 10)], &hello))?;
    access.expect("the stranger's broadcast", PATIENCE, |frame| carries(frame, &hello))?;
    // VM 3 does not ask for unknown unicast: it gets this only because the address was learnt.
    let answer = format!("answer to {number}");
    access.send(&note(stranger, vm1.mac(), &[], &answer))?;
    let got = trunk.expect("the answer to the stranger", PATIENCE, |frame| carries(frame, &answer))?;
    ensure!(tags(&got) == [(TPID_CUSTOMER, 10)], "{got:02x?}");
    Ok(())
}

#[test]
fn killing_the_daemon_under_load_loses_nothing() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, vm3, vm4] = network(lab)?;
        vm1.ping(&vm2)?;
        a_new_address_is_learnt(&vm1, &vm3, 100)?;

        let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
        flow.wait_received(PACKETS / 5, LONG)?;
        lab.kill()?;
        let killed_at = flow.sent();

        // Nobody is at home: flows that never were, and addresses that nobody knew.
        vm4.ping(&vm2)?;
        vm1.ping(&vm4)?;
        a_new_address_is_learnt(&vm1, &vm3, 101)?;
        flow.wait_received(killed_at + PACKETS / 5, LONG)?;

        lab.start()?;
        let restarted_at = flow.sent();
        for vm in [&vm1, &vm2, &vm3, &vm4] {
            lab.sluice().wait_ready("vnic", &vm.name, PATIENCE)?;
        }
        flow.wait_received(PACKETS.max(restarted_at + PACKETS / 5), LONG)?;
        let report = flow.finish()?;
        ensure!(
            report.sent >= PACKETS && report.lost() == 0 && report.duplicated == 0 && report.reordered == 0,
            "killed at {killed_at}, restarted at {restarted_at}: {report:?}"
        );

        // What was learnt meanwhile is still known.
        let fdb = lab.sluice().fdb()?;
        for number in [100, 101] {
            let row = ("vnic/vm3".to_owned(), mac_text(mac(number)));
            ensure!(fdb.contains(&row), "{row:?} is not in {fdb:?}");
        }
        a_new_address_is_learnt(&vm1, &vm3, 102)?;
        Ok(())
    })
}

#[test]
fn an_orderly_stop_leaves_the_switch_running_too() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, vm3, vm4] = network(lab)?;
        lab.stop()?;
        vm1.ping(&vm2)?;
        vm4.ping(&vm1)?;
        a_new_address_is_learnt(&vm1, &vm3, 100)?;
        lab.start()?;
        vm2.ping(&vm4)
    })
}

#[test]
fn a_restart_changes_nothing() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, _vm3, _vm4] = network(lab)?;
        vm1.ping(&vm2)?;
        let before = lab.sluice().json(&["get", "vnic", "vm1"])?;
        lab.kill()?;
        lab.start()?;
        lab.sluice().wait_ready("vnic", "vm1", PATIENCE)?;
        let after = lab.sluice().json(&["get", "vnic", "vm1"])?;
        ensure!(before == after, "before: {before}\nafter: {after}");
        lab.sluice().wait_doctor("adopted", PATIENCE)
    })
}

/// `kill -9` at any moment of an apply: afterwards it has happened, or it has not; never in part.
#[test]
fn a_kill_during_an_apply_leaves_all_of_it_or_nothing() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let config = |vlan: u32| -> String {
            // Many more, so that the kill has something to interrupt.
            let others: String = (10..60)
                .map(|n| format!("- {{name: o{n}, switch: blue, attach: {{veth: o{n}}}, mac: \"02:00:00:00:01:{n}\", policy: {{vlan: {{access: {vlan}}}}}}}\n"))
                .collect();
            let access = format!("policy: {{vlan: {{access: {vlan}}}}}");
            format!("vnics:\n{}{}{others}", vm1.vnic(&access), vm2.vnic(&access))
        };
        let mut vlan = 100;
        let start = Instant::now();
        lab.sluice().apply(&config(vlan))?;
        let took = start.elapsed();
        let mut outcomes = [0, 0];
        for round in 0..12u32 {
            let sluice = lab.sluice().clone();
            let next = config(vlan + 1);
            let apply = std::thread::spawn(move || sluice.apply(&next).is_ok());
            // Not to wait for anything, but to strike at different moments: from before the request to after it.
            std::thread::sleep(took * round / 6);
            lab.kill()?;
            let answered = apply.join().is_ok_and(|ok| ok);
            lab.start()?;
            let answer = lab.sluice().json(&["get", "vnic"])?;
            let vlans: std::collections::BTreeSet<u64> = list(&answer["resources"])
                .iter()
                .map(|resource| number(&resource["vnic"]["policy"]["vlan"]["access"]))
                .collect();
            ensure!(vlans.len() == 1, "round {round}: half an apply: VLANs {vlans:?}");
            let now = vlans.first().copied().unwrap_or(0);
            ensure!(
                now == u64::from(vlan) || now == u64::from(vlan + 1),
                "round {round}: VLAN {now} after {vlan}"
            );
            // What was answered was done.
            ensure!(!answered || now == u64::from(vlan + 1), "round {round}: an answered apply was lost");
            outcomes[usize::from(now == u64::from(vlan + 1))] += 1;
            vlan = u32::try_from(now)?;
            lab.sluice().wait_ready("vnic", "vm1", PATIENCE)?;
            lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
            vm1.ping(&vm2)?;
        }
        ensure!(outcomes[0] > 0 && outcomes[1] > 0, "the kills came all before or all after: {outcomes:?}");
        Ok(())
    })
}

/// The daemon is killed, `harm` is done, it is started again; then everything must work, with no apply in between.
fn comes_back_after(harm: impl FnOnce(&Lab) -> Result<()>, diagnosis: &str) -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, vm3, _vm4] = network(lab)?;
        vm1.ping(&vm2)?;
        lab.kill()?;
        harm(lab)?;
        lab.start()?;
        works_again(lab, &vm1, &vm2, &vm3)?;
        lab.sluice().wait_doctor(diagnosis, PATIENCE)
    })
}

fn works_again(lab: &Lab, vm1: &Vm, vm2: &Vm, vm3: &Vm) -> Result<()> {
    for vm in [vm1, vm2, vm3] {
        lab.sluice().wait_ready("vnic", &vm.name, PATIENCE)?;
    }
    vm1.ping(vm2)?;
    a_new_address_is_learnt(vm1, vm3, 110)?;
    // And policy is still policy.
    let before = lab.sluice().dropped("vnic/vm1", "mac-guard")?;
    PacketSocket::open(&vm1.netns, INTERFACE)?.send(&note(vm2.mac(), mac(66), &[], "spoofed"))?;
    wait_until("the spoofed frame is dropped and counted", PATIENCE, || {
        Ok((lab.sluice().dropped("vnic/vm1", "mac-guard")? == before + 1).then_some(()))
    })
}

#[test]
fn the_state_directory_deleted_while_the_daemon_is_dead() -> Result<()> {
    comes_back_after(
        |lab| fs::remove_dir_all(&lab.places().state).context("deleting the state"),
        "the state directory was empty",
    )
}

#[test]
fn the_pins_deleted_while_the_daemon_is_dead() -> Result<()> {
    comes_back_after(
        |lab| fs::remove_dir_all(&lab.places().pins).context("deleting the pins"),
        "none were pinned",
    )
}

#[test]
fn the_state_directory_deleted_while_the_daemon_lives() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, vm3, vm4] = network(lab)?;
        let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
        flow.wait_received(10_000, LONG)?;
        fs::remove_dir_all(&lab.places().state)?;
        lab.sluice().wait_doctor("the state file was deleted", Duration::from_secs(60))?;
        let report = flow.finish()?;
        ensure!(report.lost() == 0, "{report:?}");
        // What is applied now is on disk again: it survives a kill.
        lab.apply(&format!("vnics:\n{}", vm4.vnic("policy: {vlan: {access: 20}}")))?;
        lab.kill()?;
        lab.start()?;
        works_again(lab, &vm1, &vm2, &vm3)?;
        vm4.no_ping(&vm1)
    })
}

#[test]
fn the_pins_deleted_while_the_daemon_lives() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, vm3, _vm4] = network(lab)?;
        let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
        flow.wait_received(10_000, LONG)?;
        let pins = &lab.places().pins;
        let count = pins_under(lab)?;
        fs::remove_dir_all(pins)?;
        wait_until("the pins are back", Duration::from_secs(60), || {
            let now = pins_under(lab)?;
            if now == count { Ok(Some(())) } else { bail!("{now} pins of {count}") }
        })?;
        lab.sluice().wait_doctor("pin", PATIENCE)?;
        // They are pins of what is in force, so the switch outlives the daemon as before.
        lab.kill()?;
        a_new_address_is_learnt(&vm1, &vm3, 100)?;
        let received = flow.received();
        flow.wait_received(received + 10_000, LONG)?;
        lab.start()?;
        works_again(lab, &vm1, &vm2, &vm3)?;
        let report = flow.finish()?;
        ensure!(report.lost() == 0, "{report:?}");
        Ok(())
    })
}

fn pins_under(lab: &Lab) -> Result<usize> {
    let mut count = 0;
    let mut folders = vec![lab.places().pins.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() { folders.push(entry.path()) } else { count += 1 }
        }
    }
    Ok(count)
}

#[test]
fn a_second_daemon_refuses_and_harms_nothing() -> Result<()> {
    scenario(|lab| {
        let [vm1, vm2, _vm3, _vm4] = network(lab)?;
        for socket in [lab.places().socket.clone(), lab.places().socket.with_extension("other")] {
            let places = sluice_tests::daemon::Places { socket, ..lab.places().clone() };
            let output = Daemon::command(lab.host(), &places)?.output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            ensure!(!output.status.success(), "a second daemon ran and ended well: {said}");
            let state = lab.places().state.display().to_string();
            ensure!(said.contains(&state), "it does not name the state directory: {said}");
        }
        ensure!(lab.sluice().daemon_pid()? == lab.daemon_pid(), "the first daemon does not answer any more");
        vm1.ping(&vm2)
    })
}
