//! Two sorted maps, side by side.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// What to write and what to delete to get from one map to the other.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference<K, V> {
    pub(crate) writes: Vec<(K, V)>,
    pub(crate) deletes: Vec<K>,
}

impl<K, V> Difference<K, V> {
    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.deletes.is_empty()
    }
}

/// The difference, in the order of the keys.
pub(crate) fn difference<K: Copy + Ord, V: Copy + PartialEq>(
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
) -> Difference<K, V> {
    let mut difference = Difference { writes: Vec::new(), deletes: Vec::new() };
    merge(have, want, |key, have, want| match (have, want) {
        (_, Some(want)) if have != Some(want) => difference.writes.push((*key, *want)),
        (Some(_), None) => difference.deletes.push(*key),
        _ => {}
    });
    difference
}

/// Calls `visit` for every key of either map, in order.
pub(crate) fn merge<K: Ord, A, B>(
    have: &BTreeMap<K, A>,
    want: &BTreeMap<K, B>,
    mut visit: impl FnMut(&K, Option<&A>, Option<&B>),
) {
    let (mut have, mut want) = (have.iter().peekable(), want.iter().peekable());
    loop {
        let order = match (have.peek(), want.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let a = if order.is_le() { have.next() } else { None };
        let b = if order.is_ge() { want.next() } else { None };
        if let Some((key, _)) = a {
            visit(key, a.map(|(_, value)| value), b.map(|(_, value)| value));
        } else if let Some((key, _)) = b {
            visit(key, None, b.map(|(_, value)| value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applying_the_difference_makes_the_maps_equal() {
        let maps: Vec<BTreeMap<u32, u32>> = vec![
            BTreeMap::new(),
            BTreeMap::from([(1, 1), (2, 2), (3, 3)]),
            BTreeMap::from([(2, 2), (3, 4), (9, 9)]),
            BTreeMap::from([(0, 0)]),
        ];
        for have in &maps {
            for want in &maps {
                let difference = difference(have, want);
                let mut result = have.clone();
                result.retain(|key, _| !difference.deletes.contains(key));
                result.extend(difference.writes.iter().copied());
                assert_eq!(&result, want);
                assert_eq!(difference.is_empty(), have == want);
                assert!(difference.deletes.iter().all(|key| have.contains_key(key)));
                assert!(difference.writes.iter().all(|(key, value)| have.get(key) != Some(value)));
            }
        }
    }
}
