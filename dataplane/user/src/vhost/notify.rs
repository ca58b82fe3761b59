//! Notifications between the guest and a queue: eventfds that the front-end hands over.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlinkat};

use super::error::RequestError;

/// An eventfd of the other side, made non-blocking: a full or empty counter must not hold a worker up.
#[derive(Debug)]
pub(super) struct EventFd(OwnedFd);

impl EventFd {
    /// Takes over a descriptor from the front-end, if it is what it should be.
    pub(super) fn from_peer(fd: OwnedFd) -> Result<Self, RequestError> {
        use std::os::fd::AsRawFd;
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let target = readlinkat(rustix::fs::CWD, link, Vec::new())?;
        if target.to_bytes() != b"anon_inode:[eventfd]" {
            return Err(RequestError::NotAnEvent);
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Notifies. It cannot fail in a way that matters: a counter that is full has notified already.
    #[inline]
    pub(super) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes back all notifications that have come.
    #[inline]
    pub(super) fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
