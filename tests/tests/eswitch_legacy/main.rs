//! The legacy eSwitch back-end on real drivers, in the SR-IOV lab: igb for what a NIC does to frames, netdevsim for the
//! knobs that igb has not, and for many VFs.
//!
//! The one test that is not ignored boots the lab; the others run there.

#![forbid(unsafe_code)]

mod filter;
mod nic;
mod simulated;
mod trouble;

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sluice_eswitch::contract::{Enforced, Eswitch, VfIndex};
use sluice_eswitch::legacy::Legacy;
use sluice_eswitch::lifecycle::Action;
use sluice_eswitch::lifecycle::execute::{check, execute};
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{PortVlan, Program, VfSettings, VlanProtocol};
use sluice_tests::lab_guest::{self, PATIENCE, give};
use sluice_tests::netns;
use sluice_tests::{Netns, tools, wait_until};

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

/// The address of VM number `number`.
fn mac(number: u8) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, 0x1e, number])
}

fn ip(number: u8) -> String {
    format!("10.80.0.{number}")
}

fn port_vlan(vid: u32, qos: u8, protocol: VlanProtocol) -> Result<PortVlan> {
    Ok(PortVlan { vid: VlanId::new(vid)?, qos, protocol })
}

/// What VM number `number` gets in a VLAN, or in none.
fn settings(number: u8, vlan: Option<u32>) -> Result<VfSettings> {
    let vlan = vlan.map(|vid| port_vlan(vid, 0, VlanProtocol::Dot1q)).transpose()?;
    Ok(VfSettings { mac: mac(number), vlan, spoofchk: true, ..VfSettings::default() })
}

/// The lab's first port.
const PORT: &str = "pf0";

/// The port, up, with so many VFs that have no program and are closed. They stay for the next test, since making them
/// resets the port, and its carrier takes seconds to come back.
fn port(vfs: u16) -> Result<Legacy> {
    lab_guest::require()?;
    set_port("up")?;
    let mut eswitch = Legacy::open(PORT)?;
    if eswitch.vfs()?.len() != usize::from(vfs) {
        eswitch.set_vf_count(0)?;
        eswitch.set_vf_count(vfs)?;
        let found = eswitch.vfs()?;
        ensure!(found.len() == usize::from(vfs), "{vfs} VFs were made, and there are {found:?}");
        ensure!(found.iter().all(|vf| vf.driver.is_none()), "new VFs are open: {found:?}");
    }
    for vf in (0..vfs).map(VfIndex) {
        eswitch.unprogram(vf)?;
    }
    wait_carrier()?;
    Ok(eswitch)
}

/// `ip link set` on the port, for what other people do to it.
fn set_port(setting: &str) -> Result<()> {
    let words = ["link", "set", PORT].into_iter().chain(setting.split(' '));
    netns::check(Command::new("ip").args(words)).map(drop)
}

/// The port's VFs, as an operator makes and removes them.
fn set_vfs(count: u16) -> Result<()> {
    let path = format!("/sys/class/net/{PORT}/device/sriov_numvfs");
    fs::write(path, count.to_string()).with_context(|| format!("making {count} VFs"))
}

/// Waits for the port's carrier: without it the driver refuses rates, and VFs have no link.
fn wait_carrier() -> Result<()> {
    wait_until("the port has a carrier", PATIENCE, || {
        let state = fs::read_to_string(format!("/sys/class/net/{PORT}/operstate"))?;
        Ok((state.trim() == "up").then_some(()))
    })
}

/// What a lifecycle does with a VF: program, read back, compare, open.
fn grant(eswitch: &mut Legacy, vf: VfIndex, settings: VfSettings) -> Result<()> {
    let program = Program::Legacy(settings);
    eswitch.program(vf, &program)?;
    let observed = eswitch.read_back(vf)?;
    ensure!(!observed.enabled, "programming opened {vf}");
    let differences = observed.differences(&program);
    ensure!(differences.is_empty(), "{vf} reads back differently: {differences:?}");
    eswitch.enable(vf)?;
    ensure!(eswitch.read_back(vf)?.enabled, "{vf} was opened, and reads back closed");
    Ok(())
}

/// The same as the lifecycle does it, there and back, which sees for itself what the NIC holds; then once more without
/// a write.
fn lifecycle(eswitch: &mut Legacy, vf: VfIndex, settings: VfSettings, opens_by_binding: bool) -> Result<()> {
    let program = Program::Legacy(settings);
    let act = |eswitch: &mut Legacy, action: &Action| match execute(eswitch, action) {
        Some(result) => result.with_context(|| format!("{action:?}")),
        None => anyhow::bail!("{action:?} is not for the NIC"),
    };
    ensure!(eswitch.opens_by_binding(vf)? == opens_by_binding, "it opens the other way");
    let there = [
        Action::Close(vf),
        Action::Program { vf, program: program.clone(), is_open: false },
        Action::Open { vf, program: program.clone() },
    ];
    for action in &there {
        act(eswitch, action)?;
    }
    writes(eswitch, 0, |eswitch| {
        act(eswitch, &there[2])?;
        Ok(check(eswitch, vf, &program)?)
    })?;
    let back = [Action::Close(vf), Action::Clean(vf)];
    for action in &back {
        act(eswitch, action)?;
    }
    writes(eswitch, 0, |eswitch| back.iter().try_for_each(|action| act(eswitch, action)))
}

/// The settings that a VF has.
fn found(eswitch: &mut Legacy, vf: VfIndex) -> Result<VfSettings> {
    match eswitch.read_back(vf)?.enforced {
        Enforced::Legacy(settings) => Ok(settings),
        other => anyhow::bail!("{other:?} in legacy mode"),
    }
}

/// Does something that must write just so often.
fn writes<T>(eswitch: &mut Legacy, wanted: u64, act: impl FnOnce(&mut Legacy) -> Result<T>) -> Result<T> {
    let before = eswitch.writes();
    let result = act(eswitch)?;
    let written = eswitch.writes() - before;
    ensure!(written == wanted, "{written} writes, and {wanted} are due");
    Ok(result)
}

/// The interface of an open VF.
fn interface(eswitch: &mut Legacy, vf: VfIndex) -> Result<String> {
    let vfs = eswitch.vfs()?;
    let found = vfs.iter().find(|one| one.index == vf).context("no such VF")?;
    found.netdev.clone().with_context(|| format!("{found:?} has no interface"))
}

/// VM number `number`: a namespace whose one interface is a granted VF.
fn vm(eswitch: &mut Legacy, vf: u16, number: u8, vlan: Option<u32>) -> Result<Netns> {
    let vf = VfIndex(vf);
    grant(eswitch, vf, settings(number, vlan)?)?;
    let netns = Netns::create(&format!("sl-{}-legacy{number}", std::process::id()))?;
    let netdev = interface(eswitch, vf)?;
    give(&netdev, &netns, &[&format!("{}/24", ip(number))])?;
    let shown = netns.run(&["ip", "-o", "link", "show", "dev", &netdev])?;
    ensure!(shown.contains(&mac(number).to_string()), "it is not {}: {shown}", mac(number));
    Ok(netns)
}

/// Waits until a VM answers.
fn ping(from: &Netns, number: u8) -> Result<()> {
    tools::ping(from, &ip(number))
}
