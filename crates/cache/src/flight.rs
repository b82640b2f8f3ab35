//! One computation per key at a time: the first reader leads, those who come meanwhile wait for him.
//!
//! Called by `compute`. Never computes, never judges: whether a waiting reader may share what lands is his own question.
//! A leader who goes (cancelled, timed out, panicked) leaves his place free; the first waiting reader to wake takes it.
//! The lock is held for a look into a map, never across an await.

use std::{
    any::Any,
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use walcast_model::CacheKey;

use crate::Entry;

pub(crate) struct Flights {
    aloft: Mutex<HashMap<CacheKey, Flight>>,
    /// Departures so far. Numbers, not times: two flights never share one, and "after" is certain.
    departures: AtomicU64,
    max_flights: usize,
    max_joiners: usize,
}

/// The number of a flight, in the order in which flights began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Departure(u64);

struct Flight {
    began: Departure,
    landing: watch::Receiver<Option<Landing>>,
    seats: Arc<Semaphore>,
}

#[derive(Clone)]
pub(crate) enum Landing {
    Value(Arc<Entry>),
    /// The caller's own error type; flights of different callers meet in one map.
    Error(Arc<dyn Any + Send + Sync>),
}

pub(crate) enum Boarding {
    Lead(Lead),
    Join(Join),
    /// Too many flights, or too many wait for this one: compute for yourself.
    Full,
}

pub(crate) struct Lead {
    flights: Arc<Flights>,
    key: CacheKey,
    pub(crate) began: Departure,
    landing: watch::Sender<Option<Landing>>,
}

pub(crate) struct Join {
    pub(crate) began: Departure,
    landing: watch::Receiver<Option<Landing>>,
    _seat: OwnedSemaphorePermit,
}

impl Flights {
    pub(crate) fn new(max_flights: usize, max_joiners: usize) -> Flights {
        let max_joiners = max_joiners.min(Semaphore::MAX_PERMITS);
        Flights { aloft: Mutex::default(), departures: AtomicU64::new(0), max_flights, max_joiners }
    }

    /// What begins from here on has this number or a later one.
    pub(crate) fn next_departure(&self) -> Departure {
        Departure(self.departures.load(Ordering::Acquire))
    }

    pub(crate) fn board(self: &Arc<Flights>, key: &CacheKey) -> Boarding {
        let mut aloft = self.aloft.lock();
        if let Some(flight) = aloft.get(key) {
            return match flight.seats.clone().try_acquire_owned() {
                Ok(seat) => Boarding::Join(Join { began: flight.began, landing: flight.landing.clone(), _seat: seat }),
                Err(_) => Boarding::Full,
            };
        }
        self.take_off(key, &mut aloft).map_or(Boarding::Full, Boarding::Lead)
    }

    /// None if somebody computes it already, or too many flights are aloft.
    pub(crate) fn lead(self: &Arc<Flights>, key: &CacheKey) -> Option<Lead> {
        let mut aloft = self.aloft.lock();
        if aloft.contains_key(key) {
            return None;
        }
        self.take_off(key, &mut aloft)
    }

    fn take_off(self: &Arc<Flights>, key: &CacheKey, aloft: &mut HashMap<CacheKey, Flight>) -> Option<Lead> {
        if aloft.len() >= self.max_flights {
            return None;
        }
        let (sender, landing) = watch::channel(None);
        let began = Departure(self.departures.fetch_add(1, Ordering::AcqRel));
        aloft.insert(key.clone(), Flight { began, landing, seats: Arc::new(Semaphore::new(self.max_joiners)) });
        Some(Lead { flights: self.clone(), key: key.clone(), began, landing: sender })
    }

    pub(crate) fn len(&self) -> usize {
        self.aloft.lock().len()
    }
}

impl Lead {
    pub(crate) fn land(self, landing: Landing) {
        // Leave the map first, or those who wake would join a flight that is over.
        self.leave();
        self.landing.send_replace(Some(landing));
    }

    /// A key has one leader, so the flight under this key is ours, unless we left already and another took off:
    /// that one has another channel.
    fn leave(&self) {
        let mut aloft = self.flights.aloft.lock();
        if aloft.get(&self.key).is_some_and(|flight| flight.landing.same_channel(&self.landing.subscribe())) {
            aloft.remove(&self.key);
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Join {
    /// None: the leader went without landing.
    pub(crate) async fn landed(mut self) -> Option<Landing> {
        match self.landing.wait_for(Option::is_some).await {
            Ok(landing) => landing.clone(),
            Err(_) => None,
        }
    }
}
