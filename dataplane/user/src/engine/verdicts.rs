//! A worker's cache of ACL verdicts: what the classifier said about a packet, for as long as the tables stay as they are.
//!
//! Sets of four; a short sign of each entry lies in front of the set, so that a look-up reads the one entry that it wants.

use sluice_pipeline::tables::{AclKey, AclVerdict};

/// Sets. A power of two.
const SETS: usize = 4096;
const WAYS: usize = 4;

/// What a packet's verdicts depend on, next to the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) key: AclKey,
    /// Port whose from-vm rules are asked, or 0.
    pub(super) ingress: u32,
    /// Port whose to-vm rules are asked, or 0.
    pub(super) egress: u32,
}

/// The verdicts, from-vm and to-vm; one that was not asked for means nothing.
pub(super) type Answer = [AclVerdict; 2];

#[derive(Clone, Copy, Debug)]
struct Slot {
    question: Question,
    answer: Answer,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Set {
    /// 0 where a slot is empty.
    signs: [u32; WAYS],
    slots: [Slot; WAYS],
    /// The way that is overwritten next.
    next: u32,
    /// Epoch of all of its entries.
    epoch: u64,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Verdicts {
    sets: Box<[Set]>,
}

/// Where an answer is, or would be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    set: usize,
    sign: u32,
}

impl Question {
    /// Multiplications to 128 bits, folded; four lanes that overlap.
    #[inline]
    pub(super) fn place(&self) -> Place {
        const A: u64 = 0x9e37_79b9_7f4a_7c15;
        const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let words = self.key.words();
        let ports = u64::from(self.ingress) << 32 | u64::from(self.egress);
        let one = fold(words[0] ^ A, words[1] ^ B) ^ fold(words[4] ^ B, words[5] ^ A).rotate_left(17);
        let two = fold(words[2] ^ B, words[3] ^ A) ^ fold(words[6] ^ A, words[7] ^ B).rotate_left(29);
        let hash = fold(one ^ A, two ^ ports.wrapping_mul(B));
        Place { set: hash as usize % SETS, sign: (hash >> 32) as u32 | 1 }
    }
}

impl Verdicts {
    pub(super) fn new() -> Verdicts {
        let none = AclVerdict { counter: 0, action: 0 };
        let question = Question { key: AclKey::default(), ingress: 0, egress: 0 };
        let slots = [Slot { question, answer: [none; 2] }; WAYS];
        Verdicts { sets: vec![Set { signs: [0; WAYS], slots, next: 0, epoch: 0 }; SETS].into() }
    }

    /// The answer that was stored for this question in this epoch.
    #[inline]
    pub(super) fn get(&self, place: Place, question: &Question, epoch: u64) -> Option<&Answer> {
        let set = &self.sets[place.set];
        if set.epoch != epoch {
            return None;
        }
        let slots = set.signs.iter().zip(&set.slots);
        slots
            .filter(|(sign, _)| **sign == place.sign)
            .map(|(_, slot)| slot)
            .find(|slot| slot.question == *question)
            .map(|slot| &slot.answer)
    }

    /// Stores an answer, in place of an old one.
    pub(super) fn put(&mut self, place: Place, question: Question, epoch: u64, answer: Answer) {
        let set = &mut self.sets[place.set];
        if set.epoch != epoch {
            set.epoch = epoch;
            set.signs = [0; WAYS];
        }
        let empty = set.signs.iter().position(|sign| *sign == 0);
        let way = empty.unwrap_or(set.next as usize % WAYS);
        set.next = way as u32 + 1;
        set.signs[way] = place.sign;
        set.slots[way] = Slot { question, answer };
    }
}
