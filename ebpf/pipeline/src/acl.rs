//! Stage 7 and its to-vm twin: tuple space search over groups of rules, behind a verdict cache.
//!
//! Rules that look at the same bits form a tuple; one hash look-up under the tuple's mask finds the best of them.
//! Tuples are sorted by their best rule, so the search ends as soon as no later tuple can win.

use crate::tables::{
    AclConfig, AclGroup, AclKey, AclVerdict, CACHE_SLOTS, Direction, LoopBody, NO_RULE, PORT_GROUPS_MAX,
    PortConfig, RuleKey, TUPLE_CHUNK, TUPLES_MAX, Tables, TupleChunk, TupleKey,
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
        direction,
        rank: 0,
        verdict: AclVerdict { counter: NO_RULE, action: acl.default_action, reserved: [0; 3] },
    };
    let rounds =
        if acl.group_count < PORT_GROUPS_MAX as u32 { acl.group_count } else { PORT_GROUPS_MAX as u32 };
    tables.repeat(rounds, &mut search);
    search.verdict
}

/// Walks the groups of a port.
struct Search<'a, T> {
    tables: &'a T,
    acl: &'a AclConfig,
    key: &'a AclKey,
    direction: Direction,
    /// Of the best rule so far; 0 before the first.
    rank: u32,
    verdict: AclVerdict,
}

impl<T: Tables> LoopBody for Search<'_, T> {
    #[inline(always)]
    fn step(&mut self, round: u32) -> bool {
        if round >= PORT_GROUPS_MAX as u32 {
            return false;
        }
        let id = self.acl.groups[round as usize];
        let Some(group) = self.tables.acl_group(id) else {
            return true; // a group that is being made; its rules are not promised yet
        };
        let count = group.tuple_count[self.direction as usize];
        let mut walk = GroupWalk {
            tables: self.tables,
            key: self.key,
            group,
            id,
            direction: self.direction,
            chunk: None,
            rank: self.rank,
            verdict: self.verdict,
        };
        self.tables.repeat(if count < TUPLES_MAX { count } else { TUPLES_MAX }, &mut walk);
        self.rank = walk.rank;
        self.verdict = walk.verdict;
        true
    }
}

/// Walks the tuples of a group, best first.
struct GroupWalk<'a, T> {
    tables: &'a T,
    key: &'a AclKey,
    group: &'a AclGroup,
    id: u32,
    direction: Direction,
    chunk: Option<&'a TupleChunk>,
    rank: u32,
    verdict: AclVerdict,
}

impl<T: Tables> LoopBody for GroupWalk<'_, T> {
    #[inline(always)]
    fn step(&mut self, round: u32) -> bool {
        let index = round % TUPLE_CHUNK as u32;
        if index == 0 {
            self.chunk = self.tables.acl_tuples(&TupleKey {
                group: self.id,
                generation: self.group.generation,
                direction: self.direction as u32,
                chunk: round / TUPLE_CHUNK as u32,
            });
        }
        let Some(chunk) = self.chunk else {
            return false;
        };
        let tuple = &chunk.tuples[index as usize];
        if tuple.max_rank <= self.rank {
            return false; // nor can any later one win
        }
        let key = RuleKey {
            key: self.key.masked(&tuple.mask),
            group_direction: self.id * 2 + self.direction as u32,
            tuple: tuple.id,
        };
        if let Some(entry) = self.tables.acl_rule(&key) {
            let mut i = 0;
            while i < 2 {
                let slot = &entry.slots[i];
                if slot.rank > self.rank && slot.is_valid_in(self.group.version) {
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

/// The verdicts of the source's ACL and, when the destination is one known port, of its ACL too: from one cache slot.
///
/// `source` is `None` when only the destination's is asked for (floods).
#[inline(always)]
pub(crate) fn verdicts<T: Tables>(
    tables: &T,
    key: &AclKey,
    source: Option<(u32, &PortConfig)>,
    destination: Option<(u32, &PortConfig)>,
) -> (AclVerdict, AclVerdict) {
    let from_vm = source.map(|(_, port)| &port.acl[Direction::FromVm as usize]);
    let to_vm = destination.map(|(_, port)| &port.acl[Direction::ToVm as usize]);
    let default = |acl: Option<&AclConfig>| AclVerdict {
        counter: NO_RULE,
        action: match acl {
            Some(acl) => acl.default_action,
            None => crate::tables::acl_action::ALLOW,
        },
        reserved: [0; 3],
    };
    let mut answer = (default(from_vm), default(to_vm));
    let from_rules = matches!(from_vm, Some(acl) if acl.group_count > 0);
    let to_rules = matches!(to_vm, Some(acl) if acl.group_count > 0);
    if !from_rules && !to_rules {
        return answer;
    }
    // Only the ports whose rules decide are part of the cache's key.
    let ingress = match source {
        Some((id, _)) if from_rules => id,
        _ => 0,
    };
    let egress = match destination {
        Some((id, _)) if to_rules => id,
        _ => 0,
    };
    // The epoch is read before any rule is: if tables change meanwhile, what is stored here is already outdated.
    let epoch = tables.epoch();
    let hash = mix(key.words(), (u64::from(ingress) << 32) | u64::from(egress));
    let cached = tables.cache(hash as u32 & (CACHE_SLOTS - 1));
    if let Some(slot) = &cached
        && slot.epoch == epoch
        && slot.ingress == ingress
        && slot.egress == egress
        && slot.key.words() == key.words()
    {
        if from_rules {
            answer.0 = slot.from_vm;
        }
        if to_rules {
            answer.1 = slot.to_vm;
        }
        return answer;
    }
    tables.count_cache_miss(if ingress != 0 { ingress } else { egress });
    if let (true, Some(acl)) = (from_rules, from_vm) {
        answer.0 = classify(tables, acl, Direction::FromVm, key);
    }
    if let (true, Some(acl)) = (to_rules, to_vm) {
        answer.1 = classify(tables, acl, Direction::ToVm, key);
    }
    if let Some(slot) = cached {
        slot.key = *key;
        slot.epoch = epoch;
        slot.ingress = ingress;
        slot.egress = egress;
        slot.from_vm = answer.0;
        slot.to_vm = answer.1;
    }
    answer
}
