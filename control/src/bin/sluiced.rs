//! The daemon. See [`sluice_control::daemon`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sluice_control::daemon::{self, Args};

#[allow(clippy::print_stderr)] // there may be no log yet
fn main() -> ExitCode {
    match daemon::run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluiced: {error}");
            ExitCode::FAILURE
        }
    }
}
