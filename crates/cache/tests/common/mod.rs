//! A cache over a real tag clock, and short names for what the tests say again and again.
#![allow(dead_code)]

pub mod l2;
pub mod readers;

use std::sync::Arc;

use walcast_cache::{Cache, CacheConfig, Computed, Hearing, L2, Lookup, NamespaceConfig, NewValue, Refusal, Stored};
use walcast_model::{CacheKey, Fence, Floor, Lsn, Stamp, Tag, TagClock, Xid};

pub struct World {
    pub clock: Arc<TagClock>,
    pub cache: Cache,
}

pub fn world() -> World {
    world_with(CacheConfig::default(), None)
}

pub fn world_with(mut config: CacheConfig, l2: Option<L2>) -> World {
    let graceful = NamespaceConfig { serve_invalidated: true, ..NamespaceConfig::default() };
    let external = NamespaceConfig { external: true, ..NamespaceConfig::default() };
    config.namespaces.insert("graceful".into(), graceful);
    config.namespaces.insert("external".into(), external);
    let clock = Arc::new(TagClock::new(1 << 12, Floor(1)));
    let cache = Cache::new(config, clock.clone(), l2);
    cache.set_hearing(Hearing::Live);
    World { clock, cache }
}

impl World {
    /// What the pipeline does with a commit: raise its tags, then note how far it came.
    pub fn commit(&self, lsn: u64, xid: u64, tags: &[&str]) {
        for text in tags {
            self.clock.raise(tag(text).hash(), Stamp { lsn: Lsn(lsn), xid: Xid(xid) });
        }
        self.cache.note_invalidated(Lsn(lsn));
    }

    pub fn put(&self, name: &str, text: &str, tags: &[&str], fence: Fence) -> Stored {
        self.cache.put(&key(name), value(text, tags), fence).unwrap()
    }
}

pub fn key(name: &str) -> CacheKey {
    match name.split_once('/') {
        Some((namespace, name)) => CacheKey::new(namespace, name).unwrap(),
        None => CacheKey::new("patients", name).unwrap(),
    }
}

pub fn tag(text: &str) -> Tag {
    Tag::parse(text).unwrap()
}

pub fn value(text: &str, tags: &[&str]) -> NewValue {
    let tags = tags.iter().map(|text| tag(text)).collect();
    NewValue { value: text.to_owned().into(), content_type: "text/plain".into(), tags, ttl: None, negative: false }
}

pub fn computed(text: &str, tags: &[&str], fence: Fence) -> Computed {
    let NewValue { value, content_type, tags, ttl, negative } = value(text, tags);
    Computed { value, content_type, tags, fence, ttl, negative }
}

/// `snapshot` as PostgreSQL writes it.
pub fn fence(snapshot: &str, settled: u64) -> Fence {
    Fence { snapshot: snapshot.parse().unwrap(), settled: Lsn(settled), floor: Floor(1) }
}

/// "hit TEXT", "stale TEXT" or "miss REASON".
pub fn told(lookup: &Lookup) -> String {
    match lookup {
        Lookup::Hit { entry, stale, .. } => {
            let text = String::from_utf8_lossy(&entry.value);
            if stale.is_some() { format!("stale {text}") } else { format!("hit {text}") }
        }
        Lookup::Miss { reason } => format!("miss {reason}"),
    }
}

pub fn refusal(stored: &Stored) -> Option<Refusal> {
    match stored {
        Stored::Yes { .. } => None,
        Stored::No(refusal) => Some(*refusal),
    }
}
