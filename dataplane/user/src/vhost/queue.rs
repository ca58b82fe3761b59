//! One virtqueue: what the front-end has set of it, and, while that is complete, the [`Service`] of it.
//!
//! | the front-end … | the queue |
//! |---|---|
//! | has given memory, size, addresses and a kick, and enabled it | is served |
//! | changes any of these while it is served | goes on from where it stands, with the new ones |
//! | asks for its base, resets, or goes away | stops, after it has shown the driver all that was done |
//!
//! A driver that breaks the rules stops its queue; it is served again once the front-end sets it up anew, as it does when the
//! guest resets the device.
//!
//! A queue is behind a lock. The session holds it to change something, a worker for one batch.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;
use rustix::event::epoll;

use super::chain::Direction;
use super::counters::Counters;
use super::error::{QueueError, RequestError, SetupError};
use super::features::bit;
use super::lines::LogLines;
use super::notify::EventFd;
use super::ring::{MAX_SIZE, RingAddresses};
use super::service::{Common, Plan, Service};
use super::virtqueue::Position;
use crate::frame::{Frame, Pool};
use crate::port::Batch;

/// How the driver says that it made buffers available.
#[derive(Debug)]
pub(super) enum Kick {
    /// By an eventfd.
    Event(EventFd),
    /// Not at all: the ring has to be polled.
    Polled,
}

/// What a queue is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueState {
    /// Not set up, or not enabled.
    #[default]
    Idle,
    /// Served.
    Running,
    /// Stopped for what the driver did.
    Stopped(QueueError),
}

/// How a queue is, for those who do not hold it. To look under its lock would cost the guest frames whenever the reader loses its
/// CPU there.
#[derive(Debug, Default)]
pub(super) struct Sign {
    is_live: AtomicBool,
    fault: ArcSwapOption<QueueError>,
}

impl Sign {
    /// Whether it is served.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.is_live.load(Ordering::Acquire)
    }

    /// What it is doing.
    pub(super) fn state(&self) -> QueueState {
        match &*self.fault.load() {
            Some(fault) => QueueState::Stopped(**fault),
            None if self.is_live() => QueueState::Running,
            None => QueueState::Idle,
        }
    }

    fn set_fault(&self, fault: QueueError) {
        self.fault.store(Some(Arc::new(fault)));
    }

    /// Whether there was one.
    fn forget_fault(&self) -> bool {
        self.fault.swap(None).is_some()
    }
}

#[derive(Debug)]
pub(super) struct Queue {
    index: usize,
    direction: Direction,
    /// Longest frame that is not a super-frame.
    longest_frame: usize,
    common: Common,
    size: u16,
    addresses: Option<RingAddresses>,
    /// Where the front-end says to begin.
    base: u32,
    /// Where an interrupted queue goes on.
    position: Option<Position>,
    kick: Option<Kick>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    is_enabled: bool,
    live: Option<Service>,
    sign: Arc<Sign>,
    /// Readable when the guest kicks; it outlives the kick descriptors, which come and go with the guest.
    event: Arc<OwnedFd>,
    lines: Arc<LogLines>,
}

impl Queue {
    pub(super) fn new(
        index: usize,
        longest_frame: usize,
        lines: Arc<LogLines>,
    ) -> Result<Self, rustix::io::Errno> {
        Ok(Self {
            index,
            // Of each pair, the first is the driver's receive queue.
            direction: if index.is_multiple_of(2) { Direction::ToGuest } else { Direction::FromGuest },
            longest_frame,
            common: Common::default(),
            size: 0,
            addresses: None,
            base: 0,
            position: None,
            kick: None,
            call: None,
            error: None,
            is_enabled: false,
            live: None,
            sign: Arc::default(),
            event: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?),
            lines,
        })
    }

    pub(super) fn sign(&self) -> &Arc<Sign> {
        &self.sign
    }

    pub(super) fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    // What the session does.

    /// Stops the service, to be gone on with later; the driver is told of all that was done.
    fn pause(&mut self, counters: &Counters) {
        let Some(mut live) = self.live.take() else { return };
        self.sign.is_live.store(false, Ordering::Release);
        live.notify(self.call.as_ref(), counters);
        self.position = Some(live.position());
    }

    /// Serves the queue, if everything for it is there.
    fn start(&mut self) -> Result<(), RequestError> {
        let Some(addresses) = self.addresses else { return Ok(()) };
        let memory = &self.common.memory;
        if !self.is_enabled || self.kick.is_none() || self.size == 0 || memory.is_empty() {
            return Ok(());
        }
        if self.sign.fault.load().is_some() {
            return Ok(());
        }
        if memory.is_broken() {
            // There is nothing behind it but zeros of our own.
            self.sign.set_fault(QueueError::MemoryLost);
            return Ok(());
        }
        let plan = Plan {
            index: self.index,
            direction: self.direction,
            common: &self.common,
            addresses,
            size: self.size,
            base: self.base,
            position: self.position,
            longest_frame: self.longest_frame,
        };
        self.live = Some(Service::new(&plan)?);
        self.sign.is_live.store(true, Ordering::Release);
        // Whoever sleeps on the queue looks at it now, and whoever waits in the guest does too: notifications may have been lost.
        if let Some(Kick::Event(kick)) = &self.kick {
            kick.signal();
        }
        if let Some(call) = &self.call {
            call.signal();
        }
        Ok(())
    }

    /// Changes something and goes on.
    fn change(&mut self, counters: &Counters, change: impl FnOnce(&mut Self)) -> Result<(), RequestError> {
        self.pause(counters);
        change(self);
        self.start()
    }

    /// Takes what all queues share.
    pub(super) fn set_common(&mut self, common: Common, counters: &Counters) -> Result<(), RequestError> {
        self.change(counters, |queue| {
            if common.features.has(bit::RING_PACKED) != queue.is_packed() {
                // Of a ring of the other kind it says nothing.
                queue.position = None;
            }
            queue.common = common;
        })
    }

    fn is_packed(&self) -> bool {
        self.common.features.has(bit::RING_PACKED)
    }

    pub(super) fn set_size(&mut self, size: u32, counters: &Counters) -> Result<(), RequestError> {
        let is_possible = if self.is_packed() { size > 0 } else { size.is_power_of_two() };
        if !is_possible || size > MAX_SIZE {
            return Err(SetupError::Size(size).into());
        }
        self.change(counters, |queue| queue.size = size as u16)
    }

    /// A driver that broke the rules gets a new chance with new addresses.
    pub(super) fn set_addresses(
        &mut self,
        addresses: RingAddresses,
        counters: &Counters,
    ) -> Result<(), RequestError> {
        self.change(counters, |queue| {
            if queue.sign.forget_fault() {
                queue.position = None;
            }
            queue.addresses = Some(addresses);
        })
    }

    /// Where to begin: of a split ring an index, of a packed one two places, with their wrap counters in the highest bits.
    pub(super) fn set_base(&mut self, base: u32, counters: &Counters) -> Result<(), RequestError> {
        if !self.is_packed() && base > u16::MAX.into() {
            return Err(RequestError::Value { what: "base of a ring", value: base.into() });
        }
        self.change(counters, |queue| {
            queue.base = base;
            queue.position = None;
        })
    }

    pub(super) fn set_kick(&mut self, kick: Kick, counters: &Counters) -> Result<(), RequestError> {
        self.pause(counters);
        self.forget_kick();
        if let Kick::Event(event) = &kick {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&*self.event, event, data, epoll::EventFlags::IN)?;
        }
        self.kick = Some(kick);
        self.start()
    }

    pub(super) fn set_call(&mut self, call: Option<EventFd>) {
        self.call = call;
        // What was notified by the old one may not have been seen.
        if let (Some(call), Some(_)) = (&self.call, &self.live) {
            call.signal();
        }
    }

    pub(super) fn set_error(&mut self, error: Option<EventFd>) {
        self.error = error;
    }

    pub(super) fn set_enabled(&mut self, is_enabled: bool, counters: &Counters) -> Result<(), RequestError> {
        if is_enabled == self.is_enabled {
            return Ok(());
        }
        self.change(counters, |queue| queue.is_enabled = is_enabled)
    }

    /// Ends the service until the next kick descriptor; answers where to go on, as [`set_base`](Self::set_base) has it.
    pub(super) fn stop(&mut self, counters: &Counters) -> u32 {
        self.pause(counters);
        self.forget_kick();
        self.call = None;
        self.sign.forget_fault();
        if let Some(position) = self.position.take() {
            self.base = position.available.into();
            if self.is_packed() {
                self.base |= u32::from(position.used) << 16;
            }
        }
        self.base
    }

    /// Forgets all that the front-end has set.
    pub(super) fn reset(&mut self, counters: &Counters) {
        self.stop(counters);
        self.common = Common::default();
        self.size = 0;
        self.addresses = None;
        self.base = 0;
        self.error = None;
        self.is_enabled = false;
    }

    fn forget_kick(&mut self) {
        if let Some(Kick::Event(event)) = self.kick.take() {
            // The other side holds the eventfd too: closing ours would not take it out.
            let _ = epoll::delete(&*self.event, &event);
        }
    }

    // What a worker does.

    /// Takes frames from the guest, which is to be [notified](Self::notify) if there were any.
    #[inline]
    pub(super) fn receive(&mut self, pool: &mut Pool, batch: &mut Batch, counters: &Counters) {
        let Some(live) = &mut self.live else { return };
        let before = batch.len();
        let result = live.receive(pool, batch, counters);
        if batch.len() == before {
            // There may have been chains with nothing good in them, of which nobody else knows.
            live.notify(self.call.as_ref(), counters);
        }
        if let Err(fault) = result {
            self.break_off(fault, counters);
        }
    }

    /// Puts frames into the guest; answers how many. None if nobody serves the queue.
    #[inline]
    pub(super) fn deliver(&mut self, frames: &[Frame], counters: &Counters) -> Option<usize> {
        let live = self.live.as_mut()?;
        let mut sent = 0;
        if let Err(fault) = live.deliver(frames, counters, &mut sent) {
            self.break_off(fault, counters);
        }
        Some(sent)
    }

    /// Notifies the guest of what was put into it, or taken from it.
    #[inline]
    pub(super) fn notify(&mut self, counters: &Counters) {
        if let Some(live) = &mut self.live {
            live.notify(self.call.as_ref(), counters);
        }
    }

    /// Asks the guest for kicks; `false` if something is there already.
    pub(super) fn arm(&mut self) -> bool {
        self.live.as_mut().is_none_or(|live| live.arm())
    }

    /// Whether the guest does not kick, so that somebody has to look.
    pub(super) fn is_polled(&self) -> bool {
        self.live.is_some() && matches!(self.kick, Some(Kick::Polled))
    }

    /// Asks the guest for no kicks, and forgets those that came.
    pub(super) fn disarm(&mut self) {
        if let Some(Kick::Event(event)) = &self.kick {
            event.drain();
        }
        if let Some(live) = &mut self.live {
            live.disarm();
        }
    }

    /// The driver broke the rules: it gets no further service, and is told so if it wants to know.
    #[cold]
    fn break_off(&mut self, fault: QueueError, counters: &Counters) {
        // What is read of memory that is lost is zeros, which break rules of their own.
        let is_lost = self.common.memory.is_broken();
        let fault = if is_lost { QueueError::MemoryLost } else { fault };
        // First, so that nobody sees it idle.
        self.sign.set_fault(fault);
        self.pause(counters);
        counters.stopped();
        if let Some(error) = &self.error {
            error.signal();
        }
        self.lines.write(|| {
            let (port, queue) = (self.lines.who(), self.index);
            tracing::warn!(port, queue, %fault, "a virtqueue is stopped for what its driver did");
        });
    }
}
