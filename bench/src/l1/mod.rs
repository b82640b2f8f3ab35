//! The first tier by itself: what a hit costs, how often it hits, how soon a tag falls that a million entries carry;
//! beside the crates that somebody would take otherwise, in one run and in turns. Needs neither PostgreSQL nor `walcast`.

mod contender;
mod hits;
mod loads;
mod optimum;
mod ratio;
mod tag;
mod traces;

pub use hits::run as hits;
pub use ratio::run as ratio;
pub use tag::run as tag;

use bytes::Bytes;
use walcast_model::CacheKey;

/// As each contender takes it, made before anything is measured.
struct Key {
    text: String,
    cache_key: CacheKey,
}

impl Key {
    fn new(number: u64) -> anyhow::Result<Key> {
        let text = format!("patient:{number}:summary");
        Ok(Key { cache_key: CacheKey::new("bench", &text)?, text })
    }

    fn many(count: usize) -> anyhow::Result<Vec<Key>> {
        (0..count as u64).map(Key::new).collect()
    }
}

/// On the heap, as what came from a database is.
fn value() -> Bytes {
    vec![b'v'; 128].into()
}
