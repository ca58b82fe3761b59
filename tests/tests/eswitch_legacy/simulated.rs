//! netdevsim: a driver with every knob, and as many VFs as one likes.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_eswitch::contract::{Eswitch, VfIndex};
use sluice_eswitch::legacy::Legacy;
use sluice_policy::placement::{Evidence, Program, VfSettings, VlanProtocol};
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::wait_until;

use super::{found, grant, lifecycle, mac, port_vlan, writes};

/// A simulated NIC with one port. It goes when it is dropped.
pub(crate) struct Simulated {
    number: u32,
    netdev: String,
}

impl Simulated {
    pub(crate) fn create(number: u32) -> Result<Simulated> {
        fs::write("/sys/bus/netdevsim/new_device", format!("{number} 1"))
            .with_context(|| format!("making netdevsim{number}"))?;
        let net = PathBuf::from(format!("/sys/bus/netdevsim/devices/netdevsim{number}/net"));
        let netdev = wait_until("the simulated NIC has a port", PATIENCE, || {
            let Ok(mut entries) = fs::read_dir(&net) else { return Ok(None) };
            Ok(entries.next().transpose()?.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        })?;
        Ok(Simulated { number, netdev })
    }

    pub(crate) fn netdev(&self) -> &str {
        &self.netdev
    }

    fn allow_vfs(&self, count: u32) -> Result<()> {
        let limit = format!("/sys/kernel/debug/netdevsim/netdevsim{}/max_vfs", self.number);
        // Since Linux 7.3 there is none: as many as it was compiled for, which are more.
        if !fs::exists(&limit)? {
            return Ok(());
        }
        fs::write(limit, count.to_string()).context("the limit of VFs")
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write("/sys/bus/netdevsim/del_device", self.number.to_string());
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn every_knob_of_the_last_of_250_vfs_is_turned_and_read_back() -> Result<()> {
    lab_guest::require()?;
    let simulated = Simulated::create(20)?;
    simulated.allow_vfs(250)?;
    let mut eswitch = Legacy::open(simulated.netdev())?;
    eswitch.set_vf_count(250)?;
    ensure!(eswitch.vfs()?.len() == 250, "{} VFs", eswitch.vfs()?.len());
    let vf = VfIndex(249);
    let wanted = VfSettings {
        mac: mac(1),
        vlan: Some(port_vlan(300, 5, VlanProtocol::Dot1ad)?),
        spoofchk: true,
        trust: true,
        min_rate_mbps: 10,
        max_rate_mbps: 1000,
        query_rss: true,
    };
    // A new VF's link is up with the port's, so it is open until it is closed.
    ensure!(eswitch.read_back(vf)?.enabled, "new VFs of a NIC with link states are open");
    eswitch.disable(vf)?;
    grant(&mut eswitch, vf, wanted)?;
    writes(&mut eswitch, 0, |eswitch| {
        eswitch.program(vf, &Program::Legacy(wanted))?;
        eswitch.enable(vf)?;
        Ok(eswitch.stats(vf)?)
    })?;
    ensure!(found(&mut eswitch, VfIndex(248))? == VfSettings::default(), "its neighbour changed too");

    eswitch.unprogram(vf)?;
    ensure!(!eswitch.read_back(vf)?.enabled, "it was given back and is open");
    let left = found(&mut eswitch, vf)?;
    ensure!(left == VfSettings { spoofchk: true, ..VfSettings::default() }, "{left:?} is left behind");
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.unprogram(vf)?))?;
    lifecycle(&mut eswitch, vf, wanted, false)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_driver_with_every_knob_is_found_to_have_them() -> Result<()> {
    lab_guest::require()?;
    let simulated = Simulated::create(22)?;
    let mut eswitch = Legacy::open(simulated.netdev())?;
    eswitch.set_vf_count(2)?;
    let capabilities = eswitch.capabilities()?;
    for (what, found) in [
        ("port VLAN", capabilities.access_vlan),
        ("its priority", capabilities.vlan_qos),
        ("802.1ad", capabilities.tunnel_vlan),
        ("spoofchk", capabilities.mac_guard),
        ("max_tx_rate", capabilities.rate_max),
        ("min_tx_rate", capabilities.rate_min),
        ("trust", capabilities.trust),
        ("query_rss", capabilities.query_rss),
        ("link state", capabilities.link_state),
    ] {
        ensure!(found == Evidence::ReadBack, "{what}: {found:?}");
    }
    ensure!(!capabilities.untagged_only.is_sufficient(), "this takes frames to find out");
    for vf in [VfIndex(0), VfIndex(1)] {
        ensure!(found(&mut eswitch, vf)? == VfSettings::default(), "trying left traces on {vf}");
    }
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.capabilities()?)).map(drop)
}
