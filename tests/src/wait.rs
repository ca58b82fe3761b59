//! Waiting for conditions.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const PERIOD: Duration = Duration::from_millis(10);

/// Asks `condition` again and again until it returns a value, and returns that.
///
/// # Errors
/// When the deadline passes, naming `what` was awaited and the last error; errors of `condition` count as "not yet".
pub fn wait_until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let outcome = condition();
        if let Ok(Some(value)) = outcome {
            return Ok(value);
        }
        if start.elapsed() >= deadline {
            match outcome {
                Err(error) => bail!("{what}: not within {deadline:?}; last: {error:#}"),
                Ok(_) => bail!("{what}: not within {deadline:?}"),
            }
        }
        std::thread::sleep(PERIOD);
    }
}
