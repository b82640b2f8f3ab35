//! What nobody can beat: a cache that knows the future and keeps what is needed soonest (Belady), and need not keep
//! what is needed later than all it has.

use std::collections::BTreeMap;

const NEVER: usize = usize::MAX;

/// Hits with room for `entries` of `keys` keys.
pub fn hits(order: &[u32], keys: usize, entries: usize) -> usize {
    let next = next_uses(order, keys);
    // Those kept, by their next use; one that is never used again is not kept.
    let mut kept: BTreeMap<usize, u32> = BTreeMap::new();
    let mut hits = 0;
    for (turn, key) in order.iter().enumerate() {
        hits += usize::from(kept.remove(&turn).is_some());
        if next[turn] == NEVER {
            continue;
        }
        kept.insert(next[turn], *key);
        if kept.len() > entries {
            kept.pop_last();
        }
    }
    hits
}

/// For each request, when its key is asked for again.
fn next_uses(order: &[u32], keys: usize) -> Vec<usize> {
    let mut soonest = vec![NEVER; keys];
    let mut next = vec![NEVER; order.len()];
    for (turn, key) in order.iter().enumerate().rev() {
        next[turn] = std::mem::replace(&mut soonest[*key as usize], turn);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_what_is_needed_soonest() {
        let order = [0, 1, 2, 0, 1, 2, 0, 1, 2];
        assert_eq!(hits(&order, 3, 3), 6, "all but the first of each");
        assert_eq!(hits(&order, 3, 1), 2, "one of them, from first to last");
        assert_eq!(hits(&[0, 1, 1, 0, 0], 2, 1), 2, "1 once, then 0 once");
        assert_eq!(hits(&order, 3, 0), 0);
    }
}
