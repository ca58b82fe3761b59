//! Who reaches whom: VFs, software vNICs and the wire, in VLANs.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use sluice_tests::lab::{INTERFACE, Vm};
use sluice_tests::tools::ping;
use sluice_tests::vf_lab::{BOND, PATIENCE, VF, VfLab, scenario};
use sluice_tests::wire::{BROADCAST, carries, note};
use sluice_tests::{PacketSocket, wait_until};

use super::{ATTESTED, in_vlan};

const COPIES: usize = 5;
/// After so long without a copy, no more are expected.
const QUIET: Duration = Duration::from_millis(700);

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vfs_software_and_wire_reach_each_other() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2) = (lab.guest(1)?, lab.guest(2)?);
        let (soft, outside) = (lab.software(4)?, lab.outside(None)?);
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}",
            lab.switch(ATTESTED),
            lab.vnic(&vm1, "", 50),
            lab.vnic(&vm2, "", 50),
            soft.vnic(""),
        ))?;
        on_their_vfs(lab, &[&vm1, &vm2])?;
        reach_each_other(lab, &[&vm1, &vm2, &soft, &outside], &[])
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn the_nic_separates_vlans() -> Result<()> {
    scenario(4, |lab| {
        let (vm1, vm2, vm3) = (lab.guest(1)?, lab.guest(2)?, lab.guest(3)?);
        let (soft, outside) = (lab.software(4)?, lab.outside(Some(100))?);
        lab.lab.apply(&format!(
            "{}vnics:\n{}{}{}{}",
            lab.switch(""),
            lab.vnic(&vm1, &in_vlan(100), 50),
            lab.vnic(&vm2, &in_vlan(100), 50),
            lab.vnic(&vm3, &in_vlan(200), 50),
            soft.vnic(&format!("policy: {{{}}}", in_vlan(100))),
        ))?;
        on_their_vfs(lab, &[&vm1, &vm2, &vm3])?;
        reach_each_other(lab, &[&vm1, &vm2, &soft, &outside], &[&vm3])
    })
}

fn on_their_vfs(lab: &VfLab, guests: &[&Vm]) -> Result<()> {
    for vm in guests {
        let time = lab.wait_path(vm, "HARDWARE")?;
        println!("{} is on VF {} after {time:.1?}", vm.name, lab.vf_of(vm)?);
    }
    Ok(())
}

/// All of these reach each other by unicast and broadcast, and none of the strangers; without the switch where two VFs
/// talk, or a VF and the wire.
fn reach_each_other(lab: &VfLab, machines: &[&Vm], strangers: &[&Vm]) -> Result<()> {
    let [vm1, vm2, .., outside] = machines else { bail!("too few machines") };
    for from in machines {
        for to in machines.iter().filter(|to| to.number != from.number) {
            from.ping(to)?;
            // Neighbour discovery is sent to groups, and the emulated NIC does not know the mode in which a PF receives
            // all of them (`VMOLR.MPME` of its original): what is behind the PF it cannot discover.
            if ears(to).contains(&VF) || to.number == outside.number {
                ping(&from.netns, &to.ip6().to_string())?;
            }
        }
    }
    let before = lab.software_frames(vm1)?;
    vm1.ping(vm2)?;
    vm1.ping(outside)?;
    let served = lab.software_frames(vm1)? - before;
    ensure!(served == 0, "{served} frames of vm1 took its software path");
    for stranger in strangers {
        for other in machines {
            stranger.no_ping(other)?;
            other.no_ping(stranger)?;
        }
    }
    broadcasts(machines, strangers)
}

/// Where a machine hears: a guest both on its VF and on its software attachment, which must not both hear a frame.
fn ears(vm: &Vm) -> &'static [&'static str] {
    if vm.netns.ifindex(BOND).is_ok_and(|found| found.is_some()) { &[VF, INTERFACE] } else { &[INTERFACE] }
}

/// A broadcast of each reaches each other one once, and nobody in another VLAN. What the sender itself hears is not
/// looked at: the emulated NIC gives everybody his own broadcasts back.
fn broadcasts(machines: &[&Vm], strangers: &[&Vm]) -> Result<()> {
    let all: Vec<&Vm> = machines.iter().chain(strangers).copied().collect();
    let is_strange = |vm: &Vm| strangers.iter().any(|stranger| stranger.number == vm.number);
    for from in &all {
        let mouth = PacketSocket::open(&from.netns, if ears(from).len() > 1 { BOND } else { INTERFACE })?;
        let open = |vm: &&Vm| -> Result<Vec<PacketSocket>> {
            ears(vm).iter().map(|ear| PacketSocket::open(&vm.netns, ear)).collect()
        };
        let sockets = all.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mark = format!("broadcast of {}", from.name);
        for _ in 0..COPIES {
            mouth.send(&note(BROADCAST, from.mac(), &[], &mark))?;
        }
        let mut heard: Vec<Vec<usize>> = sockets.iter().map(|ears| vec![0; ears.len()]).collect();
        // Copies that took another way may be late: until it has been quiet for a while.
        let mut last = Instant::now();
        wait_until("nothing comes any more", PATIENCE, || {
            for (sockets, counts) in sockets.iter().zip(&mut heard) {
                for (socket, count) in sockets.iter().zip(counts) {
                    let frames = socket.drain(|frame| carries(frame, &mark))?.len();
                    *count += frames;
                    last = if frames > 0 { Instant::now() } else { last };
                }
            }
            Ok((last.elapsed() > QUIET).then_some(()))
        })?;
        for (vm, counts) in all.iter().zip(&heard) {
            if vm.number == from.number {
                continue;
            }
            let wanted = if is_strange(vm) == is_strange(from) { COPIES } else { 0 };
            let total: usize = counts.iter().sum();
            ensure!(
                total == wanted,
                "of {COPIES} broadcasts of {}, {} heard {counts:?} on {:?}, wanted {wanted}",
                from.name,
                vm.name,
                ears(vm)
            );
        }
        println!(
            "{COPIES} broadcasts of {}: each heard once by those in its VLAN, by nobody else",
            from.name
        );
    }
    Ok(())
}
