//! A host with a switch, and the VMs and networks around it.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tempfile::TempDir;

use crate::api::{Sluice, list, text};
use crate::daemon::{Daemon, Places, log_tail};
use crate::lab_guest;
use crate::netns::{self, Netns, check};
use crate::tools;
use crate::wire::{Mac, mac_text};

/// Interface of a VM inside its namespace.
pub const INTERFACE: &str = "eth0";
/// What all our names begin with: `sl-<pid>-<lab>-<role>`.
const PREFIX: &str = "sl-";
const BPFFS: &str = "/sys/fs/bpf";
/// How long a change may take to be in force, on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// One host with one daemon.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    places: Places,
    sluice: Sluice,
    daemon: RefCell<Option<Daemon>>,
    // Dropped in this order: first the host with the ports, then the files.
    host: Netns,
    _folder: TempDir,
}

/// A VM, or a machine outside, wired to a port of the host.
///
/// Number `n` has the MAC address `02:00:00:00:hh:ll` and, unless it is bare, the addresses `10.77.h.l/16` and
/// `fd77::n/64`, where `hh` and `ll` are the high and low byte of `n`.
#[derive(Debug)]
pub struct Vm {
    /// Its name, as a vNIC too.
    pub name: String,
    /// Its namespace; its interface is [`INTERFACE`].
    pub netns: Netns,
    /// The host's end.
    pub port: String,
    /// Its number.
    pub number: u16,
}

impl Lab {
    /// Makes the host; nothing runs in it yet. Sweeps up what dead tests have left.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Lab> {
        Lab::with_host(|prefix| {
            let host = Netns::create(&format!("{prefix}-host"))?;
            // The host's ends of ports are wires, not hosts: without IPv6 they say nothing of their own.
            host.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
            Ok(host)
        })
    }

    /// A host that is the kernel's first namespace, where the interfaces of VFs appear. Only in the SR-IOV lab.
    ///
    /// # Errors
    /// Anywhere else.
    pub fn in_guest() -> Result<Lab> {
        lab_guest::require()?;
        Lab::with_host(|_| {
            let host = Netns::initial();
            host.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
            Ok(host)
        })
    }

    fn with_host(make: impl FnOnce(&str) -> Result<Netns>) -> Result<Lab> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces: run `cargo xtask test` as root");
        }
        sweep()?;
        mount_bpffs()?;
        let prefix = format!("{PREFIX}{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix(&format!("{prefix}-")).tempdir().context("a folder")?;
        let places = Places {
            state: folder.path().join("state"),
            socket: folder.path().join("sluiced.sock"),
            runtime: folder.path().join("run"),
            pins: Path::new(BPFFS).join(&prefix),
            settings: folder.path().join("sluiced.yaml"),
            log: folder.path().join("sluiced.log"),
        };
        let host = make(&prefix)?;
        let sluice = Sluice::new(&places.socket);
        Ok(Lab { prefix, places, sluice, daemon: RefCell::new(None), host, _folder: folder })
    }

    /// The host's namespace.
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// Where the daemon keeps things.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// The CLI.
    pub fn sluice(&self) -> &Sluice {
        &self.sluice
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start(&self) -> Result<()> {
        let daemon = Daemon::start(&self.host, &self.places)?;
        self.daemon.replace(Some(daemon));
        Ok(())
    }

    /// `kill -9` of the daemon; returns when it is gone.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill(&self) -> Result<()> {
        self.daemon.take().context("no daemon runs")?.kill()
    }

    /// Asks the daemon to end, and waits until it has, well.
    ///
    /// # Errors
    /// When it does not.
    pub fn stop(&self) -> Result<()> {
        let status = self.daemon.take().context("no daemon runs")?.stop()?;
        ensure!(status.success(), "sluiced ended with {status}");
        Ok(())
    }

    /// The daemon's process id; 0 when none runs.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.borrow().as_ref().map_or(0, Daemon::pid)
    }

    /// A namespace of this lab.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn netns(&self, role: &str) -> Result<Netns> {
        Netns::create(&format!("{}-{role}", self.prefix))
    }

    /// VM number `number` with its addresses: namespace and vNIC `vm<number>`, port `p<number>`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn vm(&self, number: u16) -> Result<Vm> {
        let vm = self.bare_vm(number)?;
        vm.default_addresses()?;
        Ok(vm)
    }

    /// VM number `number` without addresses.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn bare_vm(&self, number: u16) -> Result<Vm> {
        self.machine(format!("vm{number}"), format!("p{number}"), number)
    }

    /// The machine number `number` behind the uplink `up<number>`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn outside(&self, number: u16) -> Result<Vm> {
        let machine = self.machine(format!("out{number}"), format!("up{number}"), number)?;
        machine.default_addresses()?;
        Ok(machine)
    }

    fn machine(&self, name: String, port: String, number: u16) -> Result<Vm> {
        let vm = Vm { netns: self.netns(&name)?, name, port, number };
        self.wire(&vm, &[])?;
        Ok(vm)
    }

    /// VMs number 1 and 2 on switch `blue`, with nothing but the default policy, ready.
    ///
    /// # Errors
    /// When they do not get ready.
    pub fn pair(&self) -> Result<(Vm, Vm)> {
        let (vm1, vm2) = (self.vm(1)?, self.vm(2)?);
        self.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vm1.vnic(""), vm2.vnic("")))?;
        Ok((vm1, vm2))
    }

    /// Applies YAML and waits until every switch and vNIC in the answer is ready.
    ///
    /// # Errors
    /// When it is refused or something does not get ready.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let answer = self.sluice.apply(yaml)?;
        for result in list(&answer["results"]) {
            match text(&result["resource"]).split_once('/') {
                Some(("switches", name)) => self.sluice.wait_ready("switch", name, PATIENCE)?,
                Some(("vnics", name)) => self.sluice.wait_ready("vnic", name, PATIENCE)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes the veth pair between a VM and its port (again), with further words for `ip link add` such as `mtu 9000`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn wire(&self, vm: &Vm, options: &[&str]) -> Result<()> {
        let address = mac_text(vm.mac());
        let words: Vec<&str> = ["ip", "link", "add", &vm.port]
            .into_iter()
            .chain(options.iter().copied())
            .chain(["type", "veth", "peer", "name", INTERFACE, "address", &address])
            .chain(options.iter().copied())
            .chain(["netns", vm.netns.name()])
            .collect();
        self.host.run(&words)?;
        self.host.run(&["ip", "link", "set", &vm.port, "up"])?;
        vm.netns.run(&["ip", "link", "set", INTERFACE, "up"])?;
        Ok(())
    }

    /// What there is to know when something went wrong.
    pub fn diagnosis(&self) -> String {
        let mut text = String::new();
        for words in [&["get", "vnic"][..], &["stats"], &["drops"], &["fdb"], &["doctor"]] {
            let answer = self.sluice.attempt(words).map(|output| {
                format!(
                    "{}{}",
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                )
            });
            let answer: String = answer.unwrap_or_default().lines().take(80).collect::<Vec<_>>().join("\n");
            // Writing to a string does not fail.
            let _ = writeln!(text, "--- sluice {}\n{answer}", words.join(" "));
        }
        let links = self.host.run(&["ip", "-brief", "link"]).unwrap_or_default();
        let links: Vec<&str> = links.lines().take(30).collect();
        let _ = writeln!(text, "--- links of the host\n{}", links.join("\n"));
        let _ = writeln!(text, "--- log of the daemon\n{}", log_tail(&self.places.log));
        text
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A daemon that lives would pin again what is removed.
        drop(self.daemon.take());
        self.host.remove();
        // The pins may never have been made.
        let _ = std::fs::remove_dir_all(&self.places.pins);
    }
}

impl Vm {
    /// Its MAC address.
    pub fn mac(&self) -> Mac {
        let [high, low] = self.number.to_be_bytes();
        [0x02, 0, 0, 0, high, low]
    }

    /// Its IPv4 address.
    pub fn ip4(&self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, 77, high, low)
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number)
    }

    /// Gives its interface its addresses.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn default_addresses(&self) -> Result<()> {
        self.netns.address(INTERFACE, &format!("{}/16", self.ip4()))?;
        self.netns.address(INTERFACE, &format!("{}/64", self.ip6()))
    }

    /// Its vNIC on switch `blue` as an item of the YAML list `vnics`; `rest` are further fields in flow style, such
    /// as `policy: {dhcpGuard: true}`.
    pub fn vnic(&self, rest: &str) -> String {
        let (name, port, mac) = (&self.name, &self.port, mac_text(self.mac()));
        format!("- {{name: {name}, switch: blue, attach: {{veth: {port}}}, mac: \"{mac}\", {rest}}}\n")
    }

    /// Pings another machine over IPv4: waits for the first answer, then wants three of three.
    ///
    /// # Errors
    /// When there is none.
    pub fn ping(&self, other: &Vm) -> Result<()> {
        tools::ping(&self.netns, &other.ip4().to_string())
    }

    /// Wants three pings to another machine over IPv4 to stay unanswered.
    ///
    /// # Errors
    /// When one is answered.
    pub fn no_ping(&self, other: &Vm) -> Result<()> {
        tools::no_ping(&self.netns, &other.ip4().to_string())
    }
}

/// Runs a scenario in a new lab with a running daemon; a failure comes with a diagnosis.
///
/// # Errors
/// What `play` returns, or that the lab cannot be made.
pub fn scenario(play: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    lab.start()?;
    play(&lab).map_err(|error| anyhow!("{error:#}\n{}", lab.diagnosis()))
}

/// Mounts the bpffs if nobody has; a daemon in a container would find it mounted.
fn mount_bpffs() -> Result<()> {
    let is_mounted = || -> Result<bool> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading the mounts")?;
        Ok(mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)))
    };
    if !is_mounted()? {
        let mounted = check(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]));
        // Another test may have been quicker.
        if !is_mounted()? {
            mounted?;
        }
    }
    Ok(())
}

/// Removes namespaces, pins and folders of labs whose process is dead.
///
/// # Errors
/// When what there is cannot be read.
pub fn sweep() -> Result<()> {
    let named = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| is_stale(name))
            .collect()
    };
    for name in named(Path::new("/run/netns")) {
        netns::remove(&name);
    }
    for folder in [Path::new(BPFFS), &std::env::temp_dir()] {
        for name in named(folder) {
            // Another test may be sweeping too.
            let _ = std::fs::remove_dir_all(folder.join(name));
        }
    }
    Ok(())
}

/// Whether a name is one of ours and its process is dead.
fn is_stale(name: &str) -> bool {
    let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { return false };
    !Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_labs_are_stale() {
        assert!(!is_stale(&format!("sl-{}-0-host", std::process::id())));
        // Beyond the kernel's highest process id.
        assert!(is_stale("sl-4194305-0-host"));
        assert!(!is_stale("sl-host"));
        assert!(!is_stale("other-4194305-0"));
    }
}
