//! What can go wrong with a vhost-user port, by whose fault: a mapping, a ring's set-up, a guest's driver, a front-end's request.

use rustix::io::Errno;

use super::memory::RegionAddress;

/// Memory that a front-end wants to share cannot be.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file cannot be examined.
    #[error("the file of a memory region cannot be examined: {0}")]
    File(#[source] Errno),
    /// The descriptor is of something else.
    #[error("a memory region is not a file: share the guest's memory by memfd or hugetlbfs")]
    NotAFile,
    /// Its pages may come from elsewhere.
    #[error(
        "a memory region is on a file system (magic {magic:#x}) whose pages may have to be waited for: \
         share the guest's memory by memfd or hugetlbfs"
    )]
    FileSystem {
        /// What `statfs` says it is.
        magic: u64,
    },
    /// No bytes, or more than there are addresses.
    #[error("a memory region of {len} bytes from {offset:#x} of its file is none")]
    Length {
        /// Asked for.
        offset: u64,
        /// Asked for.
        len: u64,
    },
    /// The file ends earlier.
    #[error("a memory region ends at {end:#x} of a file of {size:#x} bytes")]
    Short {
        /// Of the file.
        size: u64,
        /// Of the region.
        end: u64,
    },
    /// A block size that is no page size.
    #[error("a memory region's file has pages of {0} bytes, which cannot be mapped")]
    PageSize(u64),
    /// The kernel refused.
    #[error("mapping a memory region: {0}")]
    Map(#[source] std::io::Error),
    /// The process has too many.
    #[error("too many memory regions are mapped by all ports together")]
    TooManyMappings,
    /// The region runs over the end of an address space.
    #[error("memory region {0:x?} is empty or wraps around")]
    Wraps(RegionAddress),
    /// Two regions claim one address.
    #[error("memory region {0:x?} overlaps another")]
    Overlap(RegionAddress),
    /// More regions or bytes than any guest has.
    #[error("the guest has more memory regions, or more memory, than can be served")]
    TooMuch,
}

/// A ring cannot be served as the front-end set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// Rings have up to 32768 entries, split ones a power of two.
    #[error("a ring of {0} entries: rings have up to 32768, split rings a power of two")]
    Size(u32),
    /// A packed ring is to be gone on with at a place that it does not have.
    #[error("a packed ring of {size} entries cannot be gone on with at entry {base}")]
    Base {
        /// The place.
        base: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// Part of it is in no memory region.
    #[error("the {part} of the ring, at {address:#x}, is not inside one memory region")]
    Outside {
        /// Which table.
        part: &'static str,
        /// In the front-end's address space.
        address: u64,
    },
    /// Part of it is not aligned as virtio demands.
    #[error("the {part} of the ring, at {address:#x}, is not aligned")]
    Unaligned {
        /// Which table.
        part: &'static str,
        /// In the front-end's address space.
        address: u64,
    },
    /// The area for tracking descriptors in flight does not fit the ring, or is not what a back-end wrote.
    #[error("the area for descriptors in flight does not fit a ring of {0} entries")]
    Inflight(u16),
}

/// What a driver did that ends the service of its queue. The queue stays stopped until the guest sets it up anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum QueueError {
    /// More buffers made available than the ring has entries.
    #[error("the available index jumped by {by} in a ring of {size}")]
    IndexJump {
        /// How far.
        by: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor that the table does not have.
    #[error("descriptor {index} of a table of {size}")]
    NoSuchDescriptor {
        /// What was named.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A chain that is longer than its table, and so a loop, or longer than any driver's.
    #[error("a chain of more than {0} descriptors: a loop, or too long")]
    ChainTooLong(u32),
    /// Memory to be read where memory to be written is expected, or the reverse.
    #[error("a chain mixes memory to read and memory to write")]
    WrongDirection,
    /// An indirect table where none was negotiated, inside another, with a successor, or of a length that is no table's.
    #[error("an indirect table that is not allowed or has an impossible length")]
    BadIndirect,
    /// An address in no region.
    #[error("{len} bytes at guest address {address:#x} are not guest memory")]
    Outside {
        /// In the guest.
        address: u64,
        /// How many bytes.
        len: u32,
    },
    /// The file behind the guest's memory shrank.
    #[error("the guest's memory went away: its file was truncated")]
    MemoryLost,
}

impl QueueError {
    /// A short name, for counters and labels.
    pub fn name(self) -> &'static str {
        match self {
            QueueError::IndexJump { .. } => "index_jump",
            QueueError::NoSuchDescriptor { .. } => "no_such_descriptor",
            QueueError::ChainTooLong(_) => "chain_too_long",
            QueueError::WrongDirection => "wrong_direction",
            QueueError::BadIndirect => "bad_indirect",
            QueueError::Outside { .. } => "outside_memory",
            QueueError::MemoryLost => "memory_lost",
        }
    }
}

/// Why a single frame was not passed on. The queue goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FrameFault {
    /// Shorter than a header and an Ethernet header.
    #[error("shorter than an Ethernet header")]
    Runt,
    /// Longer than any super-frame, or than the MTU without being one.
    #[error("longer than the MTU allows, or than any super-frame")]
    Oversize,
    /// A header that asks for what was not negotiated, or does not exist.
    #[error("the virtio-net header asks for an offload that was not negotiated")]
    NotNegotiated,
    /// The checksum's place is not in the frame.
    #[error("the checksum's place is not in the frame")]
    ChecksumOutside,
    /// A segment size that would make a storm of tiny frames, or none at all.
    #[error("a segment size below the smallest that TCP uses")]
    SegmentSize,
    /// The bytes are not what the header says of them.
    #[error("the frame is not of the protocol that its virtio-net header says")]
    Mismatch,
    /// To the guest: a buffer of the guest cannot hold the frame.
    #[error("the guest's buffer is too small, and mergeable buffers were not negotiated")]
    BufferTooSmall,
    /// To the guest: an offload that the guest does not take.
    #[error("the guest does not take this offload")]
    NotAccepted,
    /// To the guest: no buffers, or not enough.
    #[error("the guest has no buffer for the frame")]
    NoBuffers,
    /// To the guest: nobody serves the ring now.
    #[error("the guest's ring is not running")]
    NotRunning,
}

impl FrameFault {
    /// All, in the order of [`index`](Self::index).
    pub const ALL: [FrameFault; 10] = [
        FrameFault::Runt,
        FrameFault::Oversize,
        FrameFault::NotNegotiated,
        FrameFault::ChecksumOutside,
        FrameFault::SegmentSize,
        FrameFault::Mismatch,
        FrameFault::BufferTooSmall,
        FrameFault::NotAccepted,
        FrameFault::NoBuffers,
        FrameFault::NotRunning,
    ];

    /// Its place among counters.
    pub fn index(self) -> usize {
        self as usize
    }

    /// A short name, for counters and labels.
    pub fn name(self) -> &'static str {
        match self {
            FrameFault::Runt => "runt",
            FrameFault::Oversize => "oversize",
            FrameFault::NotNegotiated => "not_negotiated",
            FrameFault::ChecksumOutside => "checksum_outside",
            FrameFault::SegmentSize => "segment_size",
            FrameFault::Mismatch => "mismatch",
            FrameFault::BufferTooSmall => "buffer_too_small",
            FrameFault::NotAccepted => "not_accepted",
            FrameFault::NoBuffers => "no_buffers",
            FrameFault::NotRunning => "not_running",
        }
    }
}

/// A request that cannot be carried out. Where the front-end asked for an answer it gets one; otherwise the connection ends.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A queue that the port does not have.
    #[error("queue {index} of a port with {queues} queues")]
    NoSuchQueue {
        /// Asked for.
        index: u32,
        /// The port's.
        queues: usize,
    },
    /// Not the size that the request has.
    #[error("a request with {size} bytes of payload has a wrong length")]
    PayloadSize {
        /// Of the payload.
        size: usize,
    },
    /// Too few or too many file descriptors.
    #[error("a request came with {got} file descriptors and needs {needed}")]
    Descriptors {
        /// Received.
        got: usize,
        /// Expected.
        needed: usize,
    },
    /// Not an eventfd.
    #[error("a kick or call descriptor is not an eventfd")]
    NotAnEvent,
    /// Features that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A value that makes no sense.
    #[error("{what} {value:#x} is not possible")]
    Value {
        /// Of what.
        what: &'static str,
        /// As received.
        value: u64,
    },
    /// There is no such region to be removed.
    #[error("memory region {0:x?} is not there to be removed")]
    NoSuchRegion(RegionAddress),
    /// A request that this back-end does not know, or did not offer.
    #[error("request {0} is not known or was not offered")]
    Unknown(u32),
    /// Memory that cannot be shared.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A ring that cannot be served.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The kernel refused.
    #[error("the kernel refused: {0}")]
    System(#[from] Errno),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// The front-end closed it.
    #[error("the front-end closed the connection")]
    Closed,
    /// The port is being removed.
    #[error("the port is being removed")]
    Stopped,
    /// Not a vhost-user message.
    #[error("not a vhost-user message: request {request}, flags {flags:#x}, {size} bytes")]
    Header {
        /// As received.
        request: u32,
        /// As received.
        flags: u32,
        /// As received.
        size: u32,
    },
    /// A message began and did not end, or an answer was not taken.
    #[error("the front-end stopped in the middle of a message")]
    Stalled,
    /// More descriptors than a message may have.
    #[error("a message came with too many file descriptors")]
    TooManyDescriptors,
    /// A request failed that has no way to say so.
    #[error("request {request} failed: {source}")]
    Request {
        /// Its number.
        request: u32,
        /// Why.
        source: RequestError,
    },
    /// The socket failed.
    #[error("the socket: {0}")]
    Socket(#[from] Errno),
}
