//! The lab itself: its meters must see what goes wrong, or nothing that they say counts.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::{Flow, Lab, PacketSocket, tools, wire};

/// Two machines joined by a Linux bridge, without any daemon.
fn bridged(lab: &Lab) -> Result<(sluice_tests::Vm, sluice_tests::Vm)> {
    let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
    lab.host().ip_batch(
        "link add br0 type bridge\nlink set br0 up\nlink set p1 master br0\nlink set p2 master br0\n",
    )?;
    vm1.ping(&vm2)?;
    Ok((vm1, vm2))
}

#[test]
fn a_healthy_network_loses_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let (vm1, vm2) = bridged(&lab)?;
    let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
    flow.wait_received(50_000, Duration::from_secs(30))?;
    let report = flow.finish()?;
    ensure!(report.lost() == 0 && report.duplicated == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_cut_wire_is_seen() -> Result<()> {
    let lab = Lab::new()?;
    let (vm1, vm2) = bridged(&lab)?;
    let flow = Flow::start(&vm1.netns, &vm2.netns, (vm2.ip4(), 7000).into())?;
    flow.wait_received(10_000, Duration::from_secs(30))?;
    lab.host().run(&["ip", "link", "set", "p2", "nomaster"])?;
    // The window runs full of lost packets and is written off several times.
    let before = flow.sent();
    sluice_tests::wait_until("more is sent into the void", Duration::from_secs(10), || {
        Ok((flow.sent() > before + 1_000).then_some(()))
    })?;
    lab.host().run(&["ip", "link", "set", "p2", "master", "br0"])?;
    flow.wait_received(20_000, Duration::from_secs(30))?;
    let report = flow.finish()?;
    ensure!(report.lost() > 100 && report.longest_gap > Duration::from_millis(100), "{report:?}");
    tools::no_ping(&vm1.netns, "10.77.0.99")
}

#[test]
fn packet_sockets_see_both_tags() -> Result<()> {
    let lab = Lab::new()?;
    let (vm1, vm2) = bridged(&lab)?;
    let from = PacketSocket::open(&vm1.netns, INTERFACE)?;
    let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
    let tags = [(wire::TPID_SERVICE, 100), (wire::TPID_CUSTOMER, 7)];
    let frame = wire::note(vm2.mac(), vm1.mac(), &tags, "two tags");
    from.send(&frame)?;
    let got =
        to.expect("the tagged note", Duration::from_secs(5), |frame| wire::carries(frame, "two tags"))?;
    ensure!(got == frame, "sent {frame:02x?}, got {got:02x?}");
    Ok(())
}
