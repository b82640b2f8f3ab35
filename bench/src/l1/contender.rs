//! The caches that are compared, each as its own documentation shows it, all with room for the same number of entries.

use std::{num::NonZeroUsize, sync::Arc};

use bytes::Bytes;
use foyer_memory::{CacheBuilder, EvictionConfig, FifoConfig, LfuConfig, LruConfig, S3FifoConfig};
use parking_lot::Mutex;
use walcast_cache::{AtLeast, Cache, CacheConfig, Hearing, Lookup, NamespaceConfig, NewValue, Policy};
use walcast_model::{CacheKey, Floor, Stamp, TagClock};

use super::{Key, value};

/// One cache with room for some entries.
pub trait Contender: Send + Sync {
    fn get(&self, key: &Key) -> bool;
    fn put(&self, key: &Key);

    /// Reads, and fills at each miss; how many were hits. Here, so that each contender's own loop calls it directly.
    fn read(&self, keys: &[Key], order: &[u32]) -> usize {
        let mut hits = 0;
        for index in order {
            let key = &keys[*index as usize];
            if self.get(key) {
                hits += 1;
            } else {
                self.put(key);
            }
        }
        hits
    }

    /// The same, but every twentieth is a write.
    fn read_and_write(&self, keys: &[Key], order: &[u32]) -> usize {
        let mut hits = 0;
        for (turn, index) in order.iter().enumerate() {
            let key = &keys[*index as usize];
            if turn % 20 == 7 {
                self.put(key);
            } else if self.get(key) {
                hits += 1;
            } else {
                self.put(key);
            }
        }
        hits
    }
}

pub struct Named {
    pub name: &'static str,
    pub make: fn(usize) -> Box<dyn Contender>,
}

pub const WALCAST: [Named; 4] = [
    Named { name: "walcast adaptive", make: |entries| Box::new(Walcast::new(Policy::Adaptive, entries)) },
    Named { name: "walcast lru", make: |entries| Box::new(Walcast::new(Policy::Lru, entries)) },
    Named { name: "walcast lfu", make: |entries| Box::new(Walcast::new(Policy::Lfu, entries)) },
    Named { name: "walcast fifo", make: |entries| Box::new(Walcast::new(Policy::Fifo, entries)) },
];

pub const OTHERS: [Named; 7] = [
    Named { name: "quick_cache", make: |entries| Box::new(quick_cache::sync::Cache::<String, Bytes>::new(entries)) },
    Named { name: "moka", make: |entries| Box::new(moka::sync::Cache::<String, Bytes>::new(entries as u64)) },
    Named { name: "foyer s3fifo", make: |entries| foyer(entries, S3FifoConfig::default().into()) },
    Named { name: "foyer lru", make: |entries| foyer(entries, LruConfig::default().into()) },
    Named { name: "foyer lfu", make: |entries| foyer(entries, LfuConfig::default().into()) },
    Named { name: "foyer fifo", make: |entries| foyer(entries, FifoConfig::default().into()) },
    Named { name: "mutexed lru", make: |entries| Box::new(Mutex::new(lru(entries))) },
];

/// The whole cache: each read is judged against the tag clock, each store fenced.
pub struct Walcast {
    pub cache: Cache,
    content_type: Arc<str>,
}

impl Walcast {
    /// Bounded by entries; bytes in plenty.
    pub fn new(policy: Policy, entries: usize) -> Walcast {
        let unnamed = NamespaceConfig { policy, ..NamespaceConfig::default() };
        let l1_bytes = (entries as u64 * 4096).max(256 << 20);
        // On a busy machine a run takes longer than the usual five minutes, and the others know no time.
        let default_ttl = CacheConfig::MAX_TTL;
        let config = CacheConfig { l1_bytes, l1_entries: Some(entries), unnamed, default_ttl, ..CacheConfig::default() };
        let clock = Arc::new(TagClock::new(TagClock::DEFAULT_SLOTS, Floor(1)));
        let cache = Cache::new(config, clock, None);
        cache.set_hearing(Hearing::Live);
        Walcast { cache, content_type: "application/json".into() }
    }

    pub fn get(&self, key: &CacheKey) -> bool {
        matches!(self.cache.get_l1(key, AtLeast::Any), Lookup::Hit { .. })
    }

    pub fn raise(&self, tag: &walcast_model::Tag, stamp: Stamp) {
        self.cache.clock().raise(tag.hash(), stamp);
        self.cache.note_invalidated(stamp.lsn);
    }
}

impl Contender for Walcast {
    fn get(&self, key: &Key) -> bool {
        Walcast::get(self, &key.cache_key)
    }

    fn put(&self, key: &Key) {
        let content_type = self.content_type.clone();
        let value = NewValue { value: value(), content_type, tags: Vec::new(), ttl: None, negative: false };
        // Refused only where the config would: it sets no such limit.
        let _ = self.cache.put(&key.cache_key, value, self.cache.external_fence());
    }
}

/// A reader who has only text, and makes the key for each read.
pub struct FromText(pub Walcast);

impl Contender for FromText {
    fn get(&self, key: &Key) -> bool {
        CacheKey::new("bench", &key.text).is_ok_and(|made| self.0.get(&made))
    }

    fn put(&self, key: &Key) {
        self.0.put(key);
    }
}

impl Contender for quick_cache::sync::Cache<String, Bytes> {
    fn get(&self, key: &Key) -> bool {
        self.get(key.text.as_str()).is_some()
    }

    fn put(&self, key: &Key) {
        self.insert(key.text.clone(), value());
    }
}

impl Contender for moka::sync::Cache<String, Bytes> {
    fn get(&self, key: &Key) -> bool {
        self.get(key.text.as_str()).is_some()
    }

    fn put(&self, key: &Key) {
        self.insert(key.text.clone(), value());
    }
}

impl Contender for foyer_memory::Cache<String, Bytes> {
    fn get(&self, key: &Key) -> bool {
        self.get(key.text.as_str()).is_some()
    }

    fn put(&self, key: &Key) {
        self.insert(key.text.clone(), value());
    }
}

fn foyer(entries: usize, eviction: EvictionConfig) -> Box<dyn Contender> {
    let cache: foyer_memory::Cache<String, Bytes> = CacheBuilder::new(entries).with_eviction_config(eviction).build();
    Box::new(cache)
}

impl Contender for Mutex<lru::LruCache<String, Bytes>> {
    fn get(&self, key: &Key) -> bool {
        self.lock().get(key.text.as_str()).cloned().is_some()
    }

    fn put(&self, key: &Key) {
        self.lock().put(key.text.clone(), value());
    }
}

fn lru(entries: usize) -> lru::LruCache<String, Bytes> {
    lru::LruCache::new(NonZeroUsize::new(entries).unwrap_or(NonZeroUsize::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_contender_keeps_what_it_was_given_and_no_more_than_it_may() {
        let keys = Key::many(5_000).unwrap();
        for named in WALCAST.iter().chain(&OTHERS) {
            let cache = (named.make)(1_000);
            assert!(!cache.get(&keys[0]), "{}", named.name);
            cache.put(&keys[0]);
            assert!(cache.get(&keys[0]), "{}", named.name);
            let all: Vec<u32> = (0..5_000).collect();
            assert!(cache.read(&keys, &all) <= 1, "{}: every key once", named.name);
            let kept = keys.iter().filter(|key| cache.get(key)).count();
            // moka evicts a little later than it inserts.
            assert!((500..=1_600).contains(&kept), "{} keeps {kept}", named.name);
        }
    }
}
