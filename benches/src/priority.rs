//! Going before everything else that runs on the machine, as far as the scheduler allows; children inherit it.

use std::process::{Command, Stdio};

/// Where the scheduler's group of this session is. Between sessions, a process's own priority counts for nothing.
const GROUP: &str = "/proc/self/autogroup";

/// A raised priority; of the session, until it is dropped.
#[derive(Debug)]
pub(crate) struct Priority {
    /// What the session had before, if its priority was changed.
    before: Option<String>,
}

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
        Priority { before: before.filter(|_| std::fs::write(GROUP, "-20").is_ok()) }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = std::fs::write(GROUP, before)
        {
            eprintln!("giving the session its priority back: {error}");
        }
    }
}
