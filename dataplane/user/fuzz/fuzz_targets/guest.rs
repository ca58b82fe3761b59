//! A port with a guest attached, shared by the targets: set up once, set up anew whenever a queue was stopped.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{Batch, Receive, Transmit};
use sluice_user::vhost::driver::{DriverRing, GUEST_BASE, GuestRam};
use sluice_user::vhost::features::bit;
use sluice_user::vhost::{FromGuest, Mode, Port, PortConfig, QueueState, ToGuest};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Entries of each ring.
pub const SIZE: u16 = 8;
/// Where what the fuzzer writes begins, behind the rings.
#[allow(dead_code)] // The target of rings writes everywhere.
pub const BUFFERS: u64 = GUEST_BASE + 0x1000;

/// A port, its guest, and a way to pass frames between them.
pub struct Guest {
    pub ram: GuestRam,
    pub rings: [DriverRing; 2],
    pub pool: Pool,
    front: Frontend,
    port: Port,
    ends: (FromGuest, ToGuest),
    _folder: tempfile::TempDir,
}

impl Guest {
    /// A port of this process, and a guest with 64 KiB and split or packed rings.
    pub fn new(packed: bool) -> Guest {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let config = PortConfig {
            path: path.clone(),
            mode: Mode::Server,
            queue_pairs: 1,
            mtu: 1500,
            offloads: true,
            standby: false,
        };
        let port = Port::open(config, Box::new(|_| {})).expect("a port");
        let ends = port.queues().remove(0);
        let ring = if packed { DriverRing::packed } else { DriverRing::new };
        let to = ring(SIZE, GUEST_BASE);
        let from = ring(SIZE, GUEST_BASE + 0x800);
        let mut front = Frontend::from_stream(UnixStream::connect(path).expect("the port listens"), 2);
        front.set_owner().expect("answered");
        let not_taken = bit::LOG_ALL | if packed { 0 } else { bit::RING_PACKED };
        let features = front.get_features().expect("answered") & !not_taken;
        let protocol = front.get_protocol_features().expect("answered");
        front.set_protocol_features(protocol).expect("answered");
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(features).expect("answered");
        let ram = GuestRam::new(1 << 16).expect("memory");
        let at = ram.address();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: at.guest,
            memory_size: at.size,
            userspace_addr: at.user,
            mmap_offset: at.offset,
            mmap_handle: ram.as_fd().as_raw_fd(),
        };
        front.set_mem_table(&[region]).expect("answered");
        let pool = Pool::new(&Region::new(RegionLayout { small: 256, large: 8 }).expect("memory"));
        let mut guest = Guest { ram, rings: [to, from], pool, front, port, ends, _folder: folder };
        for index in 0..2 {
            guest.set_up(index);
            guest.front.set_vring_enable(index, true).expect("answered");
        }
        guest
    }

    fn set_up(&mut self, index: usize) {
        let at = self.rings[index].descriptors;
        self.ram.write(at, &[0; 0x800]);
        self.rings[index] = self.rings[index].afresh(at);
        let ring = &self.rings[index];
        self.front.get_vring_base(index).expect("answered");
        self.front.set_vring_num(index, SIZE).expect("answered");
        self.front.set_vring_base(index, ring.base() as u16).expect("answered");
        let data = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: DriverRing::user(ring.descriptors),
            used_ring_addr: DriverRing::user(ring.used),
            avail_ring_addr: DriverRing::user(ring.available),
            log_addr: None,
        };
        self.front.set_vring_addr(index, &data).expect("answered");
        self.front.set_vring_kick(index, &EventFd::new(0).expect("an eventfd")).expect("answered");
    }

    /// Takes what the guest sent and sends it a frame; afterwards the guest is as new, and no frame is missing.
    pub fn serve(&mut self) {
        let mut batch = Batch::new();
        self.ends.0.receive(&mut self.pool, &mut batch);
        for frame in batch.frames() {
            assert!(frame.offload().check(frame.len()).is_ok());
        }
        batch.push(self.pool.copy(&[2; 100]).expect("there are chunks"));
        self.ends.1.transmit(&mut self.pool, &mut batch);
        self.ends.1.flush();
        batch.give(&mut self.pool);
        assert_eq!(self.pool.region().outstanding(), 0);
        for index in 0..2 {
            let state = self.port.status().queues[index].state;
            assert_ne!(state, QueueState::Idle);
            self.set_up(index);
        }
    }
}
