//! Tests inside the SR-IOV lab (`cargo xtask lab`): how they get there, and the NICs that they find.
//!
//! A test of the host calls [`run_ignored`], which boots the lab once and runs there the tests of the same file that are
//! marked `#[ignore = "runs in the SR-IOV lab"]`, one after the other. Those begin with [`require`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::netns::{Netns, check};
use crate::wait::wait_until;
use crate::wire::{Mac, mac_text};

/// VFs that a simulated NIC can have where the number is compiled into netdevsim: since Linux 7.3, by the lab's preparation.
pub const COMPILED_VF_LIMIT: u16 = 256;

/// How long drivers may take in an emulated machine on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often a VF is bound again that came up without its address.
const REBINDS: usize = 5;

/// Runs, in the lab, this file's tests that are marked as ignored.
///
/// # Errors
/// When one of them fails there, or the lab itself does.
pub fn run_ignored() -> Result<()> {
    run_in_lab(&["--ignored", "--test-threads=1", "--show-output"], &[])
}

/// Runs this test program in the lab, with these arguments and variables (whose names begin with `SLUICE_`).
///
/// # Errors
/// When it fails there, or the lab itself does.
pub fn run_in_lab(arguments: &[&str], variables: &[(&str, &str)]) -> Result<()> {
    ensure!(!is_guest(), "the lab cannot run a lab");
    // `cargo xtask test` says where its own program is, which spares us waiting for cargo's locks.
    let mut command = match std::env::var_os("SLUICE_XTASK") {
        Some(program) => Command::new(program),
        None => {
            let mut command = Command::new("cargo");
            command.arg("xtask");
            command
        }
    };
    // Who runs the tests ends those that hang; the longest suite takes ten minutes on a busy host, and twice as long on a slow one.
    command
        .args(["lab", "--timeout", "1900"])
        .arg("--")
        .arg(std::env::current_exe().context("which program are we?")?);
    command.args(arguments).envs(variables.iter().copied());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in no workspace")?;
    let status = command.current_dir(root).status().context("running cargo xtask lab")?;
    ensure!(status.success(), "{arguments:?} ended in the lab with {status}; what it said is above");
    Ok(())
}

/// Stops a test that is not in the lab.
///
/// # Errors
/// Outside.
pub fn require() -> Result<()> {
    ensure!(
        is_guest(),
        "this test runs in the SR-IOV lab; the test of this file that is not ignored takes it there"
    );
    Ok(())
}

fn is_guest() -> bool {
    std::env::var_os("LAB_GUEST").is_some()
}

/// A port of an SR-IOV NIC, in the namespace that the guest boots into. Its VFs go when it is dropped.
#[derive(Debug)]
pub struct Pf {
    name: String,
    device: PathBuf,
}

/// A virtual function.
#[derive(Clone, Debug)]
pub struct Vf {
    /// Its number.
    pub index: u32,
    /// Its interface, in the namespace that the guest boots into.
    pub netdev: String,
    /// Its PCI address, such as `0000:01:10.0`.
    pub pci: String,
}

impl Pf {
    /// The port with this name: up, and without VFs.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(name: &str) -> Result<Pf> {
        let device = fs::canonicalize(format!("/sys/class/net/{name}/device"))
            .with_context(|| format!("there is no port {name}"))?;
        let pf = Pf { name: name.to_owned(), device };
        pf.set_vfs(0)?;
        check(Command::new("ip").args(["link", "set", name, "up"]))?;
        Ok(pf)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its PCI device in sysfs.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// How many VFs it can have.
    ///
    /// # Errors
    /// When it has no SR-IOV.
    pub fn total_vfs(&self) -> Result<u32> {
        let text = fs::read_to_string(self.device.join("sriov_totalvfs")).context("it has no SR-IOV")?;
        text.trim().parse().context("the number of VFs")
    }

    /// Makes so many VFs, without interfaces yet; or removes them all.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn set_vfs(&self, count: u32) -> Result<()> {
        fs::write(self.device.join("sriov_numvfs"), count.to_string())
            .with_context(|| format!("making {count} VFs of {}", self.name))
    }

    /// Makes a VF for each of these addresses, and waits for their interfaces to have them.
    ///
    /// # Errors
    /// When the driver refuses, or an interface does not come up with its address.
    pub fn make_vfs(&self, macs: &[Mac]) -> Result<Vec<Vf>> {
        self.set_vfs(macs.len() as u32)?;
        macs.iter()
            .zip(0..)
            .map(|(mac, index)| {
                self.configure(index, &["mac", &mac_text(*mac)])?;
                self.rebound(index, *mac)
            })
            .collect()
    }

    /// `ip link set PF vf INDEX SETTING…`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn configure(&self, vf: u32, setting: &[&str]) -> Result<()> {
        check(Command::new("ip").args(["link", "set", &self.name, "vf", &vf.to_string()]).args(setting))
            .map(drop)
    }

    /// A VF whose driver has asked for its address after that was set. The answer gets lost when the port is being
    /// reset at that moment, so it is asked again.
    fn rebound(&self, index: u32, mac: Mac) -> Result<Vf> {
        let device = fs::canonicalize(self.device.join(format!("virtfn{index}"))).context("no such VF")?;
        let pci = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let driver = Path::new("/sys/bus/pci/drivers/igbvf");
        for _ in 0..REBINDS {
            // It may not be bound at the first time.
            let _ = fs::write(driver.join("unbind"), &pci);
            fs::write(driver.join("bind"), &pci).with_context(|| format!("binding {pci}"))?;
            let netdev = wait_until(&format!("VF {index} has an interface"), PATIENCE, || {
                let mut entries = fs::read_dir(device.join("net"))?;
                Ok(entries.next().transpose()?.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            })?;
            let address = fs::read_to_string(device.join("net").join(&netdev).join("address"))?;
            if address.trim() == mac_text(mac) {
                return Ok(Vf { index, netdev, pci });
            }
        }
        bail!("VF {index} of {} does not get its address {}", self.name, mac_text(mac))
    }
}

impl Drop for Pf {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = self.set_vfs(0);
    }
}

/// Moves an interface into a namespace, gives it addresses and brings it up. It comes back when the namespace goes.
///
/// # Errors
/// When it cannot be moved.
pub fn give(netdev: &str, netns: &Netns, addresses: &[&str]) -> Result<()> {
    check(Command::new("ip").args(["link", "set", netdev, "netns", netns.name()]))?;
    for address in addresses {
        netns.address(netdev, address)?;
    }
    netns.run(&["ip", "link", "set", netdev, "up"]).map(drop)
}
