//! Whose turn is it? Of many who find the same key old or missing, one is asked to compute it, for a short while.
//!
//! Called by reads. In memory, of this process, and only advice: a turn that is never used costs its time, nothing else.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use walcast_model::CacheKey;

use crate::{Cache, CacheConfig};

pub(crate) struct Turns {
    taken: Mutex<HashMap<CacheKey, Instant>>,
    max: usize,
}

impl Turns {
    pub(crate) fn new(max: usize) -> Turns {
        Turns { taken: Mutex::default(), max }
    }

    /// True for one caller, until `length` is over or somebody clears the key. None: too many turns are taken.
    pub(crate) fn take(&self, key: &CacheKey, length: Duration, now: Instant) -> Option<bool> {
        let mut taken = self.taken.lock();
        if taken.get(key).is_some_and(|until| *until > now) {
            return Some(false);
        }
        if taken.len() >= self.max {
            taken.retain(|_, until| *until > now);
        }
        if taken.len() >= self.max {
            return None;
        }
        taken.insert(key.clone(), now + length);
        Some(true)
    }

    pub(crate) fn is_taken(&self, key: &CacheKey, now: Instant) -> bool {
        self.taken.lock().get(key).is_some_and(|until| *until > now)
    }

    pub(crate) fn clear(&self, key: &CacheKey) {
        self.taken.lock().remove(key);
    }
}

impl Cache {
    /// True for one of those who were answered a stale entry: he should put it anew. For 10 seconds, or until a put.
    pub fn take_turn(&self, key: &CacheKey) -> bool {
        self.0.turns.take(key, CacheConfig::TURN, Instant::now()) == Some(true)
    }

    /// The same for those who found nothing. Only advice: with too many keys missing at a time all are told to go ahead.
    pub fn take_first_turn(&self, key: &CacheKey) -> bool {
        self.0.first_turns.take(key, CacheConfig::TURN, Instant::now()) != Some(false)
    }

    /// Whoever took a turn cannot use it.
    pub fn give_turn_back(&self, key: &CacheKey) {
        self.0.turns.clear(key);
        self.0.first_turns.clear(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(n: u32) -> CacheKey {
        CacheKey::new("n", &n.to_string()).unwrap()
    }

    #[test]
    fn one_caller_has_the_turn_until_its_time_or_somebody_ends_it() {
        let (turns, now) = (Turns::new(10), Instant::now());
        assert_eq!(turns.take(&key(1), SECOND, now), Some(true));
        assert_eq!((turns.take(&key(1), SECOND, now), turns.is_taken(&key(1), now)), (Some(false), true));
        let later = now + SECOND;
        assert!(!turns.is_taken(&key(1), later));
        assert_eq!(turns.take(&key(1), SECOND, later), Some(true));
        turns.clear(&key(1));
        assert_eq!(turns.take(&key(1), SECOND, later), Some(true));
    }

    #[test]
    fn p7_when_too_many_are_taken_there_is_none_until_some_are_over() {
        let (turns, now) = (Turns::new(2), Instant::now());
        assert_eq!((turns.take(&key(1), SECOND, now), turns.take(&key(2), SECOND * 2, now)), (Some(true), Some(true)));
        assert_eq!(turns.take(&key(3), SECOND, now), None);
        assert_eq!(turns.take(&key(3), SECOND, now + SECOND), Some(true));
    }
}
