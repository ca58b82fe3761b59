//! Printing: the only module that writes to standard output and standard error.
#![allow(clippy::print_stderr)]

use std::cell::RefCell;
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

/// Where answers go, and how.
pub(super) struct Output {
    pub(super) format: Format,
    colour: bool,
    to: RefCell<Box<dyn Write>>,
}

/// What a command is for: what its refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// It changes resources: all of them, or none.
    Change,
    /// It says what would be changed.
    Plan,
    /// It asks for something that is no change of resources.
    Ask,
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
        Output::to(format, colour, Box::new(io::stdout()))
    }

    /// Prints elsewhere than on standard output.
    pub(super) fn to(format: Format, colour: bool, to: Box<dyn Write>) -> Output {
        Output { format, colour, to: RefCell::new(to) }
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
        if writeln!(self.to.borrow_mut(), "{text}").is_err() {
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
    pub(super) fn failure(&self, error: &CliError, intent: Intent) {
        let mut lines = failure(error, intent).into_iter();
        self.error(&lines.next().unwrap_or_default());
        for line in lines {
            eprintln!("  {line}");
        }
    }

    pub(super) fn completions(&self, shell: clap_complete::Shell, command: &mut clap::Command) {
        clap_complete::generate(shell, command, "sluice", &mut *self.to.borrow_mut());
    }
}

/// Why a command failed: a headline, and items if there are any.
fn failure(error: &CliError, intent: Intent) -> Vec<String> {
    let violations = match error {
        CliError::Refused(status) => violations_of(status),
        _ => Vec::new(),
    };
    let mut items: Vec<String> = violations
        .iter()
        .map(|v1::Violation { resource, field, message, .. }| {
            let place = if field.is_empty() { resource.clone() } else { format!("{resource}: {field}") };
            format!("{place}: {message}")
        })
        .collect();
    let count = match items.len() {
        0 => return vec![error.to_string()],
        1 => "1 thing is wrong:".to_owned(),
        count => format!("{count} things are wrong:"),
    };
    let headline = match intent {
        Intent::Change => format!("refused, nothing was changed; {count}"),
        Intent::Plan => format!("this would be refused; {count}"),
        Intent::Ask if items.len() == 1 => return items,
        Intent::Ask => count,
    };
    items.insert(0, headline);
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::resource::{Key, Kind};

    #[test]
    fn only_what_would_have_changed_something_says_that_nothing_was() {
        let error = CliError::from(tonic::Status::from(Error::no_such(&Key::new(Kind::Vnic, "vm1"))));
        let item = "vnics/vm1: there is no such vnic; see `sluice get vnic`";
        assert_eq!(failure(&error, Intent::Ask), [item]);
        let changed = ["refused, nothing was changed; 1 thing is wrong:", item];
        assert_eq!(failure(&error, Intent::Change), changed);
        assert_eq!(failure(&error, Intent::Plan), ["this would be refused; 1 thing is wrong:", item]);
        let error = CliError::Usage("give a name".to_owned());
        assert_eq!(failure(&error, Intent::Change), ["give a name"]);
    }
}
