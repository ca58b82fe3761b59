//! The ways out of a port, shared by all workers.

use parking_lot::{Mutex, MutexGuard};

use crate::port::Transmit;

/// A port's transmit queues.
#[derive(Debug)]
pub(super) struct Egress {
    queues: Vec<Mutex<Box<dyn Transmit>>>,
}

impl Egress {
    /// `None` without a queue.
    pub(super) fn new(queues: Vec<Box<dyn Transmit>>) -> Option<Egress> {
        let queues: Vec<_> = queues.into_iter().map(Mutex::new).collect();
        (!queues.is_empty()).then_some(Egress { queues })
    }

    /// How many there are.
    #[inline]
    pub(super) fn count(&self) -> usize {
        self.queues.len()
    }

    /// A queue, of which there is always one. Its lock is held for a batch.
    #[inline]
    pub(super) fn queue(&self, lane: usize) -> MutexGuard<'_, Box<dyn Transmit>> {
        self.queues[lane % self.queues.len()].lock()
    }
}
