//! Work that its caller does not wait for: values that are stored while he goes on.
//!
//! Called by `put_soon` and by the engine. Bounded in number and bytes, and ended with the cache; who finds no room left does
//! the work himself. Nobody is told what became of it: what was not stored is counted in `puts_failed`.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Cache;

/// Bounds what waits to be stored.
pub(crate) struct Waiting {
    items: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

/// Room for one piece of work, until that is over.
pub struct SoonRoom {
    _item: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Waiting {
    pub(crate) fn new(items: usize, bytes: usize) -> Waiting {
        let semaphore = |most: usize| Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Waiting { items: semaphore(items), bytes: semaphore(bytes) }
    }
}

impl Cache {
    /// None if too much waits already, or if this is a handle of work in the background itself.
    pub fn soon_room(&self, bytes: usize) -> Option<SoonRoom> {
        self.1.as_ref()?;
        let waiting = &self.0.waiting;
        let item = waiting.items.clone().try_acquire_owned().ok()?;
        let bytes = waiting.bytes.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()?;
        Some(SoonRoom { _item: item, _bytes: bytes })
    }

    /// The work answers how many of its values were not stored.
    pub fn soon(&self, room: SoonRoom, work: impl Future<Output = usize> + Send + 'static) {
        let cache = self.unowned();
        self.go_on(room, async move {
            let failed = work.await;
            cache.0.stats.puts_failed.add(failed as u64);
        });
    }
}
