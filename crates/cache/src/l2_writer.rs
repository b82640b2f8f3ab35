//! The one task that writes to the cache table: values in batches, sweeps, hit counts.
//!
//! Started by L2, ends with its last handle. Nobody waits for it but who asks for a flush or a sweep. It never writes
//! with a synchronous commit (a dead standby must not stop the cache) and never tries a batch twice: a cache may forget.

use std::{collections::HashMap, sync::Arc, time::Instant};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::timeout,
};
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};
use walcast_model::{CacheKey, Epoch};
use walcast_pg::PgError;

use crate::{Entry, l2::Table, lease};

pub(crate) enum Job {
    Write { key: CacheKey, entry: Arc<Entry>, epoch: Epoch, _room: OwnedSemaphorePermit },
    Release { hash: [u8; 16], holder: String },
    Flush(oneshot::Sender<()>),
    Sweep(oneshot::Sender<Result<Swept, PgError>>),
}

/// What a sweep took away.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Swept {
    pub expired: u64,
    /// Not expired, but over `max_bytes`.
    pub evicted: u64,
}

type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

const DOING: &str = "writing the cache table";
const SWEEP_ROWS: i64 = 1000;
/// Batches a sweep: values that wait to be written get their turn in between sweeps.
const SWEEP_BATCHES: u64 = 50;

const BEGIN: &str = "begin; set local synchronous_commit = off; set local lock_timeout = 1000";

/// Never back: a row gives way only to a fence that is not older, or if it is of another epoch and so unreachable.
/// Equal fences give way too, for then the later store is the newer one.
const UPSERT: &str = "
insert into walcast.cache_entries as c
  (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax, snapshot, stored_at, expires_at, etag)
select hash, namespace, key, value, content_type, string_to_array(tags, E'\\n'), epoch, floor, settled::pg_lsn, snapshot_xmax, snapshot,
       to_timestamp(stored_at / 1000.0), to_timestamp(expires_at / 1000.0), etag
from unnest($1::bytea[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::text[], $7::text[], $8::int8[], $9::text[],
            $10::int8[], $11::text[], $12::int8[], $13::int8[], $14::text[])
  as v (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax, snapshot, stored_at, expires_at, etag)
order by hash
on conflict (hash) do update set
  namespace = excluded.namespace, key = excluded.key, value = excluded.value, content_type = excluded.content_type,
  tags = excluded.tags, epoch = excluded.epoch, floor = excluded.floor, settled = excluded.settled, snapshot_xmax = excluded.snapshot_xmax,
  snapshot = excluded.snapshot, stored_at = excluded.stored_at, expires_at = excluded.expires_at, etag = excluded.etag
where (excluded.floor, excluded.settled, excluded.snapshot_xmax) >= (c.floor, c.settled, c.snapshot_xmax) or excluded.epoch <> c.epoch
returning 1";

const DELETE_EXPIRED: &str = "
delete from walcast.cache_entries where hash = any (array(
  select hash from walcast.cache_entries where expires_at <= now() order by expires_at limit $1 for update skip locked))
returning 0::int8";

/// Answers the bytes of each row, so that a sweep knows when it has taken enough.
const DELETE_SOONEST: &str = "
delete from walcast.cache_entries where hash = any (array(
  select hash from walcast.cache_entries order by expires_at limit $1 for update skip locked))
returning octet_length(value)::int8 + 512";

const TABLE_BYTES: &str = "select pg_catalog.pg_table_size('walcast.cache_entries')";
/// The file does not shrink when rows go, so only a count of what lives says how much must go.
const LIVE_BYTES: &str = "select coalesce(sum(octet_length(value)::int8 + 512), 0)::int8 from walcast.cache_entries";

const ADD_HITS: &str = "
with counted as (
  select c.hash, v.n from walcast.cache_entries c join unnest($1::bytea[], $2::int8[]) v (hash, n) on c.hash = v.hash
  order by c.hash for update of c skip locked)
update walcast.cache_entries c set hits = c.hits + counted.n from counted where c.hash = counted.hash";

pub(crate) async fn run(table: Arc<Table>, mut jobs: mpsc::Receiver<Job>) {
    let mut next = jobs.recv().await;
    while let Some(job) = next.take() {
        match job {
            Job::Flush(done) => drop(done.send(())),
            Job::Sweep(done) => drop(done.send(table.guarded(table.sweep(), 1).await)),
            Job::Release { hash, holder } => {
                let (hashes, holders) = ([&hash[..]], [&holder]);
                let parameters: [Parameter<'_>; 2] = [(&&hashes[..], Type::BYTEA_ARRAY), (&&holders[..], Type::TEXT_ARRAY)];
                drop(table.guarded(table.transaction(lease::RELEASE, &parameters), 0).await);
            }
            first => {
                let (batch, other) = gather(&table, first, &mut jobs);
                let rows = batch.len() as u64;
                if let Ok(written) = table.guarded(table.upsert(&batch), rows).await {
                    table.stats.l2_written.add(written);
                }
                next = other;
            }
        }
        if next.is_none() {
            next = jobs.recv().await;
        }
    }
}

/// All writes that wait, up to the bounds of a batch; and the first job that is something else.
fn gather(table: &Table, first: Job, jobs: &mut mpsc::Receiver<Job>) -> (Vec<Job>, Option<Job>) {
    let mut bytes = 0;
    let mut batch = Vec::new();
    let mut next = Some(first);
    while let Some(job) = next.take() {
        let Job::Write { entry, .. } = &job else { return (batch, Some(job)) };
        bytes += entry.value.len();
        batch.push(job);
        if batch.len() < table.config.batch_rows && bytes < table.config.batch_bytes {
            next = jobs.try_recv().ok();
        }
    }
    (batch, None)
}

impl Table {
    /// Behind the breaker, and counted. `rows` is what is lost if it is open.
    async fn guarded<T>(&self, work: impl Future<Output = Result<T, PgError>>, rows: u64) -> Result<T, PgError> {
        let Some(leave) = self.breaker.ask(Instant::now()) else {
            self.stats.l2_skipped.add(rows);
            return Err(PgError::Away { doing: DOING, source: "it failed several times and is left alone for a while".into() });
        };
        let result = work.await;
        match &result {
            Ok(_) => drop(leave.succeeded()),
            Err(error) => {
                self.stats.l2_errors.add(1);
                if leave.failed(Instant::now()) {
                    tracing::warn!(%error, "the cache table cannot be written; going on without it");
                }
            }
        }
        result
    }

    async fn transaction(&self, statement: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>, PgError> {
        let work = async {
            let lease = self.pool.lease(DOING).await?;
            let statements = async {
                lease.batch_execute(BEGIN).await?;
                let rows = lease.query_typed(statement, parameters).await?;
                lease.batch_execute("commit").await?;
                Ok(rows)
            };
            let outcome = timeout(self.config.write_timeout, statements).await;
            match outcome {
                Ok(Ok(rows)) => Ok(rows),
                Ok(Err(error)) => {
                    // Its transaction is in a state nobody should meet.
                    lease.discard();
                    Err(PgError::from_driver(DOING, error))
                }
                Err(_) => {
                    lease.discard();
                    Err(PgError::Away { doing: DOING, source: "no answer within `write_timeout`".into() })
                }
            }
        };
        work.await
    }

    async fn upsert(&self, batch: &[Job]) -> Result<u64, PgError> {
        let rows = newest_of_each_key(batch);
        let digests: Vec<[u8; 16]> = rows.iter().map(|row| row.key.digest()).collect();
        let tags: Vec<String> = rows.iter().map(|row| joined_tags(row.entry)).collect();
        let epochs: Vec<String> = rows.iter().map(|row| row.epoch.to_string()).collect();
        let settled: Vec<String> = rows.iter().map(|row| row.entry.fence.settled.to_string()).collect();
        let snapshots: Vec<String> = rows.iter().map(|row| row.entry.fence.snapshot.to_string()).collect();
        let number = |pick: fn(&Entry) -> u64| rows.iter().map(|row| pick(row.entry) as i64).collect::<Vec<i64>>();
        let text = |pick: for<'a> fn(&'a Write<'a>) -> &'a str| rows.iter().map(pick).collect::<Vec<&str>>();

        let hashes: Vec<&[u8]> = digests.iter().map(|digest| &digest[..]).collect();
        let values: Vec<&[u8]> = rows.iter().map(|row| &row.entry.value[..]).collect();
        let (namespaces, keys) = (text(|row| row.key.namespace()), text(|row| row.key.key()));
        let (content_types, etags) = (text(|row| &row.entry.content_type), text(|row| &row.entry.etag));
        let (floors, xmaxes) = (number(|entry| entry.fence.floor.0), number(|entry| entry.fence.snapshot.xmax.0));
        let (stored_at, expires_at) = (number(|entry| entry.stored_at), number(|entry| entry.expires_at));
        let parameters: [Parameter<'_>; 14] = [
            (&hashes, Type::BYTEA_ARRAY),
            (&namespaces, Type::TEXT_ARRAY),
            (&keys, Type::TEXT_ARRAY),
            (&values, Type::BYTEA_ARRAY),
            (&content_types, Type::TEXT_ARRAY),
            (&tags, Type::TEXT_ARRAY),
            (&epochs, Type::TEXT_ARRAY),
            (&floors, Type::INT8_ARRAY),
            (&settled, Type::TEXT_ARRAY),
            (&xmaxes, Type::INT8_ARRAY),
            (&snapshots, Type::TEXT_ARRAY),
            (&stored_at, Type::INT8_ARRAY),
            (&expires_at, Type::INT8_ARRAY),
            (&etags, Type::TEXT_ARRAY),
        ];
        Ok(self.transaction(UPSERT, &parameters).await?.len() as u64)
    }

    async fn sweep(&self) -> Result<Swept, PgError> {
        self.add_hits().await?;
        let mut swept = Swept::default();
        for _ in 0..SWEEP_BATCHES {
            let gone = self.transaction(DELETE_EXPIRED, &[(&SWEEP_ROWS, Type::INT8)]).await?.len() as u64;
            swept.expired += gone;
            if gone < SWEEP_ROWS as u64 {
                swept.evicted = self.evict().await?;
                break;
            }
        }
        self.stats.l2_swept.add(swept.expired + swept.evicted);
        Ok(swept)
    }

    /// Down to nine tenths of the bound, so that the next sweep does not begin at it again.
    async fn evict(&self) -> Result<u64, PgError> {
        let bound = self.config.max_bytes;
        if self.number(TABLE_BYTES).await? <= bound {
            return Ok(0);
        }
        let mut live = self.number(LIVE_BYTES).await?;
        let mut evicted = 0;
        let goal = if live > bound { bound / 10 * 9 } else { live };
        for _ in 0..SWEEP_BATCHES {
            if live <= goal {
                break;
            }
            let rows = self.transaction(DELETE_SOONEST, &[(&SWEEP_ROWS, Type::INT8)]).await?;
            if rows.is_empty() {
                break;
            }
            evicted += rows.len() as u64;
            live = rows.iter().fold(live, |live, row| live.saturating_sub(first_number(row)));
        }
        Ok(evicted)
    }

    async fn number(&self, statement: &str) -> Result<u64, PgError> {
        Ok(self.transaction(statement, &[]).await?.first().map_or(0, first_number))
    }

    async fn add_hits(&self) -> Result<(), PgError> {
        let hits = std::mem::take(&mut *self.hits.lock());
        if hits.is_empty() {
            return Ok(());
        }
        let hashes: Vec<&[u8]> = hits.keys().map(|digest| &digest[..]).collect();
        let counts: Vec<i64> = hits.values().copied().collect();
        self.transaction(ADD_HITS, &[(&hashes, Type::BYTEA_ARRAY), (&counts, Type::INT8_ARRAY)]).await?;
        Ok(())
    }
}

struct Write<'a> {
    key: &'a CacheKey,
    entry: &'a Entry,
    epoch: Epoch,
}

/// One statement cannot write a row twice, so by hash: should two keys ever share one, the table has room for one of them.
fn newest_of_each_key(batch: &[Job]) -> Vec<Write<'_>> {
    let mut newest: HashMap<[u8; 16], Write<'_>> = HashMap::with_capacity(batch.len());
    for job in batch {
        let Job::Write { key, entry, epoch, .. } = job else { continue };
        let is_older = |there: &Write<'_>| there.epoch == *epoch && there.entry.fence.age_rank() > entry.fence.age_rank();
        let hash = key.digest();
        if !newest.get(&hash).is_some_and(is_older) {
            newest.insert(hash, Write { key, entry, epoch: *epoch });
        }
    }
    newest.into_values().collect()
}

/// No tag holds a control character, so a line break parts them.
fn joined_tags(entry: &Entry) -> String {
    entry.tags.iter().map(|tag| tag.as_str()).collect::<Vec<_>>().join("\n")
}

fn first_number(row: &Row) -> u64 {
    row.try_get::<_, i64>(0).map_or(0, |number| number.max(0) as u64)
}
