//! A port that guests attach to by vhost-user: its settings, its queues, and the thread that talks to the front-end.
//!
//! A port has one thread of its own, which sleeps except when the front-end asks for something: no front-end can keep another
//! waiting. Workers never see it; they hold [`FromGuest`] and [`ToGuest`], the ends of each queue pair, which stay the same while
//! front-ends come and go.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::counters::{Counters, QueueCounters};
use super::features::Features;
use super::lines::LogLines;
use super::notify;
use super::queue::{Queue, QueueState, Sign};
use super::queues::{FromGuest, ToGuest};
pub use super::session::remove_dead_socket;
use super::session::{Endpoint, serve};

/// The most queue pairs of a port: a kick names its queue in seven bits.
pub const MAX_QUEUE_PAIRS: u16 = 64;
/// Ethernet header with two tags.
const LONGEST_HEADER: usize = 22;

/// Who waits for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The port listens; the VMM connects (`server=off` in QEMU).
    Server,
    /// The VMM listens; the port connects, and tries until it can.
    Client,
}

/// A port's own settings. They outlive all connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// The unix socket.
    pub path: PathBuf,
    /// Who listens on it.
    pub mode: Mode,
    /// Most queue pairs that a guest may use: 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// The longest IP packet in bytes, super-frames apart.
    pub mtu: u16,
    /// Whether checksum and segmentation offloads are offered.
    pub offloads: bool,
    /// Whether `VIRTIO_NET_F_STANDBY` is offered, for a failover pair with a VF.
    pub standby: bool,
}

/// What happened at a port, told on the port's own thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortEvent {
    /// A front-end is there.
    Connected,
    /// It is gone; the port waits for the next.
    Disconnected,
    /// The guest chose its features: what the port takes may have changed.
    Negotiated,
    /// The guest has moved here: the network is to be told of this address (an RARP request from it).
    Announce([u8; 6]),
}

/// Told of every [`PortEvent`]. It must not block for long: the front-end waits.
pub type Listener = Box<dyn Fn(PortEvent) + Send + Sync>;

/// A port cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No queue pairs, or too many.
    #[error("{0} queue pairs: a vhost-user port has 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs(u16),
    /// Another process listens there.
    #[error("{path} is in use: another process listens there; stop it, or give the port another path")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else at that path.
    #[error("{path} exists and is not a socket: move it away, or give the port another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("listening on {path}: {source}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Guests could not be notified without a danger of waiting for them.
    #[error(
        "notifying guests needs asynchronous I/O, which the kernel refuses ({0}): \
         it must be built with CONFIG_AIO, and fs.aio-nr be below fs.aio-max-nr"
    )]
    Notifications(#[source] Errno),
    /// The kernel refused something else.
    #[error("opening a vhost-user port: {0}")]
    System(#[from] Errno),
    /// No thread.
    #[error("starting the thread of a vhost-user port: {0}")]
    Thread(#[source] io::Error),
}

/// A queue, and what is counted of it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) queue: Mutex<Queue>,
    pub(super) counters: Counters,
    pub(super) event: Arc<OwnedFd>,
    pub(super) sign: Arc<Sign>,
    /// A worker waited for the queue in vain, and none has had it since.
    pub(super) is_held: AtomicBool,
}

/// What the session and the workers share.
pub(super) struct Shared {
    pub(super) config: PortConfig,
    pub(super) slots: Vec<Slot>,
    /// An eventfd, readable once the port is being removed.
    pub(super) stop: OwnedFd,
    /// Features that the guest took; none without a guest.
    features: AtomicU64,
    status: Mutex<Status>,
    listener: Listener,
    pub(super) lines: Arc<LogLines>,
}

impl Shared {
    pub(super) fn tell(&self, event: PortEvent) {
        (self.listener)(event);
    }

    #[inline]
    pub(super) fn features(&self) -> Features {
        Features(self.features.load(Ordering::Acquire))
    }

    pub(super) fn set_features(&self, features: Features) {
        self.features.store(features.0, Ordering::Release);
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock());
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

/// How a port is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether a front-end is there.
    pub is_connected: bool,
    /// How many have been.
    pub connections: u64,
    /// Features that the guest took; none without a guest.
    pub features: u64,
    /// Bytes of memory that the guest shares.
    pub memory: u64,
    /// The MTU that the front-end told.
    pub mtu: Option<u16>,
    /// Requests that were refused, in all connections.
    pub refused_requests: u64,
    /// Why the last connection ended, or the last request was refused.
    pub last_error: Option<String>,
    /// Each queue: a pair's first is to the guest, its second from the guest.
    pub queues: Vec<QueueStatus>,
}

/// How a queue is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueStatus {
    /// What it is doing.
    pub state: QueueState,
    /// What it has done.
    pub counters: QueueCounters,
}

/// A port that a guest attaches to by vhost-user. Dropping it ends the connection and removes the socket.
#[derive(Debug)]
pub struct Port {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    /// Opens a port. In server mode it listens when this returns.
    ///
    /// # Errors
    ///
    /// The settings make no port, or the socket or the thread cannot be made.
    pub fn open(config: PortConfig, listener: Listener) -> Result<Self, OpenError> {
        if config.queue_pairs == 0 || config.queue_pairs > MAX_QUEUE_PAIRS {
            return Err(OpenError::QueuePairs(config.queue_pairs));
        }
        notify::check().map_err(OpenError::Notifications)?;
        let longest = usize::from(config.mtu) + LONGEST_HEADER;
        let lines = Arc::new(LogLines::new(config.path.display().to_string()));
        let slots = (0..usize::from(config.queue_pairs) * 2).map(|index| {
            let queue = Queue::new(index, longest, Arc::clone(&lines))?;
            let event = Arc::clone(queue.event());
            let sign = Arc::clone(queue.sign());
            let is_held = AtomicBool::new(false);
            Ok(Slot { queue: Mutex::new(queue), counters: Counters::default(), event, sign, is_held })
        });
        let slots = slots.collect::<Result<Vec<_>, Errno>>()?;
        let endpoint = Endpoint::new(&config)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            config,
            slots,
            stop,
            features: AtomicU64::new(0),
            status: Mutex::default(),
            listener,
            lines,
        });
        let thread = std::thread::Builder::new().name("vhost-user".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || serve(&shared, &endpoint)
        });
        Ok(Self { shared, thread: Some(thread.map_err(OpenError::Thread)?) })
    }

    /// The ends of each queue pair. Each end is for one worker at a time: asking twice makes two that take turns.
    #[must_use]
    pub fn queues(&self) -> Vec<(FromGuest, ToGuest)> {
        let pairs = 0..usize::from(self.shared.config.queue_pairs);
        let ends = pairs.map(|pair| {
            let shared = &self.shared;
            (FromGuest::new(Arc::clone(shared), 2 * pair + 1), ToGuest::new(Arc::clone(shared), 2 * pair))
        });
        ends.collect()
    }

    /// How the port is now. No worker waits for whoever asks.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = self.shared.status.lock().clone();
        status.features = self.shared.features().0;
        let queues = self
            .shared
            .slots
            .iter()
            .map(|slot| QueueStatus { state: slot.sign.state(), counters: slot.counters.read() });
        status.queues = queues.collect();
        status
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // The counter of an eventfd that nobody else writes is not full.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(path = %self.shared.config.path.display(), "the thread of a vhost-user port panicked");
        }
    }
}
