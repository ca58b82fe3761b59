//! vhost-user: guest rings served directly, guest memory shared with the VMM.
//!
//! ```text
//!   VMM ── unix socket ──▶ session, device        one thread per port; changes queues under their locks
//!                             │
//!   guest memory ◀──────── queue, live ◀──────── FromGuest, ToGuest        workers, one batch per lock
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`memory`], `sigbus` | the guest's memory, mapped; what happens when it goes away |
//! | `ring`, `chain` | split rings in memory and descriptor chains, with every index checked |
//! | `packed` | packed rings, in memory and being served |
//! | `virtqueue`, `split` | what the data path asks of a ring of either kind; split rings being served |
//! | `header` | the virtio-net header, with every claim checked |
//! | `live`, `service`, `queue` | the data path; the same for either kind of ring; a queue's life |
//! | `inflight`, `log` | what a crash must not lose; what a migration must not miss |
//! | `wire`, `payload`, `device`, `session` | the protocol |
//! | `notify`, `lines` | notifications that nobody has to wait for; a log that nobody can flood |
//! | [`port`], `queues` | what the rest of the engine sees |
//! | [`driver`] | a guest's side of all this, for tests and benches |

//!
//! A guest is believed nothing. What it does wrong ends in a [`FrameFault`], which costs it a frame, or a [`QueueError`], which
//! costs it the queue until it sets it up anew; both are counted, and neither reaches another port.
//!
//! Not served: the control queue, which the front-end keeps; post-copy migration.

mod chain;
mod counters;
mod device;
pub mod driver;
mod error;
pub mod features;
pub(crate) mod header;
mod inflight;
mod lines;
mod live;
mod log;
pub mod memory;
mod notify;
mod packed;
mod payload;
pub mod port;
mod queue;
mod queues;
mod ring;
mod service;
mod session;
mod sigbus;
mod split;
#[cfg(test)]
mod tests;
mod virtqueue;
mod wire;

pub use counters::QueueCounters;
pub use error::{FrameFault, MemoryError, QueueError, RequestError, SetupError};
pub use lines::LogLines;
pub use port::{Mode, OpenError, Port, PortConfig, PortEvent, QueueStatus, Status};
pub use queue::QueueState;
pub use queues::{FromGuest, ToGuest};
