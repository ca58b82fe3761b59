//! Going before everything else that runs on the machine, as far as the scheduler allows; children inherit it.

use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where the scheduler's group of this session is. Between sessions, a process's own priority counts for nothing.
const GROUP: &str = "/proc/self/autogroup";

/// What the session had before, while its priority is raised.
static BEFORE: Mutex<Option<String>> = Mutex::new(None);

/// A raised priority; of the session, until it is dropped.
#[derive(Debug)]
pub(crate) struct Priority;

impl Priority {
    pub(crate) fn raise() -> Priority {
        let process = std::process::id().to_string();
        let outcome =
            Command::new("renice").args(["-n", "-20", "-p", &process]).stdout(Stdio::null()).status();
        if !outcome.is_ok_and(|status| status.success()) {
            eprintln!("cannot raise the priority: whatever else runs here will show in the figures");
        }
        // As in "/autogroup-93 nice 0"; kernels without such groups have no such file.
        let text = std::fs::read_to_string(GROUP).unwrap_or_default();
        let before = text.rsplit_once("nice ").map(|(_, nice)| nice.trim().to_owned());
        *lock() = before.filter(|_| std::fs::write(GROUP, "-20").is_ok());
        Priority
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        give_back();
    }
}

fn lock() -> MutexGuard<'static, Option<String>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the session the priority back that it had.
pub(crate) fn give_back() {
    if let Some(before) = lock().take()
        && let Err(error) = std::fs::write(GROUP, before)
    {
        eprintln!("giving the session its priority back: {error}");
    }
}
