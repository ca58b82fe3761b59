//! From descriptors to the pieces of guest memory that they name, believing nothing.

use super::error::QueueError;
use super::memory::GuestMemory;
use super::ring::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, WRITE};

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

/// Goes along one chain.
pub(super) struct Walker<'a> {
    rules: Rules,
    segments: &'a mut Vec<Segment>,
    visited: u32,
    bytes: u64,
}

impl<'a> Walker<'a> {
    /// The pieces are appended to `segments`.
    #[inline]
    pub(super) fn new(rules: Rules, segments: &'a mut Vec<Segment>) -> Self {
        Self { rules, segments, visited: 0, bytes: 0 }
    }

    /// Bytes of what was visited.
    #[inline]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes one descriptor. `limit` is the length of its table: a longer chain has been there before.
    #[inline(always)]
    pub(super) fn visit(&mut self, descriptor: &Descriptor, limit: u32) -> Result<(), QueueError> {
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

    /// Entries of a table of descriptors somewhere in guest memory, if it may be one.
    #[inline(always)]
    fn entries(&self, table: &Descriptor) -> Result<u32, QueueError> {
        let entries = table.len / DESCRIPTOR as u32;
        let is_table = entries > 0 && table.len.is_multiple_of(DESCRIPTOR as u32);
        if !self.rules.indirect || table.is(NEXT) || !is_table {
            return Err(QueueError::BadIndirect);
        }
        Ok(entries)
    }

    /// Takes a table of descriptors that are chained, which ends the chain: as split rings have it.
    #[inline(always)]
    pub(super) fn chained_table(
        &mut self,
        memory: &GuestMemory,
        table: &Descriptor,
    ) -> Result<(), QueueError> {
        let entries = self.entries(table)?;
        let limit = self.visited.saturating_add(entries);
        let mut index = 0;
        loop {
            if u32::from(index) >= entries {
                return Err(QueueError::NoSuchDescriptor { index, size: entries });
            }
            let descriptor = Descriptor::from_bytes(entry(memory, table, index.into())?);
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

    /// Takes a table of descriptors that follow each other, all of which are the chain: as packed rings have it.
    ///
    /// What is only read may be said to be writable: DPDK's driver says so of the headers in the tables of its transmit queues.
    #[inline(always)]
    pub(super) fn whole_table(&mut self, memory: &GuestMemory, table: &Descriptor) -> Result<(), QueueError> {
        let entries = self.entries(table)?;
        let ignored = if self.rules.direction == Direction::FromGuest { WRITE } else { 0 };
        for index in 0..entries {
            let mut descriptor = Descriptor::from_packed(entry(memory, table, index)?);
            descriptor.flags &= !ignored;
            self.visit(&descriptor, entries)?;
        }
        Ok(())
    }
}

/// One descriptor of a table.
#[inline(always)]
fn entry(memory: &GuestMemory, table: &Descriptor, index: u32) -> Result<[u8; DESCRIPTOR], QueueError> {
    let outside = QueueError::Outside { address: table.address, len: table.len };
    let at = table.address.checked_add(DESCRIPTOR as u64 * u64::from(index)).ok_or(outside)?;
    let mut bytes = [0; DESCRIPTOR];
    memory.read(at, &mut bytes).map_err(|_| outside)?;
    Ok(bytes)
}
