//! The one list of reasons for which a packet is dropped, shared by every engine and by the oracle.
//!
//! The numbers index the per-port drop counters in the pinned maps, so they are append-only: a new reason gets
//! a new number and no number is ever used again.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)+) => {
        /// Why a packet was dropped. Each packet is counted under the first reason that applied.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl DropReason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)+];

            /// The reason with this number, if there is one.
            pub const fn from_number(number: u8) -> Option<DropReason> {
                match number {
                    $($number => Some(DropReason::$name),)+
                    _ => None,
                }
            }

            /// Its number, or 0 for success: how a BPF sub-program returns.
            pub const fn code(result: Result<(), DropReason>) -> u32 {
                match result {
                    Ok(()) => 0,
                    Err(reason) => reason as u32,
                }
            }

            /// The opposite of [`code`](Self::code).
            ///
            /// # Errors
            /// The reason with that number; an unknown one reads as [`TableInconsistent`](Self::TableInconsistent).
            pub const fn from_code(code: u32) -> Result<(), DropReason> {
                if code == 0 {
                    return Ok(());
                }
                match DropReason::from_number(code as u8) {
                    Some(reason) => Err(reason),
                    None => Err(DropReason::TableInconsistent),
                }
            }

            /// Stable name in `lower-kebab-case`, as printed by `sluice drops` and used in metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(DropReason::$name => $text,)+
                }
            }

            /// What it means, one sentence or two.
            pub const fn describe(self) -> &'static str {
                match self {
                    $(DropReason::$name => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

drop_reasons! {
    /// The frame is shorter than an Ethernet header.
    MalformedEthernet = 1, "malformed-ethernet";
    /// A VLAN tag is announced but cut off.
    MalformedVlan = 2, "malformed-vlan";
    /// More than two VLAN tags.
    VlanDepth = 3, "vlan-depth";
    /// ARP for Ethernet and IPv4 that is cut off or announces other address lengths.
    MalformedArp = 4, "malformed-arp";
    /// IPv4 header cut off, of another version, or with a header length below 20 bytes or past the total length.
    MalformedIpv4 = 5, "malformed-ipv4";
    /// The IPv4 total length or IPv6 payload length reaches past the end of the frame; or a checksum that is still to be filled
    /// in, or the cut of a super-frame, would write into headers that were decided on.
    MalformedLength = 6, "malformed-length";
    /// IPv6 header cut off or of another version.
    MalformedIpv6 = 7, "malformed-ipv6";
    /// An IPv6 extension header is cut off, there are more than eight, or they end more than 232 bytes from the start of the
    /// IPv6 header.
    MalformedIpv6Extension = 8, "malformed-ipv6-extension";
    /// TCP header cut off, or its data offset is below 20 bytes or past the segment.
    MalformedTcp = 9, "malformed-tcp";
    /// UDP header cut off, or its length is below 8 bytes or past the datagram.
    MalformedUdp = 10, "malformed-udp";
    /// ICMP or ICMPv6 header cut off.
    MalformedIcmp = 11, "malformed-icmp";
    /// A first fragment too small to hold the transport header, or one that would overwrite it (RFC 1858, RFC 7112).
    TinyFragment = 12, "tiny-fragment";
    /// The frame came in on an interface that no port is bound to.
    PortUnknown = 13, "port-unknown";
    /// The ingress port is administratively down.
    PortDown = 14, "port-down";
    /// The source MAC address is a group address.
    MulticastSource = 15, "multicast-source";
    /// The source MAC address is not one of the vNIC's.
    MacGuard = 16, "mac-guard";
    /// The IPv4 source address is not one of the vNIC's.
    IpGuardIpv4 = 17, "ip-guard-ipv4";
    /// The ARP sender's MAC or IP address is not one of the vNIC's.
    IpGuardArp = 18, "ip-guard-arp";
    /// The IPv6 source address is not one of the vNIC's.
    IpGuardIpv6 = 19, "ip-guard-ipv6";
    /// A neighbour discovery message advertises an address that is not one of the vNIC's, or its options are broken.
    IpGuardNd = 20, "ip-guard-nd";
    /// A tagged frame on an access port.
    VlanTagged = 21, "vlan-tagged";
    /// The frame's VLAN is not allowed on the ingress port.
    VlanNotAllowed = 22, "vlan-not-allowed";
    /// An untagged frame on a trunk without a native VLAN.
    VlanUntagged = 23, "vlan-untagged";
    /// A server's DHCP or DHCPv6 message from a port that must not serve.
    DhcpGuard = 24, "dhcp-guard";
    /// A router advertisement from a port that must not route.
    RaGuard = 25, "ra-guard";
    /// The ACL of the source vNIC denies it.
    AclFromVm = 26, "acl-from-vm";
    /// Over the rate of the source vNIC.
    RateFromVm = 27, "rate-from-vm";
    /// A reserved group address that bridges do not forward (IEEE 802.1Q table 8-1).
    ReservedMulticast = 28, "reserved-multicast";
    /// The destination is behind the port that the frame came from.
    SourcePort = 29, "source-port";
    /// No port is left to send it to.
    NoDestination = 30, "no-destination";
    /// The destination port is administratively down or its interface is absent.
    DestinationDown = 31, "destination-down";
    /// The destination port is not a member of the frame's VLAN, or an inner tag would pass for the VLAN there.
    VlanEgress = 32, "vlan-egress";
    /// The ACL of the destination vNIC denies it.
    AclToVm = 33, "acl-to-vm";
    /// Over the rate of the destination vNIC.
    RateToVm = 34, "rate-to-vm";
    /// The kernel refused to rewrite or to send the frame.
    EgressFailed = 35, "egress-failed";
    /// A table entry refers to another that is not there: a bug, or maps changed by somebody else.
    TableInconsistent = 36, "table-inconsistent";
    /// SCTP header cut off.
    MalformedSctp = 37, "malformed-sctp";
    /// The NIC gave back what a port of this switch has sent: the source address is one of the switch's own, and not behind
    /// the uplink.
    LoopedBack = 38, "looped-back";
}

/// One more than the highest number that a [`DropReason`] may ever have; the width of a port's row of counters.
pub const REASONS_MAX: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_names_unique() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index + 1);
            assert_eq!(DropReason::from_number(*reason as u8), Some(*reason));
            assert!((*reason as u32) < REASONS_MAX);
            assert!(DropReason::ALL[..index].iter().all(|other| other.name() != reason.name()));
            assert!(!reason.describe().is_empty());
        }
        assert_eq!(DropReason::from_number(0), None);
    }
}
