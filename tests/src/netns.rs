//! Named network namespaces, and running things inside them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// A network namespace. One that a test made is deleted on drop, together with the processes in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    is_ours: bool,
}

impl Netns {
    /// Makes a namespace with its loopback up and with duplicate address detection off, so that IPv6 addresses work
    /// at once.
    ///
    /// # Errors
    /// When `ip netns add` fails.
    pub fn create(name: &str) -> Result<Netns> {
        check(Command::new("ip").args(["netns", "add", name]))?;
        let path = PathBuf::from("/run/netns").join(name);
        let netns = Netns { name: name.to_owned(), path, is_ours: true };
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.run(&["ip", "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The kernel's first namespace, where the interfaces of drivers appear. Only for machines that are thrown away:
    /// what a test leaves in there stays.
    pub(crate) fn initial() -> Netns {
        Netns { name: "initial".to_owned(), path: "/proc/1/ns/net".into(), is_ours: false }
    }

    /// Its name, as in `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes it, if a test made it, after killing what runs in it.
    pub(crate) fn remove(&self) {
        if self.is_ours {
            remove(&self.name);
        }
    }

    /// A command that runs inside. Unlike `ip netns exec` this leaves the mounts alone, so that a bpffs stays where
    /// it is.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Runs a command inside and returns its standard output.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        check(&mut self.prepared(words))
    }

    /// Runs a command inside and returns what became of it, whatever that is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn attempt(&self, words: &[&str]) -> Result<Output> {
        self.prepared(words).output().with_context(|| format!("running {words:?} in {}", self.name))
    }

    fn prepared(&self, words: &[&str]) -> Command {
        let (program, arguments) = words.split_first().expect("a command has a program");
        let mut command = self.command(program);
        command.args(arguments);
        command
    }

    /// Runs `work` on a thread that is inside. Sockets opened there stay in the namespace wherever they are used.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `work` fails or panics.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = self.path.clone();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let namespace = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
                setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
                work()
            });
            thread.join().map_err(|_| anyhow!("a thread in {} panicked", self.name))?
        })
    }

    /// Sets a kernel parameter of the namespace, such as `net/ipv6/conf/all/forwarding`.
    ///
    /// # Errors
    /// When there is none of that name or the value is refused.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| {
            std::fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("setting {name}"))
        })
    }

    /// Runs a batch of `ip` commands, one per line without the leading `ip`: much faster than one by one.
    ///
    /// # Errors
    /// When one fails.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), lines)?;
        let path = file.path().display().to_string();
        self.run(&["ip", "-batch", &path]).map(drop)
    }

    /// Gives an interface an address with a prefix length, IPv4 or IPv6.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn address(&self, interface: &str, address: &str) -> Result<()> {
        let mut words = vec!["ip", "address", "add", address, "dev", interface];
        if address.contains(':') {
            words.push("nodad");
        }
        self.run(&words).map(drop)
    }

    /// The index of an interface, or `None` if there is none of that name.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn ifindex(&self, interface: &str) -> Result<Option<u32>> {
        self.enter(|| Ok(nix::net::if_::if_nametoindex(interface).ok()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Deletes a namespace after killing what runs in it.
pub(crate) fn remove(name: &str) {
    if let Ok(pids) = check(Command::new("ip").args(["netns", "pids", name])) {
        for pid in pids.split_whitespace().filter(|pid| *pid != std::process::id().to_string()) {
            // It may have ended by itself.
            let _ = check(Command::new("kill").args(["-9", pid]));
        }
    }
    let _ = check(Command::new("ip").args(["netns", "delete", name]));
}

/// Runs a command and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails, with what it wrote.
pub fn check(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
