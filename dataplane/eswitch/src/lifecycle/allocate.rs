//! Who gets the VFs, when there are fewer than vNICs that want one.
//!
//! Weight decides; a vNIC that has a VF keeps it against newcomers unless they weigh so much more, and for a while
//! after it was granted: moving costs packets, so small differences must not make VFs wander.

use super::Path;

/// How reluctantly VFs change hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hysteresis {
    /// A newcomer must weigh so much more than the vNIC that it displaces.
    pub margin: u8,
    /// A VF is not taken for another vNIC earlier than so many milliseconds after the grant.
    pub hold: u64,
}

impl Default for Hysteresis {
    fn default() -> Self {
        Hysteresis { margin: 10, hold: 30_000 }
    }
}

/// A vNIC as the allocator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name; breaks ties.
    pub name: String,
    /// 0–100; 0 means never.
    pub weight: u8,
    /// Whether its policy is placed on this eSwitch, and nothing has failed so lately that it must wait.
    pub is_eligible: bool,
    /// Where it is.
    pub path: Path,
    /// Since when, milliseconds.
    pub since: u64,
}

/// What should change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// To be granted a free VF now, in this order.
    pub grants: Vec<String>,
    /// To be revoked: those that may have none, and those that make room.
    pub revokes: Vec<String>,
}

/// Decides for one eSwitch with `vfs` VFs.
///
/// Never grants more VFs than are free: what is revoked is granted in a later round, when it is clean. So repeated
/// rounds over an unchanged world change nothing.
pub fn allocate(candidates: &[Candidate], vfs: usize, hysteresis: Hysteresis, now: u64) -> Decision {
    let mut decision = Decision::default();
    let holds = |one: &&Candidate| one.path != Path::Software;
    let mut free = vfs.saturating_sub(candidates.iter().filter(holds).count());
    // VFs on their way back count as promised: nobody else needs to make room for the same newcomer.
    let mut coming = candidates.iter().filter(|one| one.path == Path::Draining).count();
    let (mut keepers, leavers): (Vec<&Candidate>, Vec<&Candidate>) = candidates
        .iter()
        .filter(|one| !matches!(one.path, Path::Software | Path::Draining))
        .partition(|one| one.weight > 0 && one.is_eligible);
    decision.revokes.extend(leavers.iter().map(|one| one.name.clone()));
    coming += leavers.len();

    let mut newcomers: Vec<&Candidate> = candidates
        .iter()
        .filter(|one| one.path == Path::Software && one.weight > 0 && one.is_eligible)
        .collect();
    newcomers.sort_by(|a, b| b.weight.cmp(&a.weight).then_with(|| a.name.cmp(&b.name)));
    // The lightest, last.
    keepers.sort_by(|a, b| b.weight.cmp(&a.weight).then_with(|| a.name.cmp(&b.name)));
    for newcomer in newcomers {
        if free > 0 {
            free -= 1;
            decision.grants.push(newcomer.name.clone());
        } else if coming > 0 {
            coming -= 1;
        } else if let Some(at) = keepers.iter().rposition(|keeper| {
            newcomer.weight >= keeper.weight.saturating_add(hysteresis.margin.max(1))
                && now.saturating_sub(keeper.since) >= hysteresis.hold
        }) {
            decision.revokes.push(keepers.remove(at).name.clone());
        } else {
            break;
        }
    }
    decision
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYSTERESIS: Hysteresis = Hysteresis { margin: 10, hold: 1_000 };

    fn candidate(name: &str, weight: u8, path: Path) -> Candidate {
        Candidate { name: name.into(), weight, is_eligible: true, path, since: 0 }
    }

    fn decide(candidates: &[Candidate], vfs: usize, now: u64) -> (Vec<String>, Vec<String>) {
        let decision = allocate(candidates, vfs, HYSTERESIS, now);
        (decision.grants, decision.revokes)
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_heaviest_get_what_is_free() {
        let candidates =
            [("a", 10), ("b", 90), ("c", 50), ("d", 0)].map(|(name, w)| candidate(name, w, Path::Software));
        assert_eq!(decide(&candidates, 2, 0), (names(&["b", "c"]), names(&[])));
        assert_eq!(decide(&candidates, 9, 0), (names(&["b", "c", "a"]), names(&[])), "0 means never");
        assert_eq!(decide(&candidates, 0, 0), (names(&[]), names(&[])));
    }

    #[test]
    fn a_holder_yields_to_much_more_weight_after_a_while() {
        let case = |newcomer, now| {
            decide(&[candidate("a", 50, Path::Hardware), candidate("b", newcomer, Path::Software)], 1, now)
        };
        assert_eq!(case(59, 5_000), (names(&[]), names(&[])), "within the margin");
        assert_eq!(case(60, 999), (names(&[]), names(&[])), "too soon");
        assert_eq!(case(60, 1_000), (names(&[]), names(&["a"])));
    }

    #[test]
    fn the_lightest_holder_yields_and_only_one_per_newcomer() {
        let candidates = [
            candidate("a", 20, Path::Hardware),
            candidate("b", 40, Path::Hardware),
            candidate("c", 90, Path::Software),
        ];
        assert_eq!(decide(&candidates, 2, 5_000), (names(&[]), names(&["a"])));
        let draining = [candidate("a", 20, Path::Draining), candidates[1].clone(), candidates[2].clone()];
        assert_eq!(decide(&draining, 2, 5_000), (names(&[]), names(&[])), "a VF is on its way");
    }

    #[test]
    fn who_may_have_none_loses_it() {
        let mut unfit = candidate("a", 90, Path::Hardware);
        unfit.is_eligible = false;
        let banned = candidate("b", 0, Path::Attaching);
        let waiting = candidate("c", 1, Path::Software);
        assert_eq!(decide(&[unfit, banned, waiting], 2, 0), (names(&[]), names(&["a", "b"])));
    }

    #[test]
    fn rounds_settle() {
        let mut candidates: Vec<Candidate> =
            (0..10).map(|n| candidate(&format!("vm{n}"), n * 10, Path::Software)).collect();
        for round in 0.. {
            let (grants, revokes) = decide(&candidates, 3, 100_000);
            if grants.is_empty() && revokes.is_empty() {
                break;
            }
            assert!(round < 10, "it does not settle");
            for one in &mut candidates {
                if grants.contains(&one.name) {
                    one.path = Path::Hardware;
                } else if revokes.contains(&one.name) {
                    one.path = Path::Software;
                }
            }
        }
        let holders: Vec<&str> =
            candidates.iter().filter(|one| one.path == Path::Hardware).map(|one| one.name.as_str()).collect();
        assert_eq!(holders, ["vm7", "vm8", "vm9"]);
    }
}
