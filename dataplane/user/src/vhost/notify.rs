//! Notifications between the guest and a queue: eventfds that the front-end hands over.
//!
//! The other side has the same open file: it can fill the counter, and make the file one that blocks, at any time. A write would
//! then keep a worker for as long as it likes. So nothing is written: the kernel is asked to signal the eventfd, which it does
//! without waiting (see [`bell`]); and what is read, is read without waiting, whatever the file is.

mod bell;

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::readlinkat;
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use self::bell::Bell;
use super::error::RequestError;

/// An eventfd of the other side. Neither a full counter nor an empty one holds a worker up.
#[derive(Debug)]
pub(super) struct EventFd {
    fd: OwnedFd,
    bell: &'static Bell,
}

/// Whether guests can be notified on this machine.
pub(super) fn check() -> Result<(), Errno> {
    Bell::get().map(|_| ())
}

impl EventFd {
    /// Takes over a descriptor from the front-end, if it is what it should be.
    pub(super) fn from_peer(fd: OwnedFd) -> Result<Self, RequestError> {
        use std::os::fd::AsRawFd;
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let target = readlinkat(rustix::fs::CWD, link, Vec::new())?;
        if target.to_bytes() != b"anon_inode:[eventfd]" {
            return Err(RequestError::NotAnEvent);
        }
        Ok(Self { fd, bell: Bell::get()? })
    }

    /// Notifies. A counter that is full has notified already.
    #[inline]
    pub(super) fn signal(&self) {
        self.bell.ring(self.fd.as_fd());
    }

    /// Takes back all notifications that have come.
    #[inline]
    pub(super) fn drain(&self) {
        let mut count = [0; 8];
        // An eventfd has no offset: the file's own is what it is to be read from.
        let _ = preadv2(&self.fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// What blocks does so for longer.
    const SOON: Duration = Duration::from_secs(10);

    fn read(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Does something to a blocking eventfd with this count; whether it was done soon.
    fn is_soon(count: u64, act: impl FnOnce(&EventFd) + Send + 'static) -> (bool, OwnedFd) {
        let peers = eventfd(0, EventfdFlags::empty()).unwrap();
        if count > 0 {
            rustix::io::write(&peers, &count.to_ne_bytes()).unwrap();
        }
        let ours = EventFd::from_peer(peers.try_clone().unwrap()).unwrap();
        let (done, wait) = mpsc::channel();
        std::thread::spawn(move || {
            act(&ours);
            let _ = done.send(());
        });
        (wait.recv_timeout(SOON).is_ok(), peers)
    }

    #[test]
    fn a_full_counter_of_a_file_that_blocks_holds_nobody_up() {
        for count in [u64::MAX - 2, u64::MAX - 1] {
            let (is_soon, peers) = is_soon(count, |event| (0..5000).for_each(|_| event.signal()));
            // Whoever waits is let go.
            assert!(read(&peers) > count);
            assert!(is_soon, "with {count:#x} in the counter");
        }
    }

    #[test]
    fn an_empty_counter_of_a_file_that_blocks_holds_nobody_up() {
        let (is_soon, peers) = is_soon(0, EventFd::drain);
        rustix::io::write(&peers, &1_u64.to_ne_bytes()).unwrap();
        assert!(is_soon);
    }

    #[test]
    fn each_signal_counts_from_any_thread() {
        // More than the kernel keeps until it is told that they have been seen.
        const TIMES: u64 = 5000;
        let (is_soon, peers) = is_soon(3, |event| {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| (0..TIMES).for_each(|_| event.signal()));
                }
            });
        });
        assert!(is_soon);
        assert_eq!(read(&peers), 3 + 4 * TIMES);
        let (is_soon, peers) = self::is_soon(7, |event| {
            event.drain();
            event.signal();
        });
        assert!(is_soon);
        assert_eq!(read(&peers), 1);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(EventFd::from_peer(reader.into()), Err(RequestError::NotAnEvent)));
    }
}
