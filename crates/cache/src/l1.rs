//! The first tier: entries in memory, bounded by bytes. The only file that knows which cache library is used.
//!
//! Called by the cache. Never judges: whoever reads from it asks `invalidate` whether the entry may be answered.

use std::sync::Arc;

use parking_lot::Mutex;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter, sync};
use walcast_model::CacheKey;

use crate::Entry;

pub(crate) struct L1 {
    entries: sync::Cache<CacheKey, Arc<Entry>, ByBytes>,
    /// Makes "look at what is there, then replace it" one step per key.
    stripes: Box<[Mutex<()>]>,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<CacheKey, Arc<Entry>> for ByBytes {
    fn weight(&self, key: &CacheKey, entry: &Arc<Entry>) -> u64 {
        entry.weight(key) as u64
    }
}

const STRIPES: usize = 64;
/// Tags, key and structs of the largest value.
const OVERHEAD: u64 = 64 << 10;

impl L1 {
    pub(crate) fn new(bytes: u64, max_value_bytes: usize) -> L1 {
        // A value must fit its shard: with too many shards, large values would silently never be kept.
        let fit = bytes / (4 * (max_value_bytes as u64 + OVERHEAD));
        let processors = std::thread::available_parallelism().map_or(2, |n| n.get());
        let shards = (fit as usize).clamp(1, processors * 4);
        let shards = if shards.is_power_of_two() { shards } else { shards.next_power_of_two() / 2 };
        let expected = ((bytes / 2048) as usize).max(shards * 32);
        let entries =
            match OptionsBuilder::new().shards(shards).weight_capacity(bytes.max(1)).estimated_items_capacity(expected).build() {
                Ok(options) => {
                    sync::Cache::with_options(options, ByBytes, DefaultHashBuilder::default(), sync::DefaultLifecycle::default())
                }
                // Cannot happen: both capacities are set above.
                Err(_) => sync::Cache::with_weighter(expected, bytes.max(1), ByBytes),
            };
        L1 { entries, stripes: (0..STRIPES).map(|_| Mutex::new(())).collect() }
    }

    pub(crate) fn get(&self, key: &CacheKey) -> Option<Arc<Entry>> {
        self.entries.get(key)
    }

    /// Stores unless `keep` says that the entry which is there already must stay.
    pub(crate) fn put_unless(&self, key: &CacheKey, entry: Arc<Entry>, keep: impl FnOnce(&Entry) -> bool) -> bool {
        let stripe = usize::from(key.digest()[0]) % STRIPES;
        let _one_at_a_time = self.stripes[stripe].lock();
        if self.entries.peek(key).is_some_and(|there| keep(&there)) {
            return false;
        }
        self.entries.insert(key.clone(), entry);
        true
    }

    /// Removes exactly this entry: one that replaced it meanwhile stays.
    pub(crate) fn remove(&self, key: &CacheKey, entry: &Arc<Entry>) {
        self.entries.remove_if(key, |there| Arc::ptr_eq(there, entry));
    }

    pub(crate) fn delete(&self, key: &CacheKey) -> bool {
        self.entries.remove(key).is_some()
    }

    pub(crate) fn clear(&self) {
        self.entries.clear();
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.entries.weight()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use walcast_model::{Fence, Floor, Lsn, Snapshot};

    use super::*;
    use crate::{NewValue, entry::Life};

    fn entry(key: &CacheKey, bytes: usize) -> Arc<Entry> {
        let value =
            NewValue { value: vec![7; bytes].into(), content_type: "x/y".into(), tags: vec![], ttl: None, negative: false };
        let fence = Fence { snapshot: Snapshot::blind(), settled: Lsn(1), floor: Floor(1) };
        Arc::new(Entry::new(key, value, Life { fresh: Duration::from_secs(60), stale: Duration::ZERO }, fence, 0))
    }

    fn key(n: usize) -> CacheKey {
        CacheKey::new("n", &n.to_string()).unwrap()
    }

    #[test]
    fn p7_memory_stays_within_its_bytes_and_the_largest_value_still_fits() {
        let l1 = L1::new(8 << 20, 1 << 20);
        for n in 0..5_000 {
            l1.put_unless(&key(n), entry(&key(n), 10_000), |_| false);
        }
        assert!(l1.bytes() <= 8 << 20, "{}", l1.bytes());
        assert!(l1.len() > 500, "{}", l1.len());
        l1.put_unless(&key(1), entry(&key(1), 1 << 20), |_| false);
        assert!(l1.get(&key(1)).is_some());
        l1.clear();
        assert_eq!((l1.len(), l1.bytes()), (0, 0));
    }

    #[test]
    fn removing_an_old_entry_leaves_the_one_that_replaced_it() {
        let l1 = L1::new(1 << 20, 1 << 10);
        let (old, new) = (entry(&key(1), 10), entry(&key(1), 20));
        l1.put_unless(&key(1), old.clone(), |_| false);
        l1.put_unless(&key(1), new, |_| false);
        l1.remove(&key(1), &old);
        assert_eq!(l1.get(&key(1)).unwrap().value, Bytes::from(vec![7; 20]));
        assert!(!l1.put_unless(&key(1), old, |_| true));
        assert!(l1.delete(&key(1)) && !l1.delete(&key(1)));
    }
}
