//! Values that no commit speaks of (`source = "external"`): sessions, translations, another service's answers.
//!
//! Called by puts and computations of such namespaces. Only a later put, a hand or time ends such a value, and the clock
//! cannot tell an old one from a new one. So both tiers must agree by themselves:
//!
//! * Puts of one key pass one after the other, **in the order in which they came** ([`Cache::arrive`]), whenever they are run.
//! * L2 confirms a value before L1 has it, and what is confirmed is what a restart finds.
//! * What cannot be confirmed (L2 away, no answer in time, its caller gone) **retires** the key: its tag is raised one byte
//!   past the last commit heard. No commit can lie there, and no fence that was ever written covers it. Whatever the tiers
//!   hold, or L2 comes to hold late, is a miss from then on, never the value before.
//! * A row that was read while somebody put the key does not move up.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use walcast_model::{CacheKey, Fence};

use crate::{AtLeast, Cache, Entry, L2, Lookup, NewValue, Precondition, PutError, Refusal, Stored, l2::Confirmation};

/// A put that came: what it can be fenced by, and its place behind those of its key that came before.
pub struct Arrival {
    fence: Fence,
    place: Place,
}

/// The puts of external values that are under way. As many keys as there are such puts.
pub(crate) struct Lines {
    lines: Arc<Mutex<HashMap<CacheKey, Line>>>,
    /// Counted at the begin and at the end of each put, for those who read its key meanwhile.
    moves: Box<[AtomicU64]>,
}

struct Line {
    places: u64,
    waiting: usize,
    /// The last place whose put is over. Held by whose turn it is.
    turn: Arc<tokio::sync::Mutex<u64>>,
}

struct Place {
    lines: Arc<Mutex<HashMap<CacheKey, Line>>>,
    key: CacheKey,
    number: u64,
    turn: Arc<tokio::sync::Mutex<u64>>,
}

/// Keys share a counter: then a row stays where it is once too often.
const COUNTERS: usize = 256;

impl Default for Lines {
    fn default() -> Lines {
        Lines { lines: Arc::default(), moves: (0..COUNTERS).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Lines {
    fn line_up(&self, key: &CacheKey) -> Place {
        let mut lines = self.lines.lock();
        let line = lines.entry(key.clone()).or_insert_with(|| Line { places: 0, waiting: 0, turn: Arc::default() });
        line.places += 1;
        line.waiting += 1;
        Place { lines: self.lines.clone(), key: key.clone(), number: line.places, turn: line.turn.clone() }
    }

    /// The same before a read and after it: nobody began or ended a put of the key in between.
    pub(crate) fn moves(&self, key: &CacheKey) -> u64 {
        self.counter(key).load(Ordering::Acquire)
    }

    fn counter(&self, key: &CacheKey) -> &AtomicU64 {
        &self.moves[(key.hash64() >> 32) as usize % COUNTERS]
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.lines.lock();
        if let Some(line) = lines.get_mut(&self.key) {
            line.waiting -= 1;
            if line.waiting == 0 {
                lines.remove(&self.key);
            }
        }
    }
}

/// A value on its way into both tiers. Dropped before it is through, also with its caller, it retires the key.
struct Crossing<'a> {
    cache: &'a Cache,
    key: &'a CacheKey,
    is_through: bool,
}

impl<'a> Crossing<'a> {
    fn begin(cache: &'a Cache, key: &'a CacheKey) -> Crossing<'a> {
        cache.0.lines.counter(key).fetch_add(1, Ordering::AcqRel);
        Crossing { cache, key, is_through: false }
    }
}

impl Drop for Crossing<'_> {
    fn drop(&mut self) {
        if !self.is_through {
            self.cache.0.judge.retire(self.key);
        }
        self.cache.0.lines.counter(self.key).fetch_add(1, Ordering::AcqRel);
    }
}

impl Cache {
    /// For a put of an external value: call it when the put comes, whenever it is run then.
    pub fn arrive(&self, key: &CacheKey) -> Arrival {
        self.arrive_with(key, self.external_fence())
    }

    pub(crate) fn arrive_with(&self, key: &CacheKey, fence: Fence) -> Arrival {
        Arrival { fence, place: self.0.lines.line_up(key) }
    }

    /// Its values are put by [`Cache::put_external`] alone.
    pub(crate) fn is_external(&self, key: &CacheKey) -> bool {
        self.namespace(key.namespace()).is_some_and(|namespace| namespace.external)
    }

    /// Stored when both tiers have it. Not stored, the key is retired: its owner says that there is another value now.
    pub async fn put_external(
        &self,
        arrival: Arrival,
        key: &CacheKey,
        value: NewValue,
        precondition: &Precondition,
    ) -> Result<Stored, PutError> {
        let entry = self.made(key, value, arrival.fence.clone())?;
        let stored = self.store_external(&arrival, entry, precondition).await;
        if let Stored::No(refusal) = &stored
            && !matches!(refusal, Refusal::Older | Refusal::Precondition)
            && self.0.l2.is_some()
        {
            self.0.judge.retire(key);
        }
        Ok(stored)
    }

    /// Refused before anything was sent, it changes nothing.
    pub(crate) async fn store_external(&self, arrival: &Arrival, entry: Arc<Entry>, precondition: &Precondition) -> Stored {
        let mut last = arrival.place.turn.lock().await;
        if *last > arrival.place.number {
            return self.refused(Refusal::Older);
        }
        let key = &arrival.place.key;
        let stored = match &self.0.l2 {
            Some(l2) => self.cross(l2, key, entry, precondition).await,
            None => self.store_if(key, entry, |there| precondition.is_met(there)),
        };
        if matches!(stored, Stored::Yes { .. }) {
            *last = arrival.place.number;
        }
        stored
    }

    async fn cross(&self, l2: &L2, key: &CacheKey, entry: Arc<Entry>, precondition: &Precondition) -> Stored {
        if let Some(refusal) = self.0.judge.refuses(&entry) {
            let retired_lately = refusal == Refusal::Touched && self.0.judge.retired_to() > entry.fence.settled;
            return self.refused(if retired_lately { Refusal::L2Away } else { refusal });
        }
        // Nobody else changes the key meanwhile.
        if !precondition.is_met(self.there(key, precondition).await.as_deref()) {
            return self.refused(Refusal::Precondition);
        }
        let mut crossing = Crossing::begin(self, key);
        match l2.confirm(key, &entry).await {
            Confirmation::Written => {
                let stored = self.store_if(key, entry, |_| true);
                crossing.is_through = matches!(stored, Stored::Yes { .. });
                stored
            }
            // Another process wrote it. What we hold is older than that.
            Confirmation::Older => {
                self.0.l1.delete(key);
                crossing.is_through = true;
                self.refused(Refusal::Older)
            }
            Confirmation::None => self.refused(Refusal::L2Away),
        }
    }

    /// What readers are answered, as far as the precondition asks.
    async fn there(&self, key: &CacheKey, precondition: &Precondition) -> Option<Arc<Entry>> {
        if matches!(precondition, Precondition::None) {
            return None;
        }
        let in_l1 = self.0.l1.get(key).filter(|there| self.is_answered(there));
        match in_l1 {
            Some(entry) => Some(entry),
            None => match self.look_l2_one(key, AtLeast::Any).await {
                Some(Lookup::Hit { entry, .. }) => Some(entry),
                _ => None,
            },
        }
    }
}
