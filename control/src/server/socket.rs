//! Making the unix socket: private from its first moment, and never stolen from a daemon that still listens.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Why the socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{0}: another daemon listens on this socket; stop it, or give this one another --socket")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is not a socket; remove it, or give another --socket")]
    NotASocket(PathBuf),
    /// The kernel says no.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Listens at `path`, with file permissions `mode`. A dead socket there is replaced. Needs a tokio runtime.
///
/// # Errors
/// [`SocketError`].
pub fn bind(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    let error = |operation: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| SocketError::Io { operation, path, source }
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).map_err(error("making", dir))?;
    }
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(SocketError::InUse(path.to_owned()));
        }
    }
    // Bound under another name and renamed when its permissions are right: nobody can connect in between.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    match fs::remove_file(&temporary) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(error("removing", &temporary)(source));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(error("listening on", &temporary))?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))
        .map_err(error("setting permissions of", &temporary))?;
    fs::rename(&temporary, path).map_err(error("renaming to", path))?;
    Ok(listener)
}
