//! The device that a front-end talks to: carries out requests, by changing queues under their locks.
//!
//! One per connection, on the session's thread. What a front-end sets lasts as long as its connection; the port's own settings
//! outlive it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq as Request;

use super::error::RequestError;
use super::features::{self, Features, bit};
use super::inflight::InflightArea;
use super::log::DirtyLog;
use super::memory::{GuestMemory, MAX_REGIONS, RegionAddress};
use super::notify::EventFd;
use super::payload::Payload;
use super::port::{PortConfig, PortEvent, Shared, Slot};
use super::queue::Kick;
use super::ring::{MAX_SIZE, RingAddresses};
use super::service::Common;
use super::wire::{Answer, Message};

/// `VHOST_VRING_F_LOG`
const LOG_RING: u32 = 1;
/// In the payload of kick, call and error: no descriptor comes with it.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// The smallest MTU of IPv4.
const SMALLEST_MTU: u64 = 68;

/// Whether a request has an answer of its own, so that none can say that it failed.
pub(super) fn has_own_answer(request: u32) -> bool {
    matches!(
        Request::try_from(request),
        Ok(Request::GET_VRING_BASE | Request::GET_INFLIGHT_FD | Request::SET_LOG_BASE)
    )
}

/// What a front-end has set up.
#[derive(Debug)]
pub(super) struct Device<'a> {
    shared: &'a Shared,
    common: Common,
    log: Option<Arc<DirtyLog>>,
    protocol: Protocol,
}

impl<'a> Device<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, common: Common::default(), log: None, protocol: Protocol::empty() }
    }

    /// Whether the front-end may ask for an answer to any request.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol.contains(Protocol::REPLY_ACK)
    }

    /// Carries out a request; answers what it is answered with, if it always is.
    pub(super) fn handle(&mut self, message: Message) -> Result<Option<Answer>, RequestError> {
        let request =
            Request::try_from(message.request).map_err(|_| RequestError::Unknown(message.request))?;
        let payload = Payload(&message.payload);
        let descriptors = message.descriptors;
        match request {
            Request::GET_FEATURES => return Ok(Some(number(self.offered()))),
            Request::GET_PROTOCOL_FEATURES => return Ok(Some(number(features::PROTOCOL.bits()))),
            Request::GET_QUEUE_NUM => return Ok(Some(number(self.config().queue_pairs.into()))),
            Request::GET_MAX_MEM_SLOTS => return Ok(Some(number(MAX_REGIONS as u64))),
            Request::GET_VRING_BASE => return self.vring_base(payload).map(Some),
            Request::GET_INFLIGHT_FD => return new_inflight(payload).map(Some),
            Request::SET_LOG_BASE => return self.set_log_base(payload, descriptors).map(Some),
            Request::SET_OWNER => {}
            Request::SET_FEATURES => self.set_features(payload.number()?)?,
            Request::SET_PROTOCOL_FEATURES => self.set_protocol(payload.number()?)?,
            Request::RESET_OWNER => self.disable_all()?,
            Request::RESET_DEVICE => self.reset_device()?,
            Request::SET_MEM_TABLE => self.set_memory_table(payload, descriptors)?,
            Request::ADD_MEM_REG => {
                let memory = self.common.memory.with(payload.region()?, &one(descriptors)?)?;
                self.set_memory(memory)?;
            }
            Request::REM_MEM_REG => {
                let at = payload.region()?;
                let memory = self.common.memory.without(at).ok_or(RequestError::NoSuchRegion(at))?;
                self.set_memory(memory)?;
            }
            Request::SET_VRING_NUM => {
                let (slot, size) = self.slot_and_value(payload)?;
                slot.change(|queue, counters| queue.set_size(size, counters))?;
            }
            Request::SET_VRING_BASE => {
                let (slot, base) = self.slot_and_value(payload)?;
                slot.change(|queue, counters| queue.set_base(base, counters))?;
            }
            Request::SET_VRING_ENABLE => {
                let (slot, enable) = self.slot_and_value(payload)?;
                let enable = match enable {
                    0 => false,
                    1 => true,
                    _ => return Err(value("enabling of a ring", enable.into())),
                };
                slot.change(|queue, counters| queue.set_enabled(enable, counters))?;
            }
            Request::SET_VRING_ADDR => self.set_addresses(payload)?,
            Request::SET_VRING_KICK => {
                let (slot, event) = self.slot_and_event(payload, descriptors)?;
                slot.change(|queue, counters| {
                    queue.set_kick(event.map_or(Kick::Polled, Kick::Event), counters)
                })?;
            }
            Request::SET_VRING_CALL => {
                let (slot, event) = self.slot_and_event(payload, descriptors)?;
                slot.change(|queue, _| queue.set_call(event));
            }
            Request::SET_VRING_ERR => {
                let (slot, event) = self.slot_and_event(payload, descriptors)?;
                slot.change(|queue, _| queue.set_error(event));
            }
            // What it would be told, it reads from the log.
            Request::SET_LOG_FD => drop(one(descriptors)?),
            Request::SET_INFLIGHT_FD => self.set_inflight(payload, descriptors)?,
            Request::NET_SET_MTU => self.set_mtu(payload.number()?)?,
            Request::SEND_RARP => {
                let [mac @ .., _, _] = payload.number()?.to_le_bytes();
                self.shared.tell(PortEvent::Announce(mac));
            }
            _ => return Err(RequestError::Unknown(message.request)),
        }
        Ok(None)
    }

    fn config(&self) -> &PortConfig {
        &self.shared.config
    }

    fn offered(&self) -> u64 {
        features::offered(self.config().offloads, self.config().standby)
    }

    fn slot(&self, index: u32) -> Result<&'a Slot, RequestError> {
        let slots = &self.shared.slots;
        slots.get(index as usize).ok_or(RequestError::NoSuchQueue { index, queues: slots.len() })
    }

    fn slot_and_value(&self, payload: Payload<'_>) -> Result<(&'a Slot, u32), RequestError> {
        let (index, value) = payload.state()?;
        Ok((self.slot(index)?, value))
    }

    fn slot_and_event(
        &self,
        payload: Payload<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(&'a Slot, Option<EventFd>), RequestError> {
        let number = payload.number()?;
        let slot = self.slot(number as u32 & 0xff)?;
        if number & NO_DESCRIPTOR != 0 {
            return Ok((slot, None));
        }
        Ok((slot, Some(EventFd::from_peer(one(descriptors)?)?)))
    }

    /// Gives all queues what they share; the old is let go of when no queue has it any more.
    fn share(&self) -> Result<(), RequestError> {
        let mut result = Ok(());
        for slot in &self.shared.slots {
            let old = self.common.clone();
            let one = slot.change(|queue, counters| queue.set_common(old, counters));
            result = result.and(one);
        }
        result
    }

    fn set_features(&mut self, features: u64) -> Result<(), RequestError> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(RequestError::Features(unknown));
        }
        self.common.features = Features(features);
        self.common.log = self.log.clone().filter(|_| self.common.features.has(bit::LOG_ALL));
        self.share()?;
        if !self.common.features.has(bit::PROTOCOL_FEATURES) {
            // Such a front-end has no request to enable a ring.
            for slot in &self.shared.slots {
                slot.change(|queue, counters| queue.set_enabled(true, counters))?;
            }
        }
        self.shared.set_features(self.common.features);
        self.shared.tell(PortEvent::Negotiated);
        Ok(())
    }

    fn set_protocol(&mut self, features: u64) -> Result<(), RequestError> {
        let unknown = features & !features::PROTOCOL.bits();
        if unknown != 0 {
            return Err(RequestError::Features(unknown));
        }
        self.protocol = Protocol::from_bits_truncate(features);
        Ok(())
    }

    fn disable_all(&mut self) -> Result<(), RequestError> {
        for slot in &self.shared.slots {
            slot.change(|queue, counters| {
                queue.stop(counters);
                queue.set_enabled(false, counters)
            })?;
        }
        Ok(())
    }

    fn reset_device(&mut self) -> Result<(), RequestError> {
        for slot in &self.shared.slots {
            slot.change(|queue, counters| queue.reset(counters));
        }
        self.shared.set_features(Features::default());
        // Memory is the front-end's, not the device's.
        self.common = Common { memory: Arc::clone(&self.common.memory), ..Common::default() };
        self.share()
    }

    fn set_memory_table(
        &mut self,
        payload: Payload<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), RequestError> {
        let regions = payload.regions()?;
        if regions.len() != descriptors.len() {
            return Err(RequestError::Descriptors { got: descriptors.len(), needed: regions.len() });
        }
        let mut memory = GuestMemory::default();
        for (at, file) in regions.into_iter().zip(&descriptors) {
            memory = memory.with(at, file)?;
        }
        self.set_memory(memory)
    }

    fn set_memory(&mut self, memory: GuestMemory) -> Result<(), RequestError> {
        let size = memory.size();
        // The old one is unmapped at the end of this function, when no queue has it and no lock is held.
        let _old = std::mem::replace(&mut self.common.memory, Arc::new(memory));
        self.shared.update(|status| status.memory = size);
        self.share()
    }

    fn set_addresses(&mut self, payload: Payload<'_>) -> Result<(), RequestError> {
        let address = payload.addresses()?;
        let slot = self.slot(address.index)?;
        let addresses = RingAddresses {
            descriptors: address.descriptors,
            available: address.available,
            used: address.used,
            log: (address.flags & LOG_RING != 0).then_some(address.log),
        };
        slot.change(|queue, counters| queue.set_addresses(addresses, counters))
    }

    fn vring_base(&mut self, payload: Payload<'_>) -> Result<Answer, RequestError> {
        let (index, _) = payload.state()?;
        let slot = self.slot(index)?;
        let base = slot.change(|queue, counters| queue.stop(counters));
        let mut payload = index.to_ne_bytes().to_vec();
        payload.extend_from_slice(&base.to_ne_bytes());
        Ok(Answer { payload, descriptor: None })
    }

    fn set_log_base(
        &mut self,
        payload: Payload<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, RequestError> {
        let (len, offset) = payload.log()?;
        self.log = Some(Arc::new(DirtyLog::new(&one(descriptors)?, offset, len)?));
        self.common.log = self.log.clone().filter(|_| self.common.features.has(bit::LOG_ALL));
        self.share()?;
        Ok(Answer { payload: payload.0.to_vec(), descriptor: None })
    }

    fn set_inflight(&mut self, payload: Payload<'_>, descriptors: Vec<OwnedFd>) -> Result<(), RequestError> {
        let at = payload.inflight()?;
        let file = one(descriptors)?;
        self.common.inflight = Some(InflightArea::new(&file, at.offset, at.len, at.queues, at.entries)?);
        self.share()
    }

    fn set_mtu(&mut self, mtu: u64) -> Result<(), RequestError> {
        if mtu < SMALLEST_MTU || mtu > self.config().mtu.into() {
            return Err(value("MTU", mtu));
        }
        self.shared.update(|status| status.mtu = Some(mtu as u16));
        Ok(())
    }
}

impl Drop for Device<'_> {
    /// The front-end went away, and its memory with it.
    fn drop(&mut self) {
        self.shared.set_features(Features::default());
        for slot in &self.shared.slots {
            slot.change(|queue, counters| queue.reset(counters));
        }
    }
}

fn value(what: &'static str, value: u64) -> RequestError {
    RequestError::Value { what, value }
}

fn number(value: u64) -> Answer {
    Answer { payload: value.to_ne_bytes().to_vec(), descriptor: None }
}

/// The only descriptor of a request.
fn one(descriptors: Vec<OwnedFd>) -> Result<OwnedFd, RequestError> {
    let [one] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|all| RequestError::Descriptors { got: all.len(), needed: 1 })?;
    Ok(one)
}

/// A fresh area for descriptors in flight, for the front-end to keep.
fn new_inflight(payload: Payload<'_>) -> Result<Answer, RequestError> {
    let mut at = payload.inflight()?;
    if at.queues == 0 || at.entries == 0 || u32::from(at.entries) > MAX_SIZE {
        // An area of no bytes, and no descriptor: there is none.
        at.len = 0;
        return Ok(Answer { payload: at.to_bytes(), descriptor: None });
    }
    let file = memfd_create("vhost-inflight", MemfdFlags::CLOEXEC)?;
    // Older front-ends ask before they say which kind of ring there will be.
    at.len = InflightArea::bytes_of_any(at.queues, at.entries);
    at.offset = 0;
    ftruncate(&file, at.len)?;
    Ok(Answer { payload: at.to_bytes(), descriptor: Some(file) })
}

/// Where a region is, as it is named in errors.
impl From<[u64; 4]> for RegionAddress {
    fn from([guest, size, user, offset]: [u64; 4]) -> Self {
        Self { guest, size, user, offset }
    }
}
