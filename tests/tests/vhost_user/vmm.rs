//! A VMM: it carries frames between the rings of a guest and a tap, whose namespace is the guest. So the guest has a real
//! IP stack, which leaves checksums and segmentation to its network card.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use sluice_tests::VnetTap;
use sluice_user::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, WRITE};
use sluice_user::vhost::features::bit;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// More than a flow has in flight: what a slow test has no room for is not lost by the switch.
const ENTRIES: u16 = 512;
/// Bytes of a buffer for frames to the guest, which takes as many as a frame needs.
const TO_GUEST: u64 = 2048;
/// Bytes of a buffer for frames from the guest: the longest, and its header.
const FROM_GUEST: u64 = 68 * 1024;
const RAM: u64 = 64 << 20;
const AT_TO_GUEST: u64 = GUEST_BASE + (1 << 20);
const AT_FROM_GUEST: u64 = AT_TO_GUEST + ENTRIES as u64 * TO_GUEST;
const HEADER: usize = 12;
/// How long a switch may be away.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest with its VMM, in a thread.
pub(crate) struct Vmm {
    stop: Arc<AtomicBool>,
    longest: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Vmm {
    /// Starts a guest whose card is `tap`, and connects it to the switch. It takes these virtio features, where the switch has
    /// them; and connects again when the switch goes.
    pub(crate) fn start(path: &Path, tap: VnetTap, features: u64) -> Result<Vmm> {
        let stop = Arc::new(AtomicBool::new(false));
        let longest = Arc::new(AtomicU64::new(0));
        let mut guest = Guest::new(path, tap, features, &longest)?;
        guest.connect(&stop)?;
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("vmm".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                guest.turn(&stopped)?;
            }
            Ok(())
        })?;
        Ok(Vmm { stop, longest, thread: Some(thread) })
    }

    /// The longest frame that reached the guest so far.
    pub(crate) fn longest_received(&self) -> u64 {
        self.longest.load(Ordering::Relaxed)
    }

    /// Ends the guest; answers how it fared.
    pub(crate) fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => bail!("the VMM panicked"),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A test that fails has said why.
            let _ = thread.join();
        }
    }
}

struct Guest {
    path: PathBuf,
    tap: VnetTap,
    wanted: u64,
    front: Option<Frontend>,
    ram: GuestRam,
    /// To the guest, from the guest.
    rings: [DriverRing; 2],
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    /// How many were posted to each ring.
    posted: [u64; 2],
    /// From the guest, not yet given back.
    under_way: u16,
    longest: Arc<AtomicU64>,
    buffer: Vec<u8>,
}

impl Guest {
    fn new(path: &Path, tap: VnetTap, wanted: u64, longest: &Arc<AtomicU64>) -> Result<Guest> {
        let ram = GuestRam::new(RAM)?;
        let to_guest = DriverRing::new(ENTRIES, GUEST_BASE);
        let from_guest = DriverRing::new(ENTRIES, to_guest.end().next_multiple_of(4096));
        let event = || EventFd::new(libc::EFD_NONBLOCK);
        let mut guest = Guest {
            path: path.to_owned(),
            tap,
            wanted: wanted | bit::VERSION_1 | bit::MRG_RXBUF | bit::PROTOCOL_FEATURES,
            front: None,
            ram,
            rings: [to_guest, from_guest],
            kicks: [event()?, event()?],
            calls: [event()?, event()?],
            posted: [0; 2],
            under_way: 0,
            longest: Arc::clone(longest),
            buffer: vec![0; FROM_GUEST as usize],
        };
        for _ in 0..ENTRIES {
            guest.post_to_guest();
        }
        guest.rings[0].show(&guest.ram);
        Ok(guest)
    }

    /// Makes the next buffer available: buffers and descriptors come round together.
    fn post_to_guest(&mut self) {
        let at = AT_TO_GUEST + self.posted[0] % u64::from(ENTRIES) * TO_GUEST;
        self.rings[0].post(&self.ram, &[(at, TO_GUEST as u32, WRITE)]);
        self.posted[0] += 1;
    }

    fn connect(&mut self, stop: &AtomicBool) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.try_connect() {
                Ok(()) => return Ok(()),
                Err(_) if stop.load(Ordering::Relaxed) => return Ok(()),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                // The switch is on its way.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn try_connect(&mut self) -> Result<()> {
        self.front = None;
        let mut front = Frontend::connect(&self.path, 2).context("connecting to the switch")?;
        front.set_owner()?;
        let features = front.get_features()? & self.wanted;
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
        for (index, ring) in self.rings.iter().enumerate() {
            front.set_vring_num(index, ring.size)?;
            // Where an earlier switch has got to.
            front.set_vring_base(index, ring.device_index(&self.ram))?;
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
            front.set_vring_call(index, &self.calls[index])?;
            front.set_vring_kick(index, &self.kicks[index])?;
            front.set_vring_enable(index, true)?;
            self.kicks[index].write(1)?;
        }
        self.front = Some(front);
        Ok(())
    }

    /// Whether the switch has gone.
    fn is_alone(&self) -> bool {
        let Some(front) = &self.front else { return true };
        // The switch says nothing of its own: what is readable is the connection's end.
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(front.as_raw_fd(), &mut [0], flags), Ok(0) | Err(nix::Error::ECONNRESET))
    }

    fn turn(&mut self, stop: &AtomicBool) -> Result<()> {
        if self.is_alone() {
            return self.connect(stop);
        }
        self.carry_from_guest()?;
        self.carry_to_guest()?;
        // Calls of the switch are looked for that often.
        let timeout = PollTimeout::from(1u8);
        let mut files = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        match poll(&mut files, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error).context("polling"),
        }
    }

    fn carry_from_guest(&mut self) -> Result<()> {
        while self.rings[1].reap(&self.ram).is_some() {
            self.under_way -= 1;
        }
        let mut any = false;
        while self.under_way < ENTRIES {
            let Some(length) = self.tap.read(&mut self.buffer)? else { break };
            let at = AT_FROM_GUEST + self.posted[1] % u64::from(ENTRIES) * FROM_GUEST;
            self.ram.write(at, &self.buffer[..length]);
            self.rings[1].post(&self.ram, &[(at, length as u32, 0)]);
            self.posted[1] += 1;
            self.under_way += 1;
            any = true;
        }
        if any {
            self.rings[1].show(&self.ram);
            self.kicks[1].write(1)?;
        }
        Ok(())
    }

    fn carry_to_guest(&mut self) -> Result<()> {
        let mut any = false;
        while let Some(mut bytes) = self.take_buffer() {
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..buffers {
                bytes.extend(self.take_buffer().context("a frame came with fewer buffers than it says")?);
            }
            self.longest.fetch_max((bytes.len() - HEADER) as u64, Ordering::Relaxed);
            self.tap.write(&bytes)?;
            any = true;
        }
        if any {
            self.rings[0].show(&self.ram);
        }
        Ok(())
    }

    /// What the switch has written to the next buffer, which is then available again.
    fn take_buffer(&mut self) -> Option<Vec<u8>> {
        let (head, written) = self.rings[0].reap(&self.ram)?;
        let bytes = self.ram.read(AT_TO_GUEST + u64::from(head) * TO_GUEST, written as usize);
        self.post_to_guest();
        Some(bytes)
    }
}
