//! A guest with rings and no IP stack: its driver sends and receives whole frames, and breaks the rules when it is told to.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, recv};
use sluice_policy::generate::Rng;
use sluice_user::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, NEXT, WRITE};
use sluice_user::vhost::features::bit;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Entries of a ring, as QEMU has it.
pub(crate) const ENTRIES: u16 = 256;
/// Bytes of a buffer: an ordinary frame and its header.
const BUFFER: u64 = 2048;
/// Where a pair's buffers begin after its rings.
const RINGS: u64 = 64 * 1024;
const HEADER: usize = 12;
/// Without receive offloads no frame takes more than one buffer, and without notifications by index every kick counts.
const FEATURES: u64 = bit::VERSION_1
    | bit::PROTOCOL_FEATURES
    | bit::MRG_RXBUF
    | bit::MQ
    | bit::CSUM
    | bit::HOST_TSO4
    | bit::HOST_TSO6
    | bit::INDIRECT_DESC;

/// Who waits for whom, seen from the guest.
#[derive(Debug)]
pub(crate) enum Meeting {
    /// The switch listens.
    Connect(PathBuf),
    /// The guest's VMM does.
    Listen(UnixListener),
}

impl Meeting {
    /// The VMM listens at a path, where nothing is.
    pub(crate) fn listen(path: &Path) -> Result<Meeting> {
        // What an earlier life left there.
        let _ = std::fs::remove_file(path);
        let listener =
            UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Meeting::Listen(listener))
    }

    /// A connection, if the other side is there.
    fn socket(&self) -> Option<UnixStream> {
        let socket = match self {
            Meeting::Connect(path) => UnixStream::connect(path).ok()?,
            Meeting::Listen(listener) => listener.accept().ok()?.0,
        };
        socket.set_nonblocking(false).ok()?;
        Some(socket)
    }
}

/// Where a pair's memory begins after that of the one before.
fn stride(entries: u16) -> u64 {
    (RINGS + 2 * u64::from(entries) * BUFFER).next_multiple_of(1 << 20)
}

/// One pair of rings.
struct Pair {
    entries: u16,
    to_guest: DriverRing,
    from_guest: DriverRing,
    base: u64,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    posted: [u64; 2],
    under_way: u16,
    has_unshown: [bool; 2],
}

impl Pair {
    fn new(number: u64, entries: u16) -> Result<Pair> {
        let base = GUEST_BASE + number * stride(entries);
        let to_guest = DriverRing::new(entries, base);
        let from_guest = DriverRing::new(entries, to_guest.end().next_multiple_of(4096));
        let event = || EventFd::new(libc::EFD_NONBLOCK);
        Ok(Pair {
            entries,
            to_guest,
            from_guest,
            base,
            kicks: [event()?, event()?],
            calls: [event()?, event()?],
            posted: [0; 2],
            under_way: 0,
            has_unshown: [false; 2],
        })
    }

    /// Where the buffer of this ring is that comes next; buffers and descriptors come round together.
    fn buffer(&self, ring: u64) -> u64 {
        let entries = u64::from(self.entries);
        self.base + RINGS + (ring * entries + self.posted[ring as usize] % entries) * BUFFER
    }

    fn post_to_guest(&mut self, ram: &GuestRam) {
        let at = self.buffer(0);
        self.to_guest.post(ram, &[(at, BUFFER as u32, WRITE)]);
        self.posted[0] += 1;
        self.has_unshown[0] = true;
    }
}

/// How a guest breaks the rules. All but the first two end its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mischief {
    /// Frames of garbage, behind headers of garbage.
    Headers,
    /// The rings are enabled and disabled while they are full.
    Switching,
    /// Descriptors and heads of garbage.
    Garbage,
    /// More heads are made available than the ring has.
    Jump,
    /// A chain without an end.
    Loop,
    /// The memory goes from under the switch.
    Truncate,
    /// Bytes of no protocol on the socket.
    Babble,
    /// It is gone, with frames in its rings.
    Vanish,
}

impl Mischief {
    /// All of them.
    pub(crate) const ALL: [Mischief; 8] = [
        Mischief::Headers,
        Mischief::Switching,
        Mischief::Garbage,
        Mischief::Jump,
        Mischief::Loop,
        Mischief::Truncate,
        Mischief::Babble,
        Mischief::Vanish,
    ];
}

/// A guest that is connected.
pub(crate) struct Guest {
    front: Frontend,
    /// The same connection, to look at it and to spoil it.
    socket: UnixStream,
    ram: GuestRam,
    pairs: Vec<Pair>,
}

impl Guest {
    /// Connects a new guest with so many pairs of rings of so many entries; `None` if the other side is not there, or hangs up.
    pub(crate) fn meet(meeting: &Meeting, pairs: usize, entries: u16) -> Result<Option<Guest>> {
        let Some(socket) = meeting.socket() else { return Ok(None) };
        let ram = GuestRam::new(pairs as u64 * stride(entries))?;
        let pairs = (0..pairs as u64).map(|number| Pair::new(number, entries)).collect::<Result<Vec<_>>>()?;
        let front = Frontend::from_stream(socket.try_clone()?, 2 * pairs.len() as u64);
        let mut guest = Guest { front, socket, ram, pairs };
        for pair in &mut guest.pairs {
            for _ in 0..entries {
                pair.post_to_guest(&guest.ram);
            }
        }
        guest.flush();
        // A port that is being removed does not answer to the end.
        Ok(guest.negotiate().is_ok().then_some(guest))
    }

    fn negotiate(&mut self) -> Result<()> {
        let front = &mut self.front;
        front.set_owner()?;
        let features = front.get_features()? & FEATURES;
        let protocol = front.get_protocol_features()?;
        front.set_protocol_features(protocol)?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(features)?;
        let at = self.ram.address();
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: at.guest,
            memory_size: at.size,
            userspace_addr: at.user,
            mmap_offset: at.offset,
            mmap_handle: self.ram.as_fd().as_raw_fd(),
        }])?;
        for (number, pair) in self.pairs.iter().enumerate() {
            for (side, ring) in [&pair.to_guest, &pair.from_guest].into_iter().enumerate() {
                let index = 2 * number + side;
                front.set_vring_num(index, ring.size)?;
                front.set_vring_base(index, 0)?;
                let data = VringConfigData {
                    queue_max_size: ring.size,
                    queue_size: ring.size,
                    flags: 0,
                    desc_table_addr: DriverRing::user(ring.descriptors),
                    used_ring_addr: DriverRing::user(ring.used),
                    avail_ring_addr: DriverRing::user(ring.available),
                    log_addr: None,
                };
                front.set_vring_addr(index, &data)?;
                front.set_vring_call(index, &pair.calls[side])?;
                front.set_vring_kick(index, &pair.kicks[side])?;
                front.set_vring_enable(index, true)?;
            }
        }
        Ok(())
    }

    /// Whether the switch has hung up.
    pub(crate) fn is_alone(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(self.socket.as_raw_fd(), &mut [0], flags), Ok(0) | Err(nix::Error::ECONNRESET))
    }

    /// How many pairs it has.
    pub(crate) fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// Sends a frame behind a header; `false`, and nothing is done, without room. [`flush`](Self::flush) shows it.
    pub(crate) fn send(&mut self, pair: usize, header: [u8; HEADER], frame: &[u8]) -> bool {
        let pair = &mut self.pairs[pair];
        while pair.from_guest.reap(&self.ram).is_some() {
            pair.under_way = pair.under_way.saturating_sub(1);
        }
        let length = (HEADER + frame.len()).min(BUFFER as usize);
        if pair.under_way == pair.entries {
            return false;
        }
        let at = pair.buffer(1);
        self.ram.write(at, &header);
        self.ram.write(at + HEADER as u64, &frame[..length - HEADER]);
        pair.from_guest.post(&self.ram, &[(at, length as u32, 0)]);
        pair.posted[1] += 1;
        pair.under_way += 1;
        pair.has_unshown[1] = true;
        true
    }

    /// The next frame to the guest, whose buffer is then available again.
    pub(crate) fn receive(&mut self, pair: usize) -> Option<Vec<u8>> {
        let pair = &mut self.pairs[pair];
        let (head, written) = pair.to_guest.reap(&self.ram)?;
        let at = pair.base + RINGS + u64::from(head % pair.entries) * BUFFER;
        let written = (written as usize).min(BUFFER as usize);
        let bytes = self.ram.read(at, written);
        pair.post_to_guest(&self.ram);
        bytes.get(HEADER..).map(<[u8]>::to_vec)
    }

    /// Shows the switch what was sent, and which buffers are free again.
    pub(crate) fn flush(&mut self) {
        for pair in &mut self.pairs {
            for (side, ring) in [&mut pair.to_guest, &mut pair.from_guest].into_iter().enumerate() {
                if std::mem::take(&mut pair.has_unshown[side]) {
                    ring.show(&self.ram);
                    // Full means that it rings already.
                    let _ = pair.kicks[side].write(1);
                }
            }
        }
    }

    /// Breaks the rules; whether the connection goes on. What is refused meanwhile is refused.
    pub(crate) fn misbehave(&mut self, mischief: Mischief, rng: &mut Rng) -> bool {
        let side = rng.below(2);
        let number = rng.below(self.pairs.len());
        let pair = &self.pairs[number];
        let ring = if side == 0 { &pair.to_guest } else { &pair.from_guest };
        match mischief {
            Mischief::Headers => {
                for _ in 0..64 {
                    let header: [u8; HEADER] = std::array::from_fn(|_| rng.byte());
                    let length = *rng.pick(&[0, 1, 13, 14, 60, 300, 1514, 2000]);
                    let frame: Vec<u8> = (0..length).map(|_| rng.byte()).collect();
                    self.send(number, header, &frame);
                }
                self.flush();
                return true;
            }
            Mischief::Switching => {
                for round in 0..4 {
                    let _ = self.front.set_vring_enable(2 * number + side, round % 2 == 1);
                }
                return !self.is_alone();
            }
            Mischief::Garbage => {
                for index in 0..pair.entries {
                    let address = GUEST_BASE.wrapping_add(rng.next() % (2 * stride(pair.entries)));
                    let piece = (address, rng.next() as u32 % 70_000, rng.next() as u16 & 7);
                    ring.set_descriptor(&self.ram, index, piece, rng.next() as u16 % (pair.entries + 8));
                    let at = ring.available + 4 + 2 * u64::from(index);
                    self.ram.write(at, &(rng.next() as u16 % (pair.entries + 8)).to_le_bytes());
                }
                ring.show_index(&self.ram, ring.device_index(&self.ram).wrapping_add(pair.entries));
            }
            Mischief::Jump => ring.show_index(&self.ram, rng.next() as u16),
            Mischief::Loop => {
                for index in 0..pair.entries {
                    let write = if side == 0 { WRITE } else { 0 };
                    let piece = (pair.buffer(side as u64), 64, NEXT | write);
                    ring.set_descriptor(&self.ram, index, piece, (index + 1) % pair.entries);
                }
                ring.show_index(&self.ram, ring.device_index(&self.ram).wrapping_add(pair.entries));
            }
            Mischief::Truncate => {
                // Nothing of this guest touches its memory from here on.
                let _ = self.ram.truncate(rng.next() % self.ram.address().size);
            }
            Mischief::Babble => {
                let bytes: Vec<u8> = (0..200).map(|_| rng.byte() & 0x1f).collect();
                let _ = nix::unistd::write(&self.socket, &bytes);
            }
            Mischief::Vanish => return false,
        }
        let _ = pair.kicks[side].write(1);
        false
    }
}
