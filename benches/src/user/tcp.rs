//! TCP between two guests on rings. A guest is a namespace with a tap as its network card, whose frames a thread carries between
//! the tap and the rings as a VMM does; so it has the kernel's IP stack, and its card does checksums and segmentation, or not.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_tests::{Netns, VnetTap, tools};
use sluice_user::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, WRITE};
use sluice_user::vhost::features::bit;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::{ADDRESSES, GENERATOR_CPU, MACS, mac_text, sockets};
use crate::measure;
use crate::world::INTERFACE;

/// What a guest of today has its network card do.
const OFFLOADS: u64 =
    bit::CSUM | bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::GUEST_TSO6 | bit::HOST_TSO4 | bit::HOST_TSO6;
const TAP_OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
const ENTRIES: u16 = 1024;
/// Bytes of a buffer for frames to the guest, which takes as many as a frame needs.
const TO_GUEST: u64 = 2048;
/// Bytes of a buffer for frames from the guest: the longest, and its header.
const FROM_GUEST: u64 = 68 * 1024;
const AT_TO_GUEST: u64 = GUEST_BASE + (1 << 20);
const AT_FROM_GUEST: u64 = AT_TO_GUEST + ENTRIES as u64 * TO_GUEST;
const RAM: u64 = AT_FROM_GUEST - GUEST_BASE + ENTRIES as u64 * FROM_GUEST;
/// Most frames that are carried one way before the other is looked at.
const TURN: usize = 64;

/// Two guests on a switch.
pub(crate) struct Guests {
    netns: [Netns; 2],
    cards: [Card; 2],
}

impl Guests {
    /// Boots them on the sockets in `folder`, on which a switch listens.
    pub(crate) fn start(folder: &Path, has_offloads: bool) -> Result<Guests> {
        let name = |guest| format!("sl-{}-tcp-{guest}", std::process::id());
        let netns = [Netns::create(&name("a"))?, Netns::create(&name("b"))?];
        let sockets = sockets(folder);
        let start = |number: usize| -> Result<Card> {
            let netns: &Netns = &netns[number];
            netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
            let tap = VnetTap::open(netns, INTERFACE, if has_offloads { TAP_OFFLOADS } else { 0 })?;
            netns.run(&["ip", "link", "set", INTERFACE, "address", &mac_text(MACS[number]), "up"])?;
            netns.address(INTERFACE, &format!("{}/16", ADDRESSES[number]))?;
            Card::start(&sockets[number], tap, if has_offloads { OFFLOADS } else { 0 })
        };
        let cards = [start(0)?, start(1)?];
        let guests = Guests { netns, cards };
        tools::ping(&guests.netns[0], &ADDRESSES[1].to_string())?;
        Ok(guests)
    }

    /// Gbit/s of one stream, guests and what they do on one CPU, the switch on another.
    pub(crate) fn stream(&self, seconds: u32) -> Result<f64> {
        let [a, b] = &self.netns;
        let affinity = format!("{GENERATOR_CPU},{GENERATOR_CPU}");
        let arguments = ["-t", &seconds.to_string(), "-A", &affinity];
        let end = tools::iperf3(a, b, &ADDRESSES[1].to_string(), &arguments)?;
        ensure!(self.cards.iter().all(Card::is_running), "a guest's card has stopped");
        Ok(tools::gbits_received(&end))
    }
}

/// A network card: what a VMM does for it, in a thread for each way.
struct Card {
    stop: Arc<AtomicBool>,
    /// What the switch rings, and wakes a thread with.
    bell: EventFd,
    threads: Vec<JoinHandle<Result<()>>>,
    /// As long as it lives, so does the connection.
    _front: Frontend,
}

impl Card {
    fn start(socket: &Path, tap: VnetTap, features: u64) -> Result<Card> {
        let ram = Arc::new(GuestRam::new(RAM)?);
        let tap = Arc::new(tap);
        let to_guest = DriverRing::new(ENTRIES, GUEST_BASE);
        let from_guest = DriverRing::new(ENTRIES, to_guest.end().next_multiple_of(4096));
        let bell = EventFd::new(0)?;
        let (ram_there, tap_there) = (Arc::clone(&ram), Arc::clone(&tap));
        let mut to = ToGuest { ram: ram_there, tap: tap_there, ring: to_guest, posted: 0 };
        (0..ENTRIES).for_each(|_| to.post());
        to.ring.show(&ram);
        let event = || EventFd::new(libc::EFD_NONBLOCK);
        let (call, kick, no_kick) = (event()?, event()?, event()?);
        let front =
            connect(socket, &ram, features, [(&to.ring, &bell, &no_kick), (&from_guest, &call, &kick)])?;
        let buffer = vec![0; FROM_GUEST as usize];
        let mut from = FromGuest { ram, tap, ring: from_guest, posted: 0, under_way: 0, kick, buffer };
        let stop = Arc::new(AtomicBool::new(false));
        let mut card =
            Card { stop: Arc::clone(&stop), bell: bell.try_clone()?, threads: Vec::new(), _front: front };
        let stopped = Arc::clone(&stop);
        card.run(move || {
            while !stopped.load(Ordering::Relaxed) {
                bell.read().context("waiting for the switch")?;
                to.carry()?;
            }
            Ok(())
        })?;
        card.run(move || {
            while !stop.load(Ordering::Relaxed) {
                from.carry()?;
            }
            Ok(())
        })?;
        Ok(card)
    }

    fn run(&mut self, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let pinned = || {
            measure::pin_to(GENERATOR_CPU)?;
            work()
        };
        self.threads.push(std::thread::Builder::new().name("card".to_owned()).spawn(pinned)?);
        Ok(())
    }

    fn is_running(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A bell that cannot be rung rings already.
        let _ = self.bell.write(1);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("a guest's card: {error:#}"),
                Err(_) => eprintln!("a guest's card panicked"),
            }
        }
    }
}

/// Tells the switch where rings and memory are. Each ring has what the switch rings, and what it is rung with.
fn connect(
    socket: &Path,
    ram: &GuestRam,
    features: u64,
    rings: [(&DriverRing, &EventFd, &EventFd); 2],
) -> Result<Frontend> {
    let mut front = Frontend::connect(socket, 2).context("connecting to the switch")?;
    front.set_owner()?;
    let wanted = features | bit::VERSION_1 | bit::MRG_RXBUF | bit::PROTOCOL_FEATURES;
    let features = front.get_features()? & wanted;
    let protocol = front.get_protocol_features()?;
    front.set_protocol_features(protocol)?;
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(features)?;
    let at = ram.address();
    front.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: at.guest,
        memory_size: at.size,
        userspace_addr: at.user,
        mmap_offset: at.offset,
        mmap_handle: ram.as_fd().as_raw_fd(),
    }])?;
    for (index, (ring, call, kick)) in rings.into_iter().enumerate() {
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
        front.set_vring_call(index, call)?;
        front.set_vring_kick(index, kick)?;
        front.set_vring_enable(index, true)?;
    }
    Ok(front)
}

/// From the tap to the switch.
struct FromGuest {
    ram: Arc<GuestRam>,
    tap: Arc<VnetTap>,
    ring: DriverRing,
    posted: u64,
    /// Not yet given back.
    under_way: u16,
    kick: EventFd,
    buffer: Vec<u8>,
}

impl FromGuest {
    /// Carries what there is, or waits a while for some: as long as the end of the bench may wait.
    fn carry(&mut self) -> Result<()> {
        while self.ring.reap(&self.ram).is_some() {
            self.under_way -= 1;
        }
        let mut carried = 0;
        while carried < TURN && self.under_way < ENTRIES {
            let Some(length) = self.tap.read(&mut self.buffer)? else { break };
            let at = AT_FROM_GUEST + self.posted % u64::from(ENTRIES) * FROM_GUEST;
            self.ram.write(at, &self.buffer[..length]);
            self.ring.post(&self.ram, &[(at, length as u32, 0)]);
            self.posted += 1;
            self.under_way += 1;
            carried += 1;
        }
        if carried > 0 {
            self.ring.show(&self.ram);
            if self.ring.device_flags(&self.ram) & 1 == 0 {
                self.kick.write(1)?;
            }
            return Ok(());
        }
        let mut files = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        // With a full ring, it is the switch that is waited for.
        let timeout = PollTimeout::from(if self.under_way == ENTRIES { 0_u8 } else { 20 });
        match poll(&mut files, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error).context("polling"),
        }
    }
}

/// From the switch to the tap.
struct ToGuest {
    ram: Arc<GuestRam>,
    tap: Arc<VnetTap>,
    ring: DriverRing,
    posted: u64,
}

impl ToGuest {
    /// Carries all that there is.
    fn carry(&mut self) -> Result<()> {
        let mut carried = 0;
        while let Some(mut bytes) = self.take() {
            for _ in 1..u16::from_le_bytes([bytes[10], bytes[11]]) {
                bytes.extend(self.take().context("a frame came with fewer buffers than it says")?);
            }
            self.tap.write(&bytes)?;
            carried += 1;
            if carried % TURN == 0 {
                self.ring.show(&self.ram);
            }
        }
        self.ring.show(&self.ram);
        Ok(())
    }

    /// What the switch has written to the next buffer, which is then made available again.
    fn take(&mut self) -> Option<Vec<u8>> {
        let (head, written) = self.ring.reap(&self.ram)?;
        let bytes = self.ram.read(AT_TO_GUEST + u64::from(head) * TO_GUEST, written as usize);
        self.post();
        Some(bytes)
    }

    /// Makes the next buffer available: buffers and descriptors come round together.
    fn post(&mut self) {
        let at = AT_TO_GUEST + self.posted % u64::from(ENTRIES) * TO_GUEST;
        self.ring.post(&self.ram, &[(at, TO_GUEST as u32, WRITE)]);
        self.posted += 1;
    }
}
