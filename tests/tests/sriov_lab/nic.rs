//! The emulated igb ports: what their VFs can reach, and what the NIC keeps apart.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sluice_tests::lab_guest::{self, PATIENCE, Pf, Vf, give};
use sluice_tests::netns::check;
use sluice_tests::wire::{self, Mac, TPID_CUSTOMER, carries, note, tags};
use sluice_tests::{Netns, PacketSocket, tools};

/// The address of VM number `number`.
fn mac(number: u8) -> Mac {
    [0x02, 0, 0, 0, 0x5f, number]
}

fn ip(number: u8) -> String {
    format!("10.79.0.{number}")
}

/// A namespace that has one interface, and is VM or host number `number`.
fn machine(number: u8, netdev: &str) -> Result<Netns> {
    let netns = Netns::create(&format!("sl-{}-nic{number}", std::process::id()))?;
    give(netdev, &netns, &[&format!("{}/24", ip(number))])?;
    Ok(netns)
}

/// Both ports, the first with a VF for each VM, numbered from 1.
fn ports(vms: u8) -> Result<(Pf, Pf, Vec<Vf>)> {
    lab_guest::require()?;
    let (near, far) = (Pf::open("pf0")?, Pf::open("pf1")?);
    let macs: Vec<Mac> = (1..=vms).map(mac).collect();
    let vfs = near.make_vfs(&macs)?;
    Ok((near, far, vfs))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn the_machine_has_two_ports_of_seven_vfs_and_an_iommu() -> Result<()> {
    lab_guest::require()?;
    for name in ["pf0", "pf1"] {
        let pf = Pf::open(name)?;
        ensure!(pf.total_vfs()? == 7, "{name} has {} VFs", pf.total_vfs()?);
        let driver = fs::canonicalize(pf.device().join("driver")).context("no driver")?;
        ensure!(driver.ends_with("igb"), "{name} is driven by {}", driver.display());
        // The VFs of a port are each in a group of their own, so that each can go to another VM.
        pf.set_vfs(7)?;
        let mut groups = Vec::new();
        for index in 0..7 {
            let group = fs::canonicalize(pf.device().join(format!("virtfn{index}/iommu_group")))
                .with_context(|| format!("VF {index} of {name} is in no IOMMU group"))?;
            groups.push(group);
        }
        groups.sort();
        groups.dedup();
        ensure!(groups.len() == 7, "7 VFs of {name} share {} IOMMU groups", groups.len());
    }
    ensure!(fs::read_dir("/sys/class/iommu")?.next().is_some(), "no IOMMU");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_reach_each_other_the_port_and_the_wire() -> Result<()> {
    let (near, far, vfs) = ports(2)?;
    let vm1 = machine(1, &vfs[0].netdev)?;
    let vm2 = machine(2, &vfs[1].netdev)?;
    let outside = machine(4, far.name())?;
    // The port stays where it is: moving it would take it down, and reset its VFs.
    check(Command::new("ip").args(["address", "replace", &format!("{}/24", ip(3)), "dev", near.name()]))?;
    for (from, to) in [(&vm1, 2), (&vm2, 3), (&vm2, 4), (&outside, 3), (&outside, 1)] {
        tools::ping(from, &ip(to)).with_context(|| format!("{} to number {to}", from.name()))?;
    }
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn the_nic_keeps_port_vlans_apart_and_tags_them_on_the_wire() -> Result<()> {
    let (near, far, vfs) = ports(3)?;
    for (vf, vlan) in vfs.iter().zip(["100", "100", "200"]) {
        near.configure(vf.index, &["vlan", vlan])?;
    }
    let vm1 = machine(1, &vfs[0].netdev)?;
    let _vm2 = machine(2, &vfs[1].netdev)?;
    let vm3 = machine(3, &vfs[2].netdev)?;
    let outside = machine(4, far.name())?;
    tools::ping(&vm1, &ip(2))?;
    tools::no_ping(&vm1, &ip(3))?;
    tools::no_ping(&vm3, &ip(2))?;

    // On the wire the tag shows; to the VF it does not. The far port would filter VLANs that nobody there asked for.
    outside.run(&["ip", "link", "set", far.name(), "promisc", "on"])?;
    let wire = PacketSocket::open(&outside, far.name())?;
    for (vm, vf, number, vlan) in [(&vm1, &vfs[0], 1, 100), (&vm3, &vfs[2], 3, 200)] {
        let text = format!("from VLAN {vlan}");
        let socket = PacketSocket::open(vm, &vf.netdev)?;
        socket.send(&note(wire::BROADCAST, mac(number), &[], &text))?;
        let got = wire.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
        ensure!(tags(&got) == [(TPID_CUSTOMER, vlan)], "tags {:?} of what came {text}", tags(&got));

        let text = format!("to VLAN {vlan}");
        wire.send(&note(mac(number), mac(4), &[(TPID_CUSTOMER, vlan)], &text))?;
        let got = socket.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
        ensure!(tags(&got).is_empty(), "tags {:?} of what came {text}", tags(&got));
    }

    // What is tagged for one VLAN must not come to a VF of another: the frame sent after it comes first.
    let socket = PacketSocket::open(&vm3, &vfs[2].netdev)?;
    wire.send(&note(mac(3), mac(4), &[(TPID_CUSTOMER, 100)], "wrong VLAN"))?;
    wire.send(&note(mac(3), mac(4), &[(TPID_CUSTOMER, 200)], "right VLAN"))?;
    let got = socket.expect("a note", PATIENCE, |frame| carries(frame, "VLAN"))?;
    ensure!(carries(&got, "right VLAN"), "VLAN 100 came to a VF in VLAN 200");
    Ok(())
}
