//! What frames tell about igb as QEMU has it: it takes spoof checking and rates, and does neither; port VLANs hold.

use super::*;

use std::collections::BTreeSet;
use std::time::Instant;

use sluice_eswitch::contract::{Enforced, VfIndex};
use sluice_eswitch::probe::{ProbeError, Verdict, probe};
use sluice_policy::config::Attestable;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Evidence, Program, VfSettings};

const VF: VfIndex = VfIndex(1);

/// The port with two VFs, up, and with a carrier.
fn port() -> Result<HostNic> {
    lab_guest::require()?;
    ip(&["link", "set", PORT, "up"])?;
    let mut nic = HostNic::open(PORT)?;
    nic.set_vf_count(2)?;
    wait_carrier()?;
    Ok(nic)
}

fn wait_carrier() -> Result<()> {
    wait_until("the port has a carrier", PATIENCE, || {
        let state = fs::read_to_string(format!("/sys/class/net/{PORT}/operstate"))?;
        Ok((state.trim() == "up").then_some(()))
    })
}

/// Interfaces, and whether they are up.
fn interfaces() -> Result<BTreeSet<String>> {
    let text = check(Command::new("ip").args(["-br", "link"]))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn is_clean(nic: &mut HostNic) -> Result<()> {
    let observed = nic.eswitch().read_back(VF)?;
    let Enforced::Legacy(settings) = observed.enforced else { anyhow::bail!("{observed:?}") };
    ensure!(!observed.enabled, "it is open");
    ensure!(settings == VfSettings { spoofchk: true, ..VfSettings::default() }, "{settings:?}");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn frames_tell_what_the_nic_does() -> Result<()> {
    let mut nic = port()?;
    let before = interfaces()?;
    let start = Instant::now();
    let report = probe(&mut nic, VF, VlanId::new(4000)?)?;
    // Seven seconds here; the NIC's thread does nothing else meanwhile.
    ensure!(start.elapsed() < PATIENCE, "it took {:?}", start.elapsed());
    ensure!(report.identity.is_same_kind(nic.identity()));
    for (ability, wanted) in [
        (Attestable::MacGuard, Verdict::Refuted),
        (Attestable::Untagged, Verdict::Refuted),
        (Attestable::AccessVlan, Verdict::Enforced),
        (Attestable::RateFromVm, Verdict::Refuted),
    ] {
        ensure!(report.verdict(ability) == wanted, "{ability:?}: {:?}", report.findings);
    }
    is_clean(&mut nic)?;
    let after = wait_until("the room is gone", PATIENCE, || {
        let after = interfaces()?;
        Ok((after == before).then_some(after))
    });
    ensure!(after.is_ok(), "before: {before:?}; now: {:?}", interfaces()?);
    ensure!(check(Command::new("ip").args(["netns"]))?.is_empty(), "it left a namespace");

    let mut capabilities = nic.eswitch().capabilities()?;
    report.apply(&mut capabilities);
    ensure!(capabilities.mac_guard == Evidence::Refuted && capabilities.rate_max == Evidence::Refuted);
    ensure!(capabilities.access_vlan == Evidence::Probed, "{:?}", capabilities.access_vlan);
    // Once more, as an operator may.
    let again = probe(&mut nic, VF, VlanId::new(4000)?)?;
    ensure!(again.verdict(Attestable::AccessVlan) == Verdict::Enforced, "{:?}", again.findings);
    is_clean(&mut nic)?;
    nic.set_vf_count(0)?;
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_is_in_use_is_left_alone_and_silence_proves_nothing() -> Result<()> {
    let mut nic = port()?;
    let vlan = VlanId::new(4000)?;
    let settings = VfSettings { mac: MacAddr([2, 0, 0, 0, 0, 9]), spoofchk: true, ..VfSettings::default() };
    nic.eswitch().program(VF, &Program::Legacy(settings))?;
    nic.eswitch().read_back(VF)?;
    let writes = nic.writes();
    let refused = probe(&mut nic, VF, vlan);
    ensure!(matches!(refused, Err(ProbeError::InUse(_))), "{refused:?}");
    ensure!(nic.writes() == writes, "it wrote to somebody's VF");
    nic.eswitch().unprogram(VF)?;

    // What is found out takes a port that carries frames, and a way for them.
    ip(&["link", "set", PORT, "down"])?;
    let refused = probe(&mut nic, VF, vlan);
    ensure!(matches!(refused, Err(ProbeError::NoCarrier(_))), "{refused:?}");
    is_clean(&mut nic)?;
    ip(&["link", "set", PORT, "up"])?;
    wait_carrier()?;
    // Without a witness, silence about tags proves nothing.
    nic.eswitch().program(VfIndex(0), &Program::Legacy(settings))?;
    let report = probe(&mut nic, VF, vlan)?;
    ensure!(report.verdict(Attestable::Untagged) == Verdict::Inconclusive, "{:?}", report.findings);
    ensure!(report.verdict(Attestable::AccessVlan) == Verdict::Enforced, "{:?}", report.findings);
    is_clean(&mut nic)?;
    let left = nic.eswitch().read_back(VfIndex(0))?.differences(&Program::Legacy(settings));
    ensure!(left.is_empty(), "somebody's VF was changed: {left:?}");
    nic.eswitch().unprogram(VfIndex(0))?;
    nic.set_vf_count(0)?;
    Ok(())
}
