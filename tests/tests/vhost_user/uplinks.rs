//! Uplinks whose XDP steers to the userspace engine: guests with rings are served by AF_XDP there, past the tap, and everybody
//! else as ever.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use sluice_tests::api::{list, number, text};
use sluice_tests::lab::INTERFACE;
use sluice_tests::lab_guest::{self, Pf, give};
use sluice_tests::wire::{carries, echo_request, mac, mac_text, note};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Vm, scenario, tools, wait_until};
use sluice_user::frame::{Region, RegionLayout};
use sluice_user::xdp::{self, XdpOptions};

use crate::Guest;

/// The machine outside, behind an uplink with XDP: its card leaves nothing to be done to what it sends.
fn outside(lab: &Lab) -> Result<Vm> {
    let out = lab.outside(200)?;
    out.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off", "txvlan", "off"])?;
    Ok(out)
}

/// A switch whose uplink has XDP, with these vNICs.
fn switch(vnics: &[String]) -> String {
    format!(
        "switches: [{{name: blue, uplink: {{netdev: up200, hook: XDP, fullChecksums: true}}}}]\nvnics:\n{}",
        vnics.concat()
    )
}

const BY_SOCKET: &str = "guests with rings: AF_XDP, copy mode, 1 queue";

/// What the uplink's status says of guests with rings.
fn said(lab: &Lab) -> Result<String> {
    let status = lab.sluice().json(&["get", "switch", "blue"])?;
    let ports = list(&status["status"]["ports"]);
    let uplink = ports.iter().find(|port| text(&port["port"]) == "uplink/blue").context("no uplink")?;
    let notes: Vec<&str> = list(&uplink["notes"]).iter().map(text).collect();
    Ok(notes.join("\n"))
}

fn wait_said(lab: &Lab, words: &str) -> Result<()> {
    wait_until(&format!("the uplink says {words:?}"), PATIENCE, || {
        Ok(said(lab)?.contains(words).then_some(()))
    })
}

/// Frames that the tap has carried to the guests' engine and from it.
fn tap_carried(lab: &Lab) -> Result<[u64; 2]> {
    let links: serde_json::Value = serde_json::from_str(&lab.host().run(&["ip", "-s", "-j", "link"])?)?;
    let is_tap = |link: &&serde_json::Value| text(&link["ifname"]).starts_with("slu-");
    let tap = list(&links).iter().find(is_tap).context("no trunk")?;
    let carried = |way: &str| tap["stats64"][way]["packets"].as_u64().unwrap_or_default();
    Ok([carried("tx"), carried("rx")])
}

/// Frames that a port has received and sent.
fn counted(lab: &Lab, port: &str) -> Result<[u64; 2]> {
    let stats = lab.sluice().json(&["stats"])?;
    let counters =
        list(&stats["ports"]).iter().find(|row| text(&row["port"]) == port).context("no such port")?;
    Ok(["rxPackets", "txPackets"].map(|way| number(&counters[way])))
}

/// Sends numbered notes, and waits for the last.
fn burst(from: &PacketSocket, to: &PacketSocket, frame: impl Fn(&str) -> Vec<u8>, what: &str) -> Result<()> {
    for number in 0..BURST {
        let text = format!("{what} {number}.");
        from.send(&frame(&text))?;
        to.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
    }
    Ok(())
}

const BURST: u32 = 50;

#[test]
fn guests_with_rings_reach_the_outside_past_the_tap() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, outside(lab)?);
        let (vm2, vm3) = (Guest::new(lab, 2)?, Guest::new(lab, 3)?);
        lab.sluice().apply(&switch(&[vm1.vnic(""), vm2.vnic(""), vm3.vnic("")]))?;
        let (first, second) = (vm2.boot(lab, true)?, vm3.boot(lab, false)?);
        wait_said(lab, BY_SOCKET)?;
        for (one, other) in [(&vm1, &vm2.vm), (&vm2.vm, &out), (&out, &vm3.vm), (&vm1, &out)] {
            one.ping(other)?;
            other.ping(one)?;
            tools::ping(&one.netns, &other.ip6().to_string())?;
        }
        // From here on everybody is known everywhere, and nothing is flooded that they send each other.
        let (wire, card) =
            (PacketSocket::open(&out.netns, INTERFACE)?, PacketSocket::open(&vm2.vm.netns, INTERFACE)?);
        let (tap, uplink, trunk) =
            (tap_carried(lab)?, counted(lab, "uplink/blue")?, counted(lab, "user/blue")?);
        let guest = counted(lab, "vnic/vm2")?;
        burst(&wire, &card, |text| note(vm2.vm.mac(), out.mac(), &[], text), "to the guest")?;
        burst(&card, &wire, |text| note(out.mac(), vm2.vm.mac(), &[], text), "to the wire")?;
        let strayed = tap_carried(lab)?;
        // A neighbour may ask for an address meanwhile.
        let most = u64::from(BURST) / 2;
        ensure!(
            strayed[0] - tap[0] < most && strayed[1] - tap[1] < most,
            "the tap carried them: {tap:?}, {strayed:?}"
        );
        let both = |port: &str, before: [u64; 2]| -> Result<()> {
            let after = counted(lab, port)?;
            let grown = [after[0] - before[0], after[1] - before[1]];
            let wanted = u64::from(BURST)..u64::from(BURST) + most;
            ensure!(grown.iter().all(|count| wanted.contains(count)), "{port} counted {grown:?}");
            Ok(())
        };
        both("uplink/blue", uplink)?;
        both("vnic/vm2", guest)?;
        ensure!(counted(lab, "user/blue")?[1] - trunk[1] >= u64::from(BURST), "the kernel hands them over");
        // What is for others never leaves the kernel.
        let trunk = counted(lab, "user/blue")?;
        let port = PacketSocket::open(&vm1.netns, INTERFACE)?;
        burst(&wire, &port, |text| note(vm1.mac(), out.mac(), &[], text), "to the other")?;
        burst(&port, &wire, |text| note(out.mac(), vm1.mac(), &[], text), "from the other")?;
        let after = counted(lab, "user/blue")?;
        ensure!(
            after[1] - trunk[1] < most && after[0] - trunk[0] < most,
            "the kernel gave them away: {trunk:?}, {after:?}"
        );
        // TCP, with and without super-frames of the guest's.
        for (client, server) in [(&vm2.vm, &out), (&out, &vm2.vm), (&vm3.vm, &out), (&out, &vm3.vm)] {
            for address in [server.ip4().to_string(), server.ip6().to_string()] {
                let end = tools::iperf3(&client.netns, &server.netns, &address, &["-n", "20M"])?;
                ensure!(tools::gbits_received(&end) > 0.005, "TCP from {} to {address}: {end}", client.name);
            }
        }
        let lost = said(lab)?;
        ensure!(!lost.contains("lost"), "{lost}");
        first.end()?;
        second.end()
    })
}

#[test]
fn policy_holds_past_the_tap() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, outside(lab)?);
        let vm2 = Guest::new(lab, 2)?;
        let rule = "{priority: 9, direction: TO_VM, match: {ethertype: 2048}, action: DENY}";
        let policy = format!("policy: {{vlan: {{access: 7}}, acl: {{rules: [{rule}]}}}}");
        lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200, hook: XDP, fullChecksums: true, \
             trunk: [\"7-8\"]}}}}]\nvnics:\n{}{}",
            vm1.vnic("policy: {vlan: {access: 7}}"),
            vm2.vnic(&policy)
        ))?;
        let guest = vm2.boot(lab, true)?;
        wait_said(lab, BY_SOCKET)?;
        let wire = PacketSocket::open(&out.netns, INTERFACE)?;
        let card = PacketSocket::open(&vm2.vm.netns, INTERFACE)?;
        // The wire has tags, the guest has none; of other VLANs it hears nothing.
        wire.send(&note(vm2.vm.mac(), out.mac(), &[(0x8100, 8)], "of another VLAN"))?;
        burst(&wire, &card, |text| note(vm2.vm.mac(), out.mac(), &[(0x8100, 7)], text), "to the guest")?;
        let strayed = card.drain(|frame| carries(frame, "of another VLAN"))?;
        ensure!(strayed.is_empty(), "a frame of another VLAN got through");
        card.send(&note(out.mac(), vm2.vm.mac(), &[], "to the wire"))?;
        let frame = wire.expect("the note", PATIENCE, |frame| carries(frame, "to the wire"))?;
        ensure!(frame == note(out.mac(), vm2.vm.mac(), &[(0x8100, 7)], "to the wire"), "{frame:02x?}");
        // The trace knows the way.
        let frame: String =
            note(out.mac(), vm2.vm.mac(), &[], "traced").iter().map(|byte| format!("{byte:02x}")).collect();
        let trace = lab.sluice().json(&["trace", "--port", "vnic/vm2", "--hex", &frame])?;
        ensure!(trace["agree"] == true && trace["liveVerdict"] == "out uplink/blue", "{trace}");
        // Guards and rules are those of the engine that serves it.
        card.send(&note(out.mac(), vm1.mac(), &[], "spoofed"))?;
        wait_until("the lie is counted", PATIENCE, || {
            Ok((lab.sluice().dropped("vnic/vm2", "mac-guard")? == 1).then_some(()))
        })?;
        let echo = echo_request(vm2.vm.mac(), out.mac(), (out.ip4(), vm2.vm.ip4()), 1);
        wire.send(&[&echo[..12], &[0x81, 0, 0, 7], &echo[12..]].concat())?;
        wait_until("the rule counts", PATIENCE, || {
            Ok((lab.sluice().rule_packets("vnic/vm2", 9)? == 1).then_some(()))
        })?;
        ensure!(lab.sluice().dropped("vnic/vm2", "acl-to-vm")? == 1, "and the drop");
        // One address, one place.
        let known = lab.sluice().fdb()?;
        let places: BTreeSet<&str> = known
            .iter()
            .filter(|(_, mac)| *mac == mac_text(out.mac()))
            .map(|(port, _)| port.as_str())
            .collect();
        ensure!(places == BTreeSet::from(["uplink/blue"]), "{known:?}");
        guest.end()
    })
}

#[test]
fn nobody_else_hears_of_a_daemon_that_dies() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, outside(lab)?);
        let vm2 = Guest::new(lab, 2)?;
        lab.sluice().apply(&switch(&[vm1.vnic(""), vm2.vnic("")]))?;
        let guest = vm2.boot(lab, true)?;
        wait_said(lab, BY_SOCKET)?;
        vm2.vm.ping(&out)?;
        let (wire, port) =
            (PacketSocket::open(&out.netns, INTERFACE)?, PacketSocket::open(&vm1.netns, INTERFACE)?);
        port.send(&note(out.mac(), vm1.mac(), &[], "here"))?;
        wire.expect("the first", PATIENCE, |frame| carries(frame, "here"))?;
        for is_sudden in [true, false] {
            // Frames for everybody are under way all the time; those of the kernel's arrive, each of them.
            for number in 0..3 * BURST {
                let text = format!("{number} to the other.");
                wire.send(&note(vm1.mac(), out.mac(), &[], &text))?;
                wire.send(&note(vm2.vm.mac(), out.mac(), &[], "to the guest"))?;
                if number == BURST && is_sudden {
                    lab.kill()?;
                } else if number == BURST {
                    lab.stop()?;
                } else if number == 2 * BURST {
                    lab.start()?;
                }
                port.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
            }
            lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
            wait_said(lab, BY_SOCKET)?;
            vm2.vm.ping(&out)?;
            out.ping(&vm2.vm)?;
        }
        guest.end()
    })
}

#[test]
fn guests_take_the_tap_where_there_is_no_xdp_and_the_uplink_says_so() -> Result<()> {
    scenario(|lab| {
        let out = outside(lab)?;
        let vm2 = Guest::new(lab, 2)?;
        let with = |hook: &str| switch(&[vm2.vnic("")]).replace("hook: XDP", &format!("hook: {hook}"));
        lab.sluice().apply(&with("TCX"))?;
        let guest = vm2.boot(lab, true)?;
        for (hook, says) in [
            ("TCX", "take the tap: no XDP"),
            ("XDP", BY_SOCKET),
            ("TCX", "take the tap: no XDP"),
            ("XDP", BY_SOCKET),
        ] {
            lab.sluice().apply(&with(hook))?;
            wait_said(lab, says)?;
            vm2.vm.ping(&out)?;
            out.ping(&vm2.vm)?;
        }
        // A driver that has XDP for others only.
        lab.sluice().apply(&with("TCX"))?;
        wait_said(lab, "no XDP")?;
        let region = Region::new(RegionLayout { small: 256, large: 0 })?;
        let ifindex = lab.host().ifindex("up200")?.context("no uplink")?;
        let options = XdpOptions { entries: 64, zero_copy: false, ..XdpOptions::default() };
        let other = lab.host().enter(|| Ok(xdp::open(ifindex, 0, &region, &options)?))?;
        lab.sluice().apply(&with("XDP"))?;
        wait_said(lab, "another socket has the queue")?;
        vm2.vm.ping(&out)?;
        out.ping(&vm2.vm)?;
        drop(other);
        guest.end()
    })
}

#[test]
fn an_uplink_that_comes_back_or_changes_is_served_again() -> Result<()> {
    scenario(|lab| {
        let out = outside(lab)?;
        let vm2 = Guest::new(lab, 2)?;
        lab.sluice().apply(&switch(&[vm2.vnic("")]))?;
        let guest = vm2.boot(lab, true)?;
        wait_said(lab, BY_SOCKET)?;
        vm2.vm.ping(&out)?;
        lab.host().run(&["ip", "link", "del", "up200"])?;
        lab.sluice().wait_state("switch", "blue", "PENDING", PATIENCE)?;
        lab.wire(&out, &["numrxqueues", "2", "numtxqueues", "2"])?;
        out.default_addresses()?;
        out.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off", "txvlan", "off"])?;
        wait_said(lab, "AF_XDP, copy mode, 2 queues")?;
        let reach = || -> Result<()> {
            vm2.vm.ping(&out)?;
            out.ping(&vm2.vm)
        };
        reach()?;
        let address = vm2.vm.ip4().to_string();
        let end = tools::iperf3(&out.netns, &vm2.vm.netns, &address, &["-n", "20M", "-P", "4"])?;
        ensure!(tools::gbits_received(&end) > 0.005, "TCP over both queues: {end}");
        // The kernel takes no queue away that has a socket, or has had one a moment ago.
        lab.sluice().apply(&switch(&[vm2.vnic("")]).replace("hook: XDP", "hook: TCX"))?;
        wait_said(lab, "take the tap")?;
        reach()?;
        out.netns.run(&["ethtool", "-L", INTERFACE, "tx", "1", "rx", "1"])?;
        wait_until("the queue can go", PATIENCE, || {
            let set = lab.host().attempt(&["ethtool", "-L", "up200", "rx", "1", "tx", "1"])?;
            Ok(set.status.success().then_some(()))
        })?;
        lab.sluice().apply(&switch(&[vm2.vnic("")]))?;
        wait_said(lab, BY_SOCKET)?;
        reach()?;
        // One that is added gets a socket, though nobody announces it.
        lab.host().run(&["ethtool", "-L", "up200", "rx", "2", "tx", "2"])?;
        let two = || Ok(said(lab)?.contains("copy mode, 2 queues").then_some(()));
        wait_until("the second queue has a socket", 3 * PATIENCE, two)?;
        reach()?;
        lab.host().run(&["ip", "link", "set", "up200", "mtu", "3000"])?;
        out.netns.run(&["ip", "link", "set", INTERFACE, "mtu", "3000"])?;
        vm2.vm.netns.run(&["ip", "link", "set", INTERFACE, "mtu", "3000"])?;
        let target = out.ip4().to_string();
        wait_until("long frames pass", 3 * PATIENCE, || {
            let ping = vm2
                .vm
                .netns
                .attempt(&["ping", "-n", "-c", "1", "-W", "1", "-s", "2900", "-M", "do", &target])?;
            Ok(ping.status.success().then_some(()))
        })?;
        guest.end()
    })
}

#[test]
fn an_uplink_that_takes_redirected_frames_is_sent_to_by_redirect() -> Result<()> {
    const REDIRECT: &str = "sent by XDP redirect";
    scenario(|lab| {
        let out = outside(lab)?;
        let vm2 = Guest::new(lab, 2)?;
        lab.sluice().apply(&switch(&[vm2.vnic("")]))?;
        let guest = vm2.boot(lab, true)?;
        wait_said(lab, BY_SOCKET)?;
        // A veth takes them while its other end polls.
        for (gro, is_redirected) in [("on", true), ("off", false), ("on", true)] {
            out.netns.run(&["ethtool", "-K", INTERFACE, "gro", gro])?;
            wait_until(&format!("gro is {gro}"), 3 * PATIENCE, || {
                let said = said(lab)?;
                Ok((said.contains(BY_SOCKET) && said.contains(REDIRECT) == is_redirected).then_some(()))
            })?;
            let (wire, card) =
                (PacketSocket::open(&out.netns, INTERFACE)?, PacketSocket::open(&vm2.vm.netns, INTERFACE)?);
            vm2.vm.ping(&out)?;
            out.ping(&vm2.vm)?;
            burst(&card, &wire, |text| note(out.mac(), vm2.vm.mac(), &[], text), gro)?;
            burst(&wire, &card, |text| note(vm2.vm.mac(), out.mac(), &[], text), gro)?;
            let address = out.ip4().to_string();
            let end = tools::iperf3(&vm2.vm.netns, &out.netns, &address, &["-n", "20M"])?;
            ensure!(tools::gbits_received(&end) > 0.005, "TCP: {end}");
        }
        guest.end()
    })
}

/// A station that is heard outside, and then behind a vNIC that may have others behind it: guests with rings find it there.
#[test]
fn guests_find_a_station_that_moves_from_the_wire_to_a_learning_vnic() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, outside(lab)?);
        let vm2 = Guest::new(lab, 2)?;
        let learner = vm1.vnic("policy: {allowSpoofing: true, learnLimit: 4}");
        lab.sluice().apply(&switch(&[learner, vm2.vnic("")]))?;
        let guest = vm2.boot(lab, true)?;
        wait_said(lab, "may spoof")?;
        wait_said(lab, BY_SOCKET)?;
        let station = mac(77);
        let (wire, card) =
            (PacketSocket::open(&out.netns, INTERFACE)?, PacketSocket::open(&vm2.vm.netns, INTERFACE)?);
        let port = PacketSocket::open(&vm1.netns, INTERFACE)?;
        burst(&wire, &card, |text| note(vm2.vm.mac(), station, &[], text), "from the wire")?;
        burst(&card, &wire, |text| note(station, vm2.vm.mac(), &[], text), "to the wire")?;
        // It says a word to somebody else only.
        port.send(&note(out.mac(), station, &[], "moved"))?;
        wire.expect("the word", PATIENCE, |frame| carries(frame, "moved"))?;
        burst(&card, &port, |text| note(station, vm2.vm.mac(), &[], text), "to where it is")?;
        guest.end()
    })
}

/// A driver with queues of its own, and frames that are as long as any.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_nic_serves_guests_with_rings_and_others() -> Result<()> {
    lab_guest::require()?;
    scenario(|lab| {
        let (near, far) = (Pf::open("pf0")?, Pf::open("pf1")?);
        let outside = lab.netns("outside")?;
        let target = "10.77.79.1";
        give(far.name(), &outside, &[&format!("{target}/16")])?;
        outside.run(&["ip", "link", "set", far.name(), "promisc", "on"])?;
        give(near.name(), lab.host(), &[])?;
        lab.host().run(&["ethtool", "-L", near.name(), "combined", "1"])?;
        let vm1 = lab.vm(1)?;
        let vm2 = Guest::new(lab, 2)?;
        lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: {}}}}}]\nvnics:\n{}{}",
            near.name(),
            vm1.vnic(""),
            vm2.vnic("")
        ))?;
        let guest = vm2.boot(lab, true)?;
        let reach = || -> Result<()> {
            wait_said(lab, BY_SOCKET)?;
            for vm in [&vm1, &vm2.vm] {
                tools::ping(&vm.netns, target)?;
                tools::ping(&outside, &vm.ip4().to_string())?;
            }
            let end = tools::iperf3(&outside, &vm2.vm.netns, &vm2.vm.ip4().to_string(), &["-n", "2M"])?;
            // Emulated, and so slow; but TCP that lives on retransmissions would not get there.
            ensure!(tools::gbits_received(&end) > 0.002, "TCP to the guest: {end}");
            vm1.ping(&vm2.vm)
        };
        reach()?;
        let before = tap_carried(lab)?;
        tools::ping(&vm2.vm.netns, target)?;
        ensure!(tap_carried(lab)?[0] - before[0] < 3, "the tap carried what came in");
        // What is cut in two would be taken for frames of others. (What could not be sent while the NIC came up is no such.)
        let is_strange =
            |(port, reason): &(String, String)| port == "uplink/blue" && reason != "egress-failed";
        let strangers: Vec<_> = lab.sluice().drops()?.into_keys().filter(is_strange).collect();
        ensure!(strangers.is_empty(), "the wire has brought what nobody sent: {strangers:?}");
        // The sockets vanish, and others go on.
        lab.kill()?;
        tools::ping(&vm1.netns, target)?;
        tools::ping(&outside, &vm1.ip4().to_string())?;
        lab.start()?;
        lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
        reach()?;
        // And so they do when nobody needs sockets any more.
        lab.sluice().run(&["delete", "vnic", "vm2"])?;
        tools::ping(&vm1.netns, target)?;
        ensure!(!said(lab)?.contains("guests with rings"), "{}", said(lab)?);
        drop(guest);
        Ok(())
    })
}

#[test]
fn nics_serve_guests_with_rings_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}
