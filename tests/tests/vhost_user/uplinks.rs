//! Uplinks whose XDP steers to the userspace engine: guests with rings are served by AF_XDP there, past the tap, and everybody
//! else as ever.

use anyhow::{Context, Result, ensure};
use sluice_tests::api::{list, number, text};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{carries, note};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Vm, scenario, tools, wait_until};

use crate::Guest;

/// The machine outside, behind an uplink with XDP: its card leaves nothing to be done to what it sends.
fn outside(lab: &Lab) -> Result<Vm> {
    let out = lab.outside(200)?;
    out.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off", "txvlan", "off"])?;
    Ok(out)
}

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
        lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200, hook: XDP, fullChecksums: true}}}}]\nvnics:\n{}{}{}",
            vm1.vnic(""),
            vm2.vnic(""),
            vm3.vnic("")
        ))?;
        let (first, second) = (vm2.boot(lab, true)?, vm3.boot(lab, false)?);
        wait_said(lab, "guests with rings: AF_XDP, copy mode, 1 queue")?;
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
