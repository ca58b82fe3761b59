//! Frames of the probe, and sending some and hearing which arrive.

use std::io;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_policy::net::{MacAddr, VlanId};

use super::packet::{ETHERTYPE, Packets};

/// Shortest and longest frames, without checksums.
const FRAME_MIN: usize = 60;
pub(super) const FRAME_MAX: usize = 1514;
/// Time for stragglers, after the last frame that was waited for.
const GRACE: Duration = Duration::from_millis(100);
/// Longest wait between two looks.
const LOOK: Duration = Duration::from_millis(20);
const TPID: u16 = 0x8100;

/// What tells frames of one probe from those of another.
pub(super) type Nonce = [u8; 8];

/// A frame to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Note {
    pub(super) destination: MacAddr,
    pub(super) source: MacAddr,
    /// The sender's own tag.
    pub(super) tag: Option<VlanId>,
    /// What kind of frame it is, for whoever hears it.
    pub(super) kind: u8,
}

/// A frame that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// The outermost tag.
    pub(super) tag: Option<u16>,
    pub(super) kind: u8,
    pub(super) number: u32,
}

impl Note {
    /// As bytes, so long.
    pub(super) fn bytes(&self, nonce: Nonce, number: u32, length: usize) -> Vec<u8> {
        let mut frame = [self.destination.0, self.source.0].concat();
        if let Some(vlan) = self.tag {
            frame.extend(TPID.to_be_bytes());
            frame.extend(vlan.get().to_be_bytes());
        }
        frame.extend(ETHERTYPE.to_be_bytes());
        frame.extend(nonce);
        frame.push(self.kind);
        frame.extend(number.to_be_bytes());
        frame.resize(length.clamp(FRAME_MIN, FRAME_MAX), 0);
        frame
    }
}

/// Reads a frame of this probe; the kernel may have taken a tag out of it.
fn read(nonce: Nonce, stripped: Option<u16>, frame: &[u8]) -> Option<Heard> {
    let half_word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let (mut at, mut tag) = (12, stripped);
    while let Some(TPID | 0x88a8) = half_word(at) {
        tag = tag.or(half_word(at + 2));
        at += 4;
    }
    let body = frame.get(at + 2..)?;
    let is_ours = half_word(at)? == ETHERTYPE && body.get(..nonce.len())? == nonce;
    let number = u32::from_be_bytes(body.get(9..13)?.try_into().ok()?);
    is_ours.then_some(Heard { tag: tag.map(|tci| tci & 0x0fff), kind: *body.get(8)?, number })
}

/// Sends frames, waiting for room; `false` if there is none until the deadline.
pub(super) fn send(socket: &Packets, frame: &[u8], deadline: Instant) -> io::Result<bool> {
    loop {
        if socket.send(frame)? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        wait(socket, PollFlags::POLLOUT)?;
    }
}

/// Everything that is there now.
pub(super) fn drain(socket: &Packets, nonce: Nonce, mut hear: impl FnMut(Heard, usize)) -> io::Result<()> {
    let mut buffer = [0; 2048];
    // More than fits into the socket's buffer cannot have been there.
    for _ in 0..100_000 {
        let Some(received) = socket.receive(&mut buffer)? else { return Ok(()) };
        if let Some(heard) = read(nonce, received.tag, received.bytes) {
            hear(heard, received.bytes.len());
        }
    }
    Ok(())
}

/// Listens until `is_done` with what was heard, and a moment longer for stragglers; or until the deadline.
pub(super) fn listen(
    socket: &Packets,
    nonce: Nonce,
    deadline: Instant,
    is_done: impl Fn(&[Heard]) -> bool,
) -> io::Result<Vec<Heard>> {
    let mut all = Vec::new();
    let mut end = deadline;
    let mut was_done = false;
    loop {
        drain(socket, nonce, |heard, _| all.push(heard))?;
        if !was_done && is_done(&all) {
            was_done = true;
            end = Instant::now() + GRACE;
        }
        if Instant::now() >= end {
            return Ok(all);
        }
        wait(socket, PollFlags::POLLIN)?;
    }
}

/// Waits a moment for a socket.
pub(super) fn wait(socket: &Packets, flags: PollFlags) -> io::Result<()> {
    use std::os::fd::AsFd;
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(socket.as_fd(), flags)], timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: Nonce = *b"01234567";

    fn note(tag: Option<VlanId>) -> Note {
        Note { destination: MacAddr([2; 6]), source: MacAddr([4; 6]), tag, kind: 3 }
    }

    #[test]
    fn what_is_sent_is_read_wherever_its_tag_is() {
        let plain = note(None).bytes(NONCE, 77, 0);
        assert_eq!(plain.len(), FRAME_MIN);
        let heard = Heard { tag: None, kind: 3, number: 77 };
        assert_eq!(read(NONCE, None, &plain), Some(heard));
        assert_eq!(read(NONCE, Some(0x2005), &plain), Some(Heard { tag: Some(5), ..heard }));
        let tagged = note(VlanId::new(9).ok()).bytes(NONCE, 77, 1514);
        assert_eq!(read(NONCE, None, &tagged), Some(Heard { tag: Some(9), ..heard }));
        assert_eq!(read(NONCE, Some(5), &tagged), Some(Heard { tag: Some(5), ..heard }), "the outer one");
    }

    #[test]
    fn frames_of_others_are_not_read() {
        let mut frame = note(None).bytes(NONCE, 77, 0);
        assert_eq!(read(*b"76543210", None, &frame), None);
        for length in 0..27 {
            assert_eq!(read(NONCE, None, &frame[..length]), None);
        }
        frame[12] = 8;
        assert_eq!(read(NONCE, None, &frame), None);
    }
}
