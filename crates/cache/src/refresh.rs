//! Work without a reader: an old entry is computed anew while it is still answered, a young one ahead of its end, and what a
//! reader did not wait for goes on.
//!
//! Called by `compute`. Bounded, one for each key, and ended with the cache. What it computes is fenced like any fill;
//! what fails is counted and tried again a little later, never thrown.

use std::{
    future::Future,
    hash::{BuildHasher, RandomState},
    sync::{Arc, LazyLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, timeout_at},
};
use walcast_model::CacheKey;

use crate::{AtLeast, Cache, ComputeOptions, Computed, Entry, Stats, coarse_clock, flight::Landing, reader::Reader};

/// Not more often than this is a key computed in the background: a computation that fails at once must not run in a loop.
const PAUSE: Duration = Duration::from_secs(1);
/// Of what is left of a life after the share, the part that refreshes are spread over.
const SPREAD: f64 = 0.5;

/// Dropping it ends what runs.
pub(crate) struct Background {
    room: Arc<Semaphore>,
    tasks: Mutex<JoinSet<()>>,
}

impl Background {
    pub(crate) fn new(max: usize) -> Background {
        Background { room: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))), tasks: Mutex::default() }
    }
}

impl Cache {
    /// None if too much runs already (counted), or if this is a handle of such work itself.
    pub(crate) fn room(&self) -> Option<OwnedSemaphorePermit> {
        let room = self.1.as_ref()?.room.clone().try_acquire_owned().ok();
        if room.is_none() {
            self.0.stats.refreshes_full.add(1);
        }
        room
    }

    pub(crate) fn go_on(&self, room: impl Send + 'static, work: impl Future<Output = ()> + Send + 'static) {
        let Some(background) = &self.1 else { return };
        let mut tasks = background.tasks.lock();
        // What is over leaves the set, so that it holds no more than there is room for.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let _room = room;
            work.await;
        });
    }

    /// Is the entry so far in its life that it should be computed anew? Asked by a hit, so it is in use.
    pub(crate) fn is_refresh_due(&self, key: &CacheKey, entry: &Entry) -> bool {
        self.0.refreshes_ahead
            && self.namespace(key.namespace()).and_then(|namespace| namespace.refresh_ahead).is_some_and(|share| {
                let now = coarse_clock::now_towards(u64::MAX);
                // The spread is worked out only for what is near enough.
                due_at(entry, share, 0.0) <= now && due_at(entry, share, spread(key, entry)) <= now
            })
    }

    /// Computes the key without a reader, in place of `old`, unless somebody computes it already.
    pub(crate) fn refresh<F, Fut, E>(&self, key: &CacheKey, options: &ComputeOptions, old: &Entry, compute: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Computed, E>> + Send + 'static,
        E: Clone + Send + Sync + 'static,
    {
        if self.0.judge.is_lost() || self.0.turns.take(key, PAUSE, Instant::now()) != Some(true) {
            return;
        }
        let Some(room) = self.room() else { return self.0.turns.clear(key) };
        let Some(lead) = self.0.flights.lead(key) else { return };
        let stats = &self.0.stats;
        stats.flights.add(1);
        stats.refreshes.add(1);
        let failed = Failed(Some(stats.clone()));
        let options = ComputeOptions { at_least: AtLeast::Any, force: false, ..options.clone() };
        let mut reader = Reader::new(self.unowned(), key.clone(), options);
        reader.newer_than = old.stored_at;
        self.go_on(room, async move {
            match timeout_at(reader.deadline, reader.lead(&compute)).await {
                Ok(Ok(answer)) => {
                    failed.not();
                    lead.land(Landing::Value(answer.entry));
                }
                Ok(Err(error)) => lead.land(Landing::Error(Arc::new(error))),
                // The lead is free for whoever waits.
                Err(_) => drop(lead),
            }
        });
    }
}

/// Counts a refresh that ends without a value, also if it panicked or was ended.
struct Failed(Option<Arc<Stats>>);

impl Failed {
    fn not(mut self) {
        self.0 = None;
    }
}

impl Drop for Failed {
    fn drop(&mut self) {
        if let Some(stats) = &self.0 {
            stats.refresh_errors.add(1);
        }
    }
}

/// When a read computes the entry anew: after `share` of its life and, by `spread` (0 to 1), up to half of the rest later.
fn due_at(entry: &Entry, share: f64, spread: f64) -> u64 {
    let life = entry.expires_at.saturating_sub(entry.stored_at) as f64;
    let share = share.clamp(0.0, 1.0);
    entry.stored_at.saturating_add((life * (share + (1.0 - share) * SPREAD * spread)) as u64)
}

/// The same at each read of an entry, another for each entry and each process.
fn spread(key: &CacheKey, entry: &Entry) -> f64 {
    static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    SEED.hash_one((key, entry.stored_at)) as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use walcast_model::{Fence, Floor, Lsn, Snapshot};

    use super::*;
    use crate::{NewValue, entry::Life};

    #[test]
    fn refresh_ahead_spreads_what_was_stored_together_over_half_of_what_is_left() {
        let life = Life { fresh: Duration::from_secs(100), stale: Duration::ZERO };
        let fence = Fence { snapshot: Snapshot::blind(), settled: Lsn(1), floor: Floor(1) };
        let mut tenths = [0_u32; 10];
        for n in 0..10_000 {
            let key = CacheKey::new("n", &n.to_string()).unwrap();
            let value = NewValue { value: Bytes::new(), content_type: "x/y".into(), tags: vec![], ttl: None, negative: false };
            let entry = Entry::new(&key, value, life, fence.clone(), 1_000);
            let at = due_at(&entry, 0.8, spread(&key, &entry));
            assert_eq!(at, due_at(&entry, 0.8, spread(&key, &entry)), "one entry has one time");
            assert!((81_000..=91_000).contains(&at), "{at}");
            tenths[((at - 81_000) / 1_000).min(9) as usize] += 1;
        }
        assert!(tenths.iter().all(|share| (800..1_200).contains(share)), "{tenths:?}");
    }
}
