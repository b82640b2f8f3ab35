//! The end of a server, spread over a while: long connections are sent away one by one, each at a moment of its own.
//!
//! Stock clients come back without jitter, so those who leave together return together. From [`Drain::begin`] on
//! `/readyz` says `draining` and nobody new is let in; each connection awaits its [`Farewell`], says it, and ends;
//! [`Drain::over`] is when the last one has.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Of the window, kept for the last ones to say goodbye.
const LAST_WORDS: f64 = 0.1;
/// A goodbye that takes longer meets a client that does not read.
const GRACE: Duration = Duration::from_secs(2);
/// The next server needs at least so long to stand where this one stood.
const CHANGE_OF_GUARD: Duration = Duration::from_millis(500);

/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    began: CancellationToken,
    window: OnceLock<Window>,
    connections: TaskTracker,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    length: Duration,
}

/// What a connection is told when it is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Farewell {
    /// When to come back: after the window, spread over another one.
    pub retry: Duration,
}

impl Farewell {
    pub fn text(&self) -> String {
        format!("the server is shutting down: retry in {} ms", self.retry.as_millis())
    }
}

impl Window {
    /// When somebody leaves, after its beginning.
    fn moment(&self, chance: f64) -> Duration {
        self.length.mul_f64(chance * (1.0 - LAST_WORDS))
    }

    /// How long somebody stays away who leaves at `elapsed`: until the next server stands, spread over another window.
    fn retry(&self, elapsed: Duration, chance: f64) -> Duration {
        self.length.saturating_sub(elapsed) + CHANGE_OF_GUARD + self.length.max(CHANGE_OF_GUARD).mul_f64(chance)
    }
}

impl Drain {
    /// Only the first call counts.
    pub fn begin(&self, length: Duration) {
        self.0.window.get_or_init(|| Window { began: Instant::now(), length });
        self.0.connections.close();
        self.0.began.cancel();
    }

    pub fn has_begun(&self) -> bool {
        self.0.began.is_cancelled()
    }

    pub async fn begun(&self) {
        self.0.began.cancelled().await;
    }

    /// Held by each long connection for as long as it lives.
    pub fn alive(&self) -> TaskTrackerToken {
        self.0.connections.token()
    }

    /// Resolves at this connection's own moment, chosen when the drain begins. Call it once for a connection.
    pub async fn farewell(&self) -> Farewell {
        self.begun().await;
        let Some(window) = self.0.window.get() else { return std::future::pending().await };
        tokio::time::sleep_until(window.began + window.moment(rand::random_range(0.0..1.0))).await;
        self.hint()
    }

    /// What somebody is told who comes, or is sent away, now.
    pub fn hint(&self) -> Farewell {
        let window = self.0.window.get().copied().unwrap_or(Window { began: Instant::now(), length: Duration::ZERO });
        Farewell { retry: window.retry(window.began.elapsed(), rand::random_range(0.0..1.0)) }
    }

    /// Every long connection has gone, or had the time to.
    pub async fn over(&self) {
        self.begun().await;
        let Some(window) = self.0.window.get() else { return };
        let _ = tokio::time::timeout_at(window.began + window.length + GRACE, self.0.connections.wait()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn everybody_leaves_within_the_window_and_is_told_to_return_after_it() {
        let window = Window { began: Instant::now(), length: 10 * SECOND };
        let chances = (0..100).map(|n| f64::from(n) / 100.0);
        let moments: Vec<_> = chances.clone().map(|chance| window.moment(chance)).collect();
        assert!(moments.is_sorted_by(|a, b| a < b), "spread evenly");
        assert_eq!((moments[0], moments[50]), (Duration::ZERO, 9 * SECOND / 2));
        assert!(moments[99] < 9 * SECOND, "the last second is for goodbyes");
        for (moment, chance) in moments.into_iter().zip(chances) {
            let back = moment + window.retry(moment, chance);
            assert!(back > 10 * SECOND && back < 21 * SECOND, "{back:?}");
        }
        assert!(window.retry(60 * SECOND, 0.0) >= CHANGE_OF_GUARD, "also long after");
    }

    #[tokio::test]
    async fn a_drain_waits_for_those_who_are_there_and_for_nobody_else() {
        let empty = Drain::default();
        empty.begin(1_000 * SECOND);
        empty.over().await;

        let drain = Drain::default();
        let leaving = tokio::spawn({
            let (drain, alive) = (drain.clone(), drain.alive());
            async move {
                let farewell = drain.farewell().await;
                drop(alive);
                farewell
            }
        });
        assert!(!drain.has_begun());
        drain.begin(Duration::ZERO);
        drain.begin(1_000 * SECOND);
        drain.over().await;
        assert!(leaving.is_finished(), "the second call is none");
        assert!(leaving.await.unwrap().text().contains("retry in"));
    }
}
