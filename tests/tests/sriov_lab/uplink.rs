//! The software switch with a real driver under it: an igb port as uplink, with XDP in the driver, and a machine on its
//! wire.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use sluice_tests::lab::INTERFACE;
use sluice_tests::lab_guest::{self, PATIENCE, Pf, give};
use sluice_tests::wire::{Mac, TPID_CUSTOMER, carries, mac_text, note, tags};
use sluice_tests::{Lab, Netns, PacketSocket, scenario, tools, wait_until};

/// The outside's address.
const OUTSIDE: Mac = [0x02, 0, 0, 0, 0x5f, 0xfe];
const OUTSIDE_IP: &str = "10.77.79.1";

/// The machine on the wire.
struct Outside {
    netns: Netns,
    port: Pf,
}

/// Gives the first port to the host as uplink, and the second to the outside.
fn wired(lab: &Lab) -> Result<(Pf, Outside)> {
    lab_guest::require()?;
    let (near, far) = (Pf::open("pf0")?, Pf::open("pf1")?);
    let netns = lab.netns("outside")?;
    give(far.name(), &netns, &[&format!("{OUTSIDE_IP}/16")])?;
    netns.run(&["ip", "link", "set", far.name(), "address", &mac_text(OUTSIDE)])?;
    // Else it would filter VLANs that nobody there asked for.
    netns.run(&["ip", "link", "set", far.name(), "promisc", "on"])?;
    give(near.name(), lab.host(), &[])?;
    Ok((near, Outside { netns, port: far }))
}

fn uplink_status(lab: &Lab) -> Result<Value> {
    Ok(lab.sluice().json(&["get", "switch", "blue"])?["status"]["ports"][0].clone())
}

/// Whether the NIC hands tags over beside the frames' bytes, where XDP does not see them.
fn takes_tags_out(lab: &Lab, pf: &Pf) -> Result<bool> {
    let features = lab.host().run(&["ethtool", "-k", pf.name()])?;
    Ok(features.lines().any(|line| line.starts_with("rx-vlan-offload: on")))
}

fn uses_xdp(status: &Value) -> bool {
    status["hooks"].as_array().is_some_and(|hooks| hooks.iter().any(|hook| hook == "XDP"))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn traffic_flows_through_xdp_in_the_driver() -> Result<()> {
    scenario(|lab| {
        let (near, outside) = wired(lab)?;
        let vm = lab.vm(1)?;
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: {}}}}}]\nvnics:\n{}",
            near.name(),
            vm.vnic("")
        ))?;
        let status = uplink_status(lab)?;
        ensure!(uses_xdp(&status), "the uplink does not use XDP: {status}");
        tools::ping(&vm.netns, OUTSIDE_IP)?;
        tools::ping(&outside.netns, &vm.ip4().to_string())?;
        for direction in [&["-t", "2"][..], &["-t", "2", "-R"]] {
            let end = tools::iperf3(&vm.netns, &outside.netns, OUTSIDE_IP, direction)?;
            // Emulated, and so slow; but TCP that lives on retransmissions would not get there.
            ensure!(tools::gbits_received(&end) > 0.005, "TCP through the uplink {direction:?}: {end}");
        }
        Ok(())
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn tags_on_the_wire_are_seen_and_kept() -> Result<()> {
    scenario(|lab| {
        let (near, outside) = wired(lab)?;
        ensure!(takes_tags_out(lab, &near)?, "the NIC does nothing that could hide tags from XDP");
        let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
        // XDP hands frames to a veth only when its peer gathers them (GRO) or runs XDP.
        for vm in [&vm1, &vm2] {
            vm.netns.run(&["ethtool", "-K", INTERFACE, "gro", "on"])?;
        }
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: {}}}}}]\nvnics:\n{}{}",
            near.name(),
            vm1.vnic("policy: {vlan: {access: 100}}"),
            vm2.vnic(""),
        ))?;
        ensure!(!takes_tags_out(lab, &near)?, "XDP runs behind receive VLAN offload");
        let host = PacketSocket::open(lab.host(), near.name())?;
        let wire = PacketSocket::open(&outside.netns, outside.port.name())?;
        let tagged = PacketSocket::open(&vm1.netns, INTERFACE)?;
        let untagged = PacketSocket::open(&vm2.netns, INTERFACE)?;

        // Both ways, in VLAN 100 and in none.
        for (vm, socket, tag) in [(&vm1, &tagged, &[(TPID_CUSTOMER, 100)][..]), (&vm2, &untagged, &[][..])] {
            let text = format!("from {}", vm.name);
            socket.send(&note(OUTSIDE, vm.mac(), &[], &text))?;
            let got = wire.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
            ensure!(tags(&got) == tag, "tags {:?} of what came {text}", tags(&got));
            let text = format!("to {}", vm.name);
            wire.send(&note(vm.mac(), OUTSIDE, tag, &text))?;
            let got = socket.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
            ensure!(tags(&got).is_empty(), "tags {:?} of what came {text}", tags(&got));
            // What XDP delivers, no packet socket on the way sees.
            let seen = host.receive(Duration::ZERO)?;
            ensure!(seen.is_none(), "XDP did not serve what came {text}: {seen:02x?}");
        }

        // A frame of one VLAN does not come to a VM of another, nor an untagged one: what is sent after it comes first.
        for (vm, socket, wrong, right) in [
            (&vm1, &tagged, &[][..], &[(TPID_CUSTOMER, 100)][..]),
            (&vm2, &untagged, &[(TPID_CUSTOMER, 100)][..], &[][..]),
        ] {
            wire.send(&note(vm.mac(), OUTSIDE, wrong, "wrong VLAN"))?;
            wire.send(&note(vm.mac(), OUTSIDE, right, "right VLAN"))?;
            let got = socket.expect("a note", PATIENCE, |frame| carries(frame, " VLAN"))?;
            ensure!(carries(&got, "right VLAN"), "{}: a frame with tags {wrong:?} came", vm.name);
        }

        // Without the uplink, the NIC is as it was.
        for resource in [["vnic", "vm1"], ["vnic", "vm2"], ["switch", "blue"]] {
            lab.sluice().run(&[&["delete"][..], &resource].concat())?;
        }
        wait_until("the NIC takes tags out of frames again", PATIENCE, || {
            Ok(takes_tags_out(lab, &near)?.then_some(()))
        })
    })
}
