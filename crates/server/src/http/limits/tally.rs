//! How many there are of each name right now. What is counted stays counted until its holder is dropped.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;

/// Cheap to clone. Knows only names that somebody holds.
#[derive(Debug, Clone)]
pub struct Tally<K: Eq + Hash>(Arc<Mutex<HashMap<K, u64>>>);

/// One of a name. Dropping it counts it off.
#[derive(Debug)]
pub struct Held<K: Eq + Hash> {
    tally: Tally<K>,
    name: K,
}

impl<K: Eq + Hash> Held<K> {
    pub fn name(&self) -> &K {
        &self.name
    }
}

impl<K: Eq + Hash> Default for Tally<K> {
    fn default() -> Tally<K> {
        Tally(Arc::default())
    }
}

impl<K: Eq + Hash + Clone> Tally<K> {
    /// None: there are `most` already. A `most` of 0 is no limit.
    pub fn take(&self, name: K, most: u64) -> Option<Held<K>> {
        let mut counts = self.0.lock();
        let count = counts.entry(name.clone()).or_default();
        if most > 0 && *count >= most {
            return None;
        }
        *count += 1;
        drop(counts);
        Some(Held { tally: self.clone(), name })
    }

    pub fn of<Q: Eq + Hash + ?Sized>(&self, name: &Q) -> u64
    where
        K: std::borrow::Borrow<Q>,
    {
        self.0.lock().get(name).copied().unwrap_or_default()
    }

    pub fn names(&self) -> usize {
        self.0.lock().len()
    }

    /// The names with the most, at most `many`.
    pub fn top(&self, many: usize) -> Vec<(K, u64)>
    where
        K: Ord,
    {
        let mut all: Vec<_> = self.0.lock().iter().map(|(name, count)| (name.clone(), *count)).collect();
        all.sort_unstable_by(|(a, m), (b, n)| n.cmp(m).then_with(|| a.cmp(b)));
        all.truncate(many);
        all
    }
}

impl<K: Eq + Hash> Drop for Held<K> {
    fn drop(&mut self) {
        let mut counts = self.tally.0.lock();
        if let Some(count) = counts.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.name);
                // A herd's table is not kept for the quiet hours after it.
                if counts.len() * 4 < counts.capacity() {
                    let fits = counts.len() * 2;
                    counts.shrink_to(fits);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p9_what_is_dropped_is_counted_off_and_its_name_forgotten() {
        let tally = Tally::default();
        let held: Vec<_> = (0..3).map(|_| tally.take("a", 3).unwrap()).collect();
        assert!(tally.take("a", 3).is_none());
        assert!(tally.take("b", 3).is_some());
        assert_eq!((tally.of("a"), tally.of("b"), tally.names()), (3, 0, 1));
        drop(held);
        assert_eq!((tally.of("a"), tally.names()), (0, 0));
    }

    #[test]
    fn a_refusal_leaves_nothing_behind() {
        let tally = Tally::default();
        let _held = tally.take("a", 1).unwrap();
        assert!(tally.take("a", 1).is_none());
        assert_eq!(tally.top(10), [("a", 1)]);
    }
}
