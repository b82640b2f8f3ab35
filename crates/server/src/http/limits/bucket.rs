//! Token buckets: so many a second, with some room for a burst. A rate of 0 is no limit and costs nothing.

use std::{
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use governor::{
    DefaultDirectRateLimiter, DefaultKeyedRateLimiter, NotUntil, Quota,
    clock::{Clock, DefaultClock, Reference},
};

/// Names that are told apart; those that come while so many are busy share a few buckets.
const MAX_NAMES: usize = 100_000;
const SHARED: u64 = 1_024;
/// After so many questions the names that are at rest again are forgotten.
const SWEEP_EVERY: u32 = 1_024;

/// One bucket.
#[derive(Debug)]
pub struct Bucket(Option<DefaultDirectRateLimiter>);

/// A bucket for each name. State is kept only for names that were busy lately.
#[derive(Debug)]
pub struct Buckets {
    limiter: Option<DefaultKeyedRateLimiter<u64>>,
    hasher: RandomState,
    asked: AtomicU32,
    is_full: AtomicBool,
}

impl Bucket {
    /// `burst_seconds`: how many seconds' worth may come at once.
    pub fn new(per_second: u32, burst_seconds: u32) -> Bucket {
        Bucket(quota(per_second, burst_seconds).map(DefaultDirectRateLimiter::direct))
    }

    /// Takes `n`, or says how long until it could.
    pub fn take(&self, n: usize) -> Result<(), Duration> {
        let Some(limiter) = &self.0 else { return Ok(()) };
        in_bursts(n, |n| limiter.check_n(n).map(|taken| taken.map_err(wait)).map_err(|most| most.0))
    }
}

impl Buckets {
    pub fn new(per_second: u32, burst_seconds: u32) -> Buckets {
        let limiter = quota(per_second, burst_seconds).map(DefaultKeyedRateLimiter::dashmap);
        Buckets { limiter, hasher: RandomState::new(), asked: AtomicU32::new(0), is_full: AtomicBool::new(false) }
    }

    pub fn take(&self, name: &str, n: usize) -> Result<(), Duration> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        if self.asked.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            limiter.retain_recent();
            limiter.shrink_to_fit();
            self.is_full.store(limiter.len() >= MAX_NAMES, Ordering::Relaxed);
        }
        // Two names of one hash would share a bucket, which 64 bits and a key of our own make nobody's plan.
        let hash = self.hasher.hash_one(name);
        let key = if self.is_full.load(Ordering::Relaxed) { hash % SHARED } else { hash };
        in_bursts(n, |n| limiter.check_key_n(&key, n).map(|taken| taken.map_err(wait)).map_err(|most| most.0))
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.limiter.as_ref().map_or(0, governor::RateLimiter::len)
    }
}

fn quota(per_second: u32, burst_seconds: u32) -> Option<Quota> {
    let rate = NonZeroU32::new(per_second)?;
    let burst = rate.saturating_mul(NonZeroU32::new(burst_seconds).unwrap_or(NonZeroU32::MIN));
    Some(Quota::per_second(rate).allow_burst(burst))
}

/// More than a whole burst could never be had at once: a full bucket is enough for it.
fn in_bursts(n: usize, take: impl Fn(NonZeroU32) -> Result<Result<(), Duration>, u32>) -> Result<(), Duration> {
    let Some(n) = NonZeroU32::new(u32::try_from(n).unwrap_or(u32::MAX)) else { return Ok(()) };
    match take(n) {
        Ok(taken) => taken,
        Err(burst) => NonZeroU32::new(burst).and_then(|burst| take(burst).ok()).unwrap_or(Ok(())),
    }
}

fn wait<P: Reference>(not_until: NotUntil<P>) -> Duration
where
    DefaultClock: Clock<Instant = P>,
{
    not_until.wait_time_from(DefaultClock::default().now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_it_says_how_long_to_wait() {
        let bucket = Bucket::new(1, 5);
        assert!((0..5).all(|_| bucket.take(1).is_ok()));
        let wait = bucket.take(1).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
        assert!((0..10_000).all(|_| Bucket::new(0, 5).take(1_000).is_ok()), "0 is no limit");
    }

    #[test]
    fn more_than_a_burst_takes_a_full_bucket() {
        let bucket = Bucket::new(1, 5);
        assert!(bucket.take(1_000_000).is_ok());
        assert!(bucket.take(1).is_err());
    }

    #[test]
    fn each_name_has_its_own_bucket() {
        let buckets = Buckets::new(1, 2);
        assert!(buckets.take("a", 2).is_ok() && buckets.take("a", 1).is_err());
        assert!(buckets.take("b", 2).is_ok());
    }

    #[test]
    fn p7_names_that_are_at_rest_are_forgotten() {
        let buckets = Buckets::new(u32::MAX, 1);
        for n in 0..10 * SWEEP_EVERY {
            assert!(buckets.take(&n.to_string(), 1).is_ok());
        }
        // At such a rate a bucket is full again within a nanosecond.
        assert!(buckets.len() <= SWEEP_EVERY as usize, "{}", buckets.len());
    }

    #[test]
    fn p7_more_names_than_are_told_apart_share_a_few_buckets() {
        let buckets = Buckets::new(1, 1);
        for n in 0..(MAX_NAMES as u32 + 10 * SWEEP_EVERY) {
            let _ = buckets.take(&n.to_string(), 1);
        }
        assert!(buckets.len() <= MAX_NAMES + (SWEEP_EVERY as usize) + SHARED as usize, "{}", buckets.len());
    }
}
