//! AF_XDP: queues of a network device, read and written without the kernel's stack.
//!
//! [`open`] binds a socket to one queue and gives its two halves. A steering program brings frames to it: the kernel
//! engine's, or [`Steering`], which takes all that a device receives.
//!
//! The rings are our own, on system calls, and not xsk-rs: its UMEM allocates its own memory and its frame descriptors can
//! be copied, while here every region of frames is the UMEM, so that frames go from port to port as tokens, uncopied; and
//! both are equally fast. Each socket registers the region anew, instead of sharing a UMEM: then a device that copies and
//! one that does not can be served from the same memory, and no socket depends on another's life.
//!
//! Frames here carry no offloads: a local sender whose checksums are left to its device must be told not to, and VLAN
//! tags must be in the bytes (docs/architecture.md, "The hooks").
//!
//! Kernel 5.4; frames longer than a chunk need 6.6. Needs CAP_NET_RAW, CAP_BPF and CAP_NET_ADMIN; without CAP_IPC_LOCK, regions
//! count against RLIMIT_MEMLOCK.

mod receive;
mod redirect;
mod ring;
mod steering;
mod sys;
mod transmit;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::frame::{Lent, Pool, Region, RegionLayout, SMALL_CHUNK};
pub use receive::XdpReceive;
use redirect::Redirector;
use ring::{Consumer, Producer};
pub use steering::Steering;
use sys::RingKind;
pub use sys::SocketStatistics;
pub use transmit::XdpTransmit;

/// How a queue is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpOptions {
    /// Entries of each ring: a power of two. As many chunks wait in the fill ring.
    pub entries: u32,
    /// Whether zero copy is tried first. A driver that has it may reset its queues for it.
    ///
    /// Only for drivers that are known to respect the length of a chunk, less the kernel's headroom: [`ONE_CHUNK`]. igb (Linux
    /// 7.2, as QEMU has it) rounds it down to 1 KiB, and takes the rest of a longer frame for another frame.
    pub zero_copy: bool,
    /// The longest frame that may be sent, in bytes with Ethernet header and two tags.
    pub longest: usize,
    /// Whether the device takes frames that XDP redirects to it (its feature `ndo-xmit`), from the CPUs of all workers. Without zero copy, frames that fit a chunk are
    /// sent so then.
    pub redirect: bool,
}

/// Room for a frame in one chunk: what the kernel puts into it begins behind a headroom of its own.
pub const ONE_CHUNK: usize = SMALL_CHUNK - 256;

impl Default for XdpOptions {
    fn default() -> Self {
        XdpOptions { entries: 1024, zero_copy: true, longest: 1500 + 22, redirect: false }
    }
}

/// How the driver serves a queue, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpMode {
    /// Frames are not copied between device and UMEM.
    pub zero_copy: bool,
    /// Frames may be longer than a chunk.
    pub multi_buffer: bool,
    /// Frames are sent as XDP redirects them, and only others by the socket.
    pub redirect: bool,
}

/// A queue cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// The number of entries is no power of two.
    #[error("{0} entries: rings have a power of two")]
    Entries(u32),
    /// The kernel refused a step.
    #[error("{step} for queue {queue} of interface {ifindex}: {source}{hint}", hint = hint(.source))]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// Interface index.
        ifindex: u32,
        /// Queue of the interface.
        queue: u32,
        /// The kernel's error.
        source: io::Error,
    },
}

/// What to do about an error.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "; another socket has the queue, or another program the interface",
        Some(libc::EPERM) => "; CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF are needed",
        Some(libc::ENOBUFS) => "; raise RLIMIT_MEMLOCK, or give the process CAP_IPC_LOCK",
        Some(libc::EINVAL) => "; the interface may have fewer queues",
        Some(libc::ENODEV) => "; the interface is gone",
        _ => "",
    }
}

/// How long the kernel may take to let go of a queue whose socket is closed: it does so by itself, a little later.
const LETTING_GO: Duration = Duration::from_secs(2);
/// How often it is asked.
const ASKING: Duration = Duration::from_millis(2);

/// A bound socket: kept by both halves.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    mode: XdpMode,
    /// Frames wait in the transmit ring that the kernel must be called for again.
    unsent: AtomicBool,
    /// The shorter way out, if the device has it. Here, since to close a tap takes the kernel a while.
    redirector: Option<Redirector>,
    /// Somebody has removed its tap.
    is_cut_off: AtomicBool,
    /// Behind `fd`, and so dropped when that is closed.
    left: Left,
}

/// What halves that are gone had lent. It comes back when the kernel cannot write any more.
#[derive(Debug)]
struct Left {
    ifindex: u32,
    queue: u32,
    zero_copy: bool,
    lent: Mutex<Vec<Lent>>,
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// How the driver serves the queue, now.
    fn mode(&self) -> XdpMode {
        XdpMode { redirect: self.redirector().is_some(), ..self.mode }
    }

    /// The shorter way out, while it can be used.
    #[inline]
    fn redirector(&self) -> Option<&Redirector> {
        self.redirector.as_ref().filter(|_| !self.is_cut_off.load(Ordering::Relaxed))
    }

    /// Makes the kernel send what is in the transmit ring.
    fn kick(&self) -> Kick {
        match sys::kick_transmit(self.fd()).map_err(|error| error.raw_os_error()) {
            Err(Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR)) => Kick::More,
            // What is down or gone sends nothing however often it is called: frames wait, and then the ring is full.
            Ok(()) | Err(_) => Kick::Done,
        }
    }
}

/// What came of calling the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kick {
    /// There is no need to call again.
    Done,
    /// Some frames were not sent.
    More,
}

impl Left {
    /// Whether the device is done with a queue whose socket is closed: then the queue can be bound again.
    fn is_free(&self) -> bool {
        let Ok(region) = Region::new(RegionLayout { small: 64, large: 0 }) else { return false };
        let options = XdpOptions { entries: 32, zero_copy: false, ..XdpOptions::default() };
        match open(self.ifindex, self.queue, &region, &options) {
            Ok(_) => true,
            Err(XdpError::Kernel { source, .. }) => source.raw_os_error() == Some(libc::ENODEV),
            Err(XdpError::Entries(_)) => false,
        }
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        // When it is closed, the kernel copies nothing into its chunks any more; but a device may go on writing until its
        // driver has been told, a little later.
        if self.zero_copy && !self.is_free() {
            let Left { ifindex, queue, .. } = self;
            tracing::error!(ifindex, queue, "the device does not let go of its chunks; they are lost");
            std::mem::take(&mut *self.lent.lock()).into_iter().for_each(std::mem::forget);
        }
    }
}

/// A queue of a device.
#[derive(Debug)]
pub struct XdpQueue {
    /// What the device receives.
    pub receive: XdpReceive,
    /// What it sends.
    pub transmit: XdpTransmit,
}

impl XdpQueue {
    /// How the driver serves it.
    pub fn mode(&self) -> XdpMode {
        self.receive.mode()
    }

    /// Keeps its socket open when its halves are placed, and says when they are gone.
    pub fn keeper(&self) -> XdpKeeper {
        XdpKeeper(self.receive.shared())
    }

    /// What can still be asked when its halves are placed.
    pub fn monitor(&self) -> XdpMonitor {
        self.receive.monitor()
    }
}

/// A share in a queue's socket. Whoever may bind sockets keeps it to the end: closing one may take asking the kernel whether
/// the device is done with it, which workers may not.
#[derive(Debug)]
pub struct XdpKeeper(Arc<Socket>);

impl XdpKeeper {
    /// Whether both halves are gone.
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// How the driver serves the queue.
    pub fn mode(&self) -> XdpMode {
        self.0.mode()
    }

    /// The socket, to be put into the XSKMAP of a steering program.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// The kernel's counters of the socket.
    ///
    /// # Errors
    /// The kernel's.
    pub fn statistics(&self) -> io::Result<SocketStatistics> {
        sys::statistics(self.0.fd())
    }
}

/// Answers questions about a queue, wherever its halves are; it does not keep it open.
#[derive(Clone, Debug)]
pub struct XdpMonitor(Weak<Socket>);

impl XdpMonitor {
    /// How the driver serves the queue; `None` when it is closed.
    pub fn mode(&self) -> Option<XdpMode> {
        self.0.upgrade().map(|socket| socket.mode())
    }

    /// The kernel's counters of the socket; `None` when the queue is closed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn statistics(&self) -> io::Result<Option<SocketStatistics>> {
        self.0.upgrade().map(|socket| sys::statistics(socket.fd())).transpose()
    }
}

/// Opens a queue of an interface. Nothing is received before a program steers frames to [the socket](XdpReceive::socket).
///
/// # Errors
/// If the kernel refuses: the error says which step, and what may help.
pub fn open(
    ifindex: u32,
    queue: u32,
    region: &Arc<Region>,
    options: &XdpOptions,
) -> Result<XdpQueue, XdpError> {
    if !options.entries.is_power_of_two() {
        return Err(XdpError::Entries(options.entries));
    }
    let step = |step| move |source| XdpError::Kernel { step, ifindex, queue, source };
    let fd = sys::socket().map_err(step("opening an AF_XDP socket"))?;
    sys::register(fd.as_fd(), region).map_err(step("registering memory"))?;
    for kind in [RingKind::Fill, RingKind::Completion, RingKind::Receive, RingKind::Transmit] {
        sys::make_ring(fd.as_fd(), kind, options.entries).map_err(step("making a ring"))?;
    }
    let offsets = sys::offsets(fd.as_fd()).map_err(step("finding the rings"))?;
    let map = step("mapping a ring");
    let mut fill = Producer::new(fd.as_fd(), RingKind::Fill, options.entries, &offsets).map_err(map)?;
    let map = step("mapping a ring");
    let completion =
        Consumer::new(fd.as_fd(), RingKind::Completion, options.entries, &offsets).map_err(map)?;
    let map = step("mapping a ring");
    let received = Consumer::new(fd.as_fd(), RingKind::Receive, options.entries, &offsets).map_err(map)?;
    let map = step("mapping a ring");
    let sending = Producer::new(fd.as_fd(), RingKind::Transmit, options.entries, &offsets).map_err(map)?;
    // Before the socket is bound: drivers look for chunks then, and some not again before they have received something.
    let mut lent = Lent::new(region);
    receive::refill(&mut fill, &mut lent, &mut Pool::new(region));
    let multi_buffer = bind(fd.as_fd(), ifindex, queue, options).map_err(step("binding"))?;
    let zero_copy = sys::is_zero_copy(fd.as_fd()).map_err(step("asking for the mode"))?;
    let redirector = redirector(ifindex, options, zero_copy);
    let mode = XdpMode { zero_copy, multi_buffer, redirect: redirector.is_some() };
    let left = Left { ifindex, queue, zero_copy, lent: Mutex::default() };
    let (unsent, is_cut_off) = (AtomicBool::new(false), AtomicBool::new(false));
    let socket = Arc::new(Socket { fd, mode, unsent, redirector, is_cut_off, left });
    Ok(XdpQueue {
        receive: XdpReceive::new(Arc::clone(&socket), fill, received, lent),
        transmit: XdpTransmit::new(socket, sending, completion, region, options.longest),
    })
}

/// The shorter way out. Without, frames go by the socket.
fn redirector(ifindex: u32, options: &XdpOptions, zero_copy: bool) -> Option<Redirector> {
    if zero_copy || !options.redirect || options.longest > ONE_CHUNK {
        return None;
    }
    Redirector::open(ifindex)
        .inspect_err(|error| {
            tracing::warn!(ifindex, %error, "frames are sent by the AF_XDP socket: no tap can be had to redirect them from");
        })
        .ok()
}

/// Binds in the best mode that the driver has; answers whether frames may be longer than a chunk. Waits for the queue's last
/// socket to be gone.
fn bind(fd: BorrowedFd<'_>, ifindex: u32, queue: u32, options: &XdpOptions) -> io::Result<bool> {
    let deadline = Instant::now() + LETTING_GO;
    loop {
        match bind_best(fd, ifindex, queue, options) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(ASKING);
            }
            result => return result,
        }
    }
}

fn bind_best(fd: BorrowedFd<'_>, ifindex: u32, queue: u32, options: &XdpOptions) -> io::Result<bool> {
    let mut last = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    for copy in [libc::XDP_ZEROCOPY, libc::XDP_COPY] {
        if copy == libc::XDP_ZEROCOPY && !options.zero_copy {
            continue;
        }
        for several in [libc::XDP_USE_SG, 0] {
            match sys::bind(fd, ifindex, queue, copy | several | libc::XDP_USE_NEED_WAKEUP) {
                Ok(()) => return Ok(several != 0),
                // Neither of these gets better with another mode.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EPERM | libc::ENODEV)) =>
                {
                    return Err(error);
                }
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}
