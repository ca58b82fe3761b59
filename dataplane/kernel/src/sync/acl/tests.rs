//! Groups through changes, kills and adoption, against a model that looks at every version.

use std::collections::BTreeMap;

use sluice_pipeline::tables::{AclKey, Tuple, acl_action};

use super::*;
use crate::sync::Mirror;

const GROUP: u32 = 3;

fn key(number: u16) -> RuleKey {
    RuleKey { key: AclKey { dst_port: number, ..AclKey::default() }, group_direction: GROUP * 2, tuple: 1 }
}

fn image(rules: &[(u16, u32)]) -> Image {
    let rules: BTreeMap<RuleKey, RuleImage> = rules
        .iter()
        .map(|(number, rank)| {
            (
                key(*number),
                RuleImage { rank: *rank, counter: u32::from(*number) * 10 + rank, action: acl_action::ALLOW },
            )
        })
        .collect();
    let max_rank = rules.values().map(|rule| rule.rank).max().unwrap_or(0);
    let mask = AclKey { dst_port: u16::MAX, ..AclKey::default() };
    let tuples = if rules.is_empty() { vec![] } else { vec![Tuple { mask, id: 1, max_rank }] };
    let mut image = Image::default();
    image.groups.insert(GROUP, GroupImage { tuples: [tuples, vec![]], rules });
    image
}

/// What a reader that sees the group's entry finds.
fn visible(mirror: &Mirror) -> BTreeMap<RuleKey, u32> {
    let Some(group) = mirror.groups.get(&GROUP) else { return BTreeMap::new() };
    let Some(entry) = group.entry else { return BTreeMap::new() };
    let mut found = BTreeMap::new();
    for (key, rule) in &group.rules {
        let valid: Vec<_> = rule.slots.iter().filter(|slot| slot.is_valid_in(entry.version)).collect();
        assert!(valid.len() <= 1, "two meanings of one key in version {}", entry.version);
        found.extend(valid.iter().map(|slot| (*key, slot.rank)));
    }
    found
}

fn wanted(image: &Image) -> BTreeMap<RuleKey, u32> {
    image.groups[&GROUP].rules.iter().map(|(key, rule)| (*key, rule.rank)).collect()
}

/// Runs a pass up to the point where it is killed: 0 before anything, 1 after the residue, 2 after `part` rule writes,
/// 3 after the flip, 4 not at all.
fn pass(mirror: &mut Mirror, image: &Image, kill: u8, part: usize) -> usize {
    let before = visible(mirror);
    let mut plans = plan(mirror, image);
    let writes = plans.iter().map(|plan| plan.rules.len() + usize::from(plan.flip.is_some())).sum();
    for plan in &mut plans {
        if kill == 0 {
            return writes;
        }
        let mut halfway = GroupPlan { id: plan.id, residue: plan.residue.clone(), ..GroupPlan::default() };
        if kill >= 2 {
            halfway.rules = plan.rules.iter().take(part).copied().collect();
        }
        apply_writes(mirror, &halfway);
        assert_eq!(visible(mirror), before, "a reader saw a change before the flip");
        if kill >= 3 {
            apply_writes(mirror, plan);
            assert_eq!(visible(mirror), wanted(image), "after the flip, all of the new rules and no old one");
        }
        if kill >= 4 {
            apply_removals(mirror, plan);
            assert_eq!(visible(mirror), wanted(image));
        }
    }
    writes
}

#[test]
fn a_change_is_seen_as_a_whole_wherever_the_pass_is_killed() {
    let images = [
        image(&[(1, 2), (2, 2), (3, 2)]),
        image(&[(1, 2), (2, 4), (4, 2)]),
        image(&[(2, 2), (3, 6)]),
        image(&[]),
        image(&[(1, 2), (2, 2), (3, 2), (4, 2)]),
    ];
    for first in &images {
        for second in &images {
            for third in &images {
                for kill in 0..=4 {
                    for part in 0..4 {
                        let mut mirror = Mirror::empty();
                        pass(&mut mirror, first, 4, usize::MAX);
                        pass(&mut mirror, second, kill, part);
                        pass(&mut mirror, third, 4, usize::MAX);
                        assert_eq!(visible(&mirror), wanted(third));
                        assert_eq!(mirror.groups[&GROUP].rules.len(), wanted(third).len(), "leftovers");
                        assert!(plan(&mirror, third).is_empty(), "a second pass must do nothing");
                    }
                }
            }
        }
    }
}

#[test]
fn one_changed_rule_is_two_writes() {
    let rules: Vec<(u16, u32)> = (0..1000).map(|number| (number, 2 + u32::from(number != 7) * 2)).collect();
    let mut mirror = Mirror::empty();
    pass(&mut mirror, &image(&rules), 4, usize::MAX);
    let mut changed = rules;
    changed[500].1 = 2;
    let plans = plan(&mirror, &image(&changed));
    assert_eq!(plans.len(), 1);
    assert_eq!(plans[0].rules.len(), 1);
    assert!(plans[0].tuples.is_empty());
    assert!(plans[0].flip.is_some());
}

#[test]
fn a_counter_starts_anew_with_its_rule_and_not_before() {
    let mut mirror = Mirror::empty();
    pass(&mut mirror, &image(&[(1, 2), (2, 2)]), 4, usize::MAX);
    let plans = plan(&mirror, &image(&[(1, 2), (2, 4)]));
    assert_eq!(plans[0].new_counters, BTreeSet::from([24]));
}

#[test]
fn a_group_that_goes_leaves_nothing() {
    let mut mirror = Mirror::empty();
    pass(&mut mirror, &image(&[(1, 2), (2, 2)]), 4, usize::MAX);
    let plans = plan(&mirror, &Image::default());
    assert!(plans[0].remove_group);
    apply_removals(&mut mirror, &plans[0]);
    assert!(mirror.groups.is_empty());
}
