//! Guards: a VM may only speak for itself.

#![forbid(unsafe_code)]

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::tools::{DhcpServer, dhcp_lease};
use sluice_tests::wire::{self, arp, carries, mac, note, udp4};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Vm, scenario, wait_until};

/// Waits until `port` has dropped `wanted` frames for `reason`.
fn dropped(lab: &Lab, port: &str, reason: &str, wanted: u64) -> Result<()> {
    wait_until(&format!("{port} has dropped {wanted} frames as {reason}"), PATIENCE, || {
        let count = lab.sluice().dropped(port, reason)?;
        ensure!(count == wanted, "it has dropped {count}");
        Ok(Some(()))
    })
}

/// Sends `bad` and then a good note from VM 1, and wants only the note to reach VM 2.
fn only_the_note_arrives(vm1: &Vm, vm2: &Vm, bad: &[u8]) -> Result<()> {
    let from = PacketSocket::open(&vm1.netns, INTERFACE)?;
    let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
    from.send(bad)?;
    from.send(&note(vm2.mac(), vm1.mac(), &[], "honest"))?;
    let mut strayed = 0;
    to.expect("the honest note", PATIENCE, |frame| {
        strayed += u32::from(frame == bad);
        carries(frame, "honest")
    })?;
    ensure!(strayed == 0, "the forged frame got through");
    Ok(())
}

#[test]
fn a_spoofed_mac_drops() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        only_the_note_arrives(&vm1, &vm2, &note(vm2.mac(), mac(66), &[], "spoofed"))?;
        dropped(lab, "vnic/vm1", "mac-guard", 1)?;
        only_the_note_arrives(&vm1, &vm2, &note(vm2.mac(), [1, 0, 0, 0, 0, 1], &[], "group"))?;
        dropped(lab, "vnic/vm1", "multicast-source", 1)?;
        // Allowed to, it may.
        lab.apply(&format!("vnics:\n{}", vm1.vnic("policy: {allowSpoofing: true}")))?;
        let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
        PacketSocket::open(&vm1.netns, INTERFACE)?.send(&note(vm2.mac(), mac(66), &[], "allowed"))?;
        to.expect("the spoofed note", PATIENCE, |frame| carries(frame, "allowed"))?;
        dropped(lab, "vnic/vm1", "mac-guard", 1)
    })
}

#[test]
fn a_spoofed_address_drops() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let guard = format!("policy: {{ipGuard: [\"{}\", \"{}\"]}}", vm1.ip4(), vm1.ip6());
        lab.apply(&format!("vnics:\n{}", vm1.vnic(&guard)))?;
        vm1.ping(&vm2)?;
        sluice_tests::tools::ping(&vm1.netns, &vm2.ip6().to_string())?;

        let other: Ipv4Addr = [10, 77, 0, 66].into();
        only_the_note_arrives(
            &vm1,
            &vm2,
            &udp4(vm2.mac(), vm1.mac(), (other, vm2.ip4()), (1, 2), b"forged"),
        )?;
        dropped(lab, "vnic/vm1", "ip-guard-ipv4", 1)?;
        only_the_note_arrives(&vm1, &vm2, &arp(vm2.mac(), 2, (vm1.mac(), other), (vm2.mac(), vm2.ip4())))?;
        dropped(lab, "vnic/vm1", "ip-guard-arp", 1)?;

        // The kernel itself, told to use another address.
        vm1.netns.address(INTERFACE, "fd77::66/64")?;
        vm1.netns.attempt(&["ping", "-n", "-c", "1", "-W", "1", "-I", "fd77::66", &vm2.ip6().to_string()])?;
        let count = lab.sluice().dropped("vnic/vm1", "ip-guard-ipv6")?;
        ensure!(count > 0, "an IPv6 packet from another address got through");
        Ok(())
    })
}

#[test]
fn dhcp_is_served_only_by_those_who_may() -> Result<()> {
    scenario(|lab| {
        let (server, client) = (lab.vm(1)?, lab.bare_vm(2)?);
        let guarded = |on: bool| format!("vnics:\n{}", server.vnic(&format!("policy: {{dhcpGuard: {on}}}")));
        lab.apply(&format!(
            "switches: [{{name: blue}}]\n{}{}",
            guarded(false),
            client.vnic("policy: {dhcpGuard: true}")
        ))?;
        let (first, last) = (Ipv4Addr::new(10, 77, 5, 1), Ipv4Addr::new(10, 77, 5, 9));
        let _dnsmasq = DhcpServer::start(&server.netns, first, last)?;

        let lease = dhcp_lease(&client.netns)?;
        ensure!(
            lease.is_some_and(|lease| (first..=last).contains(&lease)),
            "with the guard off the lease is {lease:?}"
        );

        lab.apply(&guarded(true))?;
        let lease = dhcp_lease(&client.netns)?;
        ensure!(lease.is_none(), "with the guard on there is a lease: {lease:?}");
        let count = lab.sluice().dropped("vnic/vm1", "dhcp-guard")?;
        ensure!(count > 0, "no DHCP message was counted as dropped");

        lab.apply(&guarded(false))?;
        ensure!(dhcp_lease(&client.netns)?.is_some(), "with the guard off again there is no lease");
        Ok(())
    })
}

#[test]
fn routers_are_only_those_who_may() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        lab.apply(&format!("vnics:\n{}", vm1.vnic("policy: {raGuard: true}")))?;
        only_the_note_arrives(&vm1, &vm2, &wire::router_advertisement(vm1.mac()))?;
        dropped(lab, "vnic/vm1", "ra-guard", 1)?;
        // VM 2 has no such guard.
        let to = PacketSocket::open(&vm1.netns, INTERFACE)?;
        let advertisement = wire::router_advertisement(vm2.mac());
        PacketSocket::open(&vm2.netns, INTERFACE)?.send(&advertisement)?;
        to.expect("the router advertisement", PATIENCE, |frame| frame == advertisement)?;
        Ok(())
    })
}
