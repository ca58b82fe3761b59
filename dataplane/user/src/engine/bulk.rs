//! Which guests send super-frames, and so keep their TCP to the trunk where an uplink is the shorter way.
//!
//! An uplink takes no super-frames; the trunk carries them whole, and the kernel and the NIC cut them for less. Frames of one
//! flow must not take both ways, since they would overtake each other. So it is the port that decides: all TCP of a port
//! that has lately sent a super-frame of TCP takes the trunk, and everything else the uplink.

use sluice_pipeline::tables::PORTS_MAX;

use crate::frame::{Gso, GsoKind, Offload};

/// Ports that send TCP in super-frames, as one worker sees them.
#[derive(Debug)]
pub(super) struct BulkSenders {
    /// By port: when the last super-frame came, in seconds, and one more.
    last: Box<[u32]>,
}

impl BulkSenders {
    /// Seconds without super-frames after which a port is none of them: nothing is on its way by then.
    pub(super) const LULL: u32 = 10;

    pub(super) fn new() -> BulkSenders {
        BulkSenders { last: vec![0; PORTS_MAX as usize].into() }
    }

    /// Looks at a frame that came from a port.
    #[inline]
    pub(super) fn note(&mut self, port: u32, offload: Offload, seconds: u32) {
        let Some(Gso { kind: GsoKind::TcpV4 | GsoKind::TcpV6, .. }) = offload.gso else { return };
        if let Some(last) = self.last.get_mut(port as usize) {
            *last = seconds.saturating_add(1);
        }
    }

    /// Whether a port is one of them.
    #[inline]
    pub(super) fn has(&self, port: u32, seconds: u32) -> bool {
        self.last
            .get(port as usize)
            .is_some_and(|last| *last > 0 && seconds.wrapping_sub(*last - 1) <= Self::LULL)
    }
}

#[cfg(test)]
mod tests;
