//! Printing: the only module that writes to standard output and standard error.
#![allow(clippy::print_stderr)]

use std::io::{self, IsTerminal, Write};

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use prost::Message;
use serde_json::Value;
use sluice_proto::v1;

use super::Format;
use super::client::CliError;
use crate::error::violations_of;
use crate::json;

/// Where answers go.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) format: Format,
    colour: bool,
}

/// Colours of words, on a terminal.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tone {
    Good,
    Warn,
    Bad,
    Faint,
}

impl Output {
    pub(super) fn new(format: Format) -> Output {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Output { format, colour }
    }

    pub(super) fn is_table(&self) -> bool {
        self.format == Format::Table
    }

    pub(super) fn paint(&self, tone: Tone, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Good => 32,
            Tone::Warn => 33,
            Tone::Bad => 31,
            Tone::Faint => 2,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    pub(super) fn line(&self, text: &str) {
        if writeln!(io::stdout(), "{text}").is_err() {
            // Nobody reads any more, as behind `| head`: there is nothing left to do, and nobody to tell.
            std::process::exit(1);
        }
    }

    pub(super) fn table(&self, headers: &[&str], rows: Vec<Vec<String>>) {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(headers.iter().map(|header| header.to_ascii_uppercase()));
        table.add_rows(rows);
        for line in table.to_string().lines() {
            self.line(line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()));
        }
    }

    /// Prints an answer as JSON or YAML.
    pub(super) fn message<M: Message>(&self, message: &M, name: &str) -> Result<(), CliError> {
        self.value(&json::to_json_with_defaults(message, &format!("sluice.v1.{name}")))
    }

    pub(super) fn value(&self, value: &Value) -> Result<(), CliError> {
        let text = match self.format {
            Format::Json => serde_json::to_string_pretty(value).map_err(|error| error.to_string()),
            Format::Table | Format::Yaml => {
                serde_yaml_ng::to_string(value).map_err(|error| error.to_string())
            }
        };
        self.line(text.map_err(CliError::Print)?.trim_end());
        Ok(())
    }

    pub(super) fn error(&self, text: &str) {
        eprintln!("sluice: {text}");
    }

    /// Prints why a command failed, item by item.
    pub(super) fn failure(&self, error: &CliError) {
        let violations = match error {
            CliError::Refused(status) => violations_of(status),
            _ => Vec::new(),
        };
        if violations.is_empty() {
            self.error(&error.to_string());
            return;
        }
        let count = violations.len();
        self.error(&format!(
            "refused, nothing was changed; {count} {} wrong:",
            if count == 1 { "thing is" } else { "things are" }
        ));
        for v1::Violation { resource, field, message, .. } in &violations {
            let place = if field.is_empty() { resource.clone() } else { format!("{resource}: {field}") };
            eprintln!("  {place}: {message}");
        }
    }

    pub(super) fn completions(&self, shell: clap_complete::Shell, command: &mut clap::Command) {
        clap_complete::generate(shell, command, "sluice", &mut io::stdout());
    }
}
