//! Huge pages, which DPDK wants: reserved for a run, and given back.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

use crate::priority;

const KNOB: &str = "/proc/sys/vm/nr_hugepages";
/// Pages of two megabytes: for a generator, and for a peer.
const WANTED: u64 = 1024;

/// How many there were before; `None` while none are reserved by us.
static BEFORE: Mutex<Option<u64>> = Mutex::new(None);

/// Huge pages, for as long as it lives.
#[derive(Debug)]
pub(crate) struct HugePages;

impl HugePages {
    /// Sees to it that there are enough, and that an interrupted bench gives them back.
    pub(crate) fn reserve() -> Result<HugePages> {
        let has = read()?;
        if has < WANTED {
            give_back_when_interrupted()?;
            *before() = Some(has);
        }
        let pages = HugePages;
        if has < WANTED {
            write(WANTED)?;
        }
        let got = read()?;
        ensure!(got >= WANTED, "{got} of {WANTED} huge pages of 2 MiB could be had; free some memory");
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        give_back();
    }
}

fn before() -> std::sync::MutexGuard<'static, Option<u64>> {
    BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn give_back() {
    if let Some(had) = before().take()
        && let Err(error) = write(had)
    {
        eprintln!("{error:#}");
    }
}

/// To be called before other threads are started: those take no signals either.
fn give_back_when_interrupted() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if signals.wait().is_ok() {
            give_back();
            priority::give_back();
            // Namespaces and folders are swept up by the next bench; programs die with us.
            std::process::exit(130);
        }
    })?;
    Ok(())
}

fn read() -> Result<u64> {
    let text = std::fs::read_to_string(Path::new(KNOB)).with_context(|| format!("reading {KNOB}"))?;
    text.trim().parse().with_context(|| format!("a number in {KNOB}"))
}

fn write(pages: u64) -> Result<()> {
    std::fs::write(KNOB, pages.to_string()).with_context(|| format!("writing {pages} to {KNOB}"))
}
