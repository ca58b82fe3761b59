//! Feature bits: what a port offers, and what follows from what the guest and the front-end took.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::header::HeaderKind;
use crate::port::Accepts;

/// Feature bits of virtio and virtio-net (VIRTIO 1.3, 5.1.3 and 6).
pub mod bit {
    /// The device takes partial checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The device says its MTU.
    pub const MTU: u64 = 1 << 3;
    /// The driver takes super-frames of TCP over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes super-frames of TCP over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes super-frames with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes super-frames of TCP over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes super-frames of TCP over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes super-frames with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The driver merges buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue; the front-end serves it.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The control queue sets receive modes.
    pub const CTRL_RX: u64 = 1 << 18;
    /// The driver announces itself after a migration.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// There are several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// vhost: log all writes to guest memory.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Headers and data may share descriptors in any way.
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Tables of descriptors elsewhere in memory.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user: there are protocol features.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Rings are packed.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// The driver takes super-frames of UDP over IPv4.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes super-frames of UDP over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes super-frames of UDP.
    pub const HOST_USO: u64 = 1 << 56;
    /// The device is the stand-by of a pair with a VF.
    pub const STANDBY: u64 = 1 << 62;
}

/// Offered always.
const BASE: u64 = bit::MTU
    | bit::MRG_RXBUF
    | bit::STATUS
    | bit::CTRL_VQ
    | bit::CTRL_RX
    | bit::GUEST_ANNOUNCE
    | bit::MQ
    | bit::LOG_ALL
    | bit::ANY_LAYOUT
    | bit::INDIRECT_DESC
    | bit::EVENT_IDX
    | bit::PROTOCOL_FEATURES
    | bit::RING_PACKED
    | bit::IN_ORDER
    | bit::VERSION_1;

/// Offered with offloads.
const OFFLOADS: u64 = bit::CSUM
    | bit::GUEST_CSUM
    | bit::GUEST_TSO4
    | bit::GUEST_TSO6
    | bit::GUEST_ECN
    | bit::HOST_TSO4
    | bit::HOST_TSO6
    | bit::HOST_ECN
    | bit::GUEST_USO4
    | bit::GUEST_USO6
    | bit::HOST_USO;

/// Which protocol features are offered.
pub(super) const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::RARP)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::MTU)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::CONFIGURE_MEM_SLOTS);

/// What a port offers.
#[must_use]
pub fn offered(offloads: bool, standby: bool) -> u64 {
    BASE | if offloads { OFFLOADS } else { 0 } | if standby { bit::STANDBY } else { 0 }
}

/// The features that were agreed upon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Whether a [bit] was.
    #[inline]
    #[must_use]
    pub fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// Bytes of the header in front of each frame: with a count of buffers, or, for old drivers that do not merge, without.
    #[must_use]
    pub fn header_len(self) -> usize {
        self.header_kind().len()
    }

    pub(super) fn header_kind(self) -> HeaderKind {
        if self.has(bit::VERSION_1 | bit::MRG_RXBUF) { HeaderKind::Long } else { HeaderKind::Short }
    }

    /// What the guest takes.
    #[must_use]
    pub fn guest_accepts(self) -> Accepts {
        let checksum = self.has(bit::GUEST_CSUM);
        Accepts {
            checksum,
            tcp_v4: checksum && self.has(bit::GUEST_TSO4),
            tcp_v6: checksum && self.has(bit::GUEST_TSO6),
            udp: checksum && self.has(bit::GUEST_USO4) && self.has(bit::GUEST_USO6),
            ecn: self.has(bit::GUEST_ECN),
        }
    }

    /// What the guest may ask of us.
    #[must_use]
    pub fn host_accepts(self) -> Accepts {
        let checksum = self.has(bit::CSUM);
        Accepts {
            checksum,
            tcp_v4: checksum && self.has(bit::HOST_TSO4),
            tcp_v6: checksum && self.has(bit::HOST_TSO6),
            udp: checksum && self.has(bit::HOST_USO),
            ecn: self.has(bit::HOST_ECN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_follows_the_settings() {
        assert_eq!(offered(true, false), BASE | OFFLOADS);
        assert_eq!(offered(false, true), BASE | bit::STANDBY);
        assert!(
            offered(false, false) & bit::RING_PACKED != 0,
            "which kind of ring, is for the guest to choose"
        );
    }

    #[test]
    fn segments_need_checksums_and_udp_needs_both_families() {
        let all = Features(offered(true, false));
        assert_eq!((all.guest_accepts(), all.host_accepts()), (Accepts::ALL, Accepts::ALL));
        let without = |bits: u64| Features(all.0 & !bits);
        assert!(!without(bit::GUEST_CSUM).guest_accepts().tcp_v4);
        assert!(!without(bit::CSUM).host_accepts().tcp_v6);
        assert!(!without(bit::GUEST_USO6).guest_accepts().udp);
        assert_eq!(Features::default().guest_accepts(), Accepts::default());
        assert_eq!((all.header_len(), Features(bit::CSUM).header_len()), (12, 10));
    }
}
