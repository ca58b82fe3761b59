//! Workers as tables.

use sluice_proto::v1;

use super::super::client::CliError;
use super::super::output::{Output, Tone};

/// Workers, and behind them the queues that they serve.
pub(in super::super) fn status(output: &Output, answer: &v1::WorkersStatus) -> Result<bool, CliError> {
    if !output.is_table() {
        output.message(answer, "WorkersStatus")?;
        return Ok(true);
    }
    if !answer.trouble.is_empty() {
        output.line(&output.paint(Tone::Warn, &answer.trouble));
    }
    if answer.workers.is_empty() {
        output.line("no workers: they start with the first port that the userspace engine serves");
        return Ok(true);
    }
    let workers = answer.workers.iter().map(|worker| {
        let state = match worker.state() {
            v1::worker::State::Asleep => "asleep",
            v1::worker::State::Spinning => "spinning",
            v1::worker::State::Unspecified => "unknown",
        };
        vec![
            worker.core.to_string(),
            state.to_owned(),
            percent(worker.load),
            rate(worker.frames_per_second),
            worker.polls.to_string(),
            worker.wakeups.to_string(),
            worker.queues.len().to_string(),
        ]
    });
    let headers = ["core", "state", "load", "frames/s", "polls", "wake-ups", "queues"];
    output.table(&headers, workers.collect());
    let mut queues: Vec<(&v1::WorkerQueue, u32)> = answer
        .workers
        .iter()
        .flat_map(|worker| worker.queues.iter().map(|queue| (queue, worker.core)))
        .collect();
    queues.sort_by(|(a, _), (b, _)| (&a.port, a.queue).cmp(&(&b.port, b.queue)));
    let queues = queues.into_iter().map(|(queue, core)| {
        let placed = match queue.pin {
            None => "by load".to_owned(),
            Some(pin) if pin == core => "pinned".to_owned(),
            Some(pin) => format!("pinned to core {pin}, where no worker is"),
        };
        vec![
            queue.port.clone(),
            queue.queue.to_string(),
            core.to_string(),
            percent(queue.load),
            rate(queue.frames_per_second),
            placed,
        ]
    });
    let queues: Vec<Vec<String>> = queues.collect();
    if !queues.is_empty() {
        output.line("");
        output.table(&["port", "queue", "core", "load", "frames/s", "placed"], queues);
    }
    Ok(true)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn rate(frames: f64) -> String {
    format!("{frames:.0}")
}
