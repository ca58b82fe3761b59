//! One run of the guest: from its RAM disk to the status of its command.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use super::ram_disk::RamDisk;
use crate::process::say_error;
use crate::workspace;

const INIT: &str = include_str!("init.sh");
const GUEST: &str = include_str!("guest.sh");

/// Modules that the guest needs before it has any files.
const EARLY_MODULES: [&str; 4] = ["virtio_pci", "9p", "9pnet_virtio", "overlay"];
/// Variables that go from here into the guest, by the beginning of their names.
const PASSED_ON: [&str; 8] =
    ["PATH=", "HOME=", "TERM=", "NO_COLOR=", "CARGO_TERM_COLOR=", "RUST_", "SLUICE_", "NEXTEST_"];
/// The status when time is up, as of timeout(1).
const OUT_OF_TIME: u8 = 124;
/// How much of what the guest said before it died is worth reading.
const TAIL: usize = 40;

/// The machine that is emulated.
pub(super) struct Machine<'a> {
    pub(super) cpus: u16,
    pub(super) memory: u32,
    pub(super) timeout: Duration,
    pub(super) qemu: &'a [String],
    pub(super) append: &'a [String],
}

/// A folder that the guest may write to, for this run only.
struct Shared(PathBuf);

impl Shared {
    fn create() -> Result<Shared> {
        let folder = workspace::target().join(format!("lab/run-{}", std::process::id()));
        // A dead process of the same number may have left it.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Shared(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.file(name), text).with_context(|| format!("writing {}", self.file(name).display()))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // It lies under target/, where it harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Boots the guest, runs `command` in it and returns its status; its output goes where ours goes.
pub(super) fn run(qemu: &Path, kernel: &Kernel, machine: &Machine<'_>, command: &[String]) -> Result<u8> {
    let shared = Shared::create()?;
    ram_disk(kernel, &shared)?;
    fs::copy(kernel.folder.join("busybox"), shared.file("busybox")).context("copying busybox")?;
    shared.write("guest.sh", GUEST)?;
    shared.write("environment", &environment(kernel, command)?)?;

    let status = emulate(qemu, kernel, machine, &shared)?;
    if let Ok(text) = fs::read_to_string(shared.file("status"))
        && let Ok(status) = text.trim().parse()
    {
        return Ok(status);
    }
    let said: Vec<String> = ["qemu", "console"]
        .iter()
        .map(|name| fs::read(shared.file(name)).unwrap_or_default())
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .collect();
    let lines: Vec<&str> = said.iter().flat_map(|text| text.lines()).collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    if status.code() == Some(OUT_OF_TIME.into()) {
        eprintln!("{tail}");
        say_error(&format!("the guest was ended after {} s; see --timeout", machine.timeout.as_secs()));
        return Ok(OUT_OF_TIME);
    }
    match status.signal() {
        Some(signal) => {
            bail!("the guest was ended by signal {signal}; the last lines of QEMU and the console:\n{tail}")
        }
        None => {
            bail!(
                "the guest died before the command ended ({status}); the last lines of QEMU and the console:\n{tail}"
            )
        }
    }
}

/// The RAM disk that the guest boots from.
fn ram_disk(kernel: &Kernel, shared: &Shared) -> Result<()> {
    let disk = RamDisk::create(kernel, &shared.file("ram-disk"), INIT)?;
    disk.add_modules(kernel, &EARLY_MODULES)?;
    disk.pack(&shared.file("ram-disk.cpio"))
}

/// What the guest's shell reads first.
fn environment(kernel: &Kernel, command: &[String]) -> Result<String> {
    let folder = std::env::current_dir().context("where are we?")?;
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let mut lines = vec![
        "export LANG=C.UTF-8 LAB_GUEST=1".to_owned(),
        format!("LAB_MODULES={}", quoted(&kernel.folder.join("lib/modules").display().to_string())),
        format!("LAB_FOLDER={}", quoted(&folder.display().to_string())),
        format!("LAB_COMMAND={}", quoted(&words.join(" "))),
    ];
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        if PASSED_ON.iter().any(|prefix| format!("{name}=").starts_with(prefix)) {
            lines.push(format!("export {name}={}", quoted(value)));
        }
    }
    Ok(lines.join("\n") + "\n")
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A path within an option of QEMU, where a comma ends a value unless it is doubled.
fn in_option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Runs QEMU to its end, and passes on what the command in the guest writes while it writes it.
fn emulate(qemu: &Path, kernel: &Kernel, machine: &Machine<'_>, shared: &Shared) -> Result<ExitStatus> {
    // `timeout` ends QEMU even if we are killed, and `--foreground` leaves it where an interrupt reaches it.
    let mut command = Command::new("timeout");
    command
        .args(["--foreground", "--kill-after=5", &machine.timeout.as_secs().to_string()])
        .arg(qemu)
        // A guest's memory is not worth saving, and nothing is shown.
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"])
        .args(["-smp", &machine.cpus.to_string(), "-m", &machine.memory.to_string()])
        .arg("-kernel")
        .arg(kernel.folder.join("vmlinuz"))
        .arg("-initrd")
        .arg(shared.file("ram-disk.cpio"))
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check intel_iommu=on iommu=pt net.ifnames=0 {}",
            machine.append.join(" ")
        ))
        .args(["-serial", &format!("file:{}", in_option(&shared.file("console")))])
        .args(["-device", "intel-iommu,intremap=on,caching-mode=on"])
        .args([
            "-object",
            "rng-random,id=random,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=random",
        ])
        .args(["-device", "virtio-serial-pci"]);
    let (out, err) = (Channel::open("out")?, Channel::open("err")?);
    for channel in [&out, &err] {
        let (name, path) = (channel.name, channel.path());
        command
            .args(["-chardev", &format!("file,id={name},path={path}")])
            .args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
    }
    command
        .args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"])
        .args(["-virtfs", &format!("local,path={},mount_tag=lab,security_model=none", in_option(&shared.0))]);
    for number in 0..2 {
        // Both ports are on one hub: what one sends arrives at the other.
        command
            .args(["-device", &format!("pcie-root-port,id=root{number},chassis={number},slot={number}")])
            .args(["-netdev", &format!("hubport,id=wire{number},hubid=1")])
            .args([
                "-device",
                &format!("igb,bus=root{number},netdev=wire{number},mac=02:00:00:01:00:0{number}"),
            ]);
    }
    command
        .args(machine.qemu)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // It warns of a hub that leads to no network of the host, as it must not.
        .stderr(File::create(shared.file("qemu")).context("making QEMU's log")?);

    std::thread::scope(|scope| {
        scope.spawn(|| pass_on(&out.reader, std::io::stdout()));
        scope.spawn(|| pass_on(&err.reader, std::io::stderr()));
        let status = command.status().context("running QEMU; is timeout(1) there?");
        // Nobody writes any more, so the readers come to an end.
        drop((out.writer, err.writer));
        status
    })
}

/// A pipe that a serial port of the guest leads to.
struct Channel {
    name: &'static str,
    reader: PipeReader,
    writer: PipeWriter,
}

impl Channel {
    fn open(name: &'static str) -> Result<Channel> {
        let (reader, writer) = std::io::pipe().context("making a pipe")?;
        Ok(Channel { name, reader, writer })
    }

    /// Where QEMU can open its end: its own descriptors are not inherited ones.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.writer.as_raw_fd())
    }
}

/// Copies until the end. When nobody reads ours any more, what is left is read all the same, so that the guest goes on.
fn pass_on(mut from: impl Read, mut to: impl Write) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let _ = to.write_all(&buffer[..length]).and_then(|()| to.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::output;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for word in ["plain", "two words", "it's", "$HOME `id` \"x\" \\", "", "line\nbreak"] {
            let said = output(Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]));
            assert_eq!(said.as_deref(), Some(word));
        }
    }
}
