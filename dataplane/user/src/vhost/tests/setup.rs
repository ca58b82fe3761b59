//! A queue without a front-end: memory, a ring in it, and both sides at hand.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::frame::{Frame, Pool, Region, RegionLayout};
use crate::port::Batch;
use crate::vhost::counters::{Counters, QueueCounters};
use crate::vhost::driver::{DriverRing, GUEST_BASE, GuestRam};
use crate::vhost::features::{Features, bit, offered};
use crate::vhost::notify::EventFd;
use crate::vhost::queue::{Kick, Queue, QueueState};
use crate::vhost::ring::RingAddresses;
use crate::vhost::service::Common;

/// Bytes of the guest.
pub(super) const RAM: u64 = 1 << 20;
/// Where buffers are.
pub(super) const BUFFERS: u64 = GUEST_BASE + 0x1_0000;
/// What a guest of today takes.
pub(super) const FEATURES: u64 = bit::VERSION_1 | bit::MRG_RXBUF | bit::INDIRECT_DESC;

/// The same guest with split rings and with packed ones.
pub(super) const BOTH: [u64; 2] = [FEATURES, FEATURES | bit::RING_PACKED];

/// Which way.
pub(super) const TO_GUEST: usize = 0;
pub(super) const FROM_GUEST: usize = 1;

/// Both sides of a queue.
pub(super) struct Rig {
    pub(super) index: usize,
    pub(super) ram: GuestRam,
    pub(super) ring: DriverRing,
    pub(super) queue: Queue,
    pub(super) counters: Counters,
    pub(super) pool: Pool,
    pub(super) common: Common,
    pub(super) call: OwnedFd,
}

impl Rig {
    pub(super) fn new(index: usize, size: u16, features: u64) -> Rig {
        Rig::with(index, size, features, |common| common)
    }

    pub(super) fn with(index: usize, size: u16, features: u64, more: impl FnOnce(Common) -> Common) -> Rig {
        let ram = GuestRam::new(RAM).unwrap();
        let is_packed = features & bit::RING_PACKED != 0;
        let ring = if is_packed { DriverRing::packed } else { DriverRing::new }(size, GUEST_BASE);
        let common = more(Common {
            memory: Arc::new(ram.memory().clone()),
            features: Features(features),
            ..Common::default()
        });
        let region = Region::new(RegionLayout { small: 256, large: 8 }).unwrap();
        let mut rig = Rig {
            index,
            ram,
            ring,
            queue: Queue::new(index, 1522, Arc::default()).unwrap(),
            counters: Counters::default(),
            pool: Pool::new(&region),
            common,
            call: eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
        };
        rig.set_up();
        rig
    }

    /// What a front-end does when the guest's driver is ready.
    pub(super) fn set_up(&mut self) {
        let counters = &self.counters;
        self.queue.stop(counters);
        self.queue.set_common(self.common.clone(), counters).unwrap();
        self.queue.set_size(self.ring.size.into(), counters).unwrap();
        self.queue.set_base(self.ring.base(), counters).unwrap();
        self.queue.set_addresses(self.addresses(), counters).unwrap();
        self.queue.set_call(Some(EventFd::from_peer(self.call.try_clone().unwrap()).unwrap()));
        self.queue.set_kick(Kick::Polled, counters).unwrap();
        self.queue.set_enabled(true, counters).unwrap();
        assert_eq!(self.queue.sign().state(), QueueState::Running);
        self.calls();
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptors: DriverRing::user(self.ring.descriptors),
            available: DriverRing::user(self.ring.available),
            used: DriverRing::user(self.ring.used),
            log: None,
        }
    }

    /// Frames that the guest sent.
    pub(super) fn receive(&mut self) -> Vec<Frame> {
        let mut batch = Batch::new();
        self.queue.receive(&mut self.pool, &mut batch, &self.counters);
        batch.drain().collect()
    }

    /// Sends bytes to the guest.
    pub(super) fn deliver(&mut self, frames: &[&[u8]]) -> Option<usize> {
        let frames: Vec<Frame> = frames.iter().map(|bytes| self.pool.copy(bytes).unwrap()).collect();
        let sent = self.queue.deliver(&frames, &self.counters);
        self.queue.notify(&self.counters);
        for frame in frames {
            self.pool.give(frame);
        }
        sent
    }

    pub(super) fn counted(&self) -> QueueCounters {
        self.counters.read()
    }

    /// Interrupts since the last time.
    pub(super) fn calls(&self) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(self.call.as_fd(), &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// Makes a frame available, header and data in one piece at `at`.
    pub(super) fn send(&mut self, at: u64, header: [u8; 12], frame: &[u8]) -> u16 {
        self.ram.write(at, &header);
        self.ram.write(at + 12, frame);
        let head = self.ring.post(&self.ram, &[(at, 12 + frame.len() as u32, 0)]);
        self.ring.show(&self.ram);
        head
    }
}

/// Features with every offload.
pub(super) fn all_features() -> u64 {
    offered(true, false) & !bit::LOG_ALL & !bit::EVENT_IDX & !bit::RING_PACKED
}

/// A frame of so many bytes, all different from the next.
pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}
