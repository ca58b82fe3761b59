//! Bad input, from operators and from guests.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use serde_json::Value;
use sluice_tests::api::number;
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{BROADCAST, TPID_CUSTOMER, carries, ethernet, mac, note};
use sluice_tests::{PATIENCE, PacketSocket, scenario, wait_until};

#[test]
fn a_bad_apply_names_the_item_and_changes_nothing() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let before = lab.sluice().json(&["get", "vnic"])?;
        let good = "- {name: extra, switch: blue, attach: {veth: x}, mac: \"02:00:00:00:0f:01\"}\n";
        let bad = [
            (
                "- {name: v, switch: blue, attach: {veth: v}, mac: \"02:00:00:00:00:01\"}",
                "vnics/v",
                "02:00:00:00:00:01",
            ),
            ("- {name: v, switch: red, attach: {veth: v}, mac: \"02:00:00:00:0f:02\"}", "vnics/v", "red"),
            ("- {name: v, switch: blue, attach: {veth: p1}, mac: \"02:00:00:00:0f:02\"}", "vnics/v", "p1"),
            ("- {name: v, switch: blue, attach: {veth: v}, mac: \"01:00:00:00:0f:02\"}", "vnics/v", "mac"),
            ("- {name: v, switch: blue, attach: {veth: v}, mac: nonsense}", "vnics/v", "mac"),
            (
                "- {name: v, switch: blue, attach: {veth: v}, mac: \"02:00:00:00:0f:02\", policy: {vlan: {access: 4095}}}",
                "vnics/v",
                "access",
            ),
            (
                "- {name: v, switch: blue, attach: {veth: v}, mac: \"02:00:00:00:0f:02\", policy: {vlan: {trunk: {allowed: [\"10-20\", \"15\"]}}}}",
                "vnics/v",
                "15",
            ),
            (
                "- {name: v, switch: blue, attach: {veth: v}, mac: \"02:00:00:00:0f:02\", policy: {acl: {groups: [none]}}}",
                "vnics/v",
                "none",
            ),
            (
                "- {name: v, switch: blue, attach: {veth: v}, mac: \"02:00:00:00:0f:02\", colour: green}",
                "colour",
                "unknown",
            ),
        ];
        for (item, resource, word) in bad {
            let said = lab.sluice().refused(&format!("vnics:\n{good}{item}\n"))?;
            ensure!(said.contains(resource) && said.contains(word), "for {item} it says only: {said}");
        }
        let after = lab.sluice().json(&["get", "vnic"])?;
        ensure!(before == after, "a refused apply changed something");
        vm1.ping(&vm2)
    })
}

#[test]
fn malformed_frames_drop_under_their_reason() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let from = PacketSocket::open(&vm1.netns, INTERFACE)?;
        let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
        let (destination, source) = (vm2.mac(), vm1.mac());
        let frame = |tags: &[(u16, u16)], ethertype, payload: &[u8]| {
            ethernet(destination, source, tags, ethertype, payload)
        };
        let ipv4 = |bytes: &[u8]| [bytes, &[0; 60]].concat();
        let malformed = [
            (frame(&[], 0x0800, &[0x45, 0, 0]), "malformed-ipv4"),
            (frame(&[], 0x0800, &ipv4(&[0x65, 0, 0, 20])), "malformed-ipv4"),
            (frame(&[], 0x0800, &ipv4(&[0x45, 0, 0x40, 0])), "malformed-length"),
            (frame(&[], 0x86dd, &[0x60, 0]), "malformed-ipv6"),
            (frame(&[], 0x0806, &[0, 1, 8, 0, 6]), "malformed-arp"),
            (
                frame(&[(TPID_CUSTOMER, 1), (TPID_CUSTOMER, 2), (TPID_CUSTOMER, 3)], 0x0800, &[0; 60]),
                "vlan-depth",
            ),
        ];
        for (frame, reason) in &malformed {
            let before = lab.sluice().dropped("vnic/vm1", reason)?;
            from.send(frame)?;
            wait_until(&format!("one more frame is dropped as {reason}"), PATIENCE, || {
                let now = lab.sluice().dropped("vnic/vm1", reason)?;
                ensure!(now == before + 1, "it was {before} and is {now}; {:?}", lab.sluice().drops()?);
                Ok(Some(()))
            })?;
        }
        // An unknown ethertype is not malformed; nothing of the above got through before it.
        from.send(&note(destination, source, &[], "well formed"))?;
        let mut strayed = 0;
        to.expect("the well-formed note", PATIENCE, |frame| {
            strayed += malformed.iter().filter(|(bad, _)| frame.starts_with(bad)).count();
            carries(frame, "well formed")
        })?;
        ensure!(strayed == 0, "{strayed} malformed frames got through");
        Ok(())
    })
}

#[test]
fn a_port_at_its_learning_limit_still_forwards() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, lab.outside(200)?);
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200, learnLimit: 4}}}}]\nvnics:\n{}",
            vm1.vnic("")
        ))?;
        let (inside, outside) =
            (PacketSocket::open(&vm1.netns, INTERFACE)?, PacketSocket::open(&out.netns, INTERFACE)?);
        for number in 100..110 {
            let text = format!("from number {number}");
            outside.send(&note(BROADCAST, mac(number), &[], &text))?;
            inside.expect(&text, PATIENCE, |frame| carries(frame, &text))?;
        }
        let learnt = lab.sluice().fdb()?.into_iter().filter(|(port, _)| port == "uplink/blue").count();
        ensure!(learnt == 4, "{learnt} addresses were learnt, 4 are allowed");
        // Those not learnt are unknown: what is sent to them still goes out of the uplink.
        inside.send(&note(mac(109), vm1.mac(), &[], "to a stranger"))?;
        outside.expect("the note to the stranger", PATIENCE, |frame| carries(frame, "to a stranger"))?;
        Ok(())
    })
}

#[test]
fn a_full_fdb_counts_and_goes_on_forwarding() -> Result<()> {
    scenario(|lab| {
        let (vm1, red, green) = (lab.vm(1)?, lab.outside(200)?, lab.outside(201)?);
        lab.apply(&format!(
            "switches:\n- {{name: blue, uplink: {{netdev: up200, learnLimit: 60000}}}}\n\
             - {{name: other, uplink: {{netdev: up201, learnLimit: 60000}}}}\nvnics:\n{}",
            vm1.vnic("")
        ))?;
        // Together nearly twice as many addresses as the FDB holds; each uplink by itself stays below its limit.
        for (outside, number) in [(&red, 1), (&green, 2)] {
            let socket = PacketSocket::open(&outside.netns, INTERFACE)?;
            for station in 0..59_000u32 {
                let [_, high, middle, low] = station.to_be_bytes();
                socket.send(&note(mac(254), [2, 0xf0, number, high, middle, low], &[], "a new station"))?;
            }
        }
        let stats = || lab.sluice().json(&["stats"]);
        wait_until("addresses that found no room to be counted", PATIENCE, || {
            Ok((sum(&stats()?, "fdbFull") > 0).then_some(()))
        })?;
        // A station that nobody can learn any more is reached all the same, by flooding.
        vm1.ping(&red)?;
        red.ping(&vm1)
    })
}

/// The sum of a counter, wherever it stands.
fn sum(value: &Value, counter: &str) -> u64 {
    match value {
        Value::Array(items) => items.iter().map(|item| sum(item, counter)).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| if name == counter { number(value) } else { sum(value, counter) })
            .sum(),
        _ => 0,
    }
}
