//! The log of clean-ups, in `walcast.cache_cleanups`, and its statistics by day.
//!
//! Written by upkeep after each clean-up, read by the admin page. Kept for 30 days, and never more than 50,000 lines.

use std::time::Duration;

use tokio_postgres::types::Type;
use walcast_pg::PgError;

use crate::{Cleanup, L2, Reason, l2::Table, l2_writer::Parameter};

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedCleanup {
    /// As in `2026-07-01T12:00:00.000Z`.
    pub started_at: String,
    pub reason: String,
    pub rows: u64,
    pub bytes: u64,
    pub took: Duration,
}

/// All clean-ups of a day (UTC) for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanupDay {
    /// As in `2026-07-01`.
    pub day: String,
    pub reason: String,
    pub runs: u64,
    pub rows: u64,
    pub bytes: u64,
    pub took: Duration,
    pub longest: Duration,
}

const INSERT: &str = "
with new as (
  insert into walcast.cache_cleanups (started_at, reason, rows, bytes, duration_ms)
  select clock_timestamp() - ms * interval '1 ms', reason, rows, bytes, ms
  from unnest($1::text[], $2::int8[], $3::int8[], $4::int8[]) v (reason, rows, bytes, ms) returning id)
delete from walcast.cache_cleanups where id = any (array(
  select id from walcast.cache_cleanups
  where started_at < now() - interval '30 days' or id <= (select max(id) from walcast.cache_cleanups) - 50000
  order by id limit 1000 for update skip locked))";

const LAST: &str = "
select to_char(started_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), reason, rows, bytes, duration_ms
from walcast.cache_cleanups order by id desc limit $1";

const DAYS: &str = "
select day::text, reason, runs, rows, bytes, duration_ms, longest_ms from walcast.cache_cleanup_days order by day desc, reason limit $1";

impl Table {
    pub(crate) async fn log_cleanups(&self, done: &[Cleanup]) -> Result<(), PgError> {
        if done.is_empty() {
            return Ok(());
        }
        let reasons: Vec<&str> = done.iter().map(|cleanup| cleanup.reason.as_str()).collect();
        let numbers = |pick: fn(&Cleanup) -> u64| done.iter().map(|cleanup| pick(cleanup) as i64).collect::<Vec<i64>>();
        let (rows, bytes) = (numbers(|cleanup| cleanup.rows), numbers(|cleanup| cleanup.bytes));
        let took = numbers(|cleanup| cleanup.took.as_millis() as u64);
        let parameters: [Parameter<'_>; 4] =
            [(&reasons, Type::TEXT_ARRAY), (&rows, Type::INT8_ARRAY), (&bytes, Type::INT8_ARRAY), (&took, Type::INT8_ARRAY)];
        self.transaction(INSERT, &parameters).await.map(drop)
    }
}

impl L2 {
    /// The newest first.
    pub async fn last_cleanups(&self, lines: u32) -> Result<Vec<LoggedCleanup>, PgError> {
        let parameters: [Parameter<'_>; 1] = [(&i64::from(lines), Type::INT8)];
        let rows = self.tier.guarded(self.tier.transaction(LAST, &parameters), 1).await?;
        let line = |row: &tokio_postgres::Row| LoggedCleanup {
            started_at: row.get(0),
            reason: row.get(1),
            rows: count(row, 2),
            bytes: count(row, 3),
            took: Duration::from_millis(count(row, 4)),
        };
        Ok(rows.iter().map(line).collect())
    }

    /// The newest first; at most 30 days are kept.
    pub async fn cleanup_days(&self) -> Result<Vec<CleanupDay>, PgError> {
        let most = (31 * Reason::ALL.len()) as i64;
        let parameters: [Parameter<'_>; 1] = [(&most, Type::INT8)];
        let rows = self.tier.guarded(self.tier.transaction(DAYS, &parameters), 1).await?;
        let day = |row: &tokio_postgres::Row| CleanupDay {
            day: row.get(0),
            reason: row.get(1),
            runs: count(row, 2),
            rows: count(row, 3),
            bytes: count(row, 4),
            took: Duration::from_millis(count(row, 5)),
            longest: Duration::from_millis(count(row, 6)),
        };
        Ok(rows.iter().map(day).collect())
    }
}

fn count(row: &tokio_postgres::Row, column: usize) -> u64 {
    row.get::<_, i64>(column).max(0) as u64
}
