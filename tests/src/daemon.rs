//! The real daemon, as a process in the lab's host namespace.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::api::Sluice;
use crate::netns::Netns;
use crate::wait::wait_until;

/// How long a daemon may take to answer, with nothing or with a thousand vNICs to adopt, on two busy cores.
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(20);

/// Where a daemon keeps things.
#[derive(Clone, Debug)]
pub struct Places {
    /// State directory.
    pub state: PathBuf,
    /// Socket of the API.
    pub socket: PathBuf,
    /// Runtime directory, which lives as long as the pins.
    pub runtime: PathBuf,
    /// Directory on a bpffs for this daemon's pins.
    pub pins: PathBuf,
    /// Settings file, which names the two above.
    pub settings: PathBuf,
    /// File that collects what the daemon writes, over restarts.
    pub log: PathBuf,
}

/// A running `sluiced`. Killed on drop, which leaves its switch running.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts one in `host` and waits until it answers.
    ///
    /// # Errors
    /// When it ends before, or takes too long; with the end of its log.
    pub fn start(host: &Netns, places: &Places) -> Result<Daemon> {
        let log = File::options().create(true).append(true).open(&places.log).context("opening the log")?;
        let child = Daemon::command(host, places)?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting sluiced")?;
        let mut daemon = Daemon { child, log: places.log.clone() };
        let sluice = Sluice::new(&places.socket);
        let pid = daemon.pid();
        let start = Instant::now();
        loop {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("sluiced ended with {status}:\n{}", daemon.log_tail());
            }
            // The socket of a predecessor may still be there: ask who answers.
            if sluice.daemon_pid().is_ok_and(|answered| answered == pid) {
                return Ok(daemon);
            }
            if start.elapsed() > START {
                bail!("sluiced does not answer within {START:?}:\n{}", daemon.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The command that starts one; for tests in which it is meant to fail.
    ///
    /// # Errors
    /// When the program is not built.
    pub fn command(host: &Netns, places: &Places) -> Result<Command> {
        let program = program("sluiced")?;
        let mut command = host.command(&program.display().to_string());
        command.arg("--state-dir").arg(&places.state);
        command.arg("--socket").arg(&places.socket);
        let settings =
            format!("pinDir: {}\nruntimeDir: {}\n", places.pins.display(), places.runtime.display());
        std::fs::write(&places.settings, settings).context("writing the settings")?;
        command.arg("--config").arg(&places.settings).env("NO_COLOR", "1");
        Ok(command)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and wait until it is gone.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("killing sluiced")?;
        let status = self.child.wait()?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("sluiced had ended before it was killed, with {status}:\n{}", self.log_tail());
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM), and waits until it has.
    ///
    /// # Errors
    /// When it does not.
    pub fn stop(mut self) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).context("SIGTERM to sluiced")?;
        wait_until("sluiced ends after SIGTERM", STOP, || Ok(self.child.try_wait()?))
    }

    /// The end of what it and its predecessors wrote.
    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log.
pub(crate) fn log_tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// A program of the workspace, built in the profile that this one was built in.
///
/// # Errors
/// When it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.with_context(|| {
        format!("{name} is not built; run `cargo build --package sluice-control --bins` in the same profile")
    })
}
