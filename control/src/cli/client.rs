//! The connection to the daemon, and what can go wrong on this side of it.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use sluice_proto::v1::sluice_client::SluiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::packet::PacketError;
use crate::json::ReadError;
use crate::server::MESSAGE_MAX;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// Nobody listens.
    #[error("no daemon answers on {path} ({source}): start sluiced, or name its socket by --socket")]
    Unreachable { path: PathBuf, source: io::Error },
    /// The daemon refused or failed.
    #[error("{}", .0.message())]
    Refused(Box<tonic::Status>),
    /// A file is not a configuration.
    #[error("{path}: {source}")]
    Read { path: String, source: Box<ReadError> },
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File { path: String, source: io::Error },
    /// No frame to trace.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// Wrong usage that clap cannot see.
    #[error("{0}")]
    Usage(String),
    /// The answer cannot be printed.
    #[error("printing: {0}")]
    Print(String),
}

impl CliError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Unreachable { .. }
            | CliError::Refused(_)
            | CliError::Read { .. }
            | CliError::File { .. }
            | CliError::Packet(_)
            | CliError::Print(_) => 1,
        }
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> CliError {
        CliError::Refused(Box::new(status))
    }
}

/// Connects to the socket.
pub(crate) async fn channel(socket: &Path) -> Result<Channel, CliError> {
    let unreachable = |source| CliError::Unreachable { path: socket.to_owned(), source };
    // Tried first by itself: the channel below hides why a connection failed.
    UnixStream::connect(socket).await.map_err(unreachable)?;
    let path = socket.to_owned();
    let connector = service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // The name is that of no host: the connector ignores it.
    let channel = Endpoint::from_static("http://sluiced").connect_with_connector(connector).await;
    channel.map_err(|error| unreachable(io::Error::other(error)))
}

/// Connects to the daemon.
pub(crate) async fn connect(socket: &Path) -> Result<SluiceClient<Channel>, CliError> {
    let channel = channel(socket).await?;
    Ok(SluiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX))
}
