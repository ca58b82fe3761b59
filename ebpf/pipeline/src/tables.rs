//! Layouts of the tables that the pipeline reads: BPF map keys and values, and the [`Tables`] trait through
//! which [`crate::decide`] looks them up.
//!
//! All layouts are `repr(C)`, without padding, in host byte order except for addresses, which are in network
//! order. User space writes them and the BPF programs read them, so any change here is a change of ABI: raise
//! [`LAYOUT_VERSION`].
//!
//! **Atomicity.** BPF array elements are copied word by word under running readers, so whatever must change as a
//! whole is reached through one word: [`PortConfig`]s live in two slots per port and [`Tables::port`] follows the
//! live one; ACL groups are versioned (see [`AclGroup`]); everything else is a hash entry, which the kernel replaces
//! in one step.

use bytemuck::{Pod, Zeroable};

use crate::reason::DropReason;

/// Version of every layout in this module. Pinned maps of another version are never adopted.
pub const LAYOUT_VERSION: u32 = 2;

/// Most ports on one host. Port 0 is never given out: frames of unknown origin are counted there.
pub const PORTS_MAX: u32 = 4096;
/// Interface indexes below this are looked up in an array, others in a hash.
pub const IFINDEX_LOW: u32 = 65_536;
/// Most switches on one host.
pub const SWITCHES_MAX: u32 = 1024;
/// Most ACL groups that one vNIC may refer to (including the group made of its own rules).
pub const PORT_GROUPS_MAX: usize = 32;
/// Most ACL rules, over all groups of the host (one counter each).
pub const RULES_MAX: u32 = 131_072;
/// Most entries the rules may expand to (a port range becomes up to 30 prefixes).
pub const RULE_ENTRIES_MAX: u32 = 1_048_576;
/// Most tuples (distinct combinations of matched bits) in one direction of one ACL group.
pub const TUPLES_MAX: u32 = 4096;
/// Slots of the verdict cache, per CPU. A power of two.
pub const CACHE_SLOTS: u32 = 8192;
/// Neighbouring slots in which a verdict may be. A power of two.
pub const CACHE_WAYS: u32 = 4;
/// Slots of the route cache, per CPU: [`ROUTE_BITS`] bits' worth.
pub const ROUTE_SLOTS: u32 = 1 << ROUTE_BITS;
/// Binary logarithm of [`ROUTE_SLOTS`].
pub const ROUTE_BITS: u32 = 10;
/// Most learnt FDB entries.
pub const FDB_MAX: u32 = 65_536;
/// Most vNIC addresses.
pub const VNIC_MACS_MAX: u32 = 65_536;
/// Most IP guard entries.
pub const IP_GUARD_MAX: u32 = 131_072;

/// The forwarding VLAN: what separates FDB entries and floods inside one switch.
///
/// 0 is the untagged domain, 1–4094 are customer VLANs (tag 0x8100); [`SERVICE`](Vlan::SERVICE) added to 1–4094 are
/// service VLANs (tag 0x88a8), which are a separate number space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Vlan(pub u16);

impl Vlan {
    /// The untagged domain.
    pub const UNTAGGED: Vlan = Vlan(0);
    /// The bit that marks a service VLAN.
    pub const SERVICE: u16 = 0x8000;

    /// The 12-bit VLAN identifier.
    #[inline(always)]
    pub const fn vid(self) -> u16 {
        self.0 & 0x0fff
    }

    /// Whether it is a service VLAN (802.1ad).
    #[inline(always)]
    pub const fn is_service(self) -> bool {
        self.0 & Self::SERVICE != 0
    }
}

/// What a port is; decides learning and which stages apply. Values of [`PortConfig::kind`].
pub mod port_kind {
    /// A VM's interface: the whole policy applies.
    pub const VNIC: u8 = 1;
    /// The way out of the switch.
    pub const UPLINK: u8 = 2;
    /// The host's own interface on the switch.
    pub const INTERNAL: u8 = 3;
}

/// How a port treats VLAN tags. Values of [`PortConfig::vlan_mode`].
pub mod vlan_mode {
    /// Untagged and priority-tagged frames belong to [`PortConfig::vlan`](super::PortConfig::vlan); tagged ones are dropped.
    pub const ACCESS: u8 = 1;
    /// 802.1Q tags from a set; untagged frames belong to the native VLAN, if there is one.
    pub const TRUNK: u8 = 2;
    /// Whatever comes gets the service tag [`PortConfig::vlan`](super::PortConfig::vlan) (802.1ad tunnel).
    pub const TUNNEL: u8 = 3;
    /// Every VLAN, customer and service; untagged frames belong to [`PortConfig::native`](super::PortConfig::native). The default of an uplink.
    pub const ALL: u8 = 4;
}

/// Bits of [`PortConfig::flags`].
pub mod port_flag {
    /// Administratively up.
    pub const UP: u32 = 1 << 0;
    /// Bound to an interface that exists; [`PortConfig::ifindex`](super::PortConfig::ifindex) is valid.
    pub const ATTACHED: u32 = 1 << 1;
    /// The source MAC must be one of the port's addresses.
    pub const MAC_GUARD: u32 = 1 << 2;
    /// IP, ARP and ND sources must be among the port's IP guard entries.
    pub const IP_GUARD: u32 = 1 << 3;
    /// No DHCP server messages from here.
    pub const DHCP_GUARD: u32 = 1 << 4;
    /// No router advertisements from here.
    pub const RA_GUARD: u32 = 1 << 5;
    /// Learns source addresses.
    pub const LEARN: u32 = 1 << 6;
    /// Gets frames to unknown unicast addresses.
    pub const UNKNOWN_UNICAST: u32 = 1 << 7;
    /// Reachable by `bpf_redirect_peer`: a veth whose other end is in another network namespace.
    pub const PEER_REDIRECT: u32 = 1 << 8;
    /// Accepts redirected XDP frames.
    pub const XDP_TARGET: u32 = 1 << 9;
    /// Has a trunk bitmap with a native VLAN in [`PortConfig::native`](super::PortConfig::native).
    pub const NATIVE: u32 = 1 << 10;
    /// The NIC behind it has an eSwitch that may give back what it is sent: sources of the switch's own are looked for.
    pub const LOOPS: u32 = 1 << 11;
    /// The vNIC has a VF, so that it may be heard from behind the uplink while its addresses are still here.
    pub const HAS_VF: u32 = 1 << 12;
    /// The trunk to the userspace engine: what an uplink's XDP sends there may go by an AF_XDP socket instead.
    pub const STEERED: u32 = 1 << 13;
}

/// Receive queues of a port that may have an AF_XDP socket each.
pub const STEERED_QUEUES: u32 = 16;

/// Where the socket of a port's receive queue is, of [`STEERED_QUEUES`]; `None` if there is none for this queue.
#[inline(always)]
pub const fn socket_index(port: u32, queue: u32) -> Option<u32> {
    if port < PORTS_MAX && queue < STEERED_QUEUES { Some(port * STEERED_QUEUES + queue) } else { None }
}

/// Direction of a rule or rate, seen from the VM. Index into the two-element arrays below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Direction {
    /// What the VM sends.
    FromVm = 0,
    /// What the VM receives.
    ToVm = 1,
}

/// What an ACL decides. Values of [`AclConfig::default_action`] and [`RuleSlot::action`].
pub mod acl_action {
    /// Pass.
    pub const ALLOW: u32 = 1;
    /// Drop.
    pub const DENY: u32 = 2;
}

/// One direction of a port's ACL: the groups that apply and what happens when no rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AclConfig {
    /// Ids of ACL groups ([`AclGroup`]); the first [`group_count`](Self::group_count) are valid.
    pub groups: [u32; PORT_GROUPS_MAX],
    /// How many groups apply; 0 means that the default decides alone.
    pub group_count: u32,
    /// From [`acl_action`].
    pub default_action: u32,
}

/// A token bucket's parameters, in the form of a virtual scheduler (GCRA).
///
/// Conforming frames move a theoretical arrival time forward by their cost; a frame conforms when that time is at
/// most `burst_ns` ahead of now. A frame that costs more than a whole burst conforms only when the bucket is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RateConfig {
    /// Nanoseconds per byte, times 2^[`RATE_SHIFT`]; 0 means unlimited.
    pub ns_per_byte: u64,
    /// Depth of the bucket in nanoseconds.
    pub burst_ns: u64,
}

/// Binary places of [`RateConfig::ns_per_byte`].
pub const RATE_SHIFT: u32 = 16;

/// A port's configuration as the pipeline sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortConfig {
    /// Bits of [`port_flag`].
    pub flags: u32,
    /// The interface to send to, when [`port_flag::ATTACHED`].
    pub ifindex: u32,
    /// Switch that the port belongs to.
    pub switch: u32,
    /// From [`port_kind`].
    pub kind: u8,
    /// From [`vlan_mode`].
    pub vlan_mode: u8,
    /// Access VLAN or (with [`Vlan::SERVICE`] set) tunnel VLAN.
    pub vlan: Vlan,
    /// Native VLAN of a trunk (when [`port_flag::NATIVE`]) or of an uplink (0: the untagged domain).
    pub native: Vlan,
    /// How many of [`macs`](Self::macs) are valid.
    pub mac_count: u8,
    /// Zero.
    pub reserved: u8,
    /// Most FDB entries that may be learnt from here.
    pub learn_limit: u32,
    /// The first IPv4 addresses of the IP guard, as they are in packets, or 0: the answer for most packets without a
    /// look-up. All addresses are in the IP guard table too.
    pub guard_ipv4: [u32; 2],
    /// The port's own addresses, as [`mac_word`] has them. Each is also an entry of the static MAC table.
    pub macs: [u64; PORT_MACS_MAX],
    /// ACL, by [`Direction`].
    pub acl: [AclConfig; 2],
    /// Rates, by [`Direction`].
    pub rate: [RateConfig; 2],
}

/// A MAC address as a number: its bytes as they are in memory, and two zero bytes. Comparing words is what makes a guard
/// cheap in BPF, which has no unaligned access to anything but packets.
#[inline(always)]
pub const fn mac_word(mac: [u8; 6]) -> u64 {
    u64::from_le_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0])
}

// The word-wise views below take the first byte in memory for the lowest.
const _: () = assert!(cfg!(target_endian = "little"), "Sluice runs on little-endian machines");

/// Most own addresses of one port.
pub const PORT_MACS_MAX: usize = 4;

/// A trunk's VLAN set: bit `vid % 64` of word `vid / 64`.
pub type TrunkBitmap = [u64; 64];

/// Per-switch configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SwitchConfig {
    /// Port id of the uplink; 0 if there is none.
    pub uplink: u32,
    /// Learnt FDB entries older than this many seconds count as absent.
    pub ageing_seconds: u32,
}

/// Host-wide values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Globals {
    /// Raised after any table change that may alter a cached verdict.
    pub epoch: u64,
    /// [`LAYOUT_VERSION`] of the program that made the maps.
    pub layout: u32,
    /// Zero.
    pub reserved: u32,
}

/// Key of the static MAC table: an address of one of our own ports on a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct MacKey {
    /// Switch id.
    pub switch: u16,
    /// Address.
    pub mac: [u8; 6],
}

/// Key of the learnt FDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FdbKey {
    /// Switch id.
    pub switch: u32,
    /// VLAN in which the address was seen.
    pub vlan: Vlan,
    /// Address.
    pub mac: [u8; 6],
}

/// A learnt FDB entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FdbEntry {
    /// Port behind which the address was last seen.
    pub port: u32,
    /// When, in seconds of the monotonic clock.
    pub seen: u32,
}

/// Key of the IP guard: port and address (IPv4 as `::ffff:a.b.c.d`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct IpGuardKey {
    /// Port id.
    pub port: u32,
    /// Address.
    pub ip: [u8; 16],
}

/// Key of a chunk of a flood list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FloodKey {
    /// Switch id.
    pub switch: u32,
    /// VLAN whose access and tunnel ports are listed, or [`FLOOD_TRUNKS`] or [`FLOOD_UNKNOWN`].
    pub vlan: Vlan,
    /// Chunks count from 0; the list ends at the first chunk that is not full.
    pub chunk: u16,
}

/// The pseudo VLAN whose flood list holds the uplink and trunks, whose membership is checked one by one.
pub const FLOOD_TRUNKS: Vlan = Vlan(0x7fff);
/// The pseudo VLAN whose flood list holds the ports that get unknown unicast: uplink, learning ports, and those that
/// ask for it. Membership is checked one by one.
pub const FLOOD_UNKNOWN: Vlan = Vlan(0x7ffe);
/// Most chunks in a flood list.
pub const FLOOD_CHUNKS_MAX: u32 = PORTS_MAX.div_ceil(FLOOD_CHUNK as u32);
/// Ports in a [`FloodChunk`].
pub const FLOOD_CHUNK: usize = 62;

/// Part of a flood list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FloodChunk {
    /// How many of [`ports`](Self::ports) are valid.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// Port ids.
    pub ports: [u32; FLOOD_CHUNK],
}

/// Everything an ACL rule can match, of one packet; and, as a mask, the bits a rule looks at.
///
/// Fields that a packet does not have are zero; [`facts`](Self::facts) tells a zero from an absence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct AclKey {
    /// Source IP (IPv4 as `::ffff:a.b.c.d`).
    pub src_ip: [u8; 16],
    /// Destination IP, likewise.
    pub dst_ip: [u8; 16],
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Ethertype after all VLAN tags, host order.
    pub ethertype: u16,
    /// The forwarding VLAN.
    pub vlan: Vlan,
    /// TCP, UDP or SCTP source port, host order.
    pub src_port: u16,
    /// Destination port, likewise.
    pub dst_port: u16,
    /// IP protocol after IPv6 extension headers.
    pub proto: u8,
    /// TCP flags (FIN = bit 0 … CWR = bit 7).
    pub tcp_flags: u8,
    /// ICMP or ICMPv6 type.
    pub icmp_type: u8,
    /// ICMP or ICMPv6 code.
    pub icmp_code: u8,
    /// Bits of [`fact`].
    pub facts: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// Bits of [`AclKey::facts`].
pub mod fact {
    /// An IPv4 or IPv6 packet.
    pub const IP: u8 = 1 << 0;
    /// The transport header was parsed: not a later fragment, and TCP, UDP, SCTP, ICMP or ICMPv6.
    pub const L4: u8 = 1 << 1;
    /// IPv6, where [`IP`] is set.
    pub const IPV6: u8 = 1 << 2;
    /// ARP, parsed.
    pub const ARP: u8 = 1 << 3;
}

impl MacKey {
    /// From a [`mac_word`].
    #[inline(always)]
    pub fn from_word(switch: u32, mac: u64) -> Self {
        bytemuck::cast((switch as u64 & 0xffff) | mac << 16)
    }
}

impl FdbKey {
    /// From a [`mac_word`].
    #[inline(always)]
    pub fn from_word(switch: u32, vlan: Vlan, mac: u64) -> Self {
        bytemuck::cast([switch, vlan.0 as u32 | (mac as u32) << 16, (mac >> 16) as u32])
    }
}

impl AclKey {
    /// The destination MAC as a [`mac_word`].
    #[inline(always)]
    pub fn dst_mac_word(&self) -> u64 {
        self.words()[4] & 0xffff_ffff_ffff
    }

    /// The source MAC as a [`mac_word`].
    #[inline(always)]
    pub fn src_mac_word(&self) -> u64 {
        let words = self.words();
        words[4] >> 48 | (words[5] & 0xffff_ffff) << 16
    }

    /// The key as sixteen half words, for filling in: addresses are copied from packets four bytes at a time.
    #[inline(always)]
    pub fn halves_mut(&mut self) -> &mut [u32; 16] {
        bytemuck::cast_mut(self)
    }

    /// The key as eight words, for masking, comparing and hashing.
    #[inline(always)]
    pub fn words(&self) -> &[u64; 8] {
        bytemuck::cast_ref(self)
    }

    /// Bitwise and.
    #[inline(always)]
    pub fn masked(&self, mask: &AclKey) -> AclKey {
        let (a, b) = (self.words(), mask.words());
        bytemuck::cast([
            a[0] & b[0],
            a[1] & b[1],
            a[2] & b[2],
            a[3] & b[3],
            a[4] & b[4],
            a[5] & b[5],
            a[6] & b[6],
            a[7] & b[7],
        ])
    }
}

/// A group of ACL rules that ports refer to by id: the entry point through which a whole group changes at once.
///
/// The value is a hash entry, replaced in one step. Rules carry the range of versions in which they are valid
/// ([`RuleSlot`]), so new rules are written first, then the version here is raised, then old ones are removed. The
/// list of tuples has a generation of its own for the same reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AclGroup {
    /// The live version; never 0.
    pub version: u32,
    /// Generation of the tuple lists.
    pub generation: u32,
    /// Number of tuples, by [`Direction`].
    pub tuple_count: [u32; 2],
}

/// Key of a chunk of a group's tuple list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct TupleKey {
    /// Group id.
    pub group: u32,
    /// [`AclGroup::generation`].
    pub generation: u32,
    /// [`Direction`] as a number.
    pub direction: u32,
    /// Counts from 0.
    pub chunk: u32,
}

/// Tuples in a [`TupleChunk`].
pub const TUPLE_CHUNK: usize = 16;

/// A tuple: the set of bits that some rules of a group look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Tuple {
    /// Ones where the rules look.
    pub mask: AclKey,
    /// Identifies the mask in [`RuleKey`]: a hash of it, unique in its group (lowering checks).
    pub id: u32,
    /// Highest [`RuleSlot::rank`] of the tuple's rules. Lists are sorted by it, highest first.
    pub max_rank: u32,
}

/// Part of a group's tuple list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct TupleChunk {
    /// Tuples, as many as [`AclGroup::tuple_count`] says.
    pub tuples: [Tuple; TUPLE_CHUNK],
}

/// Key of the rule table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct RuleKey {
    /// The packet's key under the tuple's mask.
    pub key: AclKey,
    /// Group id, times two, plus the [`Direction`].
    pub group_direction: u32,
    /// [`Tuple::id`].
    pub tuple: u32,
}

/// What a rule does, in the versions of its group for which it is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RuleSlot {
    /// First version in which it is valid.
    pub from: u32,
    /// First version in which it is not valid any more; [`u32::MAX`] if none is known.
    pub until: u32,
    /// (Priority + 1) × 2, plus one if the action is deny: the highest rank wins, so among equals deny does. Never 0.
    pub rank: u32,
    /// Index of its counters (below [`RULES_MAX`]).
    pub counter: u32,
    /// From [`acl_action`].
    pub action: u32,
}

impl RuleSlot {
    /// A slot that is never valid.
    pub const EMPTY: RuleSlot = RuleSlot { from: 0, until: 0, rank: 0, counter: 0, action: 0 };

    /// Whether it applies in this version of its group.
    #[inline(always)]
    pub const fn is_valid_in(&self, version: u32) -> bool {
        self.from <= version && version < self.until
    }
}

/// Value of the rule table: two slots, so that the old and the new meaning of a key can stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RuleEntry {
    /// At most one is valid in any version.
    pub slots: [RuleSlot; 2],
}

/// What the ACL said about a packet: in a cache slot, or fresh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AclVerdict {
    /// Counter of the rule that matched, or [`NO_RULE`].
    pub counter: u32,
    /// From [`acl_action`].
    pub action: u32,
}

/// [`AclVerdict::counter`] when no rule matched and the default decided.
pub const NO_RULE: u32 = u32::MAX;

/// A slot of the verdict cache: one array per CPU, [`CACHE_WAYS`]-way associative, valid only in its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct CacheSlot {
    /// The packet.
    pub key: AclKey,
    /// [`Globals::epoch`] under which the verdicts were found.
    pub epoch: u64,
    /// Ingress port (0 where only the second verdict was asked for).
    pub ingress: u32,
    /// Egress port (0 where only the first was asked for).
    pub egress: u32,
    /// The source's ACL, from-vm.
    pub from_vm: AclVerdict,
    /// The destination's ACL, to-vm.
    pub to_vm: AclVerdict,
}

/// A slot of the route cache: the owner of a static address. One direct-mapped array per CPU, valid only in its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RouteSlot {
    /// The [`MacKey`] as a number; 0, which is the key of no address, in an empty slot.
    pub key: u64,
    /// Low half of the [`Globals::epoch`] under which the port was found.
    pub epoch: u32,
    /// The port.
    pub port: u32,
}

/// A port's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortStats {
    /// Frames received from the port (for a vNIC: sent by the VM), including those dropped later.
    pub rx_packets: u64,
    /// Their bytes, with Ethernet header, without FCS; a GSO super-frame counts as one frame.
    pub rx_bytes: u64,
    /// Frames sent to the port.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames flooded (unknown unicast, broadcast, multicast) from the port.
    pub flooded: u64,
    /// Addresses not learnt because the port is at its limit.
    pub learn_limited: u64,
    /// Addresses not learnt because the FDB is full.
    pub fdb_full: u64,
    /// ACL verdicts that were not in the cache.
    pub cache_misses: u64,
}

/// A rule's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RuleStats {
    /// Frames that the rule decided.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The body of a bounded loop: see [`Tables::repeat`].
pub trait LoopBody {
    /// One round; `true` goes on, `false` stops.
    fn step(&mut self, round: u32) -> bool;
}

/// The tables as [`crate::decide`] sees them: BPF maps, the oracle's simulator, or a userspace engine's memory.
///
/// Look-ups have no side effects; those that do are named after what they do and are called only once the
/// packet has got that far.
pub trait Tables {
    /// Whether this caller can send to every kind of port and flood. Where it cannot (XDP), [`crate::decide`] answers
    /// [`Defer`](crate::Verdict::Defer) before any side effect and the packet goes to a caller that can.
    const COMPLETE: bool;

    /// The live configuration of a port, and the number of the slot it is in.
    fn port(&self, port: u32) -> Option<(&PortConfig, u32)>;
    /// Whether the trunk bitmap of this slot holds `vid`.
    fn trunk_allows(&self, slot: u32, vid: u16) -> bool;
    /// A switch.
    fn switch(&self, switch: u32) -> Option<&SwitchConfig>;
    /// The port that owns a static address.
    fn vnic_mac(&self, key: &MacKey) -> Option<u32>;
    /// A learnt address.
    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry>;
    /// Whether the address is among the port's IP guard entries.
    fn ip_allowed(&self, key: &IpGuardKey) -> bool;
    /// Part of a flood list.
    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk>;
    /// A group of ACL rules.
    fn acl_group(&self, group: u32) -> Option<&AclGroup>;
    /// Part of a group's tuple list.
    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk>;
    /// Rules under one key.
    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry>;
    /// The current epoch.
    fn epoch(&self) -> u64;
    /// A slot of this CPU's (or worker's) verdict cache, or `None` to go without. `slot` is below [`CACHE_SLOTS`].
    #[allow(clippy::mut_from_ref)] // the cache belongs to the running CPU alone
    fn cache(&self, slot: u32) -> Option<&mut CacheSlot>;
    /// A slot of this CPU's (or worker's) route cache, or `None` to go without. `slot` is below [`ROUTE_SLOTS`].
    #[allow(clippy::mut_from_ref)] // as above
    #[inline(always)]
    fn route_cache(&self, _slot: u32) -> Option<&mut RouteSlot> {
        None
    }
    /// Monotonic clock in nanoseconds.
    fn now(&self) -> u64;
    /// Monotonic clock in seconds; may be coarse.
    fn now_seconds(&self) -> u32;

    /// Takes tokens for a frame of `bytes`; `false` if the frame does not conform.
    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool;
    /// Learns or refreshes an address behind `port`; full tables and limits are counted, never an error.
    fn learn(&self, key: &FdbKey, port: u32, limit: u32);
    /// Counts a frame from a port.
    fn count_rx(&self, port: u32, bytes: u32);
    /// Counts a flooded frame.
    fn count_flood(&self, port: u32);
    /// Counts an ACL verdict that was not cached.
    fn count_cache_miss(&self, port: u32);
    /// Counts a rule's hit.
    fn count_rule(&self, counter: u32, bytes: u32);
    /// Counts a drop on the port whose policy dropped.
    fn count_drop(&self, port: u32, reason: DropReason);

    /// Runs `body` up to `rounds` times (a BPF caller cannot have plain loops of run-time length).
    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B);

    /// Looks up the ACL verdicts: see [`acl_verdicts`](crate::acl_verdicts). A BPF caller does it in a sub-program.
    #[inline(always)]
    fn acl_verdicts(&self, context: &mut crate::Context, ingress: u32, egress: u32)
    where
        Self: Sized,
    {
        crate::acl_verdicts(self, context, ingress, egress);
    }

    /// The port by which the frame at hand leaves for an address that was learnt behind `port`: another one where there is a
    /// shorter way to the same place.
    #[inline(always)]
    fn way(&self, _context: &crate::Context, port: u32) -> u32 {
        port
    }

    /// Told at every stage a packet enters; for tracing.
    #[inline(always)]
    fn stage(&self, _stage: crate::Stage) {}
}
