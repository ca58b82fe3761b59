//! The stages in order: what happens to a frame between the port it came from and the ports it leaves by.

use crate::acl;
use crate::guard::{self, ip_guard};
use crate::parse::{Frame, Headers, Tag, parse};
use crate::reason::DropReason;
use crate::tables::{
    AclVerdict, Direction, FLOOD_CHUNK, FLOOD_CHUNKS_MAX, FLOOD_TRUNKS, FLOOD_UNKNOWN, FdbKey, FloodChunk,
    FloodKey, LoopBody, MacKey, NO_RULE, PORTS_MAX, PortConfig, ROUTE_BITS, Tables, Vlan, acl_action,
    mac_word, port_flag,
};
use crate::vlan;

/// The stages, as [`Tables::stage`] hears of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// 1. Headers are parsed.
    Parse,
    /// 2. The ingress port must be up.
    PortState,
    /// 3. MAC guard.
    MacGuard,
    /// 4. IP guard.
    IpGuard,
    /// 5. VLAN classification.
    Vlan,
    /// 6. DHCP and RA guard.
    Guards,
    /// 7. ACL from-vm.
    AclFromVm,
    /// 8. Rate from-vm.
    RateFromVm,
    /// 10. Learning and the choice of destinations.
    Forward,
    /// To-vm: the destination must be up and a member of the VLAN.
    Egress,
    /// To-vm: ACL.
    AclToVm,
    /// To-vm: rate.
    RateToVm,
}

impl Stage {
    /// Name as printed by `sluice trace`.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Parse => "parse",
            Stage::PortState => "port-state",
            Stage::MacGuard => "mac-guard",
            Stage::IpGuard => "ip-guard",
            Stage::Vlan => "vlan",
            Stage::Guards => "guards",
            Stage::AclFromVm => "acl-from-vm",
            Stage::RateFromVm => "rate-from-vm",
            Stage::Forward => "forward",
            Stage::Egress => "egress",
            Stage::AclToVm => "acl-to-vm",
            Stage::RateToVm => "rate-to-vm",
        }
    }
}

/// What is known about the frame after [`decide`]; [`flood`] and the caller's rewriting need it.
///
/// BPF callers keep it in a per-CPU map, as their stack is small.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Context {
    /// Parsed headers; the key's VLAN is set once stage 5 has passed.
    pub headers: Headers,
    /// Port that the frame came from.
    pub ingress: u32,
    /// Its switch.
    pub switch: u32,
    /// Priority and drop eligibility of the incoming tag, in place in a TCI.
    pub priority: u16,
    /// Whether the outermost tag is to be taken off before the outgoing tag, if any, is put on.
    pub strip: bool,
    /// Whether a flood is one of unknown unicast.
    pub unknown_unicast: bool,
    /// Length for rates and counters.
    pub bytes: u32,
    /// What the source's ACL said.
    pub from_vm: AclVerdict,
    /// What the destination's ACL said, where there is a single one.
    pub to_vm: AclVerdict,
}

/// What [`decide`] needs of a frame: every [`Frame`] has it. A BPF caller implements it by calls to sub-programs, so
/// that the verifier looks at each by itself.
pub trait Packet {
    /// Stage 1: see [`parse`].
    ///
    /// # Errors
    /// As [`parse`].
    fn parse(&self, headers: &mut Headers) -> Result<(), DropReason>;

    /// Stage 4: see [`ip_guard`].
    ///
    /// # Errors
    /// As [`ip_guard`].
    fn ip_guard<T: Tables>(&self, tables: &T, port: u32, headers: &Headers) -> Result<(), DropReason>;
}

impl<F: Frame> Packet for F {
    #[inline(always)]
    fn parse(&self, headers: &mut Headers) -> Result<(), DropReason> {
        parse(self, headers)
    }

    #[inline(always)]
    fn ip_guard<T: Tables>(&self, tables: &T, port: u32, headers: &Headers) -> Result<(), DropReason> {
        ip_guard(self, tables, port, headers)
    }
}

/// How a frame leaves by one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The port.
    pub port: u32,
    /// Its interface.
    pub ifindex: u32,
    /// Its [`port_flag`]s.
    pub flags: u32,
    /// The tag it gets after [`Context::strip`], or [`Tag::NONE`].
    pub tag: Tag,
}

/// What [`decide`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Dropped, and counted on this port.
    Drop {
        /// The port whose policy dropped.
        port: u32,
        /// Why.
        reason: DropReason,
    },
    /// Goes to one port; every stage has passed.
    Unicast(Delivery),
    /// Goes to many: call [`flood`].
    Flood,
    /// This caller cannot serve it, nothing has been counted, another must ([`Tables::COMPLETE`]).
    Defer,
}

/// Where a frame's destination address leads. A struct with every field set, not an enum: payloads of the other
/// variants would be undefined bytes, which the BPF verifier does not forgive.
struct Route<'a> {
    kind: RouteKind,
    /// The port, when [`RouteKind::Port`].
    id: u32,
    slot: u32,
    /// Its configuration; `None` if the port table does not have it.
    port: Option<&'a PortConfig>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum RouteKind {
    Port,
    Group,
    Unknown,
}

/// 01:80:c2:00:00:00 to 01:80:c2:00:00:0f.
const RESERVED: u64 = mac_word([0x01, 0x80, 0xc2, 0, 0, 0]);
const RESERVED_LOW: u64 = mac_word([0, 0, 0, 0, 0, 0x0f]);

/// Takes a frame that came from `ingress` through all stages up to a known single destination. `context` must be as
/// [`Context::default`] makes it.
///
/// Drops are counted before returning. For [`Verdict::Flood`], the to-vm stages are [`flood`]'s.
#[inline(always)]
pub fn decide<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ingress: u32,
    bytes: u32,
    context: &mut Context,
) -> Verdict {
    context.ingress = ingress;
    context.bytes = bytes;
    let drop = |port: u32, reason: DropReason| {
        tables.count_drop(port, reason);
        Verdict::Drop { port, reason }
    };
    let early_drop = |reason: DropReason| {
        tables.count_rx(ingress, bytes);
        drop(ingress, reason)
    };
    let Some((port, slot)) = tables.port(ingress) else {
        return early_drop(DropReason::PortUnknown);
    };
    context.switch = port.switch;

    tables.stage(Stage::Parse);
    if let Err(reason) = packet.parse(&mut context.headers) {
        return early_drop(reason);
    }
    tables.stage(Stage::PortState);
    if port.flags & port_flag::UP == 0 {
        return early_drop(DropReason::PortDown);
    }
    tables.stage(Stage::MacGuard);
    if let Err(reason) = guard::mac(port, &context.headers) {
        return early_drop(reason);
    }
    if port.flags & port_flag::LOOPS != 0 && is_looped(tables, context, ingress) {
        return early_drop(DropReason::LoopedBack);
    }
    tables.stage(Stage::IpGuard);
    if port.flags & port_flag::IP_GUARD != 0
        && !guard::has_first_ipv4(port, &context.headers)
        && let Err(reason) = packet.ip_guard(tables, ingress, &context.headers)
    {
        return early_drop(reason);
    }
    tables.stage(Stage::Vlan);
    match vlan::ingress(tables, port, slot, &context.headers) {
        Err(reason) => return early_drop(reason),
        Ok(classified) => {
            context.headers.key.vlan = classified.vlan;
            context.priority = classified.priority;
            context.strip = classified.strip;
        }
    }

    // Looked up early, acted on late: a caller that cannot serve the destination must know before any token is
    // taken, and the two ACLs of a unicast frame share a cache slot.
    let route = route(tables, context);
    if !T::COMPLETE {
        match route.port {
            Some(destination) if destination.flags & port_flag::XDP_TARGET != 0 => {}
            _ => return Verdict::Defer,
        }
    }
    tables.count_rx(ingress, bytes);

    tables.stage(Stage::Guards);
    if let Err(reason) = guard::services(port, &context.headers) {
        return drop(ingress, reason);
    }
    tables.stage(Stage::AclFromVm);
    acl::look_up(tables, context, Some((ingress, port)), route.port.map(|port| (route.id, port)));
    if !apply(tables, &context.from_vm, bytes) {
        return drop(ingress, DropReason::AclFromVm);
    }
    tables.stage(Stage::RateFromVm);
    let rate = &port.rate[Direction::FromVm as usize];
    if rate.ns_per_byte != 0 && !tables.take(ingress, Direction::FromVm, rate, bytes) {
        return drop(ingress, DropReason::RateFromVm);
    }

    tables.stage(Stage::Forward);
    if context.headers.key.dst_mac_word() & !RESERVED_LOW == RESERVED {
        return drop(ingress, DropReason::ReservedMulticast);
    }
    if port.flags & port_flag::LEARN != 0 {
        learn(tables, context, port.learn_limit);
    }
    if route.kind != RouteKind::Port {
        context.unknown_unicast = route.kind == RouteKind::Unknown;
        return Verdict::Flood;
    }
    if route.id == ingress {
        return drop(ingress, DropReason::SourcePort);
    }
    let Some(destination) = route.port else {
        return drop(ingress, DropReason::TableInconsistent);
    };
    match deliver(tables, context, route.id, destination, route.slot) {
        Ok(delivery) => Verdict::Unicast(delivery),
        Err(reason) => drop(route.id, reason),
    }
}

/// Whether the source address is one of the switch's own, at another port that can only be heard there.
#[inline(always)]
fn is_looped<T: Tables>(tables: &T, context: &Context, ingress: u32) -> bool {
    let source = owner(tables, context.switch, context.headers.key.src_mac_word());
    if source == 0 || source == ingress {
        return false;
    }
    match tables.port(source) {
        Some((port, _)) => port.switch == context.switch && port.flags & port_flag::HAS_VF == 0,
        None => false,
    }
}

/// Looks the destination address up, without acting on it.
#[inline(always)]
fn route<'a, T: Tables>(tables: &'a T, context: &Context) -> Route<'a> {
    let mut route = Route { kind: RouteKind::Group, id: 0, slot: 0, port: None };
    let key = &context.headers.key;
    let destination = key.dst_mac_word();
    if destination & 1 != 0 {
        return route;
    }
    route.kind = RouteKind::Unknown;
    route.id = owner(tables, context.switch, destination);
    if route.id != 0 {
        // One of our own.
    } else if let Some(switch) = tables.switch(context.switch) {
        let key = FdbKey::from_word(context.switch, key.vlan, destination);
        if let Some(entry) = tables.fdb(&key)
            && tables.now_seconds().wrapping_sub(entry.seen) <= switch.ageing_seconds
        {
            route.id = tables.way(context, entry.port);
        }
    }
    if route.id != 0 {
        route.kind = RouteKind::Port;
        // The kernel may reuse a deleted element at once: what was read may be of another switch.
        if let Some((port, slot)) = tables.port(route.id)
            && port.switch == context.switch
        {
            route.port = Some(port);
            route.slot = slot;
        }
    }
    route
}

/// The port that owns a static address, or 0.
#[inline(always)]
fn owner<T: Tables>(tables: &T, switch: u32, mac: u64) -> u32 {
    let key = MacKey::from_word(switch, mac);
    let word: u64 = bytemuck::cast(key);
    let epoch = tables.epoch() as u32;
    let index = (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - ROUTE_BITS)) as u32;
    let slot = tables.route_cache(index);
    if let Some(slot) = &slot
        && slot.key == word
        && slot.epoch == epoch
    {
        return slot.port;
    }
    let Some(port) = tables.vnic_mac(&key) else {
        return 0;
    };
    if let Some(slot) = slot {
        slot.key = word;
        slot.epoch = epoch;
        slot.port = port;
    }
    port
}

/// Learns the source address, unless it is one of our own.
#[inline(always)]
fn learn<T: Tables>(tables: &T, context: &Context, limit: u32) {
    let mac = context.headers.key.src_mac_word();
    let key = FdbKey::from_word(context.switch, context.headers.key.vlan, mac);
    if let Some(entry) = tables.fdb(&key)
        && entry.port == context.ingress
        && entry.seen == tables.now_seconds()
    {
        return;
    }
    if tables.vnic_mac(&MacKey::from_word(context.switch, mac)).is_none() {
        tables.learn(&key, context.ingress, limit);
    }
}

/// Counts a rule's hit and says whether the packet passes.
#[inline(always)]
fn apply<T: Tables>(tables: &T, verdict: &AclVerdict, bytes: u32) -> bool {
    if verdict.counter != NO_RULE {
        tables.count_rule(verdict.counter, bytes);
    }
    verdict.action == acl_action::ALLOW
}

/// The to-vm stages of one destination, whose ACL's verdict is in the context.
#[inline(always)]
fn deliver<T: Tables>(
    tables: &T,
    context: &Context,
    id: u32,
    port: &PortConfig,
    slot: u32,
) -> Result<Delivery, DropReason> {
    tables.stage(Stage::Egress);
    const READY: u32 = port_flag::UP | port_flag::ATTACHED;
    if port.flags & READY != READY {
        return Err(DropReason::DestinationDown);
    }
    let key = &context.headers.key;
    let has_inner_tag = context.headers.tag_count > context.strip as u32;
    let tag = vlan::egress(tables, port, slot, key.vlan, context.priority, has_inner_tag)?;
    tables.stage(Stage::AclToVm);
    if !apply(tables, &context.to_vm, context.bytes) {
        return Err(DropReason::AclToVm);
    }
    tables.stage(Stage::RateToVm);
    let rate = &port.rate[Direction::ToVm as usize];
    if rate.ns_per_byte != 0 && !tables.take(id, Direction::ToVm, rate, context.bytes) {
        return Err(DropReason::RateToVm);
    }
    Ok(Delivery { port: id, ifindex: port.ifindex, flags: port.flags, tag })
}

/// Takes a flood's copies.
pub trait Sink {
    /// Sends one copy, tagged as the delivery says, and counts it.
    fn emit(&mut self, delivery: &Delivery);
}

/// Serves every destination of a flooded frame: members of its VLAN for group addresses, the uplink and the ports
/// that ask for it for unknown unicast; never the port it came from.
///
/// Drops by a destination's own policy are counted there. If there was no destination at all, that is the frame's
/// drop reason.
///
/// # Errors
/// `NoDestination`, counted on the ingress port.
#[inline(always)]
pub fn flood<T: Tables, S: Sink>(tables: &T, context: &mut Context, sink: &mut S) -> Result<(), DropReason> {
    tables.count_flood(context.ingress);
    let mut found = false;
    if context.unknown_unicast {
        list(tables, context, FLOOD_UNKNOWN, sink, &mut found);
    } else {
        let vlan = context.headers.key.vlan;
        list(tables, context, vlan, sink, &mut found);
        list(tables, context, FLOOD_TRUNKS, sink, &mut found);
    }
    if found {
        return Ok(());
    }
    tables.count_drop(context.ingress, DropReason::NoDestination);
    Err(DropReason::NoDestination)
}

#[inline(always)]
fn list<T: Tables, S: Sink>(tables: &T, context: &mut Context, vlan: Vlan, sink: &mut S, found: &mut bool) {
    let mut walk =
        Walk { tables, context, sink, chunk: None, vlan, next_chunk: 0, next: 0, count: 0, found: false };
    tables.repeat(FLOOD_CHUNKS_MAX + PORTS_MAX, &mut walk);
    *found |= walk.found;
}

/// Walks the ports of a flood list, chunk by chunk: one loop, since BPF frames are small.
struct Walk<'a, T, S> {
    tables: &'a T,
    context: &'a mut Context,
    sink: &'a mut S,
    chunk: Option<&'a FloodChunk>,
    vlan: Vlan,
    next_chunk: u32,
    /// Next port of the chunk, and how many it has.
    next: u32,
    count: u32,
    found: bool,
}

impl<T: Tables, S: Sink> LoopBody for Walk<'_, T, S> {
    #[inline(always)]
    fn step(&mut self, _round: u32) -> bool {
        let next = self.next;
        if next >= self.count {
            return self.enter_chunk();
        }
        self.next = next + 1;
        let Some(chunk) = self.chunk else {
            return false;
        };
        if next >= FLOOD_CHUNK as u32 {
            return false;
        }
        self.visit(chunk.ports[next as usize]);
        true
    }
}

impl<T: Tables, S: Sink> Walk<'_, T, S> {
    /// Goes on to the next chunk, unless the last one was the last.
    #[inline(always)]
    fn enter_chunk(&mut self) -> bool {
        if self.next_chunk > 0 && self.count < FLOOD_CHUNK as u32 {
            return false;
        }
        let key = FloodKey { switch: self.context.switch, vlan: self.vlan, chunk: self.next_chunk as u16 };
        self.next_chunk += 1;
        self.next = 0;
        self.chunk = self.tables.flood(&key);
        let Some(chunk) = self.chunk else {
            return false;
        };
        self.count = if chunk.count < FLOOD_CHUNK as u32 { chunk.count } else { FLOOD_CHUNK as u32 };
        true
    }

    #[inline(always)]
    fn visit(&mut self, id: u32) {
        if id == self.context.ingress {
            return;
        }
        let Some((port, slot)) = self.tables.port(id) else {
            return;
        };
        // Not a destination of this flood, so its ACL is not asked. (For the switch, see `route`.)
        if port.switch != self.context.switch
            || !vlan::carries(self.tables, port, slot, self.context.headers.key.vlan)
        {
            return;
        }
        acl::look_up(self.tables, self.context, None, Some((id, port)));
        match deliver(self.tables, self.context, id, port, slot) {
            Ok(delivery) => {
                self.found = true;
                self.sink.emit(&delivery);
            }
            Err(DropReason::VlanEgress | DropReason::DestinationDown) => {} // nor is this one
            Err(reason) => {
                self.found = true;
                self.tables.count_drop(id, reason);
            }
        }
    }
}
