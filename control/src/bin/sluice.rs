//! The command line. See [`sluice_control::cli`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sluice_control::cli::{self, Cli};

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
