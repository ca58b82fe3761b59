//! A virtqueue being served: the data path.
//!
//! Everything read from the guest is read once, checked, and only then used. Work is in batches: what was done is shown to the
//! driver once, at the end. Nothing here allocates, except for vectors that reach their
//! size and keep it, and nothing makes a system call except a notification.
//!
//! The queue's lock is held around each call: by the worker for a batch, by the session while it changes something.

use std::sync::Arc;

use super::chain::{Direction, MAX_CHAIN, Rules, Segment};
use super::counters::Counters;
use super::error::{FrameFault, QueueError};
use super::features::{Features, bit};
use super::header::{Header, HeaderKind, MAX_HEADER, RawHeader, header_for};
use super::log::DirtyLog;
use super::memory::{Access, GuestMemory};
use super::notify::EventFd;
use super::ring::{Descriptor, WRITE};
use super::sigbus::breaks;
use super::virtqueue::{Position, Virtqueue};
use crate::frame::{Frame, Pool};
use crate::port::{Accepts, BATCH, BATCH_SEGMENTS, Batch};

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
    /// Where writes to buffers are logged.
    pub(super) log: Option<Arc<DirtyLog>>,
}

#[derive(Debug)]
pub(super) struct Live<Q: Virtqueue> {
    ring: Q,
    memory: Arc<GuestMemory>,
    /// How many mappings of the process had broken when the guest's memory was last seen whole.
    breaks_seen: usize,
    rules: Rules,
    header: HeaderKind,
    mergeable: bool,
    /// Bytes of a guest's headers that are not looked at: of one that was granted no offloads, they can ask for nothing, and may lie in
    /// a cache line of their own.
    unread: usize,
    accepts: Accepts,
    longest_frame: usize,
    log: Option<Arc<DirtyLog>>,
    /// Chains that wait, looked at ahead, so that what they lead to is near when its turn comes.
    heads: Vec<(Q::Chain, Descriptor)>,
    /// How many of them have been taken.
    taken: usize,
    /// The pieces of the frame at hand.
    segments: Vec<Segment>,
    /// The chains of the frame at hand, and how much of each is filled.
    chains: Vec<(Q::Chain, u32)>,
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

impl<Q: Virtqueue> Live<Q> {
    pub(super) fn new(ring: Q, memory: Arc<GuestMemory>, terms: Terms) -> Self {
        let features = terms.features;
        let accepts = match terms.direction {
            Direction::FromGuest => features.host_accepts(),
            Direction::ToGuest => features.guest_accepts(),
        };
        Self {
            rules: Rules { direction: terms.direction, indirect: features.has(bit::INDIRECT_DESC) },
            header: features.header_kind(),
            mergeable: features.has(bit::MRG_RXBUF),
            unread: match terms.direction {
                Direction::FromGuest if accepts == Accepts::default() => features.header_len(),
                _ => 0,
            },
            accepts,
            longest_frame: terms.longest_frame,
            log: terms.log,
            heads: Vec::with_capacity(2 * BATCH),
            taken: 0,
            segments: Vec::with_capacity(MAX_CHAIN as usize),
            chains: Vec::with_capacity(64),
            // One that it is not: the first look is a close one.
            breaks_seen: breaks().wrapping_sub(1),
            ring,
            memory,
        }
    }

    pub(super) fn position(&self) -> Position {
        self.ring.position()
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

    /// Notifies the driver of what it was shown since the last time, if it wants to know.
    #[inline]
    pub(super) fn notify(&mut self, call: Option<&EventFd>, counters: &Counters) {
        if self.ring.wants_interrupt()
            && let Some(call) = call
        {
            call.signal();
            counters.notified();
        }
    }

    /// Asks for a kick when something comes. `false` if something has come already.
    pub(super) fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Asks for no kicks.
    pub(super) fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Takes frames from the guest, as many as the batch has room for.
    // Put into one function with that of the other kind of ring, it has no registers to spare.
    #[inline(never)]
    pub(super) fn receive(
        &mut self,
        pool: &mut Pool,
        batch: &mut Batch,
        counters: &Counters,
    ) -> Result<(), QueueError> {
        if self.is_lost() {
            return Err(QueueError::MemoryLost);
        }
        self.ring.look(batch.room())?;
        let (mut frames, mut bytes) = (0, 0);
        let mut result = Ok(());
        let mut work = 0;
        let before = batch.len();
        self.approach(batch.room(), Access::Read);
        for _ in 0..batch.room() {
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
        self.ring.show();
        // While others are served, the next ones come near.
        self.approach(BATCH, Access::Read);
        result
    }

    /// Looks at chains that wait, up to so many, and has the first bytes of their buffers brought near.
    #[inline(always)]
    fn approach(&mut self, chains: usize, access: Access) {
        self.heads.drain(..std::mem::take(&mut self.taken));
        let known = self.heads.len();
        if known < chains {
            self.ring.peek(chains, &mut self.heads);
            for (_, first) in &self.heads[known..] {
                let address = first.address.wrapping_add(self.unread as u64);
                self.memory.prefetch(address, (first.len as usize).saturating_sub(self.unread), access);
            }
        }
    }

    /// The next chain, by its first descriptor. If it is not completed, or with others, [`forget`](Self::forget) has to be told.
    #[inline(always)]
    fn next(&mut self) -> Result<Option<(Q::Chain, Descriptor)>, QueueError> {
        match self.heads.get(self.taken) {
            Some(head) => {
                self.taken += 1;
                Ok(Some(*head))
            }
            None => self.ring.first(),
        }
    }

    /// Forgets what was looked at ahead.
    #[cold]
    fn forget(&mut self) {
        self.heads.clear();
        self.taken = 0;
    }

    /// Takes one frame into the batch.
    #[inline(always)]
    fn take(&mut self, pool: &mut Pool, batch: &mut Batch, work: &mut usize) -> Result<Taken, QueueError> {
        let Some((mut chain, first)) = self.next()? else { return Ok(Taken::Nothing) };
        let is_plain = first.flags == 0;
        let bytes = if is_plain {
            *work += 1;
            first.len.into()
        } else {
            self.segments.clear();
            let cursor = &mut self.ring.cursor();
            let walked = self.ring.walk(&self.memory, cursor, self.rules, &mut self.segments)?;
            let Some((walked, bytes)) = walked else {
                self.forget();
                return Ok(Taken::Nothing);
            };
            if Q::heads_of(walked).is_none() {
                self.forget();
            }
            chain = walked;
            *work += self.segments.len();
            bytes
        };
        let len = match self.frame_len(bytes) {
            Ok(len) => len,
            Err(fault) => return Ok(self.give_back(chain, fault)),
        };
        let Some(frame) = batch.add(pool, len) else {
            self.forget();
            return Ok(Taken::Nothing);
        };
        let read = if !is_plain {
            self.gather(frame.bytes_mut())
        } else {
            let read = if self.unread > 0 {
                let read = self.memory.read_behind(first.address, self.unread, frame.bytes_mut());
                read.map(|()| RawHeader::NOTHING)
            } else {
                self.memory.read_frame(first.address, self.header, frame.bytes_mut())
            };
            read.map_err(|_| QueueError::Outside { address: first.address, len: first.len })
        };
        let believed = match read {
            Ok(header) => self.believe(header, frame, len),
            Err(error) => {
                batch.truncate(batch.len() - 1, pool);
                return Err(error);
            }
        };
        match believed {
            Ok(segments) => *work += segments,
            Err(fault) => {
                batch.truncate(batch.len() - 1, pool);
                return Ok(self.give_back(chain, fault));
            }
        }
        self.ring.complete(chain, 0);
        Ok(Taken::Frame(len as u64))
    }

    /// Does what the header of a frame asks, if it may; answers how many segments are to be made of it.
    #[inline(always)]
    fn believe(&self, header: RawHeader, frame: &mut Frame, len: usize) -> Result<usize, FrameFault> {
        if header.asks_nothing() {
            return if len > self.longest_frame { Err(FrameFault::Oversize) } else { Ok(0) };
        }
        let offload = Header::from(header).offload(frame.bytes(), self.accepts)?;
        if offload.gso.is_none() && len > self.longest_frame {
            return Err(FrameFault::Oversize);
        }
        frame.set_offload(offload).map_err(|_| FrameFault::ChecksumOutside)?;
        Ok(offload.segments(frame.len()))
    }

    /// Bytes of the frame in a chain of so many bytes.
    #[inline(always)]
    fn frame_len(&self, bytes: u64) -> Result<usize, FrameFault> {
        let shortest = (self.header.len() + SHORTEST_FRAME) as u64;
        let longest = (self.header.len() + LONGEST_FRAME) as u64;
        match bytes {
            _ if bytes < shortest => Err(FrameFault::Runt),
            _ if bytes > longest => Err(FrameFault::Oversize),
            _ => Ok(bytes as usize - self.header.len()),
        }
    }

    /// Fills a frame, and the header before it, from the pieces at hand.
    fn gather(&self, frame: &mut [u8]) -> Result<RawHeader, QueueError> {
        let mut header = [0; MAX_HEADER];
        gather(&self.memory, &self.segments, [&mut header[..self.header.len()], frame])?;
        let [a, b, c, d, e, f, g, h, i, j, ..] = header;
        let read = RawHeader::new([a, b, c, d, e, f, g, h], [i, j]);
        Ok(if self.unread > 0 { RawHeader::NOTHING } else { read })
    }

    /// Gives a chain back whose frame goes nowhere.
    #[cold]
    fn give_back(&mut self, chain: Q::Chain, fault: FrameFault) -> Taken {
        self.ring.complete(chain, 0);
        Taken::Fault(fault)
    }

    /// Puts frames into the guest; answers how many went in.
    // As above.
    #[inline(never)]
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
        self.ring.look(frames.len())?;
        let mut bytes = 0;
        let mut result = Ok(());
        let mut work = 0;
        self.approach(frames.len(), Access::Write);
        for (index, frame) in frames.iter().enumerate() {
            let put = match self.put(frame, &mut work) {
                // A long frame takes more chains than were looked for.
                Err(Refusal::NoBuffers) => {
                    let looked = self.ring.look(usize::MAX).map_err(Refusal::from);
                    looked.and_then(|()| self.put(frame, &mut work))
                }
                put => put,
            };
            match put {
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
        self.ring.show();
        self.approach(BATCH, Access::Write);
        result
    }

    /// Puts one frame into the guest.
    #[inline(always)]
    fn put(&mut self, frame: &Frame, work: &mut usize) -> Result<(), Refusal> {
        if *work > BATCH_WORK {
            return Err(Refusal::NoBuffers);
        }
        let header = header_for(frame.bytes(), frame.offload(), self.accepts).map_err(Refusal::Frame)?;
        let Some((chain, first)) = self.next()? else { return Err(Refusal::NoBuffers) };
        let wanted = self.header.len() + frame.len();
        if first.flags == WRITE && first.len as usize >= wanted {
            *work += 1;
            let outside = QueueError::Outside { address: first.address, len: first.len };
            self.memory
                .write_frame(first.address, self.header, header, frame.bytes())
                .map_err(|_| outside)?;
            if let Some(log) = &self.log {
                log.mark(first.address, wanted as u64);
            }
            self.ring.complete(chain, wanted as u32);
            return Ok(());
        }
        if let Err(refusal) = self.collect(wanted as u64, work) {
            self.forget();
            return Err(refusal);
        }
        let header = header.in_buffers(self.chains.len()).to_bytes();
        self.scatter([&header[..self.header.len()], frame.bytes()])?;
        // One of them has been taken.
        let heads = self.chains.iter().try_fold(0, |sum, (chain, _)| Some(sum + Q::heads_of(*chain)?));
        let others = heads.map_or(usize::MAX, |heads| heads - 1);
        self.taken = self.taken.saturating_add(others).min(self.heads.len());
        for (chain, filled) in &self.chains {
            self.ring.complete(*chain, *filled);
        }
        Ok(())
    }

    /// Finds chains of so many bytes among those that wait.
    fn collect(&mut self, wanted: u64, work: &mut usize) -> Result<(), Refusal> {
        self.segments.clear();
        self.chains.clear();
        let mut cursor = self.ring.cursor();
        let mut found = 0;
        while found < wanted {
            if !self.mergeable && !self.chains.is_empty() {
                return Err(Refusal::Frame(FrameFault::BufferTooSmall));
            }
            let before = self.segments.len();
            let walked = self.ring.walk(&self.memory, &mut cursor, self.rules, &mut self.segments)?;
            let Some((chain, bytes)) = walked else { return Err(Refusal::NoBuffers) };
            *work += self.segments.len() - before;
            if self.segments.len() > MAX_CHAIN as usize {
                return Err(QueueError::ChainTooLong(MAX_CHAIN).into());
            }
            self.chains.push((chain, bytes.min(wanted - found) as u32));
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
                if let Some(log) = &self.log {
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
