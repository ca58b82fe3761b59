//! The command about workers: what they do, where they run, and which queues they serve.

use clap::{Args as ClapArgs, Subcommand};
use sluice_proto::v1;

use super::client::CliError;
use super::commands::Client;
use super::output::Output;
use super::render;

/// Highest number of a core that may be written: more is a slip.
const CORE_MAX: u32 = 4095;

#[derive(Debug, ClapArgs)]
pub(super) struct WorkersArgs {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say on which cores workers run, one on each; it takes effect at once and outlives restarts. No frame is lost.
    Cores {
        /// Such as `2-5,8`; `auto`: as many as there are queues, on the last cores, and no more than one core in four.
        cores: String,
    },
    /// Move a queue to a worker, where it stays until `auto`; it takes effect at once and outlives restarts. No frame is
    /// lost.
    Move {
        /// Port, such as `vnic/vm1`.
        port: String,
        /// Queue, from 0; or `all`.
        queue: String,
        /// Core of the worker.
        core: u32,
    },
    /// Let loads decide again where a queue is served.
    Auto {
        /// Port, such as `vnic/vm1`.
        port: String,
        /// Queue, from 0; or `all`.
        #[arg(default_value = "all")]
        queue: String,
    },
}

/// What is asked of the daemon.
#[derive(Debug, PartialEq)]
pub(super) enum Request {
    List(v1::ListWorkersRequest),
    Set(v1::SetWorkersRequest),
    Place(v1::PlaceQueueRequest),
}

pub(super) fn request(args: WorkersArgs) -> Result<Request, CliError> {
    Ok(match args.action {
        None => Request::List(v1::ListWorkersRequest {}),
        Some(Action::Cores { cores }) => Request::Set(v1::SetWorkersRequest { cores: read_cores(&cores)? }),
        Some(Action::Move { port, queue, core }) => {
            Request::Place(v1::PlaceQueueRequest { port, queue: read_queue(&queue)?, core: Some(core) })
        }
        Some(Action::Auto { port, queue }) => {
            Request::Place(v1::PlaceQueueRequest { port, queue: read_queue(&queue)?, core: None })
        }
    })
}

/// Numbers and ranges; `auto` is none.
fn read_cores(text: &str) -> Result<Vec<u32>, CliError> {
    if text == "auto" {
        return Ok(Vec::new());
    }
    let wrong = || CliError::Usage(format!("`{text}` is no list of cores: write 2-5,8 or auto"));
    let number = |word: &str| word.parse().ok().filter(|core: &u32| *core <= CORE_MAX).ok_or_else(wrong);
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        cores.extend(first..=last);
    }
    Ok(cores)
}

/// A number; `all` is none.
fn read_queue(text: &str) -> Result<Option<u32>, CliError> {
    if text == "all" {
        return Ok(None);
    }
    let wrong = |_| CliError::Usage(format!("`{text}` is no queue: write its number, from 0, or all"));
    text.parse().map(Some).map_err(wrong)
}

pub(super) async fn workers(
    client: &mut Client,
    output: &Output,
    request: Request,
) -> Result<bool, CliError> {
    let answer = match request {
        Request::List(request) => client.list_workers(request).await?,
        Request::Set(request) => client.set_workers(request).await?,
        Request::Place(request) => client.place_queue(request).await?,
    };
    render::workers::status(output, &answer.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_and_queues_are_read_or_refused() {
        assert_eq!(read_cores("auto").ok(), Some(Vec::new()));
        assert_eq!(read_cores("3").ok(), Some(vec![3]));
        assert_eq!(read_cores("2-4,8").ok(), Some(vec![2, 3, 4, 8]));
        assert_eq!(read_queue("all").ok(), Some(None));
        assert_eq!(read_queue("7").ok(), Some(Some(7)));
        for text in ["", "4-2", "a", "1,", "-1", "1-", "0-4096", "99999999999"] {
            assert_eq!(read_cores(text).expect_err("no cores").exit_code(), 2, "{text}");
        }
        assert_eq!(read_queue("-1").expect_err("no queue").exit_code(), 2);
    }
}
