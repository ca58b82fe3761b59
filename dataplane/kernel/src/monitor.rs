//! Notice of interfaces that come, change and go.

use std::time::Duration;

use crate::EngineError;

/// What happened to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is new, or some property of it changed.
    Changed {
        /// Interface index.
        ifindex: u32,
        /// Name.
        name: String,
    },
    /// It is gone.
    Gone {
        /// Interface index.
        ifindex: u32,
        /// Name.
        name: String,
    },
    /// Events were lost; look at everything.
    Overrun,
}

/// A subscription to the kernel's link notifications in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct LinkMonitor {}

impl LinkMonitor {
    /// Subscribes.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn open() -> Result<LinkMonitor, EngineError> {
        Err(EngineError::ObjectMissing)
    }

    /// Waits for events, up to `timeout`; an empty list means that there were none.
    ///
    /// # Errors
    /// [`EngineError::Netlink`].
    pub fn next_timeout(&self, _timeout: Duration) -> Result<Vec<LinkEvent>, EngineError> {
        Err(EngineError::ObjectMissing)
    }
}
