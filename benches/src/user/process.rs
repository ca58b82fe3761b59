//! Programs that a measurement needs: peers and generators. None outlives the bench, however that ends.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sluice_tests::Netns;

/// How long a program may take for what it is asked.
const PATIENCE: Duration = Duration::from_secs(30);

/// A command in a namespace that the kernel kills when the thread that starts it ends.
pub(crate) fn command(netns: &Netns, program: &str) -> Command {
    let mut command = netns.command("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// What a program has written so far.
#[derive(Debug, Default)]
struct Screen {
    text: Mutex<String>,
    changed: Condvar,
}

impl Screen {
    fn text(&self) -> MutexGuard<'_, String> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, mut output: impl Read) {
        let mut bytes = [0; 4096];
        while let Ok(length) = output.read(&mut bytes)
            && length > 0
        {
            self.text().push_str(&String::from_utf8_lossy(&bytes[..length]));
            self.changed.notify_all();
        }
    }
}

/// A program that runs, with what it writes. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    child: Child,
    screen: Arc<Screen>,
}

impl Program {
    /// Starts it. Its errors go to a file in `folder`.
    pub(crate) fn start(name: &str, folder: &Path, mut command: Command) -> Result<Program> {
        let errors = File::create(folder.join(format!("{name}.errors"))).context("a file for errors")?;
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn();
        let mut child = spawned.with_context(|| format!("starting {name}"))?;
        let screen = Arc::new(Screen::default());
        if let Some(output) = child.stdout.take() {
            let screen = Arc::clone(&screen);
            std::thread::Builder::new().name("screen".to_owned()).spawn(move || screen.follow(output))?;
        }
        Ok(Program { name: name.to_owned(), child, screen })
    }

    /// Waits until `text` was written for the `count`-th time, and answers all that was written.
    pub(crate) fn wait(&mut self, folder: &Path, text: &str, count: usize) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        let screen = Arc::clone(&self.screen);
        let mut shown = screen.text();
        while shown.matches(text).count() < count {
            let left = end.saturating_duration_since(Instant::now());
            let ended = self.child.try_wait()?;
            if left.is_zero() || ended.is_some() {
                let errors = folder.join(format!("{}.errors", self.name));
                let errors = std::fs::read_to_string(errors).unwrap_or_default();
                let state = ended.map_or("still runs".to_owned(), |status| status.to_string());
                bail!("{} ({state}) did not write `{text}`:\n{}\n{errors}", self.name, &*shown);
            }
            let moment = left.min(Duration::from_millis(100));
            shown = screen.changed.wait_timeout(shown, moment).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(shown.clone())
    }

    /// How often it has written `text`.
    pub(crate) fn count(&self, text: &str) -> usize {
        self.screen.text().matches(text).count()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
