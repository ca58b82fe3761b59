//! VLANs: access, trunk and tunnel (QinQ) ports, down to the tags on the wire.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{self, TPID_CUSTOMER, TPID_SERVICE, carries, note, tags};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Vm, scenario};

fn socket(vm: &Vm) -> Result<PacketSocket> {
    PacketSocket::open(&vm.netns, INTERFACE)
}

#[test]
fn access_vlans_separate() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, vm3) = (lab.vm(1)?, lab.vm(2)?, lab.vm(3)?);
        lab.apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}{}",
            vm1.vnic("policy: {vlan: {access: 10}}"),
            vm2.vnic("policy: {vlan: {access: 10}}"),
            vm3.vnic("policy: {vlan: {access: 20}}"),
        ))?;
        vm1.ping(&vm2)?;
        vm1.no_ping(&vm3)?;
        vm3.no_ping(&vm2)?;
        // A tagged frame on an access port drops, and says why.
        socket(&vm3)?.send(&note(vm2.mac(), vm3.mac(), &[(TPID_CUSTOMER, 10)], "hopping"))?;
        let count = lab.sluice().dropped("vnic/vm3", "vlan-tagged")?;
        ensure!(count == 1, "{count} frames dropped as vlan-tagged");
        // Moving VM 3 over joins it.
        lab.apply(&format!("vnics:\n{}", vm3.vnic("policy: {vlan: {access: 10}}")))?;
        vm1.ping(&vm3)
    })
}

/// VM 1 in VLAN 10, VM 2 in VLAN 30, VM 3 a trunk of 10 and 20 whose untagged frames are in VLAN 30.
fn trunked(lab: &Lab) -> Result<(Vm, Vm, Vm)> {
    let (vm1, vm2, vm3) = (lab.vm(1)?, lab.vm(2)?, lab.bare_vm(3)?);
    lab.apply(&format!(
        "switches: [{{name: blue}}]\nvnics:\n{}{}{}",
        vm1.vnic("policy: {vlan: {access: 10}}"),
        vm2.vnic("policy: {vlan: {access: 30}}"),
        vm3.vnic("policy: {vlan: {trunk: {allowed: [\"10\", \"20\"], native: 30}}}"),
    ))?;
    Ok((vm1, vm2, vm3))
}

#[test]
fn a_trunk_carries_its_vlans_tagged_and_its_native_untagged() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, vm3) = trunked(lab)?;
        let (access, native, trunk) = (socket(&vm1)?, socket(&vm2)?, socket(&vm3)?);

        access.send(&note(vm3.mac(), vm1.mac(), &[], "from access"))?;
        let got = trunk.expect("the access port's note", PATIENCE, |frame| carries(frame, "from access"))?;
        ensure!(got == note(vm3.mac(), vm1.mac(), &[(TPID_CUSTOMER, 10)], "from access"), "{got:02x?}");

        trunk.send(&note(vm1.mac(), vm3.mac(), &[(TPID_CUSTOMER, 10)], "to access"))?;
        let got = access.expect("the trunk's note", PATIENCE, |frame| carries(frame, "to access"))?;
        ensure!(got == note(vm1.mac(), vm3.mac(), &[], "to access"), "{got:02x?}");

        trunk.send(&note(vm2.mac(), vm3.mac(), &[], "untagged"))?;
        let got = native.expect("the untagged note", PATIENCE, |frame| carries(frame, "untagged"))?;
        ensure!(tags(&got).is_empty(), "{got:02x?}");
        native.send(&note(vm3.mac(), vm2.mac(), &[], "back"))?;
        let got = trunk.expect("the native VLAN's note", PATIENCE, |frame| carries(frame, "back"))?;
        ensure!(tags(&got).is_empty(), "{got:02x?}");

        trunk.send(&note(wire::BROADCAST, vm3.mac(), &[(TPID_CUSTOMER, 40)], "not allowed"))?;
        let count = lab.sluice().dropped("vnic/vm3", "vlan-not-allowed")?;
        ensure!(count == 1, "{count} frames dropped as vlan-not-allowed");
        Ok(())
    })
}

#[test]
fn broadcasts_stay_in_their_vlan() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, vm3) = trunked(lab)?;
        let (access, native, trunk) = (socket(&vm1)?, socket(&vm2)?, socket(&vm3)?);
        trunk.send(&note(wire::BROADCAST, vm3.mac(), &[(TPID_CUSTOMER, 10)], "to all of 10"))?;
        access.expect("the broadcast", PATIENCE, |frame| carries(frame, "to all of 10"))?;
        // Sent after the broadcast and arrived: the broadcast would have been here before.
        trunk.send(&note(vm2.mac(), vm3.mac(), &[], "after it"))?;
        let mut strayed = 0;
        native.expect("the note after the broadcast", PATIENCE, |frame| {
            strayed += u32::from(carries(frame, "to all of 10"));
            carries(frame, "after it")
        })?;
        ensure!(strayed == 0, "a broadcast of VLAN 10 reached VLAN 30");
        Ok(())
    })
}

#[test]
fn a_tunnel_carries_tags_behind_a_service_tag() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2, out) = (lab.bare_vm(1)?, lab.bare_vm(2)?, lab.outside(200)?);
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}",
            vm1.vnic("policy: {vlan: {tunnel: 100}}"),
            vm2.vnic("policy: {vlan: {tunnel: 100}}"),
        ))?;
        let (one, two, wire_side) = (socket(&vm1)?, socket(&vm2)?, socket(&out)?);

        // Between two ends of the tunnel the customer's tag travels unseen.
        let inner = [(TPID_CUSTOMER, 7)];
        one.send(&note(vm2.mac(), vm1.mac(), &inner, "through"))?;
        let got = two.expect("the tunnelled note", PATIENCE, |frame| carries(frame, "through"))?;
        ensure!(got == note(vm2.mac(), vm1.mac(), &inner, "through"), "{got:02x?}");

        // On the uplink the service tag shows, outermost, with and without a customer's tag.
        for (inner, text) in [(&inner[..], "out, tagged"), (&[], "out, untagged")] {
            one.send(&note(wire::BROADCAST, vm1.mac(), inner, text))?;
            let got = wire_side.expect("the note outside", PATIENCE, |frame| carries(frame, text))?;
            let expected = [&[(TPID_SERVICE, 100)], inner].concat();
            ensure!(got == note(wire::BROADCAST, vm1.mac(), &expected, text), "{got:02x?}");
        }

        // And inwards it is taken off.
        let both = [(TPID_SERVICE, 100), (TPID_CUSTOMER, 9)];
        wire_side.send(&note(vm1.mac(), out.mac(), &both, "inwards"))?;
        let got = one.expect("the note from outside", PATIENCE, |frame| carries(frame, "inwards"))?;
        ensure!(got == note(vm1.mac(), out.mac(), &[(TPID_CUSTOMER, 9)], "inwards"), "{got:02x?}");
        Ok(())
    })
}
