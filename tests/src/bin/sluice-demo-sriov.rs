//! The demo that `cargo xtask demo --sriov` runs in the SR-IOV lab: guests that get VFs of an emulated NIC and lose them
//! again, under one policy. Each line on screen is a claim that has just been tried; the first that is false ends the
//! demo, and it exits non-zero.

#![forbid(unsafe_code)]
// It is all about what is on screen.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use sluice_tests::api::{list, text};
use sluice_tests::lab::{INTERFACE, Vm};
use sluice_tests::screen::{bold, claim, paint};
use sluice_tests::tcp::Connection;
use sluice_tests::tools::pings_answered;
use sluice_tests::vf_lab::{BOND, PATIENCE, VF, VfLab, meddle, shown};
use sluice_tests::wire::{carries, udp4};
use sluice_tests::{PacketSocket, wait_until};

/// The VLAN of the first two guests, and that of the third.
const VLANS: [u16; 2] = [100, 200];
/// How often the VF is taken under load.
const REVOKES: usize = 2;
const DENIED: u16 = 7009;
const ALLOWED: u16 = 7010;

fn main() -> ExitCode {
    println!("{}", bold("Sluice: virtual functions under the same policy"));
    println!("An emulated igb port with VFs; namespaces play guests, each with a bond of its software");
    println!("attachment and its VF; the other port, at the end of the wire, is the outside.\n");
    let start = Instant::now();
    match play() {
        Ok(()) => {
            println!("\n{} in {:.0?}", paint("1;32", "All of it is true"), start.elapsed());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\n{} {error:#}", paint("1;31", "False:"));
            ExitCode::FAILURE
        }
    }
}

fn play() -> Result<()> {
    let lab = VfLab::start(4)?;
    let (vm1, vm2, vm3) = (lab.guest(1)?, lab.guest(2)?, lab.guest(3)?);
    let outside = lab.outside(Some(VLANS[0]))?;
    grants(&lab, &[&vm1, &vm2, &vm3])?;
    separates(&lab, [&vm1, &vm2, &vm3], &outside)?;
    repairs(&lab, &vm1, &vm2)?;
    forces(&lab, &vm1, &outside)?;
    revokes(&lab, &vm1, &outside)
}

fn in_vlan(vlan: u16, rest: &str) -> String {
    format!("vlan: {{access: {vlan}}}, allowSpoofing: true{rest}")
}

fn grants(lab: &VfLab, guests: &[&Vm; 3]) -> Result<()> {
    claim("grant: each guest gets a VF, programmed and read back before it is opened", || {
        let [vm1, vm2, vm3] = guests;
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}",
            lab.switch(""),
            lab.vnic(vm1, &in_vlan(VLANS[0], ""), 50),
            lab.vnic(vm2, &in_vlan(VLANS[0], ""), 50),
            lab.vnic(vm3, &in_vlan(VLANS[1], ""), 50),
        ))?;
        let mut said = Vec::new();
        for vm in guests {
            lab.wait_path(vm, "HARDWARE")?;
            let vf = lab.vf_of(vm)?;
            let line = shown(vf)?;
            ensure!(line.contains("vlan "), "{line}");
            said.push(format!("{} on VF {vf}", vm.name));
        }
        Ok((said.join(", "), ()))
    })
}

fn separates(lab: &VfLab, [vm1, vm2, vm3]: [&Vm; 3], outside: &Vm) -> Result<()> {
    claim("the NIC switches: VF to VF and to the wire in VLAN 100, nothing of it through software", || {
        // Whatever was still on its way is over with the first answers.
        vm1.ping(vm2)?;
        vm1.ping(outside)?;
        let before = lab.software_frames(vm1)?;
        vm1.ping(vm2)?;
        vm1.ping(outside)?;
        let served = lab.software_frames(vm1)? - before;
        ensure!(served == 0, "{served} frames took the software path");
        Ok(("each answers 3 of 3; 0 frames on the software path".to_owned(), ()))
    })?;
    claim("the NIC separates: VLAN 100 and 200", || {
        let answered = [
            pings_answered(&vm1.netns, &vm3.ip4().to_string(), 3)?,
            pings_answered(&vm3.netns, &vm2.ip4().to_string(), 3)?,
        ];
        ensure!(answered == [0, 0], "{answered:?} of 3 were answered");
        Ok(("0 of 3 answered, either way".to_owned(), ()))
    })
}

fn repairs(lab: &VfLab, vm1: &Vm, vm2: &Vm) -> Result<()> {
    claim("drift: somebody changes the VF's VLAN; it is noticed, named and put right", || {
        let vf = lab.vf_of(vm1)?;
        let before = shown(vf)?;
        meddle(vf, &["vlan", "77"])?;
        let start = Instant::now();
        wait_until("the VLAN is put back", PATIENCE, || {
            let now = shown(vf)?;
            if now == before { Ok(Some(())) } else { bail!("{now}") }
        })?;
        let time = start.elapsed();
        ensure!(time < Duration::from_secs(2), "it took {time:?}");
        lab.wait_explain(vm1, "drift")?;
        lab.wait_path(vm1, "HARDWARE")?;
        vm1.ping(vm2)?;
        Ok((format!("put right after {time:.0?}, and `sluice explain` tells of it"), ()))
    })
}

fn forces(lab: &VfLab, vm1: &Vm, outside: &Vm) -> Result<()> {
    claim(
        "an ACL, which this NIC cannot enforce, takes the guest back to software, before apply returns",
        || {
            let ears = PacketSocket::open(&outside.netns, INTERFACE)?;
            let mouths = [PacketSocket::open(&vm1.netns, BOND)?, PacketSocket::open(&vm1.netns, VF)?];
            let speak = |port: u16, words: &str| {
                let frame = udp4(
                    outside.mac(),
                    vm1.mac(),
                    (vm1.ip4(), outside.ip4()),
                    (7000, port),
                    words.as_bytes(),
                );
                for mouth in &mouths {
                    // The VF may have been taken.
                    let _ = mouth.send(&frame);
                }
            };
            speak(DENIED, "before");
            ears.expect("a datagram before the rule", PATIENCE, |frame| carries(frame, "before"))?;
            let rule = format!(
                "{{priority: 9, direction: FROM_VM, match: {{ipProto: udp, dstPorts: [\"{DENIED}\"]}}, action: DENY}}"
            );
            let policy = in_vlan(VLANS[0], &format!(", acl: {{rules: [{rule}]}}"));
            lab.lab.sluice().apply(&format!("vnics:\n{}", lab.vnic(vm1, &policy, 50)))?;
            for _ in 0..20 {
                speak(DENIED, "forbidden");
            }
            let mut forbidden = 0;
            wait_until("what is allowed arrives", PATIENCE, || {
                speak(ALLOWED, "allowed");
                let mut allowed = false;
                while let Some(frame) = ears.receive(Duration::from_millis(200))? {
                    forbidden += u32::from(carries(&frame, "forbidden"));
                    allowed |= carries(&frame, "allowed");
                }
                Ok(allowed.then_some(()))
            })?;
            ensure!(forbidden == 0, "{forbidden} forbidden datagrams arrived");
            let path = lab.wait_reason(vm1, "UNCOVERED")?;
            let why = list(&path["uncovered"])
                .iter()
                .map(|one| text(&one["feature"]))
                .collect::<Vec<_>>()
                .join(", ");
            lab.lab.sluice().apply(&format!("vnics:\n{}", lab.vnic(vm1, &in_vlan(VLANS[0], ""), 50)))?;
            lab.wait_path(vm1, "HARDWARE")?;
            Ok((
                format!(
                    "0 of 40 forbidden datagrams arrive; uncovered: {why}; without the rule it is on a VF again"
                ),
                (),
            ))
        },
    )
}

fn revokes(lab: &VfLab, vm1: &Vm, outside: &Vm) -> Result<()> {
    claim(
        "revoke under load: a TCP connection to the outside survives, and survives the grant after it",
        || {
            let pause = Duration::from_millis(10);
            let address = (outside.ip4(), 7100).into();
            let connection = Connection::start(&vm1.netns, &outside.netns, address, pause)?;
            connection.wait_more(20, PATIENCE)?;
            for _ in 0..REVOKES {
                lab.lab.sluice().run(&["revoke", "vnic", &vm1.name, "--hold", "0"])?;
                lab.wait_reason(vm1, "HELD")?;
                connection.wait_more(20, PATIENCE)?;
                lab.lab.sluice().run(&["release", "vnic", &vm1.name])?;
                lab.wait_path(vm1, "HARDWARE")?;
                connection.wait_more(20, PATIENCE)?;
            }
            let (answered, slowest) = connection.finish()?;
            let said = format!(
                "{REVOKES} revokes and grants; {answered} requests answered in order, the slowest after {slowest:.0?}"
            );
            Ok((said, ()))
        },
    )
}
