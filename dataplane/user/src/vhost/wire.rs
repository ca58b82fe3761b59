//! Messages on the socket: framing, and file descriptors that travel with them.
//!
//! The numbers of requests and their flags are rust-vmm's; the loop is our own, because the one of `vhost` 0.18 ends a
//! connection at requests that QEMU 10 makes (an enable before the features) and at those it does not know.
//!
//! The socket does not block. Whoever waits for it also waits for the port's end, and a message that has begun must go on.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{MAX_MSG_SIZE, VhostUserHeaderFlag as Flag};

use super::error::SessionError;

/// Request, flags, size: four bytes each.
const HEADER: usize = 12;
/// File descriptors of one message: one per region of a memory table.
const MAX_DESCRIPTORS: usize = 32;
/// The version of the protocol, in the flags.
const VERSION: u32 = 1;
/// How long the other side may stop in the middle of a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request of the front-end.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) wants_reply: bool,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// An answer's payload.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) payload: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

/// A connection to a front-end.
#[derive(Debug)]
pub(super) struct Connection<'a> {
    socket: UnixStream,
    /// Readable once the port is being removed.
    stop: BorrowedFd<'a>,
}

impl<'a> Connection<'a> {
    pub(super) fn new(socket: UnixStream, stop: BorrowedFd<'a>) -> Result<Self, SessionError> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, stop })
    }

    /// Waits for the next request.
    pub(super) fn receive(&self) -> Result<Message, SessionError> {
        let mut header = [0; HEADER];
        let mut descriptors = Vec::new();
        self.fill(&mut header, &mut descriptors, None)?;
        let (words, _) = header.as_chunks::<4>();
        let [request, flags, size] = [words[0], words[1], words[2]].map(u32::from_ne_bytes);
        let is_request = flags & Flag::VERSION.bits() == VERSION && flags & Flag::REPLY.bits() == 0;
        if !is_request || size as usize > MAX_MSG_SIZE {
            return Err(SessionError::Header { request, flags, size });
        }
        let mut payload = vec![0; size as usize];
        self.fill(&mut payload, &mut descriptors, Some(Instant::now() + PATIENCE))?;
        let wants_reply = flags & Flag::NEED_REPLY.bits() != 0;
        Ok(Message { request, wants_reply, payload, descriptors })
    }

    /// Reads until `bytes` are full. Without a deadline the first byte may take any time, the others may not.
    fn fill(
        &self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        mut deadline: Option<Instant>,
    ) -> Result<(), SessionError> {
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut bytes[done..])];
            match recvmsg(&self.socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => {
                    for message in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            descriptors.extend(rights);
                        }
                    }
                    if got.bytes == 0 {
                        return Err(SessionError::Closed);
                    }
                    let is_cut = got.flags.contains(ReturnFlags::CTRUNC);
                    if is_cut || descriptors.len() > MAX_DESCRIPTORS {
                        return Err(SessionError::TooManyDescriptors);
                    }
                    done += got.bytes;
                    deadline = deadline.or_else(|| Some(Instant::now() + PATIENCE));
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(SessionError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Answers a request.
    pub(super) fn answer(&self, request: u32, answer: &Answer) -> Result<(), SessionError> {
        let flags = VERSION | Flag::REPLY.bits();
        let mut bytes = Vec::with_capacity(HEADER + answer.payload.len());
        for word in [request, flags, answer.payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&answer.payload);
        let deadline = Instant::now() + PATIENCE;
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = answer.descriptor.iter().filter(|_| done == 0).map(AsFd::as_fd).collect();
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let slices = [IoSlice::new(&bytes[done..])];
            match sendmsg(&self.socket, &slices, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(sent) => done += sent,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, Some(deadline))?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(SessionError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for the socket, the port's end, or the deadline.
    fn wait(&self, what: PollFlags, deadline: Option<Instant>) -> Result<(), SessionError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match wait_for(self.socket.as_fd(), what, self.stop, left)? {
            Woken::Ready => Ok(()),
            Woken::Stopped => Err(SessionError::Stopped),
            Woken::TimedOut => Err(SessionError::Stalled),
        }
    }
}

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    Ready,
    Stopped,
    TimedOut,
}

/// Waits for a descriptor, for the port's end, or for so long.
pub(super) fn wait_for(
    fd: BorrowedFd<'_>,
    what: PollFlags,
    stop: BorrowedFd<'_>,
    time: Option<Duration>,
) -> Result<Woken, Errno> {
    let time = time.map(|time| Timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::from_borrowed_fd(fd, what)];
    match poll(&mut fds, time.as_ref()) {
        Ok(0) => Ok(Woken::TimedOut),
        Ok(_) if !fds[0].revents().is_empty() => Ok(Woken::Stopped),
        Ok(_) => Ok(Woken::Ready),
        // Whatever it was, the caller looks again.
        Err(Errno::INTR) => Ok(Woken::Ready),
        Err(error) => Err(error),
    }
}
