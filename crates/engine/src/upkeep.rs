//! Keeps the cache table small: a light hand every minute and whenever much was written, a full clean-up by the hour. And
//! tells the operator of it.
//!
//! One task, started by the engine. It never fails the cache: what could not be cleaned up stays until the next round.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use walcast_cache::{Cleanup, L2};
use walcast_pg::PgError;

use crate::{Core, Engine};

/// Hits that a crash may cost. Not for what is over: that goes by the hour, when it is met, and when room is short.
const TIDY_EVERY: Duration = Duration::from_secs(60);
/// Lines of the log that `/admin/v1/cache` shows.
const SHOWN: u32 = 20;

pub async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let Some(l2) = core.cache.l2() else { return cancel.cancelled().await };
    let (mut minutes, mut hours) = (interval(TIDY_EVERY), interval(core.config.cache.upkeep_every));
    // Rounds that a slow database made us miss are not made up for.
    minutes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    hours.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let round = tokio::select! {
            () = cancel.cancelled() => break,
            _ = hours.tick() => core.cache.clean_up().await,
            _ = minutes.tick() => core.cache.tidy().await,
            () = l2.crowded() => core.cache.tidy().await,
        };
        tell(round);
    }
    // What is queued is still written, and the hits since the last round.
    let last = async {
        l2.flush().await;
        tell(core.cache.tidy().await);
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), last).await;
}

fn tell(round: Result<Vec<Cleanup>, PgError>) {
    match round {
        Err(error) => tracing::debug!(%error, "the cache table could not be cleaned up; it is tried again"),
        Ok(done) => {
            for cleanup in done.iter().filter(|cleanup| cleanup.rows > 0) {
                let (reason, rows, bytes) = (cleanup.reason.as_str(), cleanup.rows, cleanup.bytes);
                tracing::info!(reason, rows, bytes, took_ms = cleanup.took.as_millis() as u64, "cache table cleaned up");
            }
        }
    }
}

impl Engine {
    /// The tiers as they stand, for the operator. What the database cannot tell at present is null.
    pub async fn cache_report(&self) -> Value {
        let cache = &self.core.cache;
        let stats: serde_json::Map<String, Value> = cache.stats().all().into_iter().fold(Default::default(), |mut all, stat| {
            let (name, reason, value) = stat;
            match reason {
                None => drop(all.insert(name.to_owned(), value.into())),
                Some(reason) => all.entry(name).or_insert_with(|| json!({}))[reason] = value.into(),
            }
            all
        });
        json!({
            "l1": { "entries": cache.l1_entries(), "bytes": cache.l1_bytes(), "max_bytes": self.core.config.cache.l1_bytes },
            "l2": match cache.l2() { None => json!({ "state": "off" }), Some(l2) => self.l2_report(l2).await },
            "stats": stats,
        })
    }

    async fn l2_report(&self, l2: &L2) -> Value {
        let size = l2.measure().await.ok().or(l2.size());
        let (lines, days) = (l2.last_cleanups(SHOWN).await.ok(), l2.cleanup_days().await.ok());
        json!({
            // Asked last: the questions above may be the ones that found it away.
            "state": l2_state(Some(l2)),
            "max_bytes": self.core.config.cache.l2_max_bytes,
            "estimate": size.map(|size| json!({ "rows": size.rows, "bytes": size.bytes, "file_bytes": size.file_bytes })),
            "upkeep_every_s": self.core.config.cache.upkeep_every.as_secs(),
            "last_cleanups": lines.map(|lines| lines.iter().map(|line| json!({
                "started_at": line.started_at,
                "reason": line.reason,
                "rows": line.rows,
                "bytes": line.bytes,
                "duration_ms": line.took.as_millis() as u64,
            })).collect::<Vec<_>>()),
            "days": days.map(|days| days.iter().map(|day| json!({
                "day": day.day,
                "reason": day.reason,
                "runs": day.runs,
                "rows": day.rows,
                "bytes": day.bytes,
                "duration_ms": day.took.as_millis() as u64,
                "longest_ms": day.longest.as_millis() as u64,
            })).collect::<Vec<_>>()),
        })
    }

    /// The second tier is left alone at present, because it failed.
    pub fn l2_is_away(&self) -> bool {
        self.core.cache.l2().is_some_and(L2::is_away)
    }
}

/// `off`, `on`, or `away` while its breaker is open.
pub(crate) fn l2_state(l2: Option<&L2>) -> &'static str {
    match l2 {
        None => "off",
        Some(l2) if l2.is_away() => "away",
        Some(_) => "on",
    }
}
