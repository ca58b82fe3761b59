//! The event log: what happened of itself or by request, in memory, for `sluice doctor`.
//!
//! Bounded; an event that repeats the one before only raises its count.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const CAPACITY: usize = 1000;

/// How serious an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// In the course of things.
    Info,
    /// Something had to be repaired, or is not as it should be.
    Warning,
    /// Something failed.
    Error,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it happened last, since 1970.
    pub at: Duration,
    /// How serious.
    pub severity: Severity,
    /// What, in words.
    pub text: String,
    /// How often in a row.
    pub count: u32,
}

/// The log.
#[derive(Debug, Default)]
pub struct EventLog {
    ring: VecDeque<Event>,
}

impl EventLog {
    /// Notes an event, here and in the process's log.
    pub fn note(&mut self, severity: Severity, text: impl Into<String>) {
        let text = text.into();
        match severity {
            Severity::Info => tracing::info!("{text}"),
            Severity::Warning => tracing::warn!("{text}"),
            Severity::Error => tracing::error!("{text}"),
        }
        let at = now();
        match self.ring.back_mut() {
            Some(last) if last.text == text => {
                last.at = at;
                last.count = last.count.saturating_add(1);
            }
            _ => {
                if self.ring.len() == CAPACITY {
                    self.ring.pop_front();
                }
                self.ring.push_back(Event { at, severity, text, count: 1 });
            }
        }
    }

    /// Events, newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Event> {
        self.ring.iter().rev()
    }
}

/// Time since 1970.
pub fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A time since 1970 in UTC, as `2026-11-20 13:20:00`.
pub fn print_time(at: Duration) -> String {
    // Days to a civil date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
    let seconds = at.as_secs();
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day + 2) / 153;
    let (month, day) =
        (if shifted < 10 { shifted + 3 } else { shifted - 9 }, day - (153 * shifted + 2) / 5 + 1);
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil() {
        assert_eq!(print_time(Duration::ZERO), "1970-01-01 00:00:00");
        assert_eq!(print_time(Duration::from_secs(951_782_400)), "2000-02-29 00:00:00");
        assert_eq!(print_time(Duration::from_secs(1_795_181_999)), "2026-11-20 13:39:59");
    }

    #[test]
    fn the_log_is_bounded_and_counts_repetitions() {
        let mut log = EventLog::default();
        log.note(Severity::Info, "again");
        log.note(Severity::Info, "again");
        assert_eq!(log.newest().map(|event| event.count).collect::<Vec<_>>(), [2]);
        for number in 0..2 * CAPACITY {
            log.note(Severity::Info, number.to_string());
        }
        assert_eq!(log.newest().count(), CAPACITY);
        assert_eq!(log.newest().next().map(|event| event.text.clone()), Some((2 * CAPACITY - 1).to_string()));
    }
}
