//! VMs with VLAN devices, which the kernels of many machines that build this do not have: their tags travel beside the
//! frames' bytes, where XDP does not see them.

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::wire::{carries, note};
use sluice_tests::{Lab, PacketSocket, Vm, scenario, wait_until};

const DEVICE: &str = "tagged";

/// Gives a VM a VLAN device.
fn add_device(vm: &Vm, vlan: u16) -> Result<PacketSocket> {
    let vlan = vlan.to_string();
    vm.netns.run(&["ip", "link", "add", "link", INTERFACE, "name", DEVICE, "type", "vlan", "id", &vlan])?;
    vm.netns.run(&["ip", "link", "set", DEVICE, "up"])?;
    PacketSocket::open(&vm.netns, DEVICE)
}

/// A tag of a VLAN device is a tag: an access port drops it, whichever hook was asked for.
fn an_access_port_drops_tags(lab: &Lab, sender: &Vm, rest: &str) -> Result<()> {
    let receiver = lab.vm(2)?;
    receiver.netns.run(&["ethtool", "-K", INTERFACE, "gro", "on"])?;
    lab.apply(&format!(
        "switches: [{{name: blue}}]\nvnics:\n{}{}",
        sender.vnic(&format!("policy: {{vlan: {{access: 10}}}}, {rest}")),
        receiver.vnic("policy: {vlan: {access: 10}}"),
    ))?;
    let tagged = add_device(sender, 20)?;
    let untagged = PacketSocket::open(&sender.netns, INTERFACE)?;
    let socket = PacketSocket::open(&receiver.netns, INTERFACE)?;
    // What is sent later arrives later.
    tagged.send(&note(receiver.mac(), sender.mac(), &[], "note with a tag"))?;
    untagged.send(&note(receiver.mac(), sender.mac(), &[], "note without"))?;
    let got = socket.expect("a note", PATIENCE, |frame| carries(frame, "note with"))?;
    ensure!(carries(&got, "note without"), "a tagged frame came through an access port");
    wait_until("the tagged frame is counted", PATIENCE, || {
        Ok((lab.sluice().dropped(&format!("vnic/{}", sender.name), "vlan-tagged")? >= 1).then_some(()))
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn an_access_port_drops_the_tags_of_vlan_devices() -> Result<()> {
    lab_guest::require()?;
    scenario(|lab| {
        let sender = lab.vm(1)?;
        an_access_port_drops_tags(lab, &sender, "hook: TCX")
    })
}

/// With the guest's VLAN offload on, XDP is refused, and TCX sees the tag; with it off, the tag is where XDP sees it.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn xdp_does_not_take_the_tags_of_vlan_devices_for_none() -> Result<()> {
    lab_guest::require()?;
    for (offload, hook) in [("on", "TCX"), ("off", "XDP")] {
        scenario(|lab| {
            let sender = lab.vm(1)?;
            sender.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off", "txvlan", offload])?;
            an_access_port_drops_tags(lab, &sender, "hook: XDP")?;
            let status = lab.sluice().json(&["get", "vnic", "vm1"])?["status"]["ports"][0].clone();
            ensure!(status["hooks"].to_string().contains(hook), "txvlan {offload}: {status}");
            ensure!(
                status["hooks"].to_string().contains("XDP") == (hook == "XDP"),
                "txvlan {offload}: {status}"
            );
            Ok(())
        })?;
    }
    Ok(())
}
