//! The service of one queue, whichever kind its ring is of: built from what the front-end has set, and asked for whole batches.

use std::sync::Arc;

use super::chain::Direction;
use super::counters::Counters;
use super::error::{QueueError, SetupError};
use super::features::{Features, bit};
use super::inflight::InflightArea;
use super::live::{Live, Terms};
use super::log::DirtyLog;
use super::memory::GuestMemory;
use super::notify::EventFd;
use super::packed::ring::{PackedRing, Spot};
use super::packed::{Left, Packed, PackedLog, recovery};
use super::ring::{DESCRIPTOR, RingAddresses, SplitRing};
use super::split::Split;
use super::virtqueue::Position;
use crate::frame::{Frame, Pool};
use crate::port::Batch;

/// What all queues of a device share.
#[derive(Debug, Clone, Default)]
pub(super) struct Common {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) features: Features,
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) inflight: Option<InflightArea>,
}

/// What one queue is served by.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// Its place among the device's.
    pub(super) index: usize,
    pub(super) direction: Direction,
    pub(super) common: &'a Common,
    pub(super) addresses: RingAddresses,
    pub(super) size: u16,
    /// Where the front-end says to begin.
    pub(super) base: u32,
    /// Where we know that it stands, because we have served it.
    pub(super) position: Option<Position>,
    /// The longest frame that is not a super-frame, in bytes.
    pub(super) longest_frame: usize,
}

/// A queue being served.
#[derive(Debug)]
pub(super) enum Service {
    Split(Live<Split>),
    Packed(Live<Packed>),
}

impl Service {
    pub(super) fn new(plan: &Plan<'_>) -> Result<Self, SetupError> {
        let features = plan.common.features;
        let terms = Terms {
            direction: plan.direction,
            features,
            longest_frame: plan.longest_frame,
            log: plan.common.log.clone(),
        };
        let memory = Arc::clone(&plan.common.memory);
        Ok(if features.has(bit::RING_PACKED) {
            Service::Packed(Live::new(plan.packed()?, memory, terms))
        } else {
            Service::Split(Live::new(plan.split()?, memory, terms))
        })
    }

    /// Where the queue stands, between batches.
    pub(super) fn position(&self) -> Position {
        match self {
            Service::Split(live) => live.position(),
            Service::Packed(live) => live.position(),
        }
    }

    /// Takes frames from the guest, as many as the batch has room for.
    #[inline]
    pub(super) fn receive(
        &mut self,
        pool: &mut Pool,
        batch: &mut Batch,
        counters: &Counters,
    ) -> Result<(), QueueError> {
        match self {
            Service::Split(live) => live.receive(pool, batch, counters),
            Service::Packed(live) => live.receive(pool, batch, counters),
        }
    }

    /// Puts frames into the guest; `sent` says how many went in.
    #[inline]
    pub(super) fn deliver(
        &mut self,
        frames: &[Frame],
        counters: &Counters,
        sent: &mut usize,
    ) -> Result<(), QueueError> {
        match self {
            Service::Split(live) => live.deliver(frames, counters, sent),
            Service::Packed(live) => live.deliver(frames, counters, sent),
        }
    }

    /// Notifies the driver of what it was shown since the last time, if it wants to know.
    #[inline]
    pub(super) fn notify(&mut self, call: Option<&EventFd>, counters: &Counters) {
        match self {
            Service::Split(live) => live.notify(call, counters),
            Service::Packed(live) => live.notify(call, counters),
        }
    }

    /// Asks for a kick when something comes. `false` if something has come already.
    pub(super) fn arm(&mut self) -> bool {
        match self {
            Service::Split(live) => live.arm(),
            Service::Packed(live) => live.arm(),
        }
    }

    /// Asks for no kicks.
    pub(super) fn disarm(&mut self) {
        match self {
            Service::Split(live) => live.disarm(),
            Service::Packed(live) => live.disarm(),
        }
    }
}

impl Plan<'_> {
    fn split(&self) -> Result<Split, SetupError> {
        let common = self.common;
        let ring = SplitRing::new(&common.memory, &self.addresses, self.size)?;
        let used = ring.used_index();
        // The queue gives chains back in the order in which it takes them, and none stays with it between batches: whatever the base,
        // the used index says how far it got. A front-end that lost the back-end knows no better base.
        let mut position = self.position.unwrap_or(Position { available: used, used });
        let area = common.inflight.as_ref();
        let mut inflight = area.map(|area| area.queue(self.index, self.size)).transpose()?.flatten();
        let mut left = Vec::new();
        if let Some(inflight) = &mut inflight {
            left = inflight.recover(position.used)?;
            if self.position.is_none() {
                position.available = used.wrapping_add(left.len() as u16);
            }
        }
        let log = common.log.clone().zip(self.addresses.log);
        Ok(Split::new(ring, common.features.has(bit::EVENT_IDX), position, left, inflight, log))
    }

    fn packed(&self) -> Result<Packed, SetupError> {
        let common = self.common;
        let size = self.size;
        let ring = PackedRing::new(&common.memory, &self.addresses, size)?;
        // The front-end says two places, of which some say only the first; both are the same, since none of what is taken stays with
        // the queue.
        let base = Spot(self.base as u16);
        if base.index() >= size {
            return Err(SetupError::Base { base: base.index(), size });
        }
        let known = self.position.filter(|position| {
            [position.available, position.used].into_iter().all(|spot| Spot(spot).index() < size)
        });
        let area = common.inflight.as_ref();
        let mut inflight = area.map(|area| area.packed_queue(self.index, size)).transpose()?.flatten();
        let recovered: Option<(Spot, Vec<Left>)> = match &mut inflight {
            // What we know ourselves, we need not be told.
            Some(inflight) if known.is_none() => inflight.recover(&ring)?,
            _ => None,
        };
        let (position, left) = match recovered {
            Some((used, left)) => {
                let step = |spot: Spot, left: &Left| spot.after(left.descriptors.len() as u16, size);
                let available = left.iter().fold(used, step);
                (Position { available: available.0, used: used.0 }, left)
            }
            None => {
                let at = || recovery::recover(&ring, base).0;
                let position = known.unwrap_or_else(|| {
                    let at = at();
                    Position { available: at, used: at }
                });
                if let Some(inflight) = &mut inflight {
                    inflight.begin(Spot(position.used));
                }
                (position, Vec::new())
            }
        };
        let guest = |user, len| common.memory.guest_address(user, len);
        let log = common.log.clone().filter(|_| self.addresses.log.is_some()).and_then(|log| {
            let slots = guest(self.addresses.descriptors, (DESCRIPTOR * usize::from(size)) as u64)?;
            Some(PackedLog { log, slots, device: guest(self.addresses.used, 4)? })
        });
        Ok(Packed::new(ring, common.features.has(bit::EVENT_IDX), position, left, inflight, log))
    }
}
