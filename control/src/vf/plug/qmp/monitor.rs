//! A client of QEMU's monitor (QMP) that never waits: it is turned again and again, and sends and takes what it can.
//!
//! The other side may be wedged or hostile: lines, events and time are bounded, and whatever does not keep to the
//! protocol ends the connection. QEMU serves one client at a time and greets the next when that one is gone, so
//! connections are kept only while something is asked.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};

/// Longest line.
const LINE_MAX: usize = 256 * 1024;
/// Most bytes that are taken in one turn.
const TURN_MAX: usize = 1024 * 1024;
const PIECE: usize = 16 * 1024;
/// Most events that are kept.
const EVENTS_MAX: usize = 64;

/// Why a monitor is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum MonitorError {
    /// Nobody listens.
    #[error("{0}")]
    Absent(io::Error),
    /// So many wait for it that nobody else can.
    #[error("too many wait to be connected to it")]
    Crowded,
    /// It cannot be connected to.
    #[error("it cannot be connected to: {0}")]
    Connect(io::Error),
    /// It does not greet.
    #[error("it does not greet within {0:?}; somebody else may be connected to it")]
    NoGreeting(Duration),
    /// It does not answer.
    #[error("it does not answer within {0:?}")]
    Silent(Duration),
    /// It is no monitor, or speaks another protocol.
    #[error("it does not speak QMP: {0}")]
    Protocol(String),
    /// It hung up.
    #[error("it closed the connection")]
    Closed,
    /// Something else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What QEMU would not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Such as `DeviceNotFound`, or `GenericError`.
    pub(super) class: String,
    /// In QEMU's words.
    pub(super) words: String,
}

/// Something that QEMU tells by itself, about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// Such as `DEVICE_DELETED`.
    pub(super) name: String,
    /// Its identifier.
    pub(super) device: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// Capabilities are negotiated, which is the first command.
    Negotiating,
    Idle,
    Asked,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: UnixStream,
    inbox: Vec<u8>,
    /// How much of the inbox is known to hold no end of a line.
    searched: usize,
    outbox: VecDeque<u8>,
    state: State,
    since: Instant,
    patience: Duration,
    last_id: u64,
    events: VecDeque<Event>,
}

impl Monitor {
    /// Connects.
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Monitor, MonitorError> {
        let address = UnixAddr::new(path).map_err(|error| MonitorError::Connect(error.into()))?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(io::Error::from)?;
        connect(socket.as_raw_fd(), &address).map_err(|error| match io::Error::from(error) {
            error if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                MonitorError::Absent(error)
            }
            error if error.kind() == io::ErrorKind::WouldBlock => MonitorError::Crowded,
            error => MonitorError::Connect(error),
        })?;
        Ok(Monitor {
            stream: UnixStream::from(socket),
            inbox: Vec::new(),
            searched: 0,
            outbox: VecDeque::new(),
            state: State::Greeting,
            since: Instant::now(),
            patience,
            last_id: 0,
            events: VecDeque::new(),
        })
    }

    /// Whether it can be asked something.
    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// Asks something; only when idle.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) {
        debug_assert!(self.is_idle(), "one question at a time");
        self.send(command, arguments);
        self.state = State::Asked;
    }

    /// What happened meanwhile.
    pub(super) fn take_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Sends and takes what it can; returns the answer, if it came.
    pub(super) fn turn(&mut self) -> Result<Option<Result<Value, Refusal>>, MonitorError> {
        let mut taken = 0;
        loop {
            self.flush()?;
            while let Some(line) = self.line() {
                if let Some(answer) = self.take(&line)? {
                    return Ok(Some(answer));
                }
            }
            if self.inbox.len() > LINE_MAX {
                return Err(MonitorError::Protocol(format!("a line of more than {LINE_MAX} bytes")));
            }
            let late = self.state != State::Idle && self.since.elapsed() > self.patience;
            match self.fill()? {
                // A monitor that talks all the time is as late as one that says nothing.
                None | Some(_) if late => {
                    return Err(match self.state {
                        State::Greeting => MonitorError::NoGreeting(self.patience),
                        _ => MonitorError::Silent(self.patience),
                    });
                }
                None => return Ok(None),
                Some(bytes) => taken += bytes,
            }
            if taken > TURN_MAX {
                return Ok(None);
            }
        }
    }

    fn send(&mut self, command: &str, arguments: &Value) {
        self.last_id += 1;
        self.since = Instant::now();
        let text = json!({"execute": command, "arguments": arguments, "id": self.last_id}).to_string();
        self.outbox.extend(text.bytes().chain(*b"\n"));
    }

    fn flush(&mut self) -> Result<(), MonitorError> {
        while !self.outbox.is_empty() {
            match self.stream.write(self.outbox.as_slices().0) {
                Ok(written) => drop(self.outbox.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(MonitorError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads a piece; `None` if there is nothing to read now.
    fn fill(&mut self) -> Result<Option<usize>, MonitorError> {
        let mut piece = [0; PIECE];
        match self.stream.read(&mut piece) {
            Ok(0) => Err(MonitorError::Closed),
            Ok(length) => {
                self.inbox.extend_from_slice(&piece[..length]);
                Ok(Some(length))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(MonitorError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole line.
    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.inbox.iter().skip(self.searched).position(|byte| *byte == b'\n');
        let Some(end) = end else {
            self.searched = self.inbox.len();
            return None;
        };
        let rest = self.inbox.split_off(self.searched + end + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.inbox, rest))
    }

    /// Takes a line; returns the answer, if it is that.
    fn take(&mut self, line: &[u8]) -> Result<Option<Result<Value, Refusal>>, MonitorError> {
        if line.len() > LINE_MAX {
            return Err(MonitorError::Protocol(format!("a line of {} bytes", line.len())));
        }
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        let mut message: Value =
            serde_json::from_slice(line).map_err(|error| MonitorError::Protocol(error.to_string()))?;
        if message.get("QMP").is_some() && self.state == State::Greeting {
            self.send("qmp_capabilities", &json!({}));
            self.state = State::Negotiating;
            return Ok(None);
        }
        if let Some(name) = message["event"].as_str() {
            self.note(name, &message["data"]);
            return Ok(None);
        }
        let answer = if let Some(value) = message.get_mut("return") {
            Ok(value.take())
        } else if let Some(error) = message.get("error") {
            Err(Refusal {
                class: error["class"].as_str().unwrap_or_default().to_owned(),
                words: error["desc"].as_str().unwrap_or("it does not say why").to_owned(),
            })
        } else {
            return Err(MonitorError::Protocol("neither an answer nor an event".into()));
        };
        // What QEMU could not even read, it refuses without the number.
        let is_ours = match &message["id"] {
            Value::Null => answer.is_err(),
            id => id.as_u64() == Some(self.last_id),
        };
        match (self.state, is_ours) {
            (State::Negotiating, true) => match answer {
                Ok(_) => {
                    self.state = State::Idle;
                    Ok(None)
                }
                Err(refusal) => Err(MonitorError::Protocol(refusal.words)),
            },
            (State::Asked, true) => {
                self.state = State::Idle;
                Ok(Some(answer))
            }
            (State::Greeting, _) => Err(MonitorError::Protocol("an answer before the greeting".into())),
            _ => Ok(None),
        }
    }

    /// Keeps the events that are about devices. `FAILOVER_NEGOTIATED` and `UNPLUG_PRIMARY` spell it differently.
    fn note(&mut self, name: &str, data: &Value) {
        let device = data["device"].as_str().or(data["device-id"].as_str());
        let Some(device) = device else { return };
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { name: name.to_owned(), device: device.to_owned() });
    }
}
