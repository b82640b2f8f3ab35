//! What leaves the cache table, and when: what is over, what nobody asked for, what brings the least when room is short.
//!
//! Called by the engine: [`Cache::tidy`] often, [`Cache::clean_up`] by the hour. Rows go in batches of 1,000 that skip
//! what others hold, beside the writer and never in its way. Nothing here decides what may be answered.
//!
//! The table's size is estimated from a sample of its pages, so that looking costs the same however large it is.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio_postgres::{Row, types::Type};
use walcast_model::CacheKey;
use walcast_pg::PgError;

use crate::{Cache, L2, entry::now_ms, l2::Table, l2_writer::Parameter};

/// Why rows went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not even to be answered as stale any more.
    Expired,
    /// Half its life in the table, an hour at least, and nobody asked for it.
    Unused,
    /// The table came near its limit: the fewest hits for bytes and age.
    LowValue,
    /// The table was past its limit: the same, at once.
    Room,
}

impl Reason {
    pub const ALL: [Reason; 4] = [Reason::Expired, Reason::Unused, Reason::LowValue, Reason::Room];

    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Expired => "expired",
            Reason::Unused => "unused",
            Reason::LowValue => "low_value",
            Reason::Room => "room",
        }
    }
}

/// One clean-up, as its log has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleanup {
    pub reason: Reason,
    pub rows: u64,
    pub bytes: u64,
    pub took: Duration,
}

/// The table as it was last measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L2Size {
    /// Estimates, but for a table of a few megabytes.
    pub rows: u64,
    pub bytes: u64,
    /// What the files occupy, indexes and free room in them included.
    pub file_bytes: u64,
}

const BATCH: i64 = 1000;
/// Of the table's pages, as many as one look reads: 8 MB.
const SAMPLED_PAGES: u64 = 1024;
/// Pages a statement when the whole table is walked.
const WALKED_PAGES: u64 = 512;

/// What a row costs: its values as they are stored (reading their size does not fetch them), the rest of the row, its
/// place in two indexes.
macro_rules! row_bytes {
    () => {
        "(pg_column_size(c.value) + pg_column_size(c.tags) + pg_column_size(c.snapshot) + octet_length(c.key) + 256)::int8"
    };
}

macro_rules! counted {
    ($deleted:literal) => {
        concat!(
            "with gone as (",
            $deleted,
            " returning ",
            row_bytes!(),
            " as bytes) select count(*)::int8, coalesce(sum(bytes), 0)::int8 from gone"
        )
    };
}

const DELETE_EXPIRED: &str = counted!(
    "delete from walcast.cache_entries c where hash = any (array(
       select hash from walcast.cache_entries where stale_until <= to_timestamp($1 / 1000.0)
       order by stale_until limit $2 for update skip locked))"
);

/// Asked again whether it is over: it may have been written anew since a reader met it.
const DELETE_MET: &str = counted!(
    "delete from walcast.cache_entries c where hash = any (array(
       select hash from walcast.cache_entries where hash = any ($2) and stale_until <= to_timestamp($1 / 1000.0)
       for update skip locked))"
);

/// Not what was written since it was chosen.
const DELETE_CHOSEN: &str = counted!(
    "delete from walcast.cache_entries c where hash = any (array(
       select hash from walcast.cache_entries where hash = any ($2) and stored_at < to_timestamp($1 / 1000.0)
       for update skip locked))"
);

const UNUSED: &str = "
select namespace, key from walcast.cache_entries
where ctid >= $1::tid and ctid < $2::tid and hits = 0 and namespace <> all ($3)
  and stored_at < to_timestamp($4 / 1000.0) - greatest(interval '1 hour', (expires_at - stored_at) / 2)
limit $5";

/// Of a sample, the rows that bring the least: as large a share of it as must go of the table, and no more bytes than that.
const LEAST_VALUE: &str = concat!(
    "
select namespace, key from (
  select namespace, key, row_number() over w as place, count(*) over () as n, sum(bytes) over w - bytes as before
  from (
    select c.namespace, c.key, ",
    row_bytes!(),
    " as bytes,
      (c.hits + 1) / (",
    row_bytes!(),
    " * (60 + greatest(0, $2::int8 / 1000.0 - extract(epoch from coalesce(c.last_hit_at, c.stored_at)))))::float8 as worth
    from walcast.cache_entries c tablesample system ($1)) sampled
  window w as (order by worth, bytes rows unbounded preceding)) ranked
where place <= ceil(n * $3::float8) and before < $4::int8
order by place limit $5"
);

const PAGES: &str = "
select pg_catalog.pg_relation_size('walcast.cache_entries') / current_setting('block_size')::int8,
       pg_catalog.pg_total_relation_size('walcast.cache_entries')";

const SAMPLE: &str = concat!(
    "select count(*)::int8, coalesce(sum(",
    row_bytes!(),
    "), 0)::int8 from walcast.cache_entries c tablesample system ($1)"
);

const ADD_HITS: &str = "
with counted as (
  select c.hash, v.n from walcast.cache_entries c join unnest($1::bytea[], $2::int8[]) v (hash, n) on c.hash = v.hash
  order by c.hash for update of c skip locked)
update walcast.cache_entries c set hits = c.hits + counted.n, last_hit_at = to_timestamp($3 / 1000.0)
from counted where c.hash = counted.hash";

impl L2 {
    /// Resolves when so much was written that the table may be past its limit.
    pub async fn crowded(&self) {
        self.tier.crowded.notified().await;
    }

    /// As it was last measured.
    pub fn size(&self) -> Option<L2Size> {
        *self.tier.size.lock()
    }

    /// Reads a sample of the table's pages.
    pub async fn measure(&self) -> Result<L2Size, PgError> {
        self.tier.guarded(self.tier.measure(), 1).await
    }
}

impl Cache {
    /// Brings hits to the table, deletes the rows that readers met although they were over, and makes room where the
    /// table is past its limit. Cheap when there is little to do; call it every minute and when L2 is
    /// [`crowded`](L2::crowded): a crash then costs a minute's hits, and the limit holds however fast values come.
    pub async fn tidy(&self) -> Result<Vec<Cleanup>, PgError> {
        let Some(l2) = self.l2() else { return Ok(Vec::new()) };
        let upkeep = Upkeep { cache: self, table: &l2.tier };
        let done = async {
            upkeep.add_hits().await?;
            let mut done = vec![upkeep.timed(Reason::Expired, upkeep.delete_met()).await?];
            done.extend(upkeep.make_room().await?);
            upkeep.log(done, |cleanup| cleanup.rows > 0).await
        };
        l2.tier.guarded(done, 1).await
    }

    /// All of it: what is over, what nobody asked for, what brings the least. By the hour.
    pub async fn clean_up(&self) -> Result<Vec<Cleanup>, PgError> {
        let Some(l2) = self.l2() else { return Ok(Vec::new()) };
        let upkeep = Upkeep { cache: self, table: &l2.tier };
        let done = async {
            upkeep.add_hits().await?;
            let mut done = vec![upkeep.timed(Reason::Expired, upkeep.delete_expired()).await?];
            done.push(upkeep.timed(Reason::Unused, upkeep.delete_unused()).await?);
            done.extend(upkeep.make_room().await?);
            // Before it is at its limit, so that room need seldom be made while values come.
            let mark = l2.tier.config.max_bytes / 10 * 8;
            done.extend(upkeep.down_to(Reason::LowValue, mark, mark).await?);
            // That it ran is worth a line, also when nothing was over.
            upkeep.log(done, |cleanup| cleanup.rows > 0 || cleanup.reason == Reason::Expired).await
        };
        l2.tier.guarded(done, 1).await
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Gone {
    rows: u64,
    bytes: u64,
}

struct Upkeep<'a> {
    cache: &'a Cache,
    table: &'a Arc<Table>,
}

impl Upkeep<'_> {
    async fn timed(&self, reason: Reason, work: impl Future<Output = Result<Gone, PgError>>) -> Result<Cleanup, PgError> {
        let began = Instant::now();
        let gone = work.await?;
        Ok(Cleanup { reason, rows: gone.rows, bytes: gone.bytes, took: began.elapsed() })
    }

    async fn log(&self, mut done: Vec<Cleanup>, worth: fn(&Cleanup) -> bool) -> Result<Vec<Cleanup>, PgError> {
        done.retain(worth);
        for cleanup in &done {
            self.table.stats.l2_cleaned_rows(cleanup.reason).add(cleanup.rows);
            self.table.stats.l2_cleaned_bytes(cleanup.reason).add(cleanup.bytes);
        }
        self.table.log_cleanups(&done).await?;
        Ok(done)
    }

    async fn add_hits(&self) -> Result<(), PgError> {
        let hits = std::mem::take(&mut *self.table.hits.lock());
        if hits.is_empty() {
            return Ok(());
        }
        let hashes: Vec<&[u8]> = hits.keys().map(|digest| &digest[..]).collect();
        let counts: Vec<i64> = hits.values().copied().collect();
        let parameters: [Parameter<'_>; 3] =
            [(&hashes, Type::BYTEA_ARRAY), (&counts, Type::INT8_ARRAY), (&(now_ms() as i64), Type::INT8)];
        self.table.transaction(ADD_HITS, &parameters).await.map(drop)
    }

    async fn delete_met(&self) -> Result<Gone, PgError> {
        let met = std::mem::take(&mut *self.table.met.lock());
        let met: Vec<[u8; 16]> = met.into_iter().collect();
        if met.is_empty() { Ok(Gone::default()) } else { self.delete(DELETE_MET, &met, now_ms()).await }
    }

    async fn delete_expired(&self) -> Result<Gone, PgError> {
        let mut all = Gone::default();
        loop {
            let parameters: [Parameter<'_>; 2] = [(&(now_ms() as i64), Type::INT8), (&BATCH, Type::INT8)];
            let gone = self.table.transaction(DELETE_EXPIRED, &parameters).await?.first().map_or(Gone::default(), gone);
            all.add(gone);
            if gone.rows < BATCH as u64 {
                return Ok(all);
            }
        }
    }

    /// Not of namespaces whose values come from elsewhere: what Walcast cannot have read again (a session) ends with its
    /// time. And not what L1 holds: its readers never come here.
    async fn delete_unused(&self) -> Result<Gone, PgError> {
        let config = self.cache.config();
        let external: Vec<&str> =
            config.namespaces.iter().filter(|(_, namespace)| namespace.external).map(|(name, _)| name.as_str()).collect();
        let (pages, _) = self.table.pages().await?;
        let mut all = Gone::default();
        for page in (0..pages).step_by(WALKED_PAGES as usize) {
            let chosen_at = now_ms();
            let (from, to) = (format!("({page},0)"), format!("({},0)", page + WALKED_PAGES));
            let parameters: [Parameter<'_>; 5] = [
                (&from, Type::TEXT),
                (&to, Type::TEXT),
                (&external, Type::TEXT_ARRAY),
                (&(chosen_at as i64), Type::INT8),
                (&BATCH, Type::INT8),
            ];
            let found = keys(&self.table.transaction(UNUSED, &parameters).await?);
            let (in_use, unused) = self.parted(found);
            in_use.iter().for_each(|key| self.table.note_hit(key));
            if !unused.is_empty() {
                all.add(self.delete(DELETE_CHOSEN, &digests(&unused), chosen_at).await?);
            }
        }
        Ok(all)
    }

    async fn make_room(&self) -> Result<Option<Cleanup>, PgError> {
        let limit = self.table.config.max_bytes;
        self.down_to(Reason::Room, limit, limit / 10 * 9).await
    }

    /// Nothing if the table is not above `mark`.
    async fn down_to(&self, reason: Reason, mark: u64, goal: u64) -> Result<Option<Cleanup>, PgError> {
        let (_, file_bytes) = self.table.pages().await?;
        // The files hold all that lives and more: if they fit, nobody needs to count.
        if file_bytes <= mark {
            self.table.written.store(0, Ordering::Release);
            return Ok(None);
        }
        let size = self.table.measure().await?;
        if size.bytes <= mark {
            return Ok(None);
        }
        let work = async {
            let mut all = self.delete_expired().await?;
            let mut spare = true;
            while size.bytes.saturating_sub(all.bytes) > goal {
                let gone = self.take_least(size.bytes - all.bytes, goal, spare).await?;
                all.add(gone);
                // All of them are in use: the limit counts more. Nothing even then: others hold what is left.
                if gone.rows == 0 && !std::mem::take(&mut spare) {
                    break;
                }
            }
            Ok(all)
        };
        let cleanup = self.timed(reason, work).await?;
        self.table.measure().await?;
        Ok(Some(cleanup))
    }

    async fn take_least(&self, live: u64, goal: u64, spare: bool) -> Result<Gone, PgError> {
        let (pages, _) = self.table.pages().await?;
        let chosen_at = now_ms();
        let over = live - goal;
        let parameters: [Parameter<'_>; 5] = [
            (&percent(pages), Type::FLOAT4),
            (&(chosen_at as i64), Type::INT8),
            (&(over as f64 / live as f64), Type::FLOAT8),
            (&(over as i64), Type::INT8),
            (&BATCH, Type::INT8),
        ];
        let found = keys(&self.table.transaction(LEAST_VALUE, &parameters).await?);
        let (in_use, unused) = self.parted(found);
        in_use.iter().for_each(|key| self.table.note_hit(key));
        let chosen = if spare { unused } else { in_use.into_iter().chain(unused).collect() };
        if chosen.is_empty() { Ok(Gone::default()) } else { self.delete(DELETE_CHOSEN, &digests(&chosen), chosen_at).await }
    }

    async fn delete(&self, statement: &str, digests: &[[u8; 16]], at_ms: u64) -> Result<Gone, PgError> {
        let hashes: Vec<&[u8]> = digests.iter().map(|digest| &digest[..]).collect();
        let parameters: [Parameter<'_>; 2] = [(&(at_ms as i64), Type::INT8), (&hashes, Type::BYTEA_ARRAY)];
        Ok(self.table.transaction(statement, &parameters).await?.first().map_or(Gone::default(), gone))
    }

    /// What L1 holds is in use, however few hits the table knows of; and the rest.
    fn parted(&self, keys: Vec<CacheKey>) -> (Vec<CacheKey>, Vec<CacheKey>) {
        keys.into_iter().partition(|key| self.cache.0.l1.holds(key))
    }
}

impl Table {
    /// Pages of the table itself, and bytes of all its files.
    async fn pages(&self) -> Result<(u64, u64), PgError> {
        let rows = self.transaction(PAGES, &[]).await?;
        Ok(rows.first().map_or((0, 0), |row| (number(row, 0), number(row, 1))))
    }

    async fn measure(&self) -> Result<L2Size, PgError> {
        self.written.store(0, Ordering::Release);
        let (pages, file_bytes) = self.pages().await?;
        let percent = percent(pages);
        let rows = self.transaction(SAMPLE, &[(&percent, Type::FLOAT4)]).await?;
        let of_all = |counted: u64| (counted as f64 * 100.0 / f64::from(percent)) as u64;
        let (counted, bytes) = rows.first().map_or((0, 0), |row| (number(row, 0), number(row, 1)));
        let size = L2Size { rows: of_all(counted), bytes: of_all(bytes), file_bytes };
        *self.size.lock() = Some(size);
        Ok(size)
    }
}

impl Gone {
    fn add(&mut self, more: Gone) {
        self.rows += more.rows;
        self.bytes += more.bytes;
    }
}

/// All of a small table, else as much as is about `SAMPLED_PAGES`.
fn percent(pages: u64) -> f32 {
    (SAMPLED_PAGES as f32 / pages.max(1) as f32 * 100.0).min(100.0)
}

/// A row that is not a key of ours is left where it is.
fn keys(rows: &[Row]) -> Vec<CacheKey> {
    let key = |row: &Row| CacheKey::stored(row.try_get(0).ok()?, row.try_get(1).ok()?).ok();
    rows.iter().filter_map(key).collect()
}

fn digests(keys: &[CacheKey]) -> Vec<[u8; 16]> {
    keys.iter().map(CacheKey::digest).collect()
}

fn gone(row: &Row) -> Gone {
    Gone { rows: number(row, 0), bytes: number(row, 1) }
}

fn number(row: &Row, column: usize) -> u64 {
    row.try_get::<_, i64>(column).map_or(0, |number| number.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_table_is_read_whole_and_of_a_large_one_a_part() {
        assert_eq!((percent(0), percent(1), percent(1024)), (100.0, 100.0, 100.0));
        assert!((percent(102_400) - 1.0).abs() < 1e-3);
    }
}
