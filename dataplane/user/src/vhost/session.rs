//! A port's own thread: finds front-ends and serves one after the other.
//!
//! A front-end may go away at any time, in the middle of a message or of a batch. What it shared is let go of, the port's settings
//! stay, and the next one is waited for.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::device::{Device, has_own_answer};
use super::error::{RequestError, SessionError};
use super::port::{Mode, OpenError, PortConfig, PortEvent, Shared};
use super::wire::{Answer, Connection, Woken, wait_for};

/// How long to wait between attempts to connect, first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long to wait between front-ends that connect to us.
const BREATHER: Duration = Duration::from_millis(2);
/// Who may connect to a server's socket: its owner and its group, to which VMMs are to belong.
const SOCKET_MODE: u32 = 0o660;
/// A connection that lasted less counts as a failed attempt.
const SHORT: Duration = Duration::from_secs(1);

/// Where front-ends come from.
#[derive(Debug)]
pub(super) enum Endpoint {
    Listening(UnixListener),
    Connecting,
}

impl Endpoint {
    pub(super) fn new(config: &PortConfig) -> Result<Self, OpenError> {
        let path = &config.path;
        if config.mode == Mode::Client {
            return Ok(Endpoint::Connecting);
        }
        remove_dead_socket(path)?;
        let listen = || {
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        listen().map(Endpoint::Listening).map_err(|source| OpenError::Listen { path: path.clone(), source })
    }
}

/// Removes the socket of a process that is no more, if there is one.
///
/// # Errors
///
/// Somebody listens there, there is something else, or the kernel refuses.
pub fn remove_dead_socket(path: &Path) -> Result<(), OpenError> {
    let path = path.to_path_buf();
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(OpenError::Listen { path, source }),
        Ok(found) if !found.file_type().is_socket() => return Err(OpenError::NotASocket { path }),
        Ok(_) => {}
    }
    match dial(&path) {
        // Refused: nobody listens any more.
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(&path).map_err(|source| OpenError::Listen { path, source })
        }
        Ok(_) | Err(Errno::AGAIN) => Err(OpenError::InUse { path }),
        Err(error) => Err(OpenError::Listen { path, source: error.into() }),
    }
}

/// Connects without waiting for a listener that is busy.
fn dial(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Serves front-ends until the port is removed.
pub(super) fn serve(shared: &Shared, endpoint: &Endpoint) {
    let mut pause = BACK_OFF.0;
    loop {
        let socket = match next(shared, endpoint) {
            Ok(socket) => socket,
            Err(SessionError::Stopped) => break,
            Err(error) => {
                shared.update(|status| status.last_error = Some(error.to_string()));
                if !rest(shared, &mut pause) {
                    break;
                }
                continue;
            }
        };
        let begun = Instant::now();
        let error = session(shared, socket);
        shared.lines.write(|| {
            tracing::info!(port = shared.lines.who(), %error, "a vhost-user connection ended");
        });
        if matches!(error, SessionError::Stopped) {
            break;
        }
        if shared.config.mode == Mode::Server {
            // It is for the other side to be patient; we only see to it that it cannot keep us busy.
            pause = BREATHER;
        } else if begun.elapsed() >= SHORT {
            pause = BACK_OFF.0;
        }
        if !rest(shared, &mut pause) {
            break;
        }
    }
    if shared.config.mode == Mode::Server {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&shared.config.path);
    }
}

/// Waits a little longer each time; `false` if the port is being removed.
fn rest(shared: &Shared, pause: &mut Duration) -> bool {
    let stop = shared.stop.as_fd();
    let woken = wait_for(stop, PollFlags::IN, stop, Some(*pause));
    *pause = (*pause * 2).min(BACK_OFF.1);
    !matches!(woken, Ok(Woken::Stopped))
}

/// The next front-end.
fn next(shared: &Shared, endpoint: &Endpoint) -> Result<UnixStream, SessionError> {
    let Endpoint::Listening(listener) = endpoint else { return Ok(dial(&shared.config.path)?) };
    loop {
        match wait_for(listener.as_fd(), PollFlags::IN, shared.stop.as_fd(), None)? {
            Woken::Stopped => return Err(SessionError::Stopped),
            Woken::Ready | Woken::TimedOut => {}
        }
        match listener.accept() {
            Ok((socket, _)) => return Ok(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO).into()),
        }
    }
}

/// Serves one front-end to its end.
fn session(shared: &Shared, socket: UnixStream) -> SessionError {
    shared.update(|status| {
        status.is_connected = true;
        status.connections += 1;
    });
    shared.tell(PortEvent::Connected);
    let error = match converse(shared, socket) {
        Err(error) => error,
        Ok(never) => match never {},
    };
    shared.update(|status| {
        status.is_connected = false;
        status.memory = 0;
        status.mtu = None;
        status.last_error = Some(error.to_string());
    });
    shared.tell(PortEvent::Disconnected);
    error
}

fn converse(shared: &Shared, socket: UnixStream) -> Result<std::convert::Infallible, SessionError> {
    let connection = Connection::new(socket, shared.stop.as_fd())?;
    let mut device = Device::new(shared);
    loop {
        let message = connection.receive()?;
        let request = message.request;
        let wants_reply = message.wants_reply;
        let result = device.handle(message);
        // A request may itself be what allows to ask for answers.
        let acknowledge = wants_reply && device.acknowledges();
        match result {
            Ok(Some(answer)) => connection.answer(request, &answer)?,
            Ok(None) if acknowledge => connection.answer(request, &status(0))?,
            Ok(None) => {}
            Err(source) => {
                shared.update(|status| {
                    status.refused_requests += 1;
                    status.last_error = Some(source.to_string());
                });
                shared.lines.write(|| {
                    let port = shared.lines.who();
                    tracing::warn!(port, request, %source, "a vhost-user request is refused");
                });
                match source {
                    _ if acknowledge && !has_own_answer(request) => connection.answer(request, &status(1))?,
                    // Newer front-ends have requests that they do not need.
                    RequestError::Unknown(_) => {}
                    source => return Err(SessionError::Request { request, source }),
                }
            }
        }
    }
}

fn status(status: u64) -> Answer {
    Answer { payload: status.to_ne_bytes().to_vec(), descriptor: None }
}
