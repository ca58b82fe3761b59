//! The port as front-ends see it: rust-vmm's front-end over a real socket, and messages by hand where it has none.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::setup::{BUFFERS, RAM, frame};
use crate::frame::{Pool, Region, RegionLayout};
use crate::port::{Batch, Receive, Transmit};
use crate::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, WRITE};
use crate::vhost::features::bit;
use crate::vhost::memory::Mapping;
use crate::vhost::{
    FromGuest, Mode, OpenError, Port, PortConfig, PortEvent, QueueError, QueueState, ToGuest,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for a condition.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

type Events = Arc<Mutex<Vec<PortEvent>>>;

/// A port, and what it told.
struct Served {
    folder: TempDir,
    port: Port,
    events: Events,
    pool: Pool,
    ends: Vec<(FromGuest, ToGuest)>,
}

fn config(path: &Path, mode: Mode) -> PortConfig {
    PortConfig { path: path.to_owned(), mode, queue_pairs: 2, mtu: 1500, offloads: true, standby: false }
}

impl Served {
    fn new(mode: Mode) -> Served {
        let folder = tempfile::tempdir().unwrap();
        Served::at(folder, mode)
    }

    fn at(folder: TempDir, mode: Mode) -> Served {
        let events = Events::default();
        let told = Arc::clone(&events);
        let port = Port::open(
            config(&folder.path().join("socket"), mode),
            Box::new(move |event| told.lock().unwrap().push(event)),
        );
        let port = port.unwrap();
        let region = Region::new(RegionLayout { small: 256, large: 8 }).unwrap();
        let ends = port.queues();
        Served { folder, port, events, pool: Pool::new(&region), ends }
    }

    fn dial(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("socket")).unwrap()
    }

    fn received(&mut self, pair: usize) -> Vec<Vec<u8>> {
        let mut batch = Batch::new();
        self.ends[pair].0.receive(&mut self.pool, &mut batch);
        let bytes = batch.frames().iter().map(|frame| frame.bytes().to_vec()).collect();
        batch.give(&mut self.pool);
        bytes
    }

    fn send(&mut self, pair: usize, bytes: &[u8]) -> usize {
        let mut batch = Batch::new();
        batch.push(self.pool.copy(bytes).unwrap());
        let sent = self.ends[pair].1.transmit(&mut self.pool, &mut batch);
        self.ends[pair].1.flush();
        sent
    }
}

/// What no guest here takes.
const NOT_TAKEN: u64 = bit::LOG_ALL | bit::EVENT_IDX;

/// Which rings a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rings {
    Split,
    Packed,
}

/// A VMM with a guest: four rings in its memory, set up over the protocol.
struct Vmm {
    kind: Rings,
    front: Frontend,
    ram: GuestRam,
    rings: Vec<DriverRing>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

impl Vmm {
    fn new(socket: UnixStream, kind: Rings) -> Vmm {
        let ram = GuestRam::new(RAM).unwrap();
        let mut at = GUEST_BASE;
        let mut rings = Vec::new();
        for _ in 0..4 {
            let ring = match kind {
                Rings::Split => DriverRing::new(64, at),
                Rings::Packed => DriverRing::packed(64, at),
            };
            at = ring.end().next_multiple_of(4096);
            rings.push(ring);
        }
        let events = || (0..4).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        Vmm { kind, front: Frontend::from_stream(socket, 4), ram, rings, kicks: events(), calls: events() }
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        let at = self.ram.address();
        VhostUserMemoryRegionInfo {
            guest_phys_addr: at.guest,
            memory_size: at.size,
            userspace_addr: at.user,
            mmap_offset: at.offset,
            mmap_handle: self.ram.as_fd().as_raw_fd(),
        }
    }

    /// What the guest takes of what it is offered.
    fn features(&mut self) -> u64 {
        let not_taken = NOT_TAKEN | if self.kind == Rings::Split { bit::RING_PACKED } else { 0 };
        self.front.get_features().unwrap() & !not_taken
    }

    fn negotiate(&mut self) -> u64 {
        self.front.set_owner().unwrap();
        let features = self.features();
        let protocol = self.front.get_protocol_features().unwrap();
        self.front.set_protocol_features(protocol).unwrap();
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.front.set_features(features).unwrap();
        features
    }

    /// Of a packed ring's base, the front-end says only the first half, as DPDK's does.
    fn set_up_ring(&mut self, index: usize, base: u32) {
        let ring = &self.rings[index];
        self.front.set_vring_num(index, ring.size).unwrap();
        self.front.set_vring_base(index, base as u16).unwrap();
        let data = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 1,
            desc_table_addr: DriverRing::user(ring.descriptors),
            used_ring_addr: DriverRing::user(ring.used),
            avail_ring_addr: DriverRing::user(ring.available),
            log_addr: Some(ring.used),
        };
        self.front.set_vring_addr(index, &data).unwrap();
        self.front.set_vring_call(index, &self.calls[index]).unwrap();
        self.front.set_vring_kick(index, &self.kicks[index]).unwrap();
    }

    /// Everything, as a VMM does it when the guest's driver is ready.
    fn boot(socket: UnixStream) -> Vmm {
        Vmm::boot_with(socket, Rings::Split)
    }

    fn boot_with(socket: UnixStream, kind: Rings) -> Vmm {
        let mut vmm = Vmm::new(socket, kind);
        vmm.negotiate();
        vmm.front.set_mem_table(&[vmm.region()]).unwrap();
        for index in 0..4 {
            vmm.set_up_ring(index, vmm.rings[index].base());
            vmm.front.set_vring_enable(index, true).unwrap();
        }
        vmm
    }

    fn transmit(&mut self, pair: usize, bytes: &[u8]) {
        let at = BUFFERS + 0x4000 * pair as u64;
        self.ram.write(at, &[vec![0; 12], bytes.to_vec()].concat());
        let ring = &mut self.rings[2 * pair + 1];
        ring.post(&self.ram, &[(at, 12 + bytes.len() as u32, 0)]);
        ring.show(&self.ram);
    }

    fn refill(&mut self, pair: usize, count: u64) {
        for index in 0..count {
            let at = BUFFERS + 0x4_0000 + 0x800 * index;
            self.rings[2 * pair].post(&self.ram, &[(at, 2048, WRITE)]);
        }
        self.rings[2 * pair].show(&self.ram);
    }
}

/// Frames pass both ways on both pairs.
fn assert_passes(served: &mut Served, vmm: &mut Vmm, seed: u8) {
    for pair in 0..2 {
        let bytes = frame(400, seed + pair as u8);
        vmm.transmit(pair, &bytes);
        assert_eq!(served.received(pair), std::slice::from_ref(&bytes));
        vmm.refill(pair, 1);
        let _ = vmm.calls[2 * pair].read();
        assert_eq!(served.send(pair, &bytes), 1);
        assert_eq!(vmm.calls[2 * pair].read().unwrap(), 1);
        let (head, written) = vmm.rings[2 * pair].reap(&vmm.ram).unwrap();
        assert_eq!(written, 412);
        let at = u64::from_le_bytes(
            vmm.ram.read(vmm.rings[2 * pair].descriptors + 16 * u64::from(head), 8).try_into().unwrap(),
        );
        assert_eq!(vmm.ram.read(at + 12, 400), bytes);
    }
}

#[test]
fn a_guest_boots_and_frames_pass() {
    boots(Rings::Split);
}

#[test]
fn a_guest_with_packed_rings_boots_and_frames_pass() {
    boots(Rings::Packed);
}

fn boots(kind: Rings) {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot_with(served.dial(), kind);
    assert_passes(&mut served, &mut vmm, 0);
    let status = served.port.status();
    assert!(status.is_connected);
    assert_eq!(status.memory, RAM);
    assert!(status.queues.iter().all(|queue| queue.state == QueueState::Running));
    assert_eq!(status.queues[1].counters.frames, 1);
    assert!(served.ends[0].1.accepts().tcp_v4);
    assert_eq!(*served.events.lock().unwrap(), [PortEvent::Connected, PortEvent::Negotiated]);
    assert_eq!(vmm.front.get_queue_num().unwrap(), 2);
    assert_eq!(vmm.front.get_max_mem_slots().unwrap(), 509);
}

/// The worker that was to notify it may have found the queue locked, and does not come back.
#[test]
fn a_request_that_changes_nothing_leaves_no_guest_without_notice() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot(served.dial());
    vmm.refill(0, 1);
    vmm.transmit(0, &frame(60, 1));
    for call in &vmm.calls {
        let _ = call.read();
    }
    let mut batch = Batch::new();
    served.ends[0].0.receive(&mut served.pool, &mut batch);
    assert_eq!(batch.len(), 1);
    assert_eq!(served.ends[0].1.transmit(&mut served.pool, &mut batch), 1);
    for index in 0..2 {
        assert!(vmm.calls[index].read().is_err(), "nobody has notified queue {index} so far");
        vmm.front.set_vring_enable(index, true).unwrap();
        assert_eq!(vmm.calls[index].read().unwrap(), 1, "queue {index}");
    }
}

#[test]
fn a_kick_wakes_a_sleeper() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot(served.dial());
    let end = &mut served.ends[0].0;
    end.disarm();
    assert!(end.arm());
    let readable = |end: &FromGuest| {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let fd = end.event().unwrap();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&now)).unwrap() > 0
    };
    assert!(!readable(end));
    vmm.transmit(0, &frame(60, 1));
    vmm.kicks[1].write(1).unwrap();
    assert!(readable(end));
    end.disarm();
    assert!(!readable(end), "the kick is consumed");
    assert!(!end.arm(), "and the frame is there");
}

#[test]
fn the_next_front_end_finds_the_port_as_it_was() {
    let mut served = Served::new(Mode::Server);
    for turn in 0..5 {
        let mut vmm = Vmm::boot(served.dial());
        assert_passes(&mut served, &mut vmm, 10 * turn);
        // Frames wait and the guest is gone.
        vmm.transmit(0, &frame(60, 1));
        drop(vmm);
        until("gone", || !served.port.status().is_connected);
        assert!(served.received(0).is_empty());
        assert_eq!(served.send(0, &frame(60, 0)), 0);
        let status = served.port.status();
        assert_eq!(status.connections, u64::from(turn) + 1);
        assert!(status.queues.iter().all(|queue| queue.state == QueueState::Idle));
        assert_eq!((status.features, status.memory), (0, 0));
    }
    let path = served.folder.path().join("socket");
    drop(served.port);
    assert!(!path.exists(), "the socket goes with the port");
}

#[test]
fn a_client_finds_its_front_end_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut served = Served::at(folder, Mode::Client);
    for turn in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let mut vmm = Vmm::boot(socket);
        assert_passes(&mut served, &mut vmm, 10 * turn);
        drop((vmm, listener));
        std::fs::remove_file(&path).unwrap();
        until("gone", || !served.port.status().is_connected);
    }
    assert_eq!(served.port.status().connections, 3);
}

#[test]
fn a_restarted_switch_goes_on_where_the_guest_is() {
    restarts(Rings::Split, 0);
}

#[test]
fn a_restarted_switch_goes_on_in_packed_rings() {
    // The VMM knows nothing better than where the rings began, and they may have gone round since.
    for turns in [0, 20, 63, 64, 65, 100, 127, 128, 200] {
        restarts(Rings::Packed, turns);
    }
}

fn restarts(kind: Rings, turns: usize) {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot_with(served.dial(), kind);
    for _ in 0..turns {
        vmm.transmit(0, &frame(60, 1));
        assert_eq!(served.received(0).len(), 1);
        assert!(vmm.rings[1].reap(&vmm.ram).is_some());
    }
    assert_passes(&mut served, &mut vmm, 0);
    vmm.transmit(0, &frame(60, 77));
    // The switch goes without a word; the guest's rings stay as they are.
    let Served { folder, port, .. } = served;
    drop(port);
    let mut served = Served::at(folder, Mode::Server);
    vmm.front = Frontend::from_stream(served.dial(), 4);
    vmm.negotiate();
    vmm.front.set_mem_table(&[vmm.region()]).unwrap();
    for index in 0..4 {
        // The VMM knows no better base than the used index, if there is one.
        let base = match kind {
            Rings::Split => vmm.rings[index].device_index(&vmm.ram).into(),
            Rings::Packed => vmm.rings[index].base(),
        };
        vmm.set_up_ring(index, base);
        vmm.front.set_vring_enable(index, true).unwrap();
    }
    assert_eq!(served.received(0), [frame(60, 77)], "the frame that waited is not lost");
    vmm.rings.iter_mut().for_each(|ring| while ring.reap(&vmm.ram).is_some() {});
    assert_passes(&mut served, &mut vmm, 1);
}

#[test]
fn frames_for_a_pair_that_the_guest_does_not_use_go_to_one_that_it_does() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot(served.dial());
    vmm.refill(0, 4);
    vmm.front.set_vring_enable(2, false).unwrap();
    vmm.front.set_vring_enable(3, false).unwrap();
    assert_eq!(served.send(1, &frame(60, 1)), 1);
    assert_eq!(vmm.rings[0].reap(&vmm.ram).map(|(_, written)| written), Some(72));
    assert!(vmm.calls[0].read().is_ok_and(|calls| calls > 0), "and the guest is told");
    vmm.front.set_vring_enable(2, true).unwrap();
    vmm.refill(1, 4);
    assert_eq!(served.send(1, &frame(60, 1)), 1);
    assert!(vmm.rings[2].reap(&vmm.ram).is_some());
    assert!(vmm.rings[0].reap(&vmm.ram).is_none());
}

#[test]
fn a_ring_stops_and_says_where() {
    // Of packed rings, both places and their wrap counters.
    let packed = |spot: u32| spot | spot << 16;
    for (kind, turns, base) in [
        (Rings::Split, 3, 3),
        (Rings::Split, 70, 70),
        (Rings::Packed, 0, packed(0x8000)),
        (Rings::Packed, 3, packed(0x8003)),
        (Rings::Packed, 64, packed(0)),
        (Rings::Packed, 70, packed(6)),
    ] {
        let mut served = Served::new(Mode::Server);
        let mut vmm = Vmm::boot_with(served.dial(), kind);
        for turn in 0..turns {
            vmm.transmit(0, &frame(60, turn));
            assert_eq!(served.received(0).len(), 1);
            assert!(vmm.rings[1].reap(&vmm.ram).is_some());
        }
        assert_eq!(vmm.front.get_vring_base(1).unwrap(), base, "{kind:?} after {turns}");
        vmm.transmit(0, &frame(60, 9));
        assert!(served.received(0).is_empty(), "a stopped ring is not served");
        vmm.set_up_ring(1, base);
        assert_eq!(served.received(0), [frame(60, 9)]);
    }
}

#[test]
fn memory_comes_and_goes_by_slots() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::new(served.dial(), Rings::Split);
    vmm.negotiate();
    vmm.front.add_mem_region(&vmm.region()).unwrap();
    for index in 0..4 {
        vmm.set_up_ring(index, 0);
        vmm.front.set_vring_enable(index, true).unwrap();
    }
    assert_passes(&mut served, &mut vmm, 0);
    let more = GuestRam::new(1 << 16).unwrap();
    let mut region = vmm.region();
    assert!(vmm.front.add_mem_region(&region).is_err(), "it is there already");
    region.guest_phys_addr += RAM;
    region.userspace_addr += RAM;
    region.memory_size = 1 << 16;
    region.mmap_handle = more.as_fd().as_raw_fd();
    vmm.front.add_mem_region(&region).unwrap();
    assert_passes(&mut served, &mut vmm, 5);
    assert_eq!(served.port.status().memory, RAM + (1 << 16));
    vmm.front.remove_mem_region(&region).unwrap();
    assert!(vmm.front.remove_mem_region(&region).is_err());
    assert_passes(&mut served, &mut vmm, 9);
}

#[test]
fn a_migration_sees_all_writes_and_is_announced() {
    // Four used rings, two buffers, which share no page.
    migrates(Rings::Split, 5..=6);
}

#[test]
fn a_migration_sees_all_writes_to_packed_rings() {
    // Four rings, whose devices' areas are on the same pages.
    migrates(Rings::Packed, 5..=6);
}

fn migrates(kind: Rings, pages: std::ops::RangeInclusive<u32>) {
    use std::sync::atomic::Ordering;
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot_with(served.dial(), kind);
    let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let bytes = ((GUEST_BASE + RAM) >> 15) + 1;
    rustix::fs::ftruncate(&log, bytes).unwrap();
    let region = VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    vmm.front.set_log_base(0, Some(region)).unwrap();
    let bits = Mapping::new(&log, 0, bytes).unwrap();
    let count = || -> u32 {
        (0..bytes as usize).map(|at| bits.atomic_u8(at).unwrap().load(Ordering::Relaxed).count_ones()).sum()
    };
    assert_passes(&mut served, &mut vmm, 0);
    assert_eq!(count(), 0, "nothing is logged before it is asked for");
    let features = vmm.features();
    vmm.front.set_features(features | bit::LOG_ALL).unwrap();
    assert_passes(&mut served, &mut vmm, 1);
    assert!(pages.contains(&count()), "{}", count());
}

#[test]
fn descriptors_in_flight_are_kept_by_the_front_end() {
    keeps_in_flight(Rings::Split, 16);
}

#[test]
fn descriptors_in_flight_of_packed_rings_are_kept_by_the_front_end() {
    keeps_in_flight(Rings::Packed, 32);
}

fn keeps_in_flight(kind: Rings, entry: u64) {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot_with(served.dial(), kind);
    let wanted = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 4, queue_size: 64 };
    let (area, file) = vmm.front.get_inflight_fd(&wanted).unwrap();
    assert!(area.mmap_size >= 4 * (16 + 64 * entry));
    vmm.front.set_inflight_fd(&area, file.as_raw_fd()).unwrap();
    assert_passes(&mut served, &mut vmm, 0);
    let mut version = [0; 2];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut version, 8).unwrap();
    assert_eq!(u16::from_ne_bytes(version), 1, "the area is in use");
    let none = VhostUserInflight { queue_size: 0, ..wanted };
    assert!(vmm.front.get_inflight_fd(&none).is_err());
}

#[test]
fn a_reset_guest_boots_again() {
    for (before, after) in [
        (Rings::Split, Rings::Split),
        (Rings::Split, Rings::Packed),
        (Rings::Packed, Rings::Packed),
        (Rings::Packed, Rings::Split),
    ] {
        boots_again(before, after);
    }
}

/// A guest may boot another system, with rings of another kind.
fn boots_again(before: Rings, after: Rings) {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot_with(served.dial(), before);
    assert_passes(&mut served, &mut vmm, 0);
    vmm.kind = after;
    vmm.front.reset_device().unwrap();
    assert!(served.port.status().queues.iter().all(|queue| queue.state == QueueState::Idle));
    vmm.ram.write(GUEST_BASE, &[0; 0x8000]);
    let features = vmm.features();
    vmm.front.set_features(features).unwrap();
    for index in 0..4 {
        let at = vmm.rings[index].descriptors;
        vmm.rings[index] = match after {
            Rings::Split => DriverRing::new(64, at),
            Rings::Packed => DriverRing::packed(64, at),
        };
        vmm.set_up_ring(index, vmm.rings[index].base());
        vmm.front.set_vring_enable(index, true).unwrap();
    }
    assert_passes(&mut served, &mut vmm, 3);
}

#[test]
fn a_hostile_driver_loses_its_queue_and_nothing_else() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot(served.dial());
    vmm.rings[1].show_index(&vmm.ram, 1000);
    assert!(served.received(0).is_empty());
    let status = served.port.status();
    let jump = QueueError::IndexJump { by: 1000, size: 64 };
    assert_eq!(status.queues[1].state, QueueState::Stopped(jump));
    assert_eq!(status.queues[1].counters.stops, 1);
    // The other pair is served.
    let bytes = frame(60, 0);
    vmm.transmit(1, &bytes);
    assert_eq!(served.received(1), [bytes]);
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_guest_lives() {
    let mut served = Served::new(Mode::Server);
    let mut vmm = Vmm::boot(served.dial());
    assert!(vmm.front.set_vring_num(0, 100).is_err(), "not a power of two");
    vmm.set_up_ring(0, 0);
    assert!(vmm.front.set_features(1 << 36 | bit::VERSION_1).is_err(), "platform ordering was not offered");
    let mut huge = vmm.region();
    huge.guest_phys_addr = 1 << 40;
    huge.memory_size = 1 << 30;
    assert!(vmm.front.add_mem_region(&huge).is_err(), "longer than its file");
    huge.memory_size = u64::MAX - 10;
    assert!(vmm.front.add_mem_region(&huge).is_err(), "wraps");
    let pipe = std::io::pipe().unwrap();
    huge.memory_size = 4096;
    huge.mmap_handle = pipe.0.as_raw_fd();
    assert!(vmm.front.add_mem_region(&huge).is_err(), "not a file");
    assert_eq!(served.port.status().refused_requests, 5);
    assert_passes(&mut served, &mut vmm, 0);
}

/// A message by hand.
fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let words = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
    [words, payload.to_vec()].concat()
}

const WANTS_REPLY: u32 = 1 | 8;

/// The payload of the next answer, if the connection goes on.
fn answer(socket: &mut UnixStream) -> Option<u64> {
    let mut bytes = [0; 20];
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.read_exact(&mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes[12..].try_into().unwrap()))
}

fn acknowledging(served: &Served) -> UnixStream {
    let mut socket = served.dial();
    socket.write_all(&message(16, 1, &Protocol::REPLY_ACK.bits().to_ne_bytes())).unwrap();
    socket
}

#[test]
fn qemu_enables_rings_before_it_sets_features() {
    let served = Served::new(Mode::Server);
    let mut socket = acknowledging(&served);
    socket.write_all(&message(18, WANTS_REPLY, &[0, 0, 0, 0, 1, 0, 0, 0])).unwrap();
    assert_eq!(answer(&mut socket), Some(0));
    socket.write_all(&message(2, WANTS_REPLY, &bit::VERSION_1.to_ne_bytes())).unwrap();
    assert_eq!(answer(&mut socket), Some(0));
}

#[test]
fn unknown_requests_are_answered_or_ignored() {
    let served = Served::new(Mode::Server);
    let mut socket = acknowledging(&served);
    for request in [0, 21, 22, 24, 28, 40, 44, 45, 99, u32::MAX] {
        socket.write_all(&message(request, WANTS_REPLY, &[7; 24])).unwrap();
        assert_eq!(answer(&mut socket), Some(1), "request {request}");
        socket.write_all(&message(request, 1, &[])).unwrap();
    }
    // MTU, larger than the port's.
    socket.write_all(&message(20, WANTS_REPLY, &9000_u64.to_ne_bytes())).unwrap();
    assert_eq!(answer(&mut socket), Some(1));
    socket.write_all(&message(20, WANTS_REPLY, &1400_u64.to_ne_bytes())).unwrap();
    assert_eq!(answer(&mut socket), Some(0));
    assert_eq!(served.port.status().mtu, Some(1400));
    // An address to be announced.
    socket.write_all(&message(19, WANTS_REPLY, &[2, 0, 0, 0, 0, 5, 0, 0])).unwrap();
    assert_eq!(answer(&mut socket), Some(0));
    assert!(served.events.lock().unwrap().contains(&PortEvent::Announce([2, 0, 0, 0, 0, 5])));
    assert_eq!(served.port.status().refused_requests, 21);
}

#[test]
fn what_is_no_message_ends_the_connection_and_the_next_is_served() {
    let mut served = Served::new(Mode::Server);
    let broken = [
        ("a wrong version", message(1, 0, &[])),
        ("an answer nobody asked for", message(1, 1 | 4, &[])),
        ("a payload too long", [1_u32, 1, 0x10_0000].map(u32::to_ne_bytes).concat()),
        ("noise", vec![0xa5; 64]),
        ("a request that fails and cannot say so", message(8, 1, &[0, 0, 0, 0, 3, 0, 0, 0])),
        ("a queue that is not there", message(11, 1, &[9, 0, 0, 0, 0, 0, 0, 0])),
        ("half a payload", message(2, 1, &[1, 2, 3])),
        ("no descriptor", message(12, 1, &[0; 8])),
    ];
    for (what, bytes) in broken {
        let mut socket = served.dial();
        socket.write_all(&bytes).unwrap();
        assert_eq!(answer(&mut socket), None, "{what}");
    }
    let mut vmm = Vmm::boot(served.dial());
    assert_passes(&mut served, &mut vmm, 0);
}

#[test]
fn a_front_end_that_stops_in_a_message_keeps_nobody() {
    let served = Served::new(Mode::Server);
    let mut socket = served.dial();
    socket.write_all(&message(2, 1, &[0; 8])[..9]).unwrap();
    until("connected", || served.port.status().is_connected);
    // The port can be removed at once.
    let begun = Instant::now();
    drop(served);
    assert!(begun.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_path_that_is_taken_is_not_taken_away() {
    let served = Served::new(Mode::Server);
    let path = served.folder.path().join("socket");
    let open = |path: &Path| Port::open(config(path, Mode::Server), Box::new(|_| {}));
    assert!(matches!(open(&path), Err(OpenError::InUse { .. })));
    let file = served.folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(open(&file), Err(OpenError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    // A socket that nobody listens on any more is.
    let stale = served.folder.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    drop(open(&stale).unwrap());
    let none = PortConfig { queue_pairs: 0, ..config(&stale, Mode::Server) };
    assert!(matches!(Port::open(none, Box::new(|_| {})), Err(OpenError::QueuePairs(0))));
}

#[test]
fn a_guest_that_goes_in_the_middle_of_a_batch_harms_nobody() {
    let mut served = Served::new(Mode::Server);
    for turn in 0..20 {
        let mut vmm = Vmm::boot(served.dial());
        vmm.refill(0, 64);
        let ends = &mut served.ends[0];
        let pool = &mut served.pool;
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let gone = &stop;
            scope.spawn(move || {
                for index in 0..30 {
                    vmm.transmit(0, &frame(60, index));
                }
                // Memory first, then the connection.
                if turn % 2 == 0 {
                    vmm.ram.truncate(0).unwrap();
                }
                drop(vmm);
                gone.store(true, std::sync::atomic::Ordering::Release);
            });
            while !stop.load(std::sync::atomic::Ordering::Acquire) {
                let mut batch = Batch::new();
                ends.0.receive(pool, &mut batch);
                batch.give(pool);
                batch.push(pool.copy(&frame(60, 0)).unwrap());
                ends.1.transmit(pool, &mut batch);
                ends.1.flush();
            }
        });
        until("gone", || !served.port.status().is_connected);
        assert_eq!(served.pool.region().outstanding(), 0);
    }
}
