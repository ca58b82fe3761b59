//! From a descriptor chain to the pieces of guest memory that it names, believing nothing.

use super::error::QueueError;
use super::memory::GuestMemory;
use super::ring::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, SplitRing, WRITE};

/// The longest chain that is served, indirect tables included: as QEMU's. It bounds the work that one frame can ask for.
pub(super) const MAX_CHAIN: u32 = 1024;

/// A piece of guest memory. The address has not been looked up yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) len: u32,
}

/// Which way the bytes of a queue go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    FromGuest,
    ToGuest,
}

/// What a chain may look like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) direction: Direction,
    pub(super) indirect: bool,
}

/// Appends the pieces of the chain that begins with `head` to `segments`; answers how many bytes they are.
pub(super) fn walk(
    ring: &SplitRing,
    memory: &GuestMemory,
    head: u16,
    rules: Rules,
    segments: &mut Vec<Segment>,
) -> Result<u64, QueueError> {
    let size = u32::from(ring.size());
    let mut walker = Walker { rules, segments, visited: 0, bytes: 0 };
    let mut index = head;
    loop {
        if u32::from(index) >= size {
            return Err(QueueError::NoSuchDescriptor { index, size });
        }
        let descriptor = ring.descriptor(index);
        if descriptor.is(INDIRECT) {
            walker.indirect(memory, &descriptor)?;
            break;
        }
        walker.visit(&descriptor, size)?;
        if !descriptor.is(NEXT) {
            break;
        }
        index = descriptor.next;
    }
    Ok(walker.bytes)
}

struct Walker<'a> {
    rules: Rules,
    segments: &'a mut Vec<Segment>,
    visited: u32,
    bytes: u64,
}

impl Walker<'_> {
    /// Takes one descriptor. `limit` is the length of its table: a longer chain has been there before.
    #[inline]
    fn visit(&mut self, descriptor: &Descriptor, limit: u32) -> Result<(), QueueError> {
        self.visited += 1;
        let limit = limit.min(MAX_CHAIN);
        if self.visited > limit {
            return Err(QueueError::ChainTooLong(limit));
        }
        if descriptor.is(WRITE) != (self.rules.direction == Direction::ToGuest) {
            return Err(QueueError::WrongDirection);
        }
        self.segments.push(Segment { address: descriptor.address, len: descriptor.len });
        self.bytes += u64::from(descriptor.len);
        Ok(())
    }

    /// Takes a table of descriptors somewhere in guest memory, which ends the chain.
    fn indirect(&mut self, memory: &GuestMemory, table: &Descriptor) -> Result<(), QueueError> {
        let entries = table.len / DESCRIPTOR as u32;
        let is_table = entries > 0 && table.len.is_multiple_of(DESCRIPTOR as u32);
        if !self.rules.indirect || table.is(NEXT) || !is_table {
            return Err(QueueError::BadIndirect);
        }
        let limit = self.visited.saturating_add(entries);
        let mut index = 0;
        loop {
            if u32::from(index) >= entries {
                return Err(QueueError::NoSuchDescriptor { index, size: entries });
            }
            let outside = QueueError::Outside { address: table.address, len: table.len };
            let at = table.address.checked_add(DESCRIPTOR as u64 * u64::from(index)).ok_or(outside)?;
            let mut bytes = [0; DESCRIPTOR];
            memory.read(at, &mut bytes).map_err(|_| outside)?;
            let descriptor = Descriptor::from_bytes(bytes);
            if descriptor.is(INDIRECT) {
                return Err(QueueError::BadIndirect);
            }
            self.visit(&descriptor, limit)?;
            if !descriptor.is(NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }
}
