//! Stage 7 and its to-vm twin: tuple space search over groups of rules, behind a verdict cache.
//!
//! Rules that look at the same bits form a tuple; one hash look-up under the tuple's mask finds the best of them.
//! Tuples are sorted by their best rule, so the search ends as soon as no later tuple can win.

use crate::decide::Context;
use crate::tables::{
    AclConfig, AclKey, AclVerdict, CACHE_SLOTS, CACHE_WAYS, Direction, LoopBody, NO_RULE, PORT_GROUPS_MAX,
    PortConfig, RuleKey, TUPLE_CHUNK, TUPLES_MAX, Tables, TupleChunk, TupleKey, Vlan, acl_action,
};

/// Identifier of a mask in [`RuleKey::tuple`].
pub fn mask_id(mask: &AclKey) -> u32 {
    let hash = mix(mask.words(), 0x5bd1_e995);
    (hash ^ (hash >> 32)) as u32
}

/// Two independent lanes, so that the multiplications overlap.
#[inline(always)]
fn mix(words: &[u64; 8], seed: u64) -> u64 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
    let mut x = seed ^ A;
    let mut y = seed.wrapping_mul(B);
    let mut i = 0;
    while i < 8 {
        x = (x ^ words[i]).wrapping_mul(A);
        x ^= x >> 29;
        y = (y ^ words[i + 1]).wrapping_mul(B);
        y ^= y >> 31;
        i += 2;
    }
    let z = (x ^ y.rotate_left(32)).wrapping_mul(A);
    z ^ (z >> 32)
}

/// One direction of one port's ACL, without the cache.
#[inline(always)]
pub fn classify<T: Tables>(tables: &T, acl: &AclConfig, direction: Direction, key: &AclKey) -> AclVerdict {
    let mut search = Search {
        tables,
        acl,
        key,
        chunk: None,
        direction: direction as u32,
        next_group: 0,
        group: 0,
        version: 0,
        generation: 0,
        next_tuple: 0,
        tuple_count: 0,
        rank: 0,
        verdict: AclVerdict { counter: NO_RULE, action: acl.default_action },
    };
    tables.repeat(PORT_GROUPS_MAX as u32 * (TUPLES_MAX + 1), &mut search);
    search.verdict
}

/// Walks the groups of a port and, inside each, its tuples, best first: one loop, since BPF frames are small.
/// The direction is a number here: as an enum it would lose its bounds in memory, for the BPF verifier.
struct Search<'a, T> {
    tables: &'a T,
    acl: &'a AclConfig,
    key: &'a AclKey,
    chunk: Option<&'a TupleChunk>,
    direction: u32,
    next_group: u32,
    /// The group being walked, and what its entry said.
    group: u32,
    version: u32,
    generation: u32,
    next_tuple: u32,
    tuple_count: u32,
    /// Of the best rule so far; 0 before the first.
    rank: u32,
    verdict: AclVerdict,
}

impl<T: Tables> LoopBody for Search<'_, T> {
    #[inline(always)]
    fn step(&mut self, _round: u32) -> bool {
        if self.next_tuple >= self.tuple_count {
            return self.enter_group();
        }
        let index = self.next_tuple % TUPLE_CHUNK as u32;
        if index == 0 {
            self.chunk = self.tables.acl_tuples(&TupleKey {
                group: self.group,
                generation: self.generation,
                direction: self.direction,
                chunk: self.next_tuple / TUPLE_CHUNK as u32,
            });
        }
        self.next_tuple += 1;
        let Some(chunk) = self.chunk else {
            self.tuple_count = 0;
            return true;
        };
        let tuple = &chunk.tuples[index as usize];
        if tuple.max_rank <= self.rank {
            self.tuple_count = 0; // nor can any later one of this group win
            return true;
        }
        let key = RuleKey {
            key: self.key.masked(&tuple.mask),
            group_direction: self.group * 2 + self.direction,
            tuple: tuple.id,
        };
        if let Some(entry) = self.tables.acl_rule(&key) {
            let mut i = 0;
            while i < 2 {
                let slot = &entry.slots[i];
                if slot.rank > self.rank && slot.is_valid_in(self.version) {
                    self.rank = slot.rank;
                    self.verdict.counter = slot.counter;
                    self.verdict.action = slot.action;
                }
                i += 1;
            }
        }
        true
    }
}

impl<T: Tables> Search<'_, T> {
    #[inline(always)]
    fn enter_group(&mut self) -> bool {
        let next = self.next_group;
        if next >= self.acl.group_count || next >= PORT_GROUPS_MAX as u32 {
            return false;
        }
        self.next_group = next + 1;
        self.group = self.acl.groups[next as usize];
        self.next_tuple = 0;
        self.tuple_count = 0;
        // A group that is not there is being made or unmade; its rules are not promised.
        if let Some(group) = self.tables.acl_group(self.group) {
            self.version = group.version;
            self.generation = group.generation;
            self.tuple_count = group.tuple_count[(self.direction & 1) as usize];
        }
        true
    }
}

/// Puts the verdicts of the source's ACL and of the destination's into the context; either may be left out. Ports
/// without rules are answered here, from their defaults.
#[inline(always)]
pub(crate) fn look_up<T: Tables>(
    tables: &T,
    context: &mut Context,
    source: Option<(u32, &PortConfig)>,
    destination: Option<(u32, &PortConfig)>,
) {
    let (mut ingress, mut egress) = (0, 0);
    context.from_vm = ALLOW;
    context.to_vm = ALLOW;
    if let Some((id, port)) = source {
        let acl = &port.acl[Direction::FromVm as usize];
        context.from_vm.action = acl.default_action;
        if acl.group_count > 0 {
            ingress = id;
        }
    }
    if let Some((id, port)) = destination {
        let acl = &port.acl[Direction::ToVm as usize];
        context.to_vm.action = acl.default_action;
        if acl.group_count > 0 {
            egress = id;
        }
    }
    if ingress != 0 || egress != 0 {
        tables.acl_verdicts(context, ingress, egress);
    }
}

const ALLOW: AclVerdict = AclVerdict { counter: NO_RULE, action: acl_action::ALLOW };

/// The verdicts of the rules of `ingress` (from-vm) and `egress` (to-vm), from one cache slot if they are there. Port 0
/// stands for a port whose rules are not asked; its verdict in the context is left as it is.
#[inline(always)]
pub fn acl_verdicts<T: Tables>(tables: &T, context: &mut Context, ingress: u32, egress: u32) {
    // The epoch is read before any rule is: if tables change meanwhile, what is stored here is already outdated.
    let epoch = tables.epoch();
    let hash = mix(context.headers.key.words(), (u64::from(ingress) << 32) | u64::from(egress));
    let set = hash as u32 & (CACHE_SLOTS - 1) & !(CACHE_WAYS - 1);
    // To be overwritten on a miss: an outdated slot, or any.
    let mut victim = set + ((hash >> 32) as u32 & (CACHE_WAYS - 1));
    let mut way = 0;
    while way < CACHE_WAYS {
        let Some(cached) = tables.cache(set + way) else {
            break;
        };
        if cached.epoch != epoch {
            victim = set + way;
        } else if cached.ingress == ingress
            && cached.egress == egress
            && same(&cached.key, &context.headers.key)
        {
            if ingress != 0 {
                context.from_vm = cached.from_vm;
            }
            if egress != 0 {
                context.to_vm = cached.to_vm;
            }
            return;
        }
        way += 1;
    }
    tables.count_cache_miss(if ingress != 0 { ingress } else { egress });
    if ingress != 0
        && let Some((port, _)) = tables.port(ingress)
    {
        let acl = &port.acl[Direction::FromVm as usize];
        context.from_vm = classify(tables, acl, Direction::FromVm, &context.headers.key);
    }
    if egress != 0
        && let Some((port, _)) = tables.port(egress)
    {
        let acl = &port.acl[Direction::ToVm as usize];
        context.to_vm = classify(tables, acl, Direction::ToVm, &context.headers.key);
    }
    if let Some(cached) = tables.cache(victim) {
        cached.key = context.headers.key.masked(&EVERYTHING); // word by word: a copy would be a call
        cached.epoch = epoch;
        cached.ingress = ingress;
        cached.egress = egress;
        cached.from_vm = context.from_vm;
        cached.to_vm = context.to_vm;
    }
}

const EVERYTHING: AclKey = AclKey {
    src_ip: [0xff; 16],
    dst_ip: [0xff; 16],
    dst_mac: [0xff; 6],
    src_mac: [0xff; 6],
    ethertype: 0xffff,
    vlan: Vlan(0xffff),
    src_port: 0xffff,
    dst_port: 0xffff,
    proto: 0xff,
    tcp_flags: 0xff,
    icmp_type: 0xff,
    icmp_code: 0xff,
    facts: 0xff,
    reserved: [0xff; 7],
};

/// Word by word and without a branch for each.
#[inline(always)]
fn same(a: &AclKey, b: &AclKey) -> bool {
    let (a, b) = (a.words(), b.words());
    let mut difference = 0;
    let mut i = 0;
    while i < 8 {
        difference |= a[i] ^ b[i];
        i += 1;
    }
    difference == 0
}
