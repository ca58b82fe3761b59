//! A tap of our own: the trunk between this engine and the kernel's.
//!
//! Each frame travels behind a virtio-net header, so that super-frames stay whole and checksums unfilled in both directions.
//! The tap is in the network namespace of whoever opens it, and lives as long as [`Tap`] or one of its ends.
//!
//! What comes out of it is the kernel's word, which is believed; it is checked all the same, as headers of guests are,
//! since what the kernel forwards was once a guest's.

mod sys;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, readv, writev};

use crate::frame::{Checksum, HEADROOM, LARGE_CHUNK, Offload, Pool, SMALL_CHUNK};
use crate::port::{Accepts, BATCH_SEGMENTS, Batch, Receive, Transmit};
use crate::vhost::header::{DATA_VALID, Header, MAX_HEADER, header_for};

/// What the kernel takes from us. Datagrams are cut here: older kernels do not take super-frames of UDP.
const ACCEPTS: Accepts = Accepts { udp: false, ..Accepts::ALL };

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel refused to make it.
    #[error("making the tap {name}: {source}; the module tun and /dev/net/tun are needed, and CAP_NET_ADMIN")]
    Make {
        /// Its name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// There is one of that name.
    #[error(
        "the interface {name} is there already: another sluiced in this network namespace has a switch of the same name; \
         rename one of the switches, or give each daemon a namespace of its own"
    )]
    Taken {
        /// Its name.
        name: String,
    },
    /// The kernel refused to keep it from speaking itself, or to set it up.
    #[error("setting the tap {name} up: {source}")]
    SetUp {
        /// Its name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
}

/// What both ends share.
#[derive(Debug)]
struct Device {
    file: OwnedFd,
    is_gone: AtomicBool,
    refused: AtomicU64,
}

impl Device {
    /// Notes what a failed call says of the tap.
    fn note(&self, error: Errno) {
        if matches!(error, Errno::BADFD | Errno::NODEV) {
            self.is_gone.store(true, Ordering::Release);
        }
    }

    fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }
}

/// A tap.
#[derive(Debug)]
pub struct Tap {
    device: Arc<Device>,
    name: String,
}

impl Tap {
    /// Makes a tap that is up and says nothing of its own.
    ///
    /// # Errors
    /// If the kernel refuses, or there is such an interface already.
    pub fn open(name: &str) -> Result<Tap, TapError> {
        let make = |source: io::Error| match source.kind() {
            io::ErrorKind::ResourceBusy => TapError::Taken { name: name.to_owned() },
            _ => TapError::Make { name: name.to_owned(), source },
        };
        let set_up = |source| TapError::SetUp { name: name.to_owned(), source };
        let file = sys::make_with_headers(name, MAX_HEADER).map_err(make)?;
        start(name).map_err(set_up)?;
        let device = Device { file, is_gone: AtomicBool::new(false), refused: AtomicU64::new(0) };
        Ok(Tap { device: Arc::new(device), name: name.to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether somebody has removed it: open another.
    pub fn is_gone(&self) -> bool {
        // Nobody may have tried to use it since.
        let mut polled = [PollFd::new(&self.device.file, PollFlags::IN)];
        let asked = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        self.device.is_gone() || (asked.is_ok() && polled[0].revents().contains(PollFlags::ERR))
    }

    /// Frames from the kernel that were dropped, since their header was not true of them.
    pub fn refused(&self) -> u64 {
        self.device.refused.load(Ordering::Relaxed)
    }

    /// Its ends.
    pub fn queue(&self) -> (FromTap, ToTap) {
        let device = &self.device;
        let rest = vec![0; LARGE_CHUNK].into();
        (FromTap { device: Arc::clone(device), rest }, ToTap { device: Arc::clone(device) })
    }
}

/// Sets a tap up that is to say nothing of its own.
fn start(name: &str) -> io::Result<()> {
    // With IPv6 the kernel would introduce itself to the VMs.
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    sys::set_up(name)
}

/// A tap that is up, and whose name says no more than whose it is; frames have nothing in front of them. It lives as long as the file.
pub(crate) fn quiet_tap() -> io::Result<(OwnedFd, String)> {
    let (file, name) = sys::make_plain("sluice%d")?;
    start(&name)?;
    Ok((file, name))
}

/// The way in: what the kernel sends to the tap.
#[derive(Debug)]
pub struct FromTap {
    device: Arc<Device>,
    /// What did not fit into a small chunk: how long a frame is, is known when it has been read.
    rest: Box<[u8]>,
}

impl FromTap {
    /// Reads one frame; `None` if there is none, `Some(None)` if it had to be dropped.
    fn read(&mut self, pool: &mut Pool) -> Option<Option<crate::frame::Frame>> {
        let mut frame = pool.take(SMALL_CHUNK - HEADROOM)?;
        let mut header = [0; MAX_HEADER];
        let spare = frame.spare_mut();
        let room = spare.len();
        let mut pieces =
            [IoSliceMut::new(&mut header), IoSliceMut::new(spare), IoSliceMut::new(&mut self.rest)];
        let length = match readv(&self.device.file, &mut pieces) {
            Ok(bytes) => bytes.saturating_sub(MAX_HEADER),
            Err(error) => {
                self.device.note(error);
                pool.give(frame);
                return None;
            }
        };
        frame.advance(length);
        if length > room {
            let Some(mut large) = pool.take(length) else {
                pool.give(frame);
                return Some(None);
            };
            // There is room: it was asked for.
            let is_whole = large.append(frame.bytes()) && large.append(&self.rest[..length - room]);
            pool.give(std::mem::replace(&mut frame, large));
            if !is_whole {
                pool.give(frame);
                return Some(None);
            }
        }
        let asked = Header::parse(&header).offload(frame.bytes(), Accepts::ALL);
        let offload = asked.map(|offload| match offload.checksum {
            Checksum::Unverified if header[0] & DATA_VALID != 0 => {
                Offload { checksum: Checksum::Valid, ..offload }
            }
            _ => offload,
        });
        if offload.is_ok_and(|offload| frame.set_offload(offload).is_ok()) {
            return Some(Some(frame));
        }
        self.device.refused.fetch_add(1, Ordering::Relaxed);
        pool.give(frame);
        Some(None)
    }
}

impl Receive for FromTap {
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch) {
        let mut attempts = batch.room();
        let mut segments = 0;
        while attempts > 0 && segments < BATCH_SEGMENTS && !self.device.is_gone() {
            attempts -= 1;
            match self.read(pool) {
                Some(Some(frame)) => {
                    segments += frame.offload().segments(frame.len());
                    batch.push(frame);
                }
                Some(None) => {}
                None => return,
            }
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.file.as_fd())
    }

    /// The kernel's side would do so.
    fn wakes_for_each(&self) -> bool {
        true
    }

    /// The file is readable while there are frames, so the worker sleeps no moment too long.
    fn arm(&mut self) -> bool {
        true
    }

    fn disarm(&mut self) {}
}

/// The way out: what the kernel takes for received by the tap.
#[derive(Debug)]
pub struct ToTap {
    device: Arc<Device>,
}

impl Transmit for ToTap {
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let mut sent = 0;
        for frame in batch.frames() {
            let Ok(header) = header_for(frame.bytes(), frame.offload(), ACCEPTS) else { continue };
            match writev(&self.device.file, &[IoSlice::new(&header.to_bytes()), IoSlice::new(frame.bytes())])
            {
                Ok(_) => sent += 1,
                Err(error) => self.device.note(error),
            }
        }
        batch.give(pool);
        sent
    }

    fn accepts(&self) -> Accepts {
        ACCEPTS
    }
}
