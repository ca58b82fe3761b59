//! Versioned updates of ACL groups: a group changes as a whole, by one write of its entry, and only what differs is
//! written.
//!
//! With the live version `v`, every rule key holds what is valid in `v` and, from `v + 1` on, what is wanted. Then the
//! entry is raised to `v + 1`. Keys that are not wanted any more are marked as ending at `v + 1` first and deleted after
//! the grace period that follows. A pass that was killed anywhere in between leaves marks for `v + 1` that the next plan
//! corrects or deletes before it raises the version.

use std::collections::{BTreeSet, HashSet};

use bytemuck::Zeroable;
use sluice_pipeline::tables::{AclGroup, RuleEntry, RuleKey, RuleSlot, TUPLE_CHUNK, TupleChunk, TupleKey};
use sluice_policy::image::{GroupImage, Image, RuleImage};

use super::diff::merge;
use super::mirror::{GroupMirror, Mirror};

/// Steps for one group.
#[derive(Debug, Default)]
pub(crate) struct GroupPlan {
    pub(crate) id: u32,
    /// Leftovers of a killed pass that no version sees: deleted first.
    pub(crate) residue: Vec<RuleKey>,
    /// Rule entries to write before the group's entry.
    pub(crate) rules: Vec<(RuleKey, RuleEntry)>,
    /// Chunks of a new generation, likewise.
    pub(crate) tuples: Vec<(TupleKey, TupleChunk)>,
    /// The group's new entry.
    pub(crate) flip: Option<AclGroup>,
    /// The group's entry goes, once no port refers to it.
    pub(crate) remove_group: bool,
    /// Rule entries that nothing sees after the flip and a grace period.
    pub(crate) outlived_rules: Vec<RuleKey>,
    /// Chunks, likewise.
    pub(crate) outlived_tuples: Vec<TupleKey>,
    /// Counters that now belong to a rule that had none before.
    pub(crate) new_counters: BTreeSet<u32>,
    /// The live tuples after the flip, if they change.
    new_tuples: Option<[Vec<sluice_pipeline::tables::Tuple>; 2]>,
}

impl GroupPlan {
    fn is_empty(&self) -> bool {
        self.residue.is_empty()
            && self.flip.is_none()
            && !self.remove_group
            && self.rules.is_empty()
            && self.outlived_rules.is_empty()
            && self.outlived_tuples.is_empty()
    }
}

/// Plans for all groups that need steps.
pub(crate) fn plan(mirror: &Mirror, image: &Image) -> Vec<GroupPlan> {
    let mut plans = Vec::new();
    let absent = GroupMirror::default();
    merge(&mirror.groups, &image.groups, |id, have, want| {
        let have = have.unwrap_or(&absent);
        let plan = match want {
            Some(want) => plan_change(*id, have, want),
            None => plan_removal(*id, have),
        };
        if !plan.is_empty() {
            plans.push(plan);
        }
    });
    plans
}

fn plan_removal(id: u32, have: &GroupMirror) -> GroupPlan {
    GroupPlan {
        id,
        remove_group: have.entry.is_some(),
        outlived_rules: have.rules.keys().copied().collect(),
        outlived_tuples: have.chunks.iter().copied().collect(),
        ..GroupPlan::default()
    }
}

fn slot(rule: &RuleImage, from: u32) -> RuleSlot {
    RuleSlot { from, until: u32::MAX, rank: rule.rank, counter: rule.counter, action: rule.action }
}

fn means(slot: &RuleSlot, rule: &RuleImage) -> bool {
    (slot.rank, slot.counter, slot.action) == (rule.rank, rule.counter, rule.action)
}

fn plan_change(id: u32, have: &GroupMirror, want: &GroupImage) -> GroupPlan {
    let entry = have.entry.unwrap_or_else(AclGroup::zeroed);
    let (live, next) = (entry.version, entry.version + 1);
    let mut plan = GroupPlan { id, ..GroupPlan::default() };
    let mut changed = have.entry.is_none();
    let mut kept_counters = HashSet::new();

    merge(&have.rules, &want.rules, |key, entry, rule| {
        // What holds now; and whether anything else under the key may come to hold later.
        let now = entry.and_then(|entry| entry.slots.iter().find(|slot| live != 0 && slot.is_valid_in(live)));
        let other_to_come = entry
            .is_some_and(|entry| entry.slots.iter().any(|slot| slot.from > live && slot.from < slot.until));
        match (now, rule) {
            (Some(now), Some(rule)) if means(now, rule) => {
                kept_counters.insert(rule.counter);
                if now.until != u32::MAX || other_to_come {
                    let slots = [RuleSlot { until: u32::MAX, ..*now }, RuleSlot::EMPTY];
                    plan.rules.push((*key, RuleEntry { slots }));
                }
            }
            (now, Some(rule)) => {
                let ending = now.map_or(RuleSlot::EMPTY, |now| RuleSlot { until: next, ..*now });
                plan.rules.push((*key, RuleEntry { slots: [ending, slot(rule, next)] }));
                plan.new_counters.insert(rule.counter);
                changed = true;
            }
            (Some(now), None) => {
                let ending = RuleSlot { until: next, ..*now };
                plan.rules.push((*key, RuleEntry { slots: [ending, RuleSlot::EMPTY] }));
                plan.outlived_rules.push(*key);
                changed = true;
            }
            (None, None) => plan.residue.push(*key),
        }
    });
    plan.new_counters.retain(|counter| !kept_counters.contains(counter));

    let mut generation = entry.generation;
    if have.entry.is_none() || have.tuples != want.tuples {
        generation = generation.wrapping_add(1);
        plan.tuples = chunks(id, generation, want);
        plan.new_tuples = Some(want.tuples.clone());
        changed = true;
    }
    let count = |direction: usize| want.tuples[direction].len() as u32;
    plan.outlived_tuples = have
        .chunks
        .iter()
        .filter(|key| {
            key.generation != generation
                || key.chunk * TUPLE_CHUNK as u32 >= count((key.direction & 1) as usize)
        })
        .copied()
        .collect();
    if changed {
        plan.flip = Some(AclGroup { version: next, generation, tuple_count: [count(0), count(1)] });
    }
    plan
}

/// A generation of tuple lists, in chunks.
fn chunks(id: u32, generation: u32, want: &GroupImage) -> Vec<(TupleKey, TupleChunk)> {
    let mut chunks = Vec::new();
    for (direction, tuples) in want.tuples.iter().enumerate() {
        for (number, part) in tuples.chunks(TUPLE_CHUNK).enumerate() {
            let mut chunk = TupleChunk::zeroed();
            for (to, from) in chunk.tuples.iter_mut().zip(part) {
                *to = *from;
            }
            let key = TupleKey { group: id, generation, direction: direction as u32, chunk: number as u32 };
            chunks.push((key, chunk));
        }
    }
    chunks
}

/// Notes that everything up to the flip was written.
pub(crate) fn apply_writes(mirror: &mut Mirror, plan: &GroupPlan) {
    let group = mirror.groups.entry(plan.id).or_default();
    for key in &plan.residue {
        group.rules.remove(key);
    }
    group.rules.extend(plan.rules.iter().copied());
    group.chunks.extend(plan.tuples.iter().map(|(key, _)| *key));
    if let Some(tuples) = &plan.new_tuples {
        group.tuples.clone_from(tuples);
    }
    if plan.flip.is_some() {
        group.entry = plan.flip;
    }
}

/// Notes that everything after that was removed.
pub(crate) fn apply_removals(mirror: &mut Mirror, plan: &GroupPlan) {
    let Some(group) = mirror.groups.get_mut(&plan.id) else { return };
    for key in &plan.outlived_rules {
        group.rules.remove(key);
    }
    for key in &plan.outlived_tuples {
        group.chunks.remove(key);
    }
    if plan.remove_group {
        group.entry = None;
    }
    if group.entry.is_none() && group.rules.is_empty() && group.chunks.is_empty() {
        mirror.groups.remove(&plan.id);
    }
}

#[cfg(test)]
mod tests;
