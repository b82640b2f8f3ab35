//! One bounded room of L1 and the engine behind its policy. The only file that knows which cache libraries are used.
//!
//! Called by `l1`, which holds a lock per key while it writes. Never holds more than its bytes, nor more than its
//! entries; what fits nowhere in it is not kept.

use std::{
    hash::{BuildHasher, Hasher},
    sync::Arc,
};

use foyer_memory::{Cache as Foyer, CacheBuilder, EvictionConfig, FifoConfig, LfuConfig, LruConfig};
use parking_lot::RwLock;
use quick_cache::{OptionsBuilder, Weighter, sync};
use walcast_model::CacheKey;

use super::plan::RoomPlan;
use crate::{Entry, Policy};

pub(super) struct Room {
    plan: RoomPlan,
    /// What an entry counts at least, so that the bound on bytes is one on entries too.
    least_weight: u64,
    /// Nothing larger is kept.
    shard_bytes: u64,
    engine: Engine,
}

enum Engine {
    Quick(sync::Cache<CacheKey, Kept, ByWeight, KeysOwnHash>),
    /// Behind a lock that only `clear` takes alone: the library's own `clear` forgets to give the bytes back.
    Foyer {
        cache: RwLock<FoyerCache>,
        empty: Box<dyn Fn() -> FoyerCache + Send + Sync>,
    },
}

type FoyerCache = Foyer<CacheKey, Kept, KeysOwnHash>;

/// The weight beside the entry, so that making room does not read every entry again.
#[derive(Clone)]
struct Kept {
    entry: Arc<Entry>,
    weight: u64,
}

#[derive(Clone)]
struct ByWeight;

impl Weighter<CacheKey, Kept> for ByWeight {
    fn weight(&self, _: &CacheKey, kept: &Kept) -> u64 {
        kept.weight
    }
}

/// A key brings its hash.
#[derive(Debug, Default, Clone, Copy)]
struct KeysOwnHash;

struct Given(u64);

impl BuildHasher for KeysOwnHash {
    type Hasher = Given;

    fn build_hasher(&self) -> Given {
        Given(0)
    }
}

impl Hasher for Given {
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, bytes: &[u8]) {
        // Nobody's keys come this way: theirs is one `write_u64`.
        for byte in bytes {
            self.0 = self.0.wrapping_mul(31).wrapping_add(u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Tags, key and structs of the largest value.
const OVERHEAD: u64 = 64 << 10;
/// Below that a shard lets go what its neighbour would keep.
const ENTRIES_A_SHARD: usize = 64;
/// How much of a room is for what proved itself in use. By `walcast-bench hit-ratio`, a little better than the
/// library's 0.97 on scans and loops and no worse elsewhere; its own share for ghosts, 0.5, was best.
const PROVEN: f64 = 0.99;
/// What an entry weighs where nobody knows better.
const USUAL_WEIGHT: u64 = 1024;

impl Room {
    pub(super) fn new(plan: RoomPlan, max_value_bytes: usize) -> Room {
        // A value must fit its shard: with too many shards, large values would silently never be kept.
        let fit = (plan.bytes / (4 * (max_value_bytes as u64 + OVERHEAD))) as usize;
        let few = plan.entries.map_or(fit, |entries| fit.min(entries / ENTRIES_A_SHARD));
        let processors = std::thread::available_parallelism().map_or(2, |n| n.get());
        let shards = few.clamp(1, processors * 4);
        let shards = if shards.is_power_of_two() { shards } else { shards.next_power_of_two() / 2 };
        let (least_weight, bytes) = match plan.entries.map(|entries| entries.max(1) as u64) {
            None => (1, plan.bytes),
            Some(entries) => (plan.bytes / entries, plan.bytes / entries * entries),
        };
        // Libraries round a shard's part up: by this no room is overfull by an entry.
        let shard_bytes = bytes / shards as u64;
        let expected = bytes / least_weight.max(USUAL_WEIGHT);
        let engine = Engine::new(plan.policy, shard_bytes, shards, expected as usize);
        Room { plan, least_weight, shard_bytes, engine }
    }

    pub(super) fn plan(&self) -> &RoomPlan {
        &self.plan
    }

    pub(super) fn get(&self, key: &CacheKey) -> Option<Arc<Entry>> {
        match &self.engine {
            Engine::Quick(cache) => cache.get(key).map(|kept| kept.entry),
            Engine::Foyer { cache, .. } => cache.read().get(key).map(|kept| kept.value().entry.clone()),
        }
    }

    /// As `get`, but no use of the entry, where the engine knows the difference.
    pub(super) fn peek(&self, key: &CacheKey) -> Option<Arc<Entry>> {
        match &self.engine {
            Engine::Quick(cache) => cache.peek(key).map(|kept| kept.entry),
            Engine::Foyer { .. } => self.get(key),
        }
    }

    pub(super) fn insert(&self, key: &CacheKey, entry: Arc<Entry>) {
        let weight = (entry.weight(key) as u64).max(self.least_weight);
        if weight > self.shard_bytes {
            // The one before it must not outlive it.
            self.delete(key);
            return;
        }
        let kept = Kept { entry, weight };
        match &self.engine {
            Engine::Quick(cache) => cache.insert(key.clone(), kept),
            Engine::Foyer { cache, .. } => drop(cache.read().insert(key.clone(), kept)),
        }
    }

    pub(super) fn delete(&self, key: &CacheKey) -> bool {
        match &self.engine {
            Engine::Quick(cache) => cache.remove(key).is_some(),
            Engine::Foyer { cache, .. } => cache.read().remove(key).is_some(),
        }
    }

    pub(super) fn each(&self, visit: &mut impl FnMut(&CacheKey, &Entry) -> bool) -> bool {
        match &self.engine {
            Engine::Quick(cache) => cache.iter().all(|(key, kept)| visit(&key, &kept.entry)),
            Engine::Foyer { .. } => self.len() == 0,
        }
    }

    pub(super) fn clear(&self) {
        match &self.engine {
            Engine::Quick(cache) => cache.clear(),
            Engine::Foyer { cache, empty } => {
                let empty = empty();
                // Out of the lock before the old entries are dropped.
                let old = std::mem::replace(&mut *cache.write(), empty);
                drop(old);
            }
        }
    }

    /// With a bound on entries, a small one counts as its share of the bytes.
    pub(super) fn bytes(&self) -> u64 {
        match &self.engine {
            Engine::Quick(cache) => cache.weight(),
            Engine::Foyer { cache, .. } => cache.read().usage() as u64,
        }
    }

    pub(super) fn len(&self) -> usize {
        match &self.engine {
            Engine::Quick(cache) => cache.len(),
            Engine::Foyer { cache, .. } => cache.read().entries(),
        }
    }
}

impl Engine {
    fn new(policy: Policy, shard_bytes: u64, shards: usize, expected: usize) -> Engine {
        let eviction: EvictionConfig = match policy {
            Policy::Adaptive => return Engine::Quick(quick(shard_bytes, shards, expected)),
            // All in one pool: with two, an entry that fell into the lower one stays there, however often it is read.
            Policy::Lru => LruConfig { high_priority_pool_ratio: 1.0 }.into(),
            Policy::Lfu => LfuConfig::default().into(),
            Policy::Fifo => FifoConfig::default().into(),
        };
        let empty = move || {
            CacheBuilder::new(shard_bytes as usize * shards)
                .with_shards(shards)
                .with_eviction_config(eviction.clone())
                .with_hash_builder(KeysOwnHash)
                .with_weighter(|_: &CacheKey, kept: &Kept| kept.weight as usize)
                .build()
        };
        Engine::Foyer { cache: RwLock::new(empty()), empty: Box::new(empty) }
    }
}

fn quick(shard_bytes: u64, shards: usize, expected: usize) -> sync::Cache<CacheKey, Kept, ByWeight, KeysOwnHash> {
    // With fewer it would take fewer shards.
    let expected = expected.max(shards * 32);
    let bytes = shard_bytes * shards as u64;
    let mut options = OptionsBuilder::new();
    options.shards(shards).weight_capacity(bytes).estimated_items_capacity(expected).hot_allocation(PROVEN);
    let options = options.build();
    let lifecycle = sync::DefaultLifecycle::default();
    match options {
        Ok(options) => sync::Cache::with_options(options, ByWeight, KeysOwnHash, lifecycle),
        // Cannot happen: both capacities are set above.
        Err(_) => sync::Cache::with(expected, bytes, ByWeight, KeysOwnHash, lifecycle),
    }
}
