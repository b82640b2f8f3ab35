//! How long an entry lives: what was asked for, less a random share of it, so that what was stored together does not
//! end together. Called wherever an entry is made. Never lengthens a life.

use std::time::Duration;

use crate::{CacheConfig, NamespaceConfig, entry::Life};

/// More than half would be another time to live, not a spread.
const MOST: f64 = 0.5;

impl Life {
    pub(crate) fn within(ttl: Duration, namespace: &NamespaceConfig) -> Life {
        Life { fresh: shortened(ttl, namespace.ttl_jitter, rand::random()), stale: namespace.stale_life() }
    }
}

/// `ttl` less up to `share` of it; `chance`, from 0 to 1, says how much of that. Never below the shortest time to
/// live, unless `ttl` is.
fn shortened(ttl: Duration, share: f64, chance: f64) -> Duration {
    // A share that is no number counts as none.
    let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, MOST) };
    let kept = ttl.mul_f64(1.0 - share * chance.clamp(0.0, 1.0));
    kept.max(CacheConfig::MIN_TTL).min(ttl)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_life_is_shortened_by_up_to_its_share_and_never_lengthened() {
        assert_eq!(shortened(MINUTE, 0.1, 0.0), MINUTE);
        assert_eq!(shortened(MINUTE, 0.1, 0.5), Duration::from_secs(57));
        assert_eq!(shortened(MINUTE, 0.1, 1.0), Duration::from_secs(54));
        assert_eq!(shortened(MINUTE, 0.0, 1.0), MINUTE);
        assert_eq!(shortened(MINUTE, 9.0, 1.0), Duration::from_secs(30), "half at most");
        for nonsense in [-1.0, f64::NAN, f64::NEG_INFINITY] {
            assert_eq!(shortened(MINUTE, nonsense, 1.0), MINUTE);
        }
    }

    #[test]
    fn it_never_falls_below_the_shortest_time_to_live() {
        assert_eq!(shortened(Duration::from_millis(1_100), 0.5, 1.0), CacheConfig::MIN_TTL);
        assert_eq!(shortened(CacheConfig::MIN_TTL, 0.5, 1.0), CacheConfig::MIN_TTL);
        assert_eq!(shortened(Duration::from_millis(10), 0.5, 1.0), Duration::from_millis(10), "nor is it lengthened to it");
    }

    #[test]
    fn what_is_stored_together_does_not_end_together() {
        let namespace = NamespaceConfig { ttl_jitter: 0.2, ..NamespaceConfig::default() };
        let lives: Vec<Duration> = (0..100).map(|_| Life::within(MINUTE, &namespace).fresh).collect();
        assert!(lives.iter().all(|life| (Duration::from_secs(48)..=MINUTE).contains(life)), "{lives:?}");
        assert!(lives.iter().any(|life| *life != lives[0]));
    }
}
