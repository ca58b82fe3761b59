//! What it means that an engine agrees with the oracle: the comparison that every conformance test uses.
//!
//! A test runs a frame through an engine, fills in [`Observed`] from what the engine did and counted, and asks
//! [`compare`]. What the oracle leaves open (which of several equal rules is counted) is left open here too.

use std::collections::{BTreeMap, BTreeSet};

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{FdbKey, PORTS_MAX, Vlan};

use crate::config::{AclRule, Config};
use crate::ids::Ids;
use crate::lower::{rule_name, shared_group, vnic_port};
use crate::oracle::{Decision, Domain, Outcome, RuleRef, Station};

/// The number used for a port that does not exist: one that no table has.
pub const NO_PORT: u32 = PORTS_MAX;

/// What an engine did with one frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Frames that left, with their ports, in any order. Bytes as on a wire, tags included.
    pub frames: Vec<(u32, Vec<u8>)>,
    /// How often each reason was counted on each port.
    pub drops: BTreeMap<(u32, DropReason), u64>,
    /// Counters of rules that were hit, in any order, each as often as it was; `None` if the engine cannot tell.
    pub rules: Option<Vec<u32>>,
    /// The entry of the FDB that is new, has moved or was refreshed; `None` if the engine cannot tell.
    pub learnt: Option<Option<(FdbKey, u32)>>,
}

/// The number of a port, or [`NO_PORT`].
pub fn port_id(ids: &Ids, name: &str) -> u32 {
    ids.ports.get(name).unwrap_or(NO_PORT)
}

/// A domain as the tables hold it.
pub const fn vlan(domain: Domain) -> Vlan {
    match domain {
        Domain::Untagged => Vlan::UNTAGGED,
        Domain::Customer(vid) => Vlan(vid.get()),
        Domain::Service(vid) => Vlan(vid.get() | Vlan::SERVICE),
    }
}

/// A learnt address as the tables hold it. Switches without a number, which no valid configuration has, become 0.
pub fn fdb_key(ids: &Ids, station: &Station) -> FdbKey {
    FdbKey {
        switch: ids.switches.get(&station.switch).unwrap_or(0),
        vlan: vlan(station.domain),
        mac: station.mac.0,
    }
}

/// Compares what an engine did with a frame from port `ingress` with what must happen to it.
///
/// # Errors
/// A text that says how they differ.
pub fn compare(
    config: &Config,
    ids: &Ids,
    ingress: &str,
    outcome: &Outcome,
    observed: &Observed,
) -> Result<(), String> {
    let mut frames = BTreeMap::new();
    let mut drops: BTreeMap<(u32, DropReason), u64> = BTreeMap::new();
    if let Some(reason) = outcome.dropped {
        drops.insert((port_id(ids, ingress), reason), 1);
    }
    for (name, result) in &outcome.deliveries {
        match result {
            Ok(bytes) => {
                frames.insert(port_id(ids, name), bytes);
            }
            Err(reason) => *drops.entry((port_id(ids, name), *reason)).or_default() += 1,
        }
    }
    if drops != observed.drops {
        return Err(format!("drops by (port, reason): wanted {drops:?}, found {:?}", observed.drops));
    }
    let ports: BTreeSet<u32> = observed.frames.iter().map(|(port, _)| *port).collect();
    if ports.len() != observed.frames.len() || !ports.iter().eq(frames.keys()) {
        let found: Vec<u32> = observed.frames.iter().map(|(port, _)| *port).collect();
        return Err(format!("egress ports: wanted {:?}, found {found:?}", frames.keys()));
    }
    for (port, bytes) in &observed.frames {
        if frames.get(port).is_none_or(|wanted| *wanted != bytes) {
            return Err(format!(
                "bytes that left by port {port}: wanted {:02x?}, found {bytes:02x?}",
                frames.get(port)
            ));
        }
    }
    if let Some(found) = &observed.rules {
        compare_rules(config, ids, outcome, found)?;
    }
    if let Some(found) = observed.learnt {
        let wanted = outcome.learnt.as_ref().map(|station| (fdb_key(ids, station), port_id(ids, ingress)));
        if wanted != found {
            return Err(format!("learnt: wanted {wanted:?}, found {found:?}"));
        }
    }
    Ok(())
}

/// Every decision that rules made must be one hit of one of these rules, and there must be no other hit.
fn compare_rules(config: &Config, ids: &Ids, outcome: &Outcome, found: &[u32]) -> Result<(), String> {
    let decisions: Vec<&Decision> = outcome
        .from_vm
        .iter()
        .chain(outcome.to_vm.values())
        .filter(|decision| !decision.rules.is_empty())
        .collect();
    let wanted: Vec<BTreeSet<u32>> = decisions
        .iter()
        .map(|decision| decision.rules.iter().filter_map(|rule| counter(config, ids, rule)).collect())
        .collect();
    if found.len() == wanted.len() && assign(&wanted, &mut found.to_vec()) {
        return Ok(());
    }
    Err(format!("rule counters hit: wanted one of each of {wanted:?}, found {found:?}"))
}

/// Whether each set can be given an element of its own from `hits`.
fn assign(sets: &[BTreeSet<u32>], hits: &mut Vec<u32>) -> bool {
    let Some((first, others)) = sets.split_first() else {
        return true;
    };
    for index in 0..hits.len() {
        let hit = hits.swap_remove(index);
        if first.contains(&hit) && assign(others, hits) {
            return true;
        }
        hits.push(hit);
        let last = hits.len() - 1;
        hits.swap(index, last);
    }
    false
}

/// The counter of a rule that the oracle names.
pub fn counter(config: &Config, ids: &Ids, rule: &RuleRef) -> Option<u32> {
    ids.rules.get(&rule_name(&rule.group, find(config, rule)?))
}

fn find<'a>(config: &'a Config, rule: &RuleRef) -> Option<&'a AclRule> {
    let shared = config.acl_groups.iter().find(|group| shared_group(&group.name) == rule.group);
    let own = || config.vnics.iter().find(|vnic| vnic_port(&vnic.name) == rule.group);
    match shared {
        Some(group) => group.rules.get(rule.index),
        None => own()?.policy.acl.rules.get(rule.index),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_assigned_to_decisions_one_to_one() {
        let sets =
            |lists: &[&[u32]]| lists.iter().map(|list| list.iter().copied().collect()).collect::<Vec<_>>();
        assert!(assign(&sets(&[&[1, 2], &[1]]), &mut vec![1, 2]));
        assert!(assign(&sets(&[&[1], &[1]]), &mut vec![1, 1]));
        assert!(!assign(&sets(&[&[1], &[1]]), &mut vec![1, 2]));
        assert!(!assign(&sets(&[&[1, 2], &[3]]), &mut vec![1, 2]));
    }

    #[test]
    fn each_kind_of_difference_is_found() {
        let config = Config::default();
        let mut ids = Ids::default();
        ids.ports.assign(["vnic/a", "vnic/b"], PORTS_MAX);
        let (a, b) = (port_id(&ids, "vnic/a"), port_id(&ids, "vnic/b"));
        let outcome =
            Outcome { deliveries: [("vnic/b".to_owned(), Ok(vec![1, 2]))].into(), ..Outcome::default() };
        let good = Observed {
            frames: vec![(b, vec![1, 2])],
            rules: Some(vec![]),
            learnt: Some(None),
            ..Observed::default()
        };
        let check = |observed: &Observed| compare(&config, &ids, "vnic/a", &outcome, observed);
        assert_eq!(check(&good), Ok(()));
        let key = FdbKey { switch: 1, vlan: Vlan(0), mac: [2; 6] };
        for bad in [
            Observed { frames: vec![], ..good.clone() },
            Observed { frames: vec![(a, vec![1, 2])], ..good.clone() },
            Observed { frames: vec![(b, vec![1, 3])], ..good.clone() },
            Observed { frames: vec![(b, vec![1, 2]), (b, vec![1, 2])], ..good.clone() },
            Observed { drops: [((a, DropReason::MacGuard), 1)].into(), ..good.clone() },
            Observed { rules: Some(vec![1]), ..good.clone() },
            Observed { learnt: Some(Some((key, a))), ..good.clone() },
        ] {
            check(&bad).expect_err("they differ");
        }
    }
}
