//! A cache in memory for a program that has no stream of commits: what ends its entries is time and the program's own hand.
//!
//! Called by Rust programs that embed the cache alone. A cache whose clock somebody else raises has no [`Hand`].

use std::sync::Arc;

use parking_lot::Mutex;
use walcast_model::{Floor, Lsn, Stamp, Tag, TagClock};

use crate::{Cache, CacheConfig, Hearing};

/// The one who invalidates. Its positions are the only ones that the cache knows, so there is one for each cache.
pub struct Hand {
    cache: Cache,
    last: Mutex<Lsn>,
}

impl Cache {
    /// ```
    /// use std::time::Duration;
    /// use walcast_cache::{Cache, CacheConfig, ComputeOptions, Computed, Source};
    /// use walcast_model::{CacheKey, Tag};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
    /// let (cache, hand) = Cache::standalone(CacheConfig::default());
    /// let key = CacheKey::new("greetings", "ann").unwrap();
    /// let ann = Tag::parse("user:ann").unwrap();
    ///
    /// let read = |text: &'static str| {
    ///     let (cache, ann) = (cache.clone(), ann.clone());
    ///     move || {
    ///         // Before the first read: what is invalidated from here on, the value may lack.
    ///         let fence = cache.external_fence();
    ///         let tags = vec![ann.clone()];
    ///         async move { Ok::<_, String>(Computed::new(text, "text/plain", tags, fence)) }
    ///     }
    /// };
    /// let options = ComputeOptions { ttl: Some(Duration::from_secs(60)), ..ComputeOptions::default() };
    /// let first = cache.get_or_compute(&key, &options, read("Hello, Ann")).await.unwrap();
    /// assert_eq!((&first.entry.value[..], first.source), (&b"Hello, Ann"[..], Source::Computed));
    ///
    /// let again = cache.get_or_compute(&key, &options, read("never read")).await.unwrap();
    /// assert_eq!(again.entry.value, first.entry.value);
    ///
    /// hand.invalidate(&[ann.clone()]);
    /// let new = cache.get_or_compute(&key, &options, read("Hello, Dr. Ann")).await.unwrap();
    /// assert_eq!(&new.entry.value[..], b"Hello, Dr. Ann");
    /// # });
    /// ```
    pub fn standalone(config: CacheConfig) -> (Cache, Hand) {
        let clock = Arc::new(TagClock::new(TagClock::DEFAULT_SLOTS, Floor(1)));
        let cache = Cache::new(config, clock, None);
        cache.set_hearing(Hearing::Live);
        (cache.clone(), Hand { cache, last: Mutex::new(Lsn(0)) })
    }
}

impl Hand {
    /// When this returns, nothing that carries one of the tags is answered as fresh. A value whose fence is from before is
    /// not stored, nor shared with readers who come from here on.
    pub fn invalidate(&self, tags: &[Tag]) {
        // Held throughout: a position is noted only when every tag up to it was raised.
        let mut last = self.last.lock();
        last.0 += 1;
        for tag in tags {
            self.cache.clock().raise(tag.hash(), Stamp::unseen(*last));
        }
        self.cache.note_invalidated(*last);
    }
}
