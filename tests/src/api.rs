//! The real CLI, and what it prints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::daemon::program;
use crate::netns::check;
use crate::wait::wait_until;

/// Drop counters, by port (`vnic/vm1`) and reason (`mac-guard`).
pub type Counters = BTreeMap<(String, String), u64>;

/// The `sluice` command, talking to one daemon.
#[derive(Clone, Debug)]
pub struct Sluice {
    socket: PathBuf,
}

impl Sluice {
    /// One that talks to the daemon behind `socket`.
    pub fn new(socket: &Path) -> Sluice {
        Sluice { socket: socket.to_owned() }
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("sluice")?);
        command.arg("--socket").arg(&self.socket).args(words).env("NO_COLOR", "1").stdin(Stdio::null());
        Ok(command)
    }

    /// Runs it and returns its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        check(&mut self.command(words)?)
    }

    /// Runs it and returns what became of it, whatever that is.
    ///
    /// # Errors
    /// When it is not built or cannot be started.
    pub fn attempt(&self, words: &[&str]) -> Result<Output> {
        self.command(words)?.output().context("running sluice")
    }

    /// Runs it with `-o json` and reads what it prints.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self.run(&[&["-o", "json"], words].concat())?;
        serde_json::from_str(&text).with_context(|| format!("sluice {words:?} printed {text}"))
    }

    /// Applies YAML.
    ///
    /// # Errors
    /// When it is refused, with what the CLI said.
    pub fn apply(&self, yaml: &str) -> Result<Value> {
        let file = yaml_file(yaml)?;
        self.json(&["apply", "-f", &file.path().display().to_string()])
    }

    /// Applies YAML that must be refused, and returns what the CLI wrote on its standard error.
    ///
    /// # Errors
    /// When it is accepted.
    pub fn refused(&self, yaml: &str) -> Result<String> {
        let file = yaml_file(yaml)?;
        let output = self.attempt(&["apply", "-f", &file.path().display().to_string()])?;
        if output.status.success() {
            bail!("this should have been refused:\n{yaml}");
        }
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Shows the plan for YAML.
    ///
    /// # Errors
    /// When it is refused.
    pub fn plan(&self, yaml: &str) -> Result<Value> {
        let file = yaml_file(yaml)?;
        self.json(&["plan", "-f", &file.path().display().to_string()])
    }

    /// Process id of the daemon that answers.
    ///
    /// # Errors
    /// When none does.
    pub fn daemon_pid(&self) -> Result<u32> {
        Ok(u32::try_from(number(&self.json(&["version"])?["daemon"]["pid"]))?)
    }

    /// The state of a resource: `READY`, `PENDING` or `FAILED`, with its message.
    ///
    /// # Errors
    /// When there is no such resource.
    pub fn state(&self, kind: &str, name: &str) -> Result<(String, String)> {
        let status = &self.json(&["get", kind, name])?["status"];
        Ok((text(&status["state"]).to_owned(), status.to_string()))
    }

    /// Waits until a resource is `READY`.
    ///
    /// # Errors
    /// When it is not in time, with its state.
    pub fn wait_ready(&self, kind: &str, name: &str, patience: Duration) -> Result<()> {
        self.wait_state(kind, name, "READY", patience)
    }

    /// Waits until a resource is in a state.
    ///
    /// # Errors
    /// When it is not in time, with its state.
    pub fn wait_state(&self, kind: &str, name: &str, wanted: &str, patience: Duration) -> Result<()> {
        wait_until(&format!("{kind} {name} is {wanted}"), patience, || {
            let (state, status) = self.state(kind, name)?;
            if state == wanted { Ok(Some(())) } else { bail!("{status}") }
        })
    }

    /// Drop counters that are not zero.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn drops(&self) -> Result<Counters> {
        let answer = self.json(&["drops"])?;
        let rows = list(&answer["drops"]).iter();
        Ok(rows
            .map(|row| {
                ((text(&row["port"]).to_owned(), text(&row["reason"]).to_owned()), number(&row["packets"]))
            })
            .collect())
    }

    /// How many frames a port has dropped for a reason.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn dropped(&self, port: &str, reason: &str) -> Result<u64> {
        Ok(self.drops()?.get(&(port.to_owned(), reason.to_owned())).copied().unwrap_or(0))
    }

    /// Frames that the rule of this priority in a group (`group/web`, `vnic/vm1`) has decided.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn rule_packets(&self, group: &str, priority: u64) -> Result<u64> {
        let answer = self.json(&["stats"])?;
        let ours =
            |row: &&Value| text(&row["group"]) == group && number(&row["rule"]["priority"]) == priority;
        Ok(list(&answer["rules"]).iter().filter(ours).map(|row| number(&row["packets"])).sum())
    }

    /// The rows of the FDB: (port, MAC).
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn fdb(&self) -> Result<Vec<(String, String)>> {
        let answer = self.json(&["fdb"])?;
        let rows = list(&answer["entries"]).iter();
        Ok(rows.map(|row| (text(&row["port"]).to_owned(), text(&row["mac"]).to_owned())).collect())
    }

    /// What the doctor says, whether or not something is wrong.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn doctor(&self) -> Result<String> {
        let output = self.attempt(&["doctor"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.trim().is_empty() {
            bail!("doctor says nothing: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(text)
    }

    /// Waits until the doctor says something that contains `wanted`.
    ///
    /// # Errors
    /// When it does not in time, with what it says.
    pub fn wait_doctor(&self, wanted: &str, patience: Duration) -> Result<()> {
        wait_until(&format!("the doctor says {wanted:?}"), patience, || {
            let text = self.doctor()?;
            if text.contains(wanted) { Ok(Some(())) } else { bail!("{text}") }
        })
    }
}

fn yaml_file(yaml: &str) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    std::fs::write(file.path(), yaml)?;
    Ok(file)
}

/// A list in an answer; an absent one is empty.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A text in an answer; an absent one is empty.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A number in an answer: JSON has 64-bit numbers as texts; an absent one is 0.
pub fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}
