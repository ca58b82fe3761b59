//! A lab with VFs, inside the emulated machine: the daemon in the kernel's first namespace, where the interfaces of VFs
//! appear, `pf0` as the uplink of its switch `blue`, and `pf1`, which is wired to it, in the hands of the outside.
//!
//! A guest is a namespace with the bond that connections survive changes of the path in: its software attachment is one
//! slave, and the VF, when it has one, the other.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::api::{list, number, text};
use crate::lab::{INTERFACE, Lab, Vm};
use crate::lab_guest;
use crate::netns::{Netns, check};
use crate::wait::wait_until;
use crate::wire::{Mac, mac_text};

/// The uplink.
pub const PF: &str = "pf0";
/// The other end of its wire.
const FAR: &str = "pf1";
/// A guest's interface.
pub const BOND: &str = "bond0";
/// Name that a VF gets in its guest.
pub const VF: &str = "vf0";
/// Number of the machine outside.
pub const OUTSIDE: u16 = 99;
/// How long drivers may take in an emulated machine on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// The lab.
#[derive(Debug)]
pub struct VfLab {
    /// The host, its daemon and its CLI.
    pub lab: Lab,
    outside: Netns,
    /// They outlive a scenario that fails, so that the diagnosis finds them as they were.
    machines: RefCell<Vec<Rc<Vm>>>,
}

impl VfLab {
    /// The machine with so many VFs that nobody uses, and its daemon running. They stay for the next test, since making
    /// them resets the port, and its carrier takes seconds to come back.
    ///
    /// # Errors
    /// Anywhere but in the emulated machine.
    pub fn start(vfs: u16) -> Result<VfLab> {
        let lab = Lab::in_guest()?;
        check(Command::new("modprobe").args(["-a", "bonding", "8021q", "igbvf", "vfio-pci"]))?;
        ip(&["link", "set", PF, "up"])?;
        if count_vfs()? != vfs {
            fs::write(device().join("sriov_drivers_autoprobe"), "0").context("no drivers for new VFs")?;
            set_vfs(0)?;
            set_vfs(vfs)?;
        }
        for vf in 0..vfs {
            // Most have none.
            let _ = fs::write(virtual_function(vf)?.join("driver/unbind"), vf_address(vf)?);
        }
        let outside = lab.netns("outside")?;
        ip(&["link", "set", FAR, "netns", outside.name()])?;
        // Else it would filter VLANs that nobody there asked for.
        outside.run(&["ip", "link", "set", FAR, "up", "promisc", "on"])?;
        let lab = VfLab { lab, outside, machines: RefCell::default() };
        wait_carrier()?;
        lab.lab.start()?;
        Ok(lab)
    }

    /// A machine behind the wire, in a VLAN or untagged, with the usual addresses of [`OUTSIDE`].
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn outside(&self, vlan: Option<u16>) -> Result<Rc<Vm>> {
        let name = vlan.map_or_else(|| "out".to_owned(), |vlan| format!("out{vlan}"));
        let vm = Vm { netns: self.lab.netns(&name)?, name, port: FAR.to_owned(), number: OUTSIDE };
        let mac = mac_text(vm.mac());
        let kind = match vlan {
            Some(vlan) => vec!["type".to_owned(), "vlan".to_owned(), "id".to_owned(), vlan.to_string()],
            // An own interface, so that the port itself stays where it is.
            None => ["type", "macvlan", "mode", "bridge"].map(str::to_owned).to_vec(),
        };
        let words = ["ip", "link", "add", "link", FAR, "name", INTERFACE, "address", &mac];
        let words: Vec<&str> = words
            .into_iter()
            .chain(["netns", vm.netns.name()])
            .chain(kind.iter().map(String::as_str))
            .collect();
        self.outside.run(&words)?;
        vm.default_addresses()?;
        vm.netns.run(&["ip", "link", "set", INTERFACE, "up"])?;
        Ok(self.keep(vm))
    }

    /// A guest, number `number`: its software attachment is in a bond that also takes a VF.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn guest(&self, number: u16) -> Result<Rc<Vm>> {
        let vm = self.lab.bare_vm(number)?;
        let mac = mac_text(vm.mac());
        vm.netns.ip_batch(&format!(
            "link set {INTERFACE} down\n\
             link add {BOND} address {mac} type bond mode active-backup miimon 50 all_slaves_active 1 num_grat_arp 2\n\
             link set {INTERFACE} master {BOND}\n\
             link set {BOND} up\n"
        ))?;
        vm.netns.address(BOND, &format!("{}/16", vm.ip4()))?;
        vm.netns.address(BOND, &format!("{}/64", vm.ip6()))?;
        Ok(self.keep(vm))
    }

    /// A machine that has its software attachment only.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn software(&self, number: u16) -> Result<Rc<Vm>> {
        Ok(self.keep(self.lab.vm(number)?))
    }

    fn keep(&self, vm: Vm) -> Rc<Vm> {
        let vm = Rc::new(vm);
        self.machines.borrow_mut().push(Rc::clone(&vm));
        vm
    }

    /// Switch `blue` with the port as its uplink; `rest` are further fields of the uplink, such as `attest: [macGuard]`.
    pub fn switch(&self, rest: &str) -> String {
        format!("switches: [{{name: blue, uplink: {{netdev: {PF}, {rest}}}}}]\n")
    }

    /// A guest's vNIC as an item of the YAML list `vnics`, with this policy and weight.
    pub fn vnic(&self, guest: &Vm, policy: &str, weight: u8) -> String {
        let attach = format!("{{netns: {{path: {}, netdev: {VF}, bond: {BOND}}}}}", guest.netns.name());
        guest.vnic(&format!("policy: {{{policy}}}, sriov: {{weight: {weight}, attach: {attach}}}"))
    }

    /// Where a vNIC is and why: its status's `path`.
    ///
    /// # Errors
    /// When there is no such vNIC.
    pub fn path(&self, vm: &Vm) -> Result<Value> {
        Ok(self.lab.sluice().json(&["get", "vnic", &vm.name])?["status"]["path"].clone())
    }

    /// Waits until a vNIC is on a path, such as `HARDWARE`; says how long that took.
    ///
    /// # Errors
    /// When it is not in time, with its path and the reason.
    pub fn wait_path(&self, vm: &Vm, wanted: &str) -> Result<Duration> {
        self.wait_status(vm, wanted, PATIENCE, |path| text(&path["path"]) == wanted).map(|(time, _)| time)
    }

    /// Waits until a vNIC is on its software path for a reason, such as `UNCOVERED`, and returns its path.
    ///
    /// # Errors
    /// When it is not in time, with its path.
    pub fn wait_reason(&self, vm: &Vm, reason: &str) -> Result<Value> {
        let is_it = |path: &Value| text(&path["path"]) == "SOFTWARE" && text(&path["reason"]) == reason;
        self.wait_status(vm, reason, PATIENCE, is_it).map(|(_, path)| path)
    }

    /// Waits until a vNIC's path is as wanted; returns how long that took, and the path.
    ///
    /// # Errors
    /// When it is not in time, with its path.
    pub fn wait_status(
        &self,
        vm: &Vm,
        what: &str,
        patience: Duration,
        is_it: impl Fn(&Value) -> bool,
    ) -> Result<(Duration, Value)> {
        let start = Instant::now();
        let path = wait_until(&format!("{} is {what}", vm.name), patience, || {
            let path = self.path(vm)?;
            if is_it(&path) { Ok(Some(path)) } else { bail!("{path}") }
        })?;
        Ok((start.elapsed(), path))
    }

    /// What the daemon says of the NIC.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn nic(&self) -> Result<Value> {
        Ok(self.lab.sluice().json(&["get", "switch", "blue"])?["status"]["nic"].clone())
    }

    /// How often the daemon has written to the NIC.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn writes(&self) -> Result<u64> {
        Ok(number(&self.nic()?["writes"]))
    }

    /// Frames that a vNIC has sent and received on its software path.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn software_frames(&self, vm: &Vm) -> Result<u64> {
        let answer = self.lab.sluice().json(&["stats"])?;
        let name = format!("vnic/{}", vm.name);
        let port = list(&answer["ports"]).iter().find(|row| text(&row["port"]) == name);
        let port = port.with_context(|| format!("no port {name}"))?;
        Ok(number(&port["rxPackets"]) + number(&port["txPackets"]))
    }

    /// What happened, as `sluice explain` tells it; everything in one text.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn explain(&self, vm: &Vm) -> Result<String> {
        self.lab.sluice().run(&["explain", "vnic", &vm.name])
    }

    /// Waits until `sluice explain` says something.
    ///
    /// # Errors
    /// When it does not in time, with what it says.
    pub fn wait_explain(&self, vm: &Vm, wanted: &str) -> Result<()> {
        wait_until(&format!("explain says {wanted:?}"), PATIENCE, || {
            let said = self.explain(vm)?;
            if said.contains(wanted) { Ok(Some(())) } else { bail!("{said}") }
        })
    }

    /// The VF that a vNIC is on.
    ///
    /// # Errors
    /// When it has none.
    pub fn vf_of(&self, vm: &Vm) -> Result<u16> {
        let path = self.path(vm)?;
        ensure!(path["vf"].is_object(), "{} has no VF: {path}", vm.name);
        Ok(u16::try_from(number(&path["vf"]["index"]))?)
    }
}

impl Drop for VfLab {
    fn drop(&mut self) {
        for machine in self.machines.borrow_mut().drain(..) {
            // A stream that a failed test has left holds the namespace, and with it the port.
            let _ = ip(&["link", "delete", &machine.port]);
        }
        // The port comes home by itself only some time after its namespace was deleted.
        let _ = self.outside.run(&["ip", "link", "set", FAR, "netns", "1"]);
    }
}

/// Runs a scenario with so many VFs; a failure comes with a diagnosis.
///
/// # Errors
/// What `play` returns, or that there is no lab.
pub fn scenario(vfs: u16, play: impl FnOnce(&VfLab) -> Result<()>) -> Result<()> {
    let lab = VfLab::start(vfs)?;
    play(&lab).map_err(|error| anyhow!("{error:#}\n{}", lab.lab.diagnosis()))
}

/// `ip` with these words, in the daemon's namespace.
///
/// # Errors
/// When it fails.
pub fn ip(words: &[&str]) -> Result<String> {
    check(Command::new("ip").args(words))
}

/// `ip link set PF vf INDEX SETTING…`, as somebody else would.
///
/// # Errors
/// When it is refused.
pub fn meddle(vf: u16, setting: &[&str]) -> Result<()> {
    let index = vf.to_string();
    ip(&[&["link", "set", PF, "vf", &index], setting].concat()).map(drop)
}

/// The uplink's device in sysfs.
pub fn device() -> PathBuf {
    Path::new("/sys/class/net").join(PF).join("device")
}

/// Makes so many VFs, or removes them all.
///
/// # Errors
/// When the driver refuses.
pub fn set_vfs(count: u16) -> Result<()> {
    fs::write(device().join("sriov_numvfs"), count.to_string()).with_context(|| format!("making {count} VFs"))
}

/// How many VFs there are.
///
/// # Errors
/// When the uplink is gone.
pub fn count_vfs() -> Result<u16> {
    let text = fs::read_to_string(device().join("sriov_numvfs")).context("the number of VFs")?;
    text.trim().parse().context("the number of VFs")
}

/// A VF's device in sysfs.
///
/// # Errors
/// When there is none.
pub fn virtual_function(vf: u16) -> Result<PathBuf> {
    fs::canonicalize(device().join(format!("virtfn{vf}"))).with_context(|| format!("there is no VF {vf}"))
}

/// A VF's PCI address.
///
/// # Errors
/// When there is none.
pub fn vf_address(vf: u16) -> Result<String> {
    Ok(virtual_function(vf)?.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

/// What the kernel says of a VF: its line of `ip link show PF`.
///
/// # Errors
/// When there is none.
pub fn shown(vf: u16) -> Result<String> {
    let all = ip(&["link", "show", "dev", PF])?;
    let line = all.lines().find(|line| line.trim_start().starts_with(&format!("vf {vf} ")));
    line.map(|line| line.trim().to_owned()).with_context(|| format!("no VF {vf} in {all}"))
}

/// Waits until the uplink has a carrier.
///
/// # Errors
/// When it does not get one.
pub fn wait_carrier() -> Result<()> {
    wait_until("the port has a carrier", lab_guest::PATIENCE, || {
        let state = fs::read_to_string(format!("/sys/class/net/{PF}/operstate"))?;
        Ok((state.trim() == "up").then_some(()))
    })
}

/// The address of the uplink itself.
///
/// # Errors
/// When it is gone.
pub fn address_of(netdev: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/sys/class/net/{netdev}/address"))?;
    Ok(text.trim().to_owned())
}

/// A MAC address that no machine of the lab has.
pub const STRANGER: Mac = [0x02, 0, 0, 0, 0x77, 0x77];
