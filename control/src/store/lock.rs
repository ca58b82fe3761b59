//! A lock on a directory, with the holder's process id in it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::StoreError;

const FILE: &str = "lock";

/// Held as long as it lives; the kernel drops it with the process, however that ends.
#[derive(Debug)]
pub(super) struct DirLock {
    _file: Flock<File>,
}

/// Whether the directory has a lock file, held or not.
pub(super) fn exists(dir: &Path) -> bool {
    dir.join(FILE).exists()
}

impl DirLock {
    pub(super) fn take(dir: &Path) -> Result<DirLock, StoreError> {
        let path = dir.join(FILE);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(StoreError::io("opening", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                let write = |file: &mut File| {
                    file.set_len(0)?;
                    file.rewind()?;
                    write!(file, "{}", std::process::id())
                };
                write(&mut file).map_err(StoreError::io("writing", &path))?;
                Ok(DirLock { _file: file })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let holder = match file.read_to_string(&mut pid) {
                    Ok(_) if !pid.trim().is_empty() => format!("pid {}", pid.trim()),
                    _ => "pid unknown".to_owned(),
                };
                Err(StoreError::Locked { dir: dir.to_owned(), holder })
            }
            Err((_, errno)) => Err(StoreError::Io { operation: "locking", path, source: errno.into() }),
        }
    }
}
