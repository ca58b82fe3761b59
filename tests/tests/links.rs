//! Interfaces come and go, as VMs and cables do; the switch follows by itself.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{BROADCAST, arp, carries, echo_request, is_arp_reply, is_echo_reply, mac, note};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Tap, Vm, scenario, tools};

/// A port that comes back is attached within so long.
const REATTACH: Duration = Duration::from_secs(1);

#[test]
fn a_pending_vnic_attaches_when_its_interface_appears() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        // Applied before its interface exists: pending, and no error.
        let vm3 = Vm { name: "vm3".to_owned(), netns: lab.netns("vm3")?, port: "p3".to_owned(), number: 3 };
        lab.sluice().apply(&format!("vnics:\n{}", vm3.vnic("")))?;
        lab.sluice().wait_state("vnic", "vm3", "PENDING", PATIENCE)?;
        let (_, status) = lab.sluice().state("vnic", "vm3")?;
        ensure!(status.contains("p3"), "the status does not name the interface: {status}");
        reappears(lab, &vm3)?;
        vm3.default_addresses()?;
        vm3.ping(&vm1)?;
        vm2.ping(&vm3)
    })
}

/// Wires a VM (again) and wants its vNIC attached within a second.
fn reappears(lab: &Lab, vm: &Vm) -> Result<()> {
    lab.wire(vm, &[])?;
    let start = Instant::now();
    lab.sluice().wait_ready("vnic", &vm.name, PATIENCE)?;
    let took = start.elapsed();
    ensure!(took < REATTACH, "{} was attached only after {took:?}", vm.name);
    Ok(())
}

#[test]
fn a_veth_deleted_and_made_again_is_attached_within_a_second() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        vm1.ping(&vm2)?;
        for _ in 0..5 {
            lab.host().run(&["ip", "link", "delete", &vm2.port])?;
            lab.sluice().wait_state("vnic", "vm2", "PENDING", PATIENCE)?;
            vm1.no_ping(&vm2)?;
            reappears(lab, &vm2)?;
            vm2.default_addresses()?;
            vm1.ping(&vm2)?;
        }
        lab.sluice().wait_doctor("vnic/vm2 is pending", PATIENCE)
    })
}

#[test]
fn a_veth_replaced_while_the_daemon_is_dead_is_attached_at_its_start() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        lab.kill()?;
        lab.host().run(&["ip", "link", "delete", &vm2.port])?;
        lab.wire(&vm2, &[])?;
        vm2.default_addresses()?;
        lab.start()?;
        lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
        vm1.ping(&vm2)?;
        vm2.ping(&vm1)
    })
}

#[test]
fn a_tap_carries_a_vm_and_its_restart() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        let guest = (mac(9), [10, 77, 0, 9].into());
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}- {{name: vm9, switch: blue, attach: {{tap: tap9}}, mac: \"{}\"}}\n",
            vm1.vnic(""),
            sluice_tests::wire::mac_text(guest.0),
        ))?;
        for boot in 1..=3 {
            // The hypervisor makes the tap, the guest speaks; then it shuts down and the tap is gone.
            let tap = Tap::open(lab.host(), "tap9")?;
            lab.host().run(&["ip", "link", "set", "tap9", "up"])?;
            let start = Instant::now();
            lab.sluice().wait_ready("vnic", "vm9", PATIENCE)?;
            ensure!(start.elapsed() < REATTACH, "boot {boot}: attached only after {:?}", start.elapsed());

            tap.send(&arp(BROADCAST, 1, guest, ([0; 6], vm1.ip4())))?;
            tap.expect("the ARP reply", PATIENCE, |frame| is_arp_reply(frame, vm1.ip4()))?;
            tap.send(&arp(vm1.mac(), 2, guest, (vm1.mac(), vm1.ip4())))?;
            tap.send(&echo_request(vm1.mac(), guest.0, (guest.1, vm1.ip4()), boot))?;
            // The VM may first ask who the guest is.
            tap.expect("the echo reply", PATIENCE, |frame| {
                if frame.len() >= 42
                    && frame[12..14] == [8, 6]
                    && frame[20..22] == [0, 1]
                    && frame[38..42] == guest.1.octets()
                {
                    // Its answer is on the way already; another does no harm.
                    let _ = tap.send(&arp(vm1.mac(), 2, guest, (vm1.mac(), vm1.ip4())));
                }
                is_echo_reply(frame, boot)
            })?;
            drop(tap);
            lab.sluice().wait_state("vnic", "vm9", "PENDING", PATIENCE)?;
        }
        Ok(())
    })
}

#[test]
fn an_uplink_taken_down_and_up_carries_again() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, out) = (lab.vm(1)?, lab.vm(2)?, lab.outside(200)?);
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}",
            vm1.vnic(""),
            vm2.vnic("")
        ))?;
        vm1.ping(&out)?;
        lab.host().run(&["ip", "link", "set", &out.port, "down"])?;
        vm1.no_ping(&out)?;
        lab.sluice().wait_doctor("up200 is down", PATIENCE)?;
        vm1.ping(&vm2)?;
        lab.host().run(&["ip", "link", "set", &out.port, "up"])?;
        vm1.ping(&out)?;
        out.ping(&vm2)?;
        // Pulled out altogether, and put in again.
        lab.host().run(&["ip", "link", "delete", &out.port])?;
        lab.sluice().wait_state("switch", "blue", "PENDING", PATIENCE)?;
        vm1.ping(&vm2)?;
        lab.wire(&out, &[])?;
        out.default_addresses()?;
        lab.sluice().wait_ready("switch", "blue", PATIENCE)?;
        vm1.ping(&out)
    })
}

#[test]
fn a_port_taken_down_by_policy_is_silent() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        lab.apply(&format!("vnics:\n{}", vm2.vnic("adminState: DOWN")))?;
        vm1.no_ping(&vm2)?;
        tools::no_ping(&vm2.netns, &vm1.ip6().to_string())?;
        ensure!(lab.sluice().dropped("vnic/vm2", "port-down")? > 0, "nothing was counted");
        lab.apply(&format!("vnics:\n{}", vm2.vnic("")))?;
        vm1.ping(&vm2)?;
        // Deleted, it is no port at all.
        lab.sluice().run(&["delete", "vnic", "vm2"])?;
        vm1.no_ping(&vm2)
    })
}

#[test]
fn what_is_attached_is_named() -> Result<()> {
    scenario(|lab| {
        let (vm1, _vm2) = lab.pair()?;
        let index = lab.host().ifindex(&vm1.port)?.unwrap_or(0);
        let answer = lab.sluice().json(&["get", "vnic", "vm1"])?;
        let port = &answer["status"]["ports"][0];
        ensure!(port["port"] == "vnic/vm1" && port["netdev"] == "p1" && port["ifindex"] == index, "{answer}");
        vm1.netns.run(&["ip", "link", "show", INTERFACE])?;
        Ok(())
    })
}

#[test]
fn a_vm_that_moved_to_another_host_is_reached_there() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, out) = (lab.vm(1)?, lab.vm(2)?, lab.outside(200)?);
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}",
            vm1.vnic(""),
            vm2.vnic("")
        ))?;
        // Now every cache knows where VM 2 is.
        vm1.ping(&vm2)?;
        lab.sluice().run(&["delete", "vnic", "vm2"])?;
        let inside = PacketSocket::open(&vm1.netns, INTERFACE)?;
        let outside = PacketSocket::open(&out.netns, INTERFACE)?;
        for round in 0..8 {
            let text = format!("to the VM that moved, {round}");
            inside.send(&note(vm2.mac(), vm1.mac(), &[], &text))?;
            outside.expect("a frame for the VM that moved", PATIENCE, |frame| carries(frame, &text))?;
        }
        Ok(())
    })
}
