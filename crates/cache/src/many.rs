//! Many values at once: put together, loaded before readers come, or handed over without waiting.
//!
//! Called by the engine and by Rust programs. Each value is fenced and judged like a single one.

use std::future::Future;

use futures_util::{StreamExt, future::join_all, stream};
use walcast_model::{CacheKey, Fence};

use crate::{Cache, NewValue, Precondition, PutError, Stored};

/// A value for a key, read at `fence`.
#[derive(Debug, Clone)]
pub struct NewEntry {
    pub key: CacheKey,
    pub value: NewValue,
    pub fence: Fence,
}

/// What became of the values that were loaded.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Preloaded {
    pub stored: u64,
    /// Older than what is there, touched meanwhile, or not fit to be kept.
    pub refused: u64,
    /// Could not be read.
    pub failed: u64,
}

/// After so many values a load waits until L2 has them: its queue would drop what does not fit.
const WRITTEN_TOGETHER: usize = 256;

impl Cache {
    /// In the order of the entries, each with an outcome of its own.
    pub async fn put_many(&self, entries: impl IntoIterator<Item = NewEntry>) -> Vec<Result<Stored, PutError>> {
        join_all(entries.into_iter().map(|entry| self.put_entry(entry))).await
    }

    /// Stores, or counts in `puts_failed` that it could not. For whoever has no use for the outcome.
    pub fn put_soon(&self, entry: NewEntry) {
        if !self.waits(&entry.key) {
            let NewEntry { key, value, fence } = entry;
            return self.0.stats.puts_failed.add(not_stored(&self.put(&key, value, fence)) as u64);
        }
        let Some(room) = self.soon_room(entry.value.value.len()) else { return self.0.stats.puts_failed.add(1) };
        let (cache, arrival) = (self.unowned(), self.arrive_with(&entry.key, entry.fence));
        self.soon(
            room,
            async move { not_stored(&cache.put_external(arrival, &entry.key, entry.value, &Precondition::None).await) },
        );
    }

    async fn put_entry(&self, NewEntry { key, value, fence }: NewEntry) -> Result<Stored, PutError> {
        self.put_if(&key, value, fence, &Precondition::None).await
    }

    /// Fills the cache before readers come. Reads at most `at_once` values at a time, and no faster than L2 writes them.
    pub async fn preload<R, E>(&self, reads: impl IntoIterator<Item = R>, at_once: usize) -> Preloaded
    where
        R: Future<Output = Result<NewEntry, E>>,
    {
        let mut loaded = Preloaded::default();
        let mut waiting = 0;
        let mut reads = std::pin::pin!(stream::iter(reads).buffer_unordered(at_once.max(1)));
        while let Some(read) = reads.next().await {
            let Ok(entry) = read else {
                loaded.failed += 1;
                continue;
            };
            match self.put_entry(entry).await {
                Ok(Stored::Yes { .. }) => {
                    loaded.stored += 1;
                    waiting += 1;
                }
                Ok(Stored::No(_)) | Err(_) => loaded.refused += 1,
            }
            if waiting >= WRITTEN_TOGETHER
                && let Some(l2) = self.l2()
            {
                l2.flush().await;
                waiting = 0;
            }
        }
        loaded
    }
}

fn not_stored(outcome: &Result<Stored, PutError>) -> usize {
    usize::from(!matches!(outcome, Ok(Stored::Yes { .. })))
}
