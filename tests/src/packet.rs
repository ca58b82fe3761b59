//! Sending and receiving whole frames: packet sockets in a namespace, and taps as a hypervisor holds them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;
use crate::sys;

/// Largest frame received: a GSO super-frame.
const FRAME_MAX: usize = 70_000;

/// A socket that sends and receives frames on one interface. It does not see what its own side sends.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens one on an interface of a namespace.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn open(netns: &Netns, interface: &str) -> Result<PacketSocket> {
        let socket = netns.enter(|| sys::open_packet(interface))?;
        let raw = socket.as_raw_fd();
        sys::set_option(raw, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        sys::set_option(raw, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        sys::set_option(raw, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)?;
        Ok(PacketSocket { socket })
    }

    /// As [`open`](Self::open), for frames with virtio-net headers of 10 bytes in front: what the socket's owner leaves undone is as
    /// free for it to say as for a VMM.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_vnet(netns: &Netns, interface: &str) -> Result<PacketSocket> {
        let opened = PacketSocket::open(netns, interface)?;
        sys::set_option(opened.socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        Ok(opened)
    }

    /// Sends a frame from its destination address on.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        nix::unistd::write(&self.socket, frame)
            .with_context(|| format!("sending a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// The next frame, with the tag that the kernel took out put back; `None` when none comes in time.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; FRAME_MAX];
        let end = Instant::now() + patience;
        loop {
            if let Some((length, tag)) = sys::receive_packet(self.socket.as_raw_fd(), &mut buffer)? {
                buffer.truncate(length);
                if let Some(tag) = tag
                    && length >= 12
                {
                    let bytes = [tag.tpid.to_be_bytes(), tag.tci.to_be_bytes()].concat();
                    buffer.splice(12..12, bytes);
                }
                return Ok(Some(buffer));
            }
            if !readable(&self.socket, end)? {
                return Ok(None);
            }
        }
    }

    /// Waits for a frame that `wanted` accepts, passing over others.
    ///
    /// # Errors
    /// When none comes in time, naming `what` was awaited.
    pub fn expect(
        &self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&[u8]) -> bool,
    ) -> Result<Vec<u8>> {
        let end = Instant::now() + patience;
        loop {
            match self.receive(end.saturating_duration_since(Instant::now()))? {
                Some(frame) if wanted(&frame) => return Ok(frame),
                Some(_) => {}
                None => bail!("{what}: no such frame within {patience:?}"),
            }
        }
    }

    /// All frames that are waiting now and that `wanted` accepts.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn drain(&self, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.receive(Duration::ZERO)? {
            if wanted(&frame) {
                frames.push(frame);
            }
        }
        Ok(frames)
    }
}

/// A tap, held as a hypervisor holds it: what is written, the VM has sent.
#[derive(Debug)]
pub struct Tap {
    device: OwnedFd,
    ifindex: u32,
}

impl Tap {
    /// Opens (and creates, if need be) the tap `name` in a namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(netns: &Netns, name: &str) -> Result<Tap> {
        netns.enter(|| Tap::open_here(name))
    }

    /// Opens (and creates, if need be) the tap `name` in the calling thread's namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open_here(name: &str) -> Result<Tap> {
        let device = sys::open_tap(name)?;
        let ifindex = if_nametoindex(name).with_context(|| format!("no interface {name}"))?;
        Ok(Tap { device, ifindex })
    }

    /// Its interface index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The frames to the VM that are there now.
    ///
    /// # Errors
    /// When reading fails.
    pub fn drain(&self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; FRAME_MAX];
        while readable(&self.device, Instant::now())? {
            let length = nix::unistd::read(&self.device, &mut buffer).context("reading from the tap")?;
            frames.push(buffer[..length].to_vec());
        }
        Ok(frames)
    }

    /// Sends a frame as the VM.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        nix::unistd::write(&self.device, frame).context("writing to the tap")?;
        Ok(())
    }

    /// Waits for a frame to the VM that `wanted` accepts, passing over others.
    ///
    /// # Errors
    /// When none comes in time, naming `what` was awaited.
    pub fn expect(
        &self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&[u8]) -> bool,
    ) -> Result<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut buffer = vec![0; FRAME_MAX];
        while readable(&self.device, end)? {
            let length = nix::unistd::read(&self.device, &mut buffer).context("reading from the tap")?;
            if wanted(&buffer[..length]) {
                return Ok(buffer[..length].to_vec());
            }
        }
        bail!("{what}: no such frame within {patience:?}")
    }
}

/// A tap whose frames have virtio-net headers of 12 bytes in front, as a VMM exchanges them with a guest's rings. Reading and
/// writing never wait.
#[derive(Debug)]
pub struct VnetTap {
    device: OwnedFd,
}

impl VnetTap {
    /// Makes the tap `name` in a namespace, whose kernel may leave undone what `offloads` (`TUN_F_…`) say.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(netns: &Netns, name: &str, offloads: u32) -> Result<VnetTap> {
        let device = netns.enter(|| sys::open_vnet_tap(name, offloads))?;
        let flags = OFlag::from_bits_truncate(fcntl(&device, FcntlArg::F_GETFL)?) | OFlag::O_NONBLOCK;
        fcntl(&device, FcntlArg::F_SETFL(flags))?;
        Ok(VnetTap { device })
    }

    /// Reads a header and a frame; `None` if there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match nix::unistd::read(&self.device, buffer) {
            Ok(length) => Ok(Some(length)),
            Err(nix::Error::EAGAIN) => Ok(None),
            Err(error) => Err(error).context("reading from the tap"),
        }
    }

    /// Writes a header and a frame.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        nix::unistd::write(&self.device, bytes).context("writing to the tap")?;
        Ok(())
    }
}

impl AsFd for VnetTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Waits until there is something to read, at most until `end`.
fn readable(file: &OwnedFd, end: Instant) -> Result<bool> {
    let left = end.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left.as_millis().min(60_000) as i32).unwrap_or(PollTimeout::MAX);
    let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match poll(&mut files, timeout) {
        Ok(count) => Ok(count > 0),
        Err(nix::Error::EINTR) => Ok(left > Duration::ZERO),
        Err(error) => Err(error).context("polling"),
    }
}
