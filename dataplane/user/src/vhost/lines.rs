//! How many lines of log others can cause. A front-end that connects again and again, sends nonsense in a loop, or whose driver
//! breaks the rules each time it is set up, gets [`BURST`] lines at once and then one each [`PAUSE`]; the others are counted,
//! and the count is told with the next line.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines at once.
const BURST: u32 = 16;
/// After how long there may be one more.
const PAUSE: Duration = Duration::from_secs(10);

/// The lines of log about one port. They are written by whichever thread has something to say.
#[derive(Debug, Default)]
pub struct LogLines {
    who: String,
    budget: Mutex<Budget>,
}

#[derive(Debug, Default)]
struct Budget {
    /// Lines that were written and count still, and since when the oldest of them does.
    written: u32,
    since: Option<Instant>,
    suppressed: u64,
}

impl Budget {
    /// Whether a line may be written now; then, how many were not since the last.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let past = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let forgiven = (past.as_secs() / PAUSE.as_secs()).min(self.written.into()) as u32;
        self.written -= forgiven;
        self.since = self.since.map(|since| since + PAUSE * forgiven).filter(|_| self.written > 0);
        if self.written >= BURST {
            self.suppressed += 1;
            return None;
        }
        self.written += 1;
        self.since.get_or_insert(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl LogLines {
    /// Of a port with this name.
    #[must_use]
    pub fn new(who: impl Into<String>) -> Self {
        Self { who: who.into(), budget: Mutex::default() }
    }

    /// The port's name.
    #[must_use]
    pub fn who(&self) -> &str {
        &self.who
    }

    /// Has a line written, if it is not one too many.
    pub fn write(&self, line: impl FnOnce()) {
        let Some(suppressed) = self.budget.lock().admit(Instant::now()) else { return };
        self.tell(suppressed);
        line();
    }

    fn tell(&self, suppressed: u64) {
        if suppressed > 0 {
            tracing::warn!(port = %self.who, suppressed, "{suppressed} more lines about this port were suppressed");
        }
    }
}

impl Drop for LogLines {
    fn drop(&mut self) {
        let suppressed = self.budget.get_mut().suppressed;
        self.tell(suppressed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_line_at_a_time() {
        let mut budget = Budget::default();
        let begun = Instant::now();
        let mut lines = |at: Duration, count: usize| -> Vec<u64> {
            (0..count).filter_map(|_| budget.admit(begun + at)).collect()
        };
        assert_eq!(lines(Duration::ZERO, 1000), [0; BURST as usize]);
        assert!(lines(PAUSE - Duration::from_secs(1), 10).is_empty());
        assert_eq!(lines(PAUSE, 10), [1000 - u64::from(BURST) + 10], "what was suppressed is told");
        assert_eq!(lines(PAUSE * 4, 10), [9, 0, 0]);
        // After a long silence, all is forgiven, and no more than that.
        assert_eq!(lines(PAUSE * 10_000, 1000).len(), BURST as usize);
        // A clock that stands still, or goes back, writes nothing.
        assert!(lines(Duration::ZERO, 10).is_empty());
    }
}
