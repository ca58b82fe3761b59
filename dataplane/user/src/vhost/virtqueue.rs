//! What the data path asks of a virtqueue, split or packed: chains that wait, in order, and a way to give them back.
//!
//! A batch begins with [`look`](Virtqueue::look), takes chains and [`complete`](Virtqueue::complete)s them in the order in which
//! they wait, and ends with [`show`](Virtqueue::show). Chains of the next one may be [`peek`](Virtqueue::peek)ed at before. The data path is compiled once for each kind: what differs costs no
//! decision per frame.

use std::fmt;

use super::chain::{Rules, Segment};
use super::error::QueueError;
use super::memory::GuestMemory;
use super::ring::Descriptor;

/// Where a queue stands, to be gone on from. Of a split ring both are free-running indices; of a packed one both are places in
/// the ring, with the wrap counter in the highest bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// The next chain to be taken.
    pub(super) available: u16,
    /// Where the next chain is given back.
    pub(super) used: u16,
}

/// A ring, and where both sides stand in it.
pub(super) trait Virtqueue: fmt::Debug {
    /// What it takes to give a chain back.
    type Chain: Copy + fmt::Debug;
    /// A place among the chains that wait.
    type Cursor: Copy;

    /// Looks how far the driver is, unless so many chains are known to wait: what the driver has written since is far away. Chains
    /// that come later may or may not be seen before the next look.
    fn look(&mut self, wanted: usize) -> Result<(), QueueError>;

    /// Appends chains that wait behind those that `heads` has, until it has so many, as far as they are easily found: as
    /// [`first`](Self::first) will have them. Only the front of `heads` may be left out of it, and only when it was completed.
    fn peek(&self, wanted: usize, heads: &mut Vec<(Self::Chain, Descriptor)>);

    /// How many of `heads` a chain has been: none says that they are to be forgotten.
    fn heads_of(chain: Self::Chain) -> Option<usize>;

    /// The first chain that waits.
    fn cursor(&self) -> Self::Cursor;

    /// The first chain that waits, by its first descriptor; None if none does. The chain can be given back as it is only if that
    /// descriptor is all of it.
    fn first(&self) -> Result<Option<(Self::Chain, Descriptor)>, QueueError>;

    /// Appends the pieces of the chain at a cursor to `segments` and moves the cursor behind it; answers the chain and how many
    /// bytes it has. None if no chain waits there.
    fn walk(
        &self,
        memory: &GuestMemory,
        cursor: &mut Self::Cursor,
        rules: Rules,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<(Self::Chain, u64)>, QueueError>;

    /// Takes the first chain that waits and gives it back, with so many bytes written; the driver does not see it yet.
    fn complete(&mut self, chain: Self::Chain, written: u32);

    /// Shows the driver what was completed, all at once.
    fn show(&mut self);

    /// Whether the driver wants to be notified of what it was shown since the last time.
    fn wants_interrupt(&mut self) -> bool;

    /// Asks for a kick when something comes. `false` if something has come already.
    fn arm(&mut self) -> bool;

    /// Asks for no kicks.
    fn disarm(&mut self);

    /// Where it stands. Everything that was completed must have been shown.
    fn position(&self) -> Position;
}
