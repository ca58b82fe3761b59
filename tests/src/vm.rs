//! Real VMs: QEMU boots a Debian kernel with a virtio network card, whose other end is the switch, by vhost-user or a tap.
//!
//! The guest is the small one that `cargo xtask guest-image` makes. It sets its address up by itself, serves TCP port 7 (echo) and
//! iperf3, and runs the test's commands, which reach it through a serial port and not through the network that is tested.
//! It is emulated (TCG), as no virtualisation can be had everywhere, so it boots in seconds and is slow.

pub mod echo;
mod image;

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::tools::Running;
use crate::wait::wait_until;
use crate::wire::{Mac, mac_text};
use image::Image;

/// How long a guest may take to boot, emulated on two busy cores.
const BOOT: Duration = Duration::from_secs(90);
/// How long a command may take in it.
const COMMAND: Duration = Duration::from_secs(60);
/// How long a neighbour may take to answer the first time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Memory of a guest, in MiB.
const MEMORY: &str = "256";
/// Lines of a console that are worth reading.
const TAIL: usize = 30;
/// The TCP port on which guests echo.
pub const ECHO: u16 = 7;

/// The other end of a guest's network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Card {
    /// vhost-user: the switch listens, QEMU connects and does so again when the switch goes.
    SwitchListens {
        /// Queue pairs; the guest gets as many processors.
        queues: u8,
    },
    /// vhost-user: QEMU listens, the switch connects.
    QemuListens,
    /// A tap that outlives QEMU, with virtio-net headers.
    Tap,
}

/// A VM. Number `n` has the addresses that [`crate::lab::Vm`] number `n` would have. Killed on drop.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Its name, as a vNIC too: `vm<number>`.
    pub name: String,
    number: u16,
    card: Card,
    lab: &'a Lab,
    image: Image,
    /// Where its QEMU connects the serial port to.
    listener: UnixListener,
    life: RefCell<Option<Life>>,
}

/// From QEMU's start to its end.
#[derive(Debug)]
struct Life {
    qemu: Running,
    agent: BufReader<UnixStream>,
    /// Of the kernel that runs.
    boot_id: String,
}

/// What came of a command in a guest.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its exit status.
    pub status: i32,
    /// What it wrote.
    pub output: String,
}

/// Frames and bytes through a guest's card, as its driver counts: a super-frame is one frame.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Frames.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Traffic {
    /// Bytes of a frame on average, since an earlier look.
    pub fn average_since(self, earlier: Traffic) -> u64 {
        (self.bytes - earlier.bytes) / (self.packets - earlier.packets).max(1)
    }
}

impl<'a> Guest<'a> {
    /// A VM that is switched off; its tap, if it has one, is there.
    ///
    /// # Errors
    /// When the image cannot be made, or the tap.
    pub fn new(lab: &'a Lab, number: u16, card: Card) -> Result<Guest<'a>> {
        let name = format!("vm{number}");
        let image = Image::find()?;
        let listener = UnixListener::bind(lab.places().socket.with_file_name(format!("{name}-agent.sock")))
            .context("listening for a guest's agent")?;
        listener.set_nonblocking(true)?;
        let guest = Guest { name, number, card, lab, image, listener, life: RefCell::new(None) };
        if card == Card::Tap {
            let tap = guest.tap();
            lab.host().run(&["ip", "tuntap", "add", "dev", &tap, "mode", "tap", "vnet_hdr"])?;
            lab.host().run(&["ip", "link", "set", &tap, "up"])?;
        }
        Ok(guest)
    }

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

    /// Its port among the switch's counters.
    pub fn port(&self) -> String {
        format!("vnic/{}", self.name)
    }

    /// The tap's name.
    pub fn tap(&self) -> String {
        format!("t{}", self.number)
    }

    fn file(&self, kind: &str) -> PathBuf {
        self.lab.places().socket.with_file_name(format!("{}.{kind}", self.name))
    }

    /// Its vNIC on switch `blue` as an item of the YAML list `vnics`, with a policy in flow style.
    pub fn vnic(&self, policy: &str) -> String {
        let socket = self.file("sock");
        let attach = match self.card {
            Card::SwitchListens { queues } => {
                format!("vhostUser: {{path: {}, queues: {queues}}}", socket.display())
            }
            Card::QemuListens => format!("vhostUser: {{path: {}, mode: CLIENT}}", socket.display()),
            Card::Tap => format!("tap: {}", self.tap()),
        };
        let mac = mac_text(self.mac());
        let name = &self.name;
        format!(
            "- {{name: {name}, switch: blue, attach: {{{attach}}}, mac: \"{mac}\", policy: {{{policy}}}}}\n"
        )
    }

    /// Switches it on; it boots meanwhile.
    ///
    /// # Errors
    /// When QEMU does not start, or has not ended before.
    pub fn switch_on(&self) -> Result<()> {
        ensure!(self.life.borrow().is_none(), "{} runs already", self.name);
        let qemu = self.qemu()?.spawn().context("starting QEMU, which `cargo xtask test` installs")?;
        let mut qemu = Running(qemu);
        let agent = wait_until(&format!("QEMU of {} starts", self.name), BOOT, || {
            if let Some(status) = qemu.0.try_wait()? {
                return Ok(Some(Err(anyhow!("QEMU of {} ended with {status}\n{}", self.name, self.tail()))));
            }
            match self.listener.accept() {
                Ok((stream, _)) => Ok(Some(Ok(stream))),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error.into()),
            }
        })??;
        agent.set_nonblocking(false)?;
        let agent = BufReader::new(agent);
        self.life.replace(Some(Life { qemu, agent, boot_id: String::new() }));
        Ok(())
    }

    /// Waits until it has booted, for the first time or again.
    ///
    /// # Errors
    /// When it does not, with its console's tail.
    pub fn wait_booted(&self) -> Result<()> {
        let mut life = self.life.borrow_mut();
        let life = life.as_mut().context("it is switched off")?;
        let line =
            life.line(BOOT).with_context(|| format!("{} does not boot\n{}", self.name, self.tail()))?;
        let boot_id = line.strip_prefix("ready ").with_context(|| format!("{} said {line:?}", self.name))?;
        ensure!(boot_id != life.boot_id, "{} has not booted anew", self.name);
        boot_id.clone_into(&mut life.boot_id);
        Ok(())
    }

    /// Has its kernel reboot, and waits until it is up again. QEMU runs on.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn reboot(&self) -> Result<()> {
        self.send("reboot -f")?;
        self.wait_booted()
    }

    /// `kill -9` of QEMU; returns when it is gone.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill(&self) -> Result<()> {
        let mut life = self.life.take().context("it is switched off")?;
        if let Some(status) = life.qemu.0.try_wait()? {
            bail!("QEMU of {} had ended with {status}\n{}", self.name, self.tail());
        }
        life.qemu.0.kill()?;
        life.qemu.0.wait()?;
        Ok(())
    }

    /// Process id of its QEMU; 0 when it is switched off.
    pub fn qemu_pid(&self) -> u32 {
        self.life.borrow().as_ref().map_or(0, |life| life.qemu.0.id())
    }

    fn qemu(&self) -> Result<Command> {
        let (console, said) = (self.file("console"), self.file("qemu"));
        let mut command = self.lab.host().command("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-m", MEMORY])
            .args(["-object", &format!("memory-backend-memfd,id=mem,size={MEMORY}M,share=on")])
            .arg("-kernel")
            .arg(&self.image.kernel)
            .arg("-initrd")
            .arg(&self.image.ram_disk)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet mitigations=off no_timer_check net.ifnames=0 \
                 guest.address={}/16 guest.address={}/64",
                self.ip4(),
                self.ip6()
            ))
            .args(["-serial", &format!("file:{}", console.display()), "-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("socket,id=agent,path={}", self.agent_path().display())])
            .args(["-device", "virtserialport,chardev=agent,name=agent"]);
        let socket = self.file("sock");
        let (chardev, netdev, processors, several) = match self.card {
            Card::SwitchListens { queues } => (
                Some(format!("socket,id=vhost,path={},reconnect-ms=100", socket.display())),
                format!("vhost-user,id=net,chardev=vhost,queues={queues}"),
                queues,
                format!(",mq=on,vectors={}", 2 * u32::from(queues) + 2),
            ),
            Card::QemuListens => (
                Some(format!("socket,id=vhost,path={},server=on", socket.display())),
                "vhost-user,id=net,chardev=vhost".to_owned(),
                1,
                String::new(),
            ),
            Card::Tap => (
                None,
                format!("tap,id=net,ifname={},script=no,downscript=no,vnet_hdr=on", self.tap()),
                1,
                String::new(),
            ),
        };
        if let Some(chardev) = chardev {
            command.args(["-chardev", &chardev]);
        }
        command
            .args(["-smp", &processors.to_string(), "-netdev", &netdev, "-device"])
            // Nothing boots from the network.
            .arg(format!("virtio-net-pci,netdev=net,mac={},romfile={several}", mac_text(self.mac())))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(said).context("making QEMU's log")?);
        Ok(command)
    }

    fn agent_path(&self) -> PathBuf {
        self.lab.places().socket.with_file_name(format!("{}-agent.sock", self.name))
    }

    fn send(&self, command: &str) -> Result<()> {
        ensure!(!command.contains('\n'), "a command is one line");
        let mut life = self.life.borrow_mut();
        let life = life.as_mut().context("it is switched off")?;
        life.agent.get_mut().write_all(format!("{command}\n").as_bytes()).context("sending a command")
    }

    /// Runs a command of its shell, and waits for its end.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn attempt(&self, command: &str) -> Result<Answer> {
        self.send(command)?;
        let mut life = self.life.borrow_mut();
        let life = life.as_mut().context("it is switched off")?;
        life.answer().with_context(|| format!("{} does not answer {command:?}", self.name))
    }

    /// The same, and it must succeed; returns what it wrote.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn run(&self, command: &str) -> Result<String> {
        let answer = self.attempt(command)?;
        ensure!(
            answer.status == 0,
            "{command:?} in {} ended with {}: {}",
            self.name,
            answer.status,
            answer.output
        );
        Ok(answer.output)
    }

    /// Starts a command that runs until the guest goes.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start(&self, command: &str) -> Result<()> {
        self.run(&format!("{command} </dev/null >/dev/null 2>&1 &")).map(drop)
    }

    /// Waits until somebody answers a ping, then wants three answers out of three.
    ///
    /// # Errors
    /// When there are none.
    pub fn ping(&self, target: impl Into<IpAddr>) -> Result<()> {
        let target = target.into();
        wait_until(&format!("{target} answers {}", self.name), PATIENCE, || {
            Ok((self.attempt(&format!("ping -c 1 -W 1 {target}"))?.status == 0).then_some(()))
        })?;
        self.run(&format!("for n in 1 2 3; do ping -c 1 -W 3 {target} || exit 1; done")).map(drop)
    }

    /// Wants two pings to stay unanswered.
    ///
    /// # Errors
    /// When one is answered.
    pub fn no_ping(&self, target: impl Into<IpAddr>) -> Result<()> {
        let target = target.into();
        let answer = self.attempt(&format!("ping -c 2 -W 1 {target}"))?;
        ensure!(answer.status != 0, "{target} answers {}, but must not: {}", self.name, answer.output);
        Ok(())
    }

    /// Whether a TCP connection can be made to a port, within two seconds.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn connects(&self, target: Ipv4Addr, port: u16) -> Result<bool> {
        Ok(self.attempt(&format!("nc -w 2 {target} {port} -e true"))?.status == 0)
    }

    /// Runs iperf3 in it, to a server, with further arguments; returns the `end` of its report.
    ///
    /// # Errors
    /// When it fails.
    pub fn iperf3(&self, server: Ipv4Addr, arguments: &str) -> Result<Value> {
        let command = format!("iperf3 --json --connect-timeout 5000 --client {server} {arguments}");
        let report = self.attempt(&command)?.output;
        let report: Value = serde_json::from_str(&report)
            .with_context(|| format!("{command} in {} said {report}", self.name))?;
        if let Some(error) = report.get("error") {
            bail!("{command} in {}: {error}", self.name);
        }
        Ok(report["end"].clone())
    }

    /// What has come into it and gone out of it so far.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn traffic(&self) -> Result<(Traffic, Traffic)> {
        let text =
            self.run("cd /sys/class/net/eth0/statistics && cat rx_packets rx_bytes tx_packets tx_bytes")?;
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [rx_packets, rx_bytes, tx_packets, tx_bytes] = numbers[..] else {
            bail!("{} counts {text:?}", self.name)
        };
        Ok((
            Traffic { packets: rx_packets, bytes: rx_bytes },
            Traffic { packets: tx_packets, bytes: tx_bytes },
        ))
    }

    /// The end of its console, and of what QEMU wrote.
    pub fn tail(&self) -> String {
        let tail = |kind: &str| {
            let bytes = std::fs::read(self.file(kind)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(TAIL)..].join("\n")
        };
        format!("--- console of {}\n{}\n--- its QEMU\n{}", self.name, tail("console"), tail("qemu"))
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // QEMU holds the tap.
        drop(self.life.take());
        if self.card == Card::Tap {
            // Its namespace may have gone before.
            let _ = self.lab.host().attempt(&["ip", "link", "del", &self.tap()]);
        }
    }
}

impl Life {
    fn line(&mut self, patience: Duration) -> Result<String> {
        self.agent.get_ref().set_read_timeout(Some(patience))?;
        let mut line = String::new();
        let length = self.agent.read_line(&mut line).context("waiting for its agent")?;
        ensure!(length > 0, "QEMU has ended");
        Ok(line.trim_end().to_owned())
    }

    fn answer(&mut self) -> Result<Answer> {
        let line = self.line(COMMAND)?;
        let (status, length) = line
            .split_once(' ')
            .and_then(|(status, length)| Some((status.parse().ok()?, length.trim().parse().ok()?)))
            .with_context(|| format!("it said {line:?}"))?;
        let mut output = vec![0; length];
        self.agent.read_exact(&mut output).context("reading what a command wrote")?;
        Ok(Answer { status, output: String::from_utf8_lossy(&output).into_owned() })
    }
}
