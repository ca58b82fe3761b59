//! A virtqueue being served: the data path.
//!
//! Everything read from the guest is read once, checked, and only then used. Work is in batches: the available index is read
//! once at the beginning, the used index written once at the end. Nothing here allocates, except for vectors that reach their
//! size and keep it, and nothing makes a system call except a notification.
//!
//! The queue's lock is held around each call: by the worker for a batch, by the session while it changes something.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::chain::{Direction, MAX_CHAIN, Rules, Segment, walk};
use super::counters::Counters;
use super::error::{FrameFault, QueueError};
use super::features::{Features, bit};
use super::header::{Header, MAX_HEADER, header_for};
use super::inflight::InflightQueue;
use super::log::DirtyLog;
use super::memory::GuestMemory;
use super::notify::EventFd;
use super::ring::{SplitRing, WRITE};
use super::sigbus::breaks;
use crate::frame::{Frame, Pool};
use crate::port::{Accepts, BATCH_SEGMENTS, Batch};

/// Ethernet header.
const SHORTEST_FRAME: usize = 14;
/// Ethernet header with two tags, and the longest IP packet.
const LONGEST_FRAME: usize = 22 + 65535;
/// Descriptors that one batch may look at, and segments that its super-frames may become. It bounds how long a guest can
/// keep a worker, whatever its chains are like.
const BATCH_WORK: usize = BATCH_SEGMENTS;
const _: () = assert!(BATCH_WORK >= 4 * MAX_CHAIN as usize, "a batch has room for the longest chains");

/// What a queue is served with.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) direction: Direction,
    pub(super) features: Features,
    /// The longest frame that is not a super-frame, in bytes.
    pub(super) longest_frame: usize,
    pub(super) inflight: Option<InflightQueue>,
    /// The log, and the guest address of the used ring, if that is to be logged too.
    pub(super) log: Option<(Arc<DirtyLog>, Option<u64>)>,
}

/// Where a queue stands, to be gone on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) available: u16,
    pub(super) used: u16,
}

#[derive(Debug)]
pub(super) struct Live {
    ring: SplitRing,
    memory: Arc<GuestMemory>,
    /// How many mappings of the process had broken when the guest's memory was last seen whole.
    breaks_seen: usize,
    rules: Rules,
    header_len: usize,
    mergeable: bool,
    event_index: bool,
    accepts: Accepts,
    longest_frame: usize,
    /// The next position of the available ring.
    available: u16,
    /// The next position of the used ring, and how much of it the driver has been shown.
    used: u16,
    shown: u16,
    /// The used index at the last decision on a notification; None before the first.
    decided: Option<u16>,
    /// Chains that an earlier process took and did not give back: they come first.
    left: VecDeque<u16>,
    inflight: Option<InflightQueue>,
    log: Option<(Arc<DirtyLog>, Option<u64>)>,
    /// The pieces of the frame at hand.
    segments: Vec<Segment>,
    /// The chains of the frame at hand, and how much of each is filled.
    chains: Vec<(u16, u32)>,
    /// Chains put into the used ring and not shown yet; kept only for the in-flight area.
    unshown: Vec<u16>,
}

/// What became of a chain from the guest.
enum Taken {
    /// A frame of so many bytes is in the batch.
    Frame(u64),
    /// The chain was given back, its frame goes nowhere.
    Fault(FrameFault),
    /// There is no chunk for it: it stays where it is.
    Nothing,
}

/// Why a frame did not go into the guest.
enum Refusal {
    Frame(FrameFault),
    NoBuffers,
    Queue(QueueError),
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        Refusal::Queue(error)
    }
}

impl Live {
    pub(super) fn new(ring: SplitRing, memory: Arc<GuestMemory>, position: Position, terms: Terms) -> Self {
        let features = terms.features;
        let accepts = match terms.direction {
            Direction::FromGuest => features.host_accepts(),
            Direction::ToGuest => features.guest_accepts(),
        };
        let event_index = features.has(bit::EVENT_IDX);
        if !event_index {
            ring.set_no_notify(true);
        }
        Self {
            rules: Rules { direction: terms.direction, indirect: features.has(bit::INDIRECT_DESC) },
            header_len: features.header_len(),
            mergeable: features.has(bit::MRG_RXBUF),
            event_index,
            accepts,
            longest_frame: terms.longest_frame,
            available: position.available,
            used: position.used,
            shown: position.used,
            decided: None,
            left: VecDeque::new(),
            inflight: terms.inflight,
            log: terms.log,
            segments: Vec::with_capacity(MAX_CHAIN as usize),
            chains: Vec::with_capacity(64),
            unshown: Vec::new(),
            // One that it is not: the first look is a close one.
            breaks_seen: breaks().wrapping_sub(1),
            ring,
            memory,
        }
    }

    /// Serves these chains before any others.
    pub(super) fn resume(&mut self, left: Vec<u16>) {
        self.left = left.into();
    }

    pub(super) fn position(&self) -> Position {
        Position { available: self.available, used: self.used }
    }

    /// Gives the in-flight area back, for whoever serves the queue next.
    pub(super) fn into_inflight(self) -> Option<InflightQueue> {
        self.inflight
    }

    /// Whether the guest's memory went away. One look, while none did anywhere.
    #[inline]
    fn is_lost(&mut self) -> bool {
        let breaks = breaks();
        if breaks == self.breaks_seen {
            return false;
        }
        self.breaks_seen = breaks;
        self.memory.is_broken()
    }

    /// How many chains wait.
    #[inline]
    fn waiting(&self) -> Result<usize, QueueError> {
        let by = self.ring.available_index().wrapping_sub(self.available);
        if by > self.ring.size() {
            return Err(QueueError::IndexJump { by, size: self.ring.size() });
        }
        Ok(usize::from(by) + self.left.len())
    }

    /// The head of the `ahead`-th chain that waits.
    #[inline]
    fn head(&self, ahead: usize) -> Result<u16, QueueError> {
        let index = match self.left.get(ahead) {
            Some(head) => *head,
            None => self.ring.head(self.available.wrapping_add((ahead - self.left.len()) as u16)),
        };
        let size = self.ring.size();
        if index >= size {
            return Err(QueueError::NoSuchDescriptor { index, size: size.into() });
        }
        Ok(index)
    }

    /// Takes the first chain that waits, and puts it into the used ring, though the driver is not shown it yet.
    #[inline]
    fn complete(&mut self, head: u16, written: u32) {
        if self.left.pop_front().is_none() {
            self.available = self.available.wrapping_add(1);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
            self.unshown.push(head);
        }
        self.ring.put_used(self.used, head, written);
        self.used = self.used.wrapping_add(1);
    }

    /// Shows the driver what was completed.
    fn show(&mut self) {
        if self.used == self.shown {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.before_publish(&self.unshown);
        }
        self.ring.set_used_index(self.used);
        self.shown = self.used;
        if let Some(inflight) = &mut self.inflight {
            inflight.after_publish(&self.unshown, self.used);
            self.unshown.clear();
        }
        self.log_used();
    }

    /// Logs the used ring, which was written.
    fn log_used(&self) {
        if let Some((log, Some(used))) = &self.log {
            log.mark(*used, self.ring.used_len());
        }
    }

    /// Notifies the driver of what it was shown since the last time, if it wants to know.
    pub(super) fn notify(&mut self, call: Option<&EventFd>, counters: &Counters) {
        if self.decided == Some(self.shown) {
            return;
        }
        // What was shown must be seen before we look whether anyone waits for it.
        fence(Ordering::SeqCst);
        let wants = if self.event_index {
            let event = self.ring.used_event();
            let past = self.shown.wrapping_sub(event).wrapping_sub(1);
            self.decided.is_none_or(|decided| past < self.shown.wrapping_sub(decided))
        } else {
            !self.ring.wants_no_interrupt()
        };
        self.decided = Some(self.shown);
        if wants && let Some(call) = call {
            call.signal();
            counters.notified();
        }
    }

    /// Asks for a kick when something comes. `false` if something has come already.
    pub(super) fn arm(&mut self) -> bool {
        if self.event_index {
            self.ring.set_available_event(self.available);
        } else {
            self.ring.set_no_notify(false);
        }
        self.log_used();
        // The wish must be seen before we look whether it came too late.
        fence(Ordering::SeqCst);
        self.left.is_empty() && self.ring.available_index() == self.available
    }

    /// Asks for no kicks. With event index, the event that has passed stays passed.
    pub(super) fn disarm(&mut self) {
        if !self.event_index {
            self.ring.set_no_notify(true);
            self.log_used();
        }
    }

    /// Takes frames from the guest, as many as the batch has room for.
    pub(super) fn receive(
        &mut self,
        pool: &mut Pool,
        batch: &mut Batch,
        counters: &Counters,
    ) -> Result<(), QueueError> {
        if self.is_lost() {
            return Err(QueueError::MemoryLost);
        }
        let waiting = self.waiting()?.min(batch.room());
        if waiting == 0 {
            return if self.is_lost() { Err(QueueError::MemoryLost) } else { Ok(()) };
        }
        let (mut frames, mut bytes) = (0, 0);
        let mut result = Ok(());
        let mut work = 0;
        let before = batch.len();
        for ahead in 0..waiting.min(PREFETCH) {
            self.prefetch(ahead)?;
        }
        for turn in 0..waiting {
            if turn + PREFETCH < waiting
                && let Err(error) = self.prefetch(PREFETCH)
            {
                result = Err(error);
                break;
            }
            match self.take(pool, batch, &mut work) {
                Ok(Taken::Frame(len)) => {
                    frames += 1;
                    bytes += len;
                }
                Ok(Taken::Fault(fault)) => counters.fault(fault, 1),
                Ok(Taken::Nothing) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            if work > BATCH_WORK {
                break;
            }
        }
        if self.is_lost() {
            // Some of the frames may be zeros in part. Which ones cannot be told.
            result = Err(QueueError::MemoryLost);
            batch.truncate(before, pool);
            (frames, bytes) = (0, 0);
        }
        counters.passed(frames, bytes);
        self.show();
        result
    }

    /// Brings the descriptor of a waiting chain near.
    #[inline]
    fn prefetch(&self, ahead: usize) -> Result<(), QueueError> {
        let head = self.head(ahead)?;
        self.memory.prefetch(self.ring.descriptor(head).address);
        Ok(())
    }

    /// Takes one frame into the batch.
    #[inline]
    fn take(&mut self, pool: &mut Pool, batch: &mut Batch, work: &mut usize) -> Result<Taken, QueueError> {
        let head = self.head(0)?;
        let first = self.ring.descriptor(head);
        let is_plain = first.flags == 0;
        let bytes = if is_plain {
            *work += 1;
            first.len.into()
        } else {
            self.segments.clear();
            let bytes = walk(&self.ring, &self.memory, head, self.rules, &mut self.segments)?;
            *work += self.segments.len();
            bytes
        };
        let len = match self.frame_len(bytes) {
            Ok(len) => len,
            Err(fault) => return Ok(self.give_back(head, fault)),
        };
        let Some(mut frame) = pool.take(len) else { return Ok(Taken::Nothing) };
        let mut header = [0; MAX_HEADER];
        let parts = (&mut header[..self.header_len], frame.spare_mut().get_mut(..len).unwrap_or_default());
        let read = if is_plain {
            let outside = QueueError::Outside { address: first.address, len: first.len };
            self.memory.read_two(first.address, parts.0, parts.1).map_err(|_| outside)
        } else {
            gather(&self.memory, &self.segments, [parts.0, parts.1])
        };
        if let Err(error) = read {
            pool.give(frame);
            return Err(error);
        }
        frame.advance(len);
        if let Err(fault) = self.believe(&header, &mut frame) {
            pool.give(frame);
            return Ok(self.give_back(head, fault));
        }
        *work += frame.offload().segments(len);
        self.complete(head, 0);
        batch.push(frame);
        Ok(Taken::Frame(len as u64))
    }

    /// Does what the header of a frame asks, if it may.
    #[inline]
    fn believe(&self, header: &[u8; MAX_HEADER], frame: &mut Frame) -> Result<(), FrameFault> {
        let offload = Header::parse(header).offload(frame.bytes(), self.accepts)?;
        if offload.gso.is_none() && frame.len() > self.longest_frame {
            return Err(FrameFault::Oversize);
        }
        if offload.is_complete() {
            return Ok(());
        }
        frame.set_offload(offload).map_err(|_| FrameFault::ChecksumOutside)
    }

    /// Bytes of the frame in a chain of so many bytes.
    #[inline]
    fn frame_len(&self, bytes: u64) -> Result<usize, FrameFault> {
        let shortest = (self.header_len + SHORTEST_FRAME) as u64;
        let longest = (self.header_len + LONGEST_FRAME) as u64;
        match bytes {
            _ if bytes < shortest => Err(FrameFault::Runt),
            _ if bytes > longest => Err(FrameFault::Oversize),
            _ => Ok(bytes as usize - self.header_len),
        }
    }

    /// Gives a chain back whose frame goes nowhere.
    #[cold]
    fn give_back(&mut self, head: u16, fault: FrameFault) -> Taken {
        self.complete(head, 0);
        Taken::Fault(fault)
    }

    /// Puts frames into the guest; answers how many went in.
    pub(super) fn deliver(
        &mut self,
        frames: &[Frame],
        counters: &Counters,
        sent: &mut usize,
    ) -> Result<(), QueueError> {
        // Whatever is put into memory that went away, is put into pages of this process.
        if self.is_lost() {
            return Err(QueueError::MemoryLost);
        }
        let mut waiting = self.waiting()?;
        let mut bytes = 0;
        let mut result = Ok(());
        let mut work = 0;
        for ahead in 0..waiting.min(frames.len()).min(PREFETCH) {
            self.prefetch(ahead)?;
        }
        for (index, frame) in frames.iter().enumerate() {
            if waiting > PREFETCH
                && let Err(error) = self.prefetch(PREFETCH)
            {
                result = Err(error);
                break;
            }
            match self.put(frame, &mut waiting, &mut work) {
                Ok(()) => {
                    *sent += 1;
                    bytes += frame.len() as u64;
                }
                Err(Refusal::Frame(fault)) => counters.fault(fault, 1),
                Err(Refusal::NoBuffers) => {
                    counters.fault(FrameFault::NoBuffers, (frames.len() - index) as u64);
                    break;
                }
                Err(Refusal::Queue(error)) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if self.is_lost() {
            result = Err(QueueError::MemoryLost);
        }
        counters.passed(*sent as u64, bytes);
        self.show();
        result
    }

    /// Puts one frame into the guest.
    #[inline]
    fn put(&mut self, frame: &Frame, waiting: &mut usize, work: &mut usize) -> Result<(), Refusal> {
        if *waiting == 0 || *work > BATCH_WORK {
            return Err(Refusal::NoBuffers);
        }
        let mut header = header_for(frame.bytes(), frame.offload(), self.accepts).map_err(Refusal::Frame)?;
        let wanted = self.header_len + frame.len();
        let head = self.head(0)?;
        let first = self.ring.descriptor(head);
        if first.flags == WRITE && first.len as usize >= wanted {
            *work += 1;
            let outside = QueueError::Outside { address: first.address, len: first.len };
            self.memory
                .write_two(first.address, &header[..self.header_len], frame.bytes())
                .map_err(|_| outside)?;
            if let Some((log, _)) = &self.log {
                log.mark(first.address, wanted as u64);
            }
            self.complete(head, wanted as u32);
            *waiting -= 1;
            return Ok(());
        }
        self.collect(wanted as u64, *waiting, work)?;
        header[10..12].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());
        self.scatter([&header[..self.header_len], frame.bytes()])?;
        *waiting -= self.chains.len();
        for index in 0..self.chains.len() {
            let (head, filled) = self.chains[index];
            self.complete(head, filled);
        }
        Ok(())
    }

    /// Finds chains of so many bytes among those that wait.
    fn collect(&mut self, wanted: u64, waiting: usize, work: &mut usize) -> Result<(), Refusal> {
        self.segments.clear();
        self.chains.clear();
        let mut found = 0;
        while found < wanted {
            if !self.mergeable && !self.chains.is_empty() {
                return Err(Refusal::Frame(FrameFault::BufferTooSmall));
            }
            if self.chains.len() == waiting {
                return Err(Refusal::NoBuffers);
            }
            let head = self.head(self.chains.len())?;
            let before = self.segments.len();
            let bytes = walk(&self.ring, &self.memory, head, self.rules, &mut self.segments)?;
            *work += self.segments.len() - before;
            if self.segments.len() > MAX_CHAIN as usize {
                return Err(QueueError::ChainTooLong(MAX_CHAIN).into());
            }
            self.chains.push((head, bytes.min(wanted - found) as u32));
            found += bytes;
        }
        Ok(())
    }

    /// Writes the parts into the pieces, one after the other.
    fn scatter(&self, parts: [&[u8]; 2]) -> Result<(), QueueError> {
        let mut segments = self.segments.iter().copied();
        let mut segment = Segment { address: 0, len: 0 };
        for mut part in parts {
            while !part.is_empty() {
                let len = part.len().min(segment.len as usize);
                if len == 0 {
                    // `collect` found room for all parts.
                    let Some(next) = segments.next() else { return Ok(()) };
                    segment = next;
                    continue;
                }
                let outside = QueueError::Outside { address: segment.address, len: segment.len };
                self.memory.write(segment.address, &part[..len]).map_err(|_| outside)?;
                if let Some((log, _)) = &self.log {
                    log.mark(segment.address, len as u64);
                }
                segment.address = segment.address.wrapping_add(len as u64);
                segment.len -= len as u32;
                part = &part[len..];
            }
        }
        Ok(())
    }
}

/// How many chains ahead memory is asked for.
const PREFETCH: usize = 4;

/// Fills the parts from the pieces, one after the other.
fn gather(memory: &GuestMemory, segments: &[Segment], parts: [&mut [u8]; 2]) -> Result<(), QueueError> {
    let mut segments = segments.iter().copied();
    let mut segment = Segment { address: 0, len: 0 };
    for part in parts {
        let mut done = 0;
        while done < part.len() {
            let len = (part.len() - done).min(segment.len as usize);
            if len == 0 {
                // The chain's length was counted before.
                let Some(next) = segments.next() else { return Ok(()) };
                segment = next;
                continue;
            }
            let outside = QueueError::Outside { address: segment.address, len: segment.len };
            memory.read(segment.address, &mut part[done..done + len]).map_err(|_| outside)?;
            segment.address = segment.address.wrapping_add(len as u64);
            segment.len -= len as u32;
            done += len;
        }
    }
    Ok(())
}
