//! The maps. User space pins and fills them; layouts are in `sluice_pipeline::tables`.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, DevMap, HashMap, PerCpuArray, XskMap};
use sluice_pipeline::tables::{
    AclGroup, CACHE_SLOTS, CacheSlot, FDB_MAX, FdbEntry, FdbKey, FloodChunk, FloodKey, Globals, IFINDEX_LOW,
    IP_GUARD_MAX, IpGuardKey, MacKey, PORTS_MAX, PortConfig, PortStats, ROUTE_SLOTS, RULE_ENTRIES_MAX,
    RULES_MAX, RouteSlot, RuleEntry, RuleKey, RuleStats, STEERED_QUEUES, SWITCHES_MAX, SwitchConfig,
    TrunkBitmap, TupleChunk, TupleKey, VNIC_MACS_MAX,
};
use sluice_pipeline::{Context, REASONS_MAX};

/// `BPF_F_NO_PREALLOC`: elements are allocated as they come.
const ON_DEMAND: u32 = 1;

/// Interface index to port, for low indexes; 0 is none.
#[map]
pub static PORT_OF: Array<u32> = Array::with_max_entries(IFINDEX_LOW, 0);
/// Interface index to port, for the others.
#[map]
pub static PORT_OF_HIGH: HashMap<u32, u32> = HashMap::with_max_entries(PORTS_MAX * 2, ON_DEMAND);
/// Port to the live one of its two slots; 0 is none.
#[map]
pub static PORT_LIVE: Array<u32> = Array::with_max_entries(PORTS_MAX, 0);
/// Slots: twice the port, and one more.
#[map]
pub static PORTS: Array<PortConfig> = Array::with_max_entries(PORTS_MAX * 2, 0);
/// VLAN bitmaps, by slot.
#[map]
pub static TRUNKS: Array<TrunkBitmap> = Array::with_max_entries(PORTS_MAX * 2, 0);
/// Switches.
#[map]
pub static SWITCHES: Array<SwitchConfig> = Array::with_max_entries(SWITCHES_MAX, 0);
/// One element.
#[map]
pub static GLOBALS: Array<Globals> = Array::with_max_entries(1, 0);
/// Static addresses to ports.
#[map]
pub static VNIC_MACS: HashMap<MacKey, u32> = HashMap::with_max_entries(VNIC_MACS_MAX, ON_DEMAND);
/// Learnt addresses.
#[map]
pub static FDB: HashMap<FdbKey, FdbEntry> = HashMap::with_max_entries(FDB_MAX, 0);
/// How many addresses each port has learnt.
#[map]
pub static LEARNT: Array<u32> = Array::with_max_entries(PORTS_MAX, 0);
/// Allowed source addresses.
#[map]
pub static IP_GUARD: HashMap<IpGuardKey, u32> = HashMap::with_max_entries(IP_GUARD_MAX, ON_DEMAND);
/// Flood lists.
#[map]
pub static FLOOD: HashMap<FloodKey, FloodChunk> = HashMap::with_max_entries(PORTS_MAX * 8, ON_DEMAND);
/// ACL groups.
#[map]
pub static ACL_GROUPS: HashMap<u32, AclGroup> = HashMap::with_max_entries(PORTS_MAX * 4, ON_DEMAND);
/// Tuple lists.
#[map]
pub static ACL_TUPLES: HashMap<TupleKey, TupleChunk> = HashMap::with_max_entries(65_536, ON_DEMAND);
/// Rules.
#[map]
pub static ACL_RULES: HashMap<RuleKey, RuleEntry> = HashMap::with_max_entries(RULE_ENTRIES_MAX, ON_DEMAND);
/// Verdict caches.
#[map]
pub static CACHE: PerCpuArray<CacheSlot> = PerCpuArray::with_max_entries(CACHE_SLOTS, 0);
/// Route caches.
#[map]
pub static ROUTES: PerCpuArray<RouteSlot> = PerCpuArray::with_max_entries(ROUTE_SLOTS, 0);
/// Token buckets: theoretical arrival times by direction.
#[map]
pub static BUCKETS: Array<[u64; 2]> = Array::with_max_entries(PORTS_MAX, 0);
/// Port counters.
#[map]
pub static PORT_STATS: PerCpuArray<PortStats> = PerCpuArray::with_max_entries(PORTS_MAX, 0);
/// Drop counters: port × [`REASONS_MAX`] + reason.
#[map]
pub static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(PORTS_MAX * REASONS_MAX, 0);
/// Rule counters.
#[map]
pub static RULE_STATS: PerCpuArray<RuleStats> = PerCpuArray::with_max_entries(RULES_MAX, 0);
/// The frame at hand.
#[map]
pub static SCRATCH: PerCpuArray<Context> = PerCpuArray::with_max_entries(1, 0);
/// Port to interface, for redirection by XDP.
#[map]
pub static DEVMAP: DevMap = DevMap::with_max_entries(PORTS_MAX, 0);
/// AF_XDP sockets of ports' receive queues: see `sluice_pipeline::tables::socket_index`. The kernel takes those out that are
/// closed.
#[map]
pub static SOCKETS: XskMap = XskMap::with_max_entries(PORTS_MAX * STEERED_QUEUES, 0);
