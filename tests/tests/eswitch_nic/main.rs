//! PFs as the daemon holds them, in the SR-IOV lab: modes that flip, names and numbers of VFs that change, unplugging,
//! the kernel's notices of all that, and what frames tell about a NIC.
//!
//! The one test that is not ignored boots the lab; the others run there.

#![forbid(unsafe_code)]

mod change;
mod modes;
mod notices;
mod probing;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sluice_eswitch::contract::EswitchError;
use sluice_eswitch::nic::{Change, HostNic, Nic};
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::netns::check;
use sluice_tests::wait_until;

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

/// The lab's first port.
const PORT: &str = "pf0";

/// A simulated NIC with one port. It goes when it is dropped.
struct Simulated {
    number: u32,
    netdev: String,
}

impl Simulated {
    fn create(number: u32) -> Result<Simulated> {
        lab_guest::require()?;
        fs::write("/sys/bus/netdevsim/new_device", format!("{number} 1"))
            .with_context(|| format!("making netdevsim{number}"))?;
        let net = PathBuf::from(format!("/sys/bus/netdevsim/devices/netdevsim{number}/net"));
        let netdev = wait_until("the simulated NIC has a port", PATIENCE, || {
            let Ok(mut entries) = fs::read_dir(&net) else { return Ok(None) };
            Ok(entries.next().transpose()?.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        })?;
        Ok(Simulated { number, netdev })
    }

    fn open(&self) -> Result<HostNic> {
        Ok(HostNic::open(&self.netdev)?)
    }

    /// As an operator makes and removes VFs.
    fn set_vfs(&self, count: u16) -> Result<()> {
        let path = format!("/sys/bus/netdevsim/devices/netdevsim{}/sriov_numvfs", self.number);
        fs::write(path, count.to_string()).with_context(|| format!("making {count} VFs"))
    }

    /// Has it refuse more VFs than so many, or than it was compiled for; answers how many.
    fn limit_vfs(&self, count: u16) -> Result<u16> {
        let limit = format!("/sys/kernel/debug/netdevsim/netdevsim{}/max_vfs", self.number);
        if !fs::exists(&limit)? {
            return Ok(lab_guest::COMPILED_VF_LIMIT);
        }
        fs::write(limit, count.to_string()).context("the limit of VFs")?;
        Ok(count)
    }

    /// As an operator changes the mode.
    fn set_mode(&self, mode: &str) -> Result<()> {
        let device = format!("netdevsim/netdevsim{}", self.number);
        check(Command::new("devlink").args(["dev", "eswitch", "set", &device, "mode", mode])).map(drop)
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write("/sys/bus/netdevsim/del_device", self.number.to_string());
    }
}

/// A file of a port's device.
fn write_device(netdev: &str, file: &str, text: &str) -> Result<()> {
    let path = format!("/sys/class/net/{netdev}/device/{file}");
    fs::write(&path, text).with_context(|| format!("writing {text} to {path}"))
}

fn ip(words: &[&str]) -> Result<()> {
    check(Command::new("ip").args(words)).map(drop)
}

/// Wants just these changes, and none the next time.
fn changed(nic: &mut HostNic, wanted: &[Change]) -> Result<()> {
    let found = nic.refresh()?;
    ensure!(found.changes == wanted, "{found}; and these are due: {wanted:?}");
    let again = nic.refresh()?;
    ensure!(again.is_unchanged(), "told again: {again}");
    Ok(())
}
