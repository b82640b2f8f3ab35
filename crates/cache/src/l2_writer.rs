//! The one task that writes values to the cache table, in batches.
//!
//! Started by L2, ends with its last handle. Nobody waits for it but who asks for a flush or puts a value from elsewhere. It never
//! writes with a synchronous commit (a dead standby must not stop the cache) and never tries a value twice: a cache may forget.
//! A row that somebody's transaction holds costs the others of its batch a short wait, and is dropped alone.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Instant,
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::timeout_at,
};
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};
use walcast_model::{CacheKey, Epoch};
use walcast_pg::PgError;

use crate::{
    Entry,
    l2::{Confirmation, Table},
    lease,
};

pub(crate) enum Job {
    Write {
        key: CacheKey,
        entry: Arc<Entry>,
        epoch: Epoch,
        /// Who waits for it.
        told: Option<oneshot::Sender<Confirmation>>,
        _room: OwnedSemaphorePermit,
    },
    Release {
        hash: [u8; 16],
        holder: String,
    },
    Flush(oneshot::Sender<()>),
}

pub(crate) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

const DOING: &str = "writing the cache table";
/// Once this part of `max_bytes` was written, the table is measured anew: by so much it may be over at most.
const MEASURED_AFTER: u64 = 16;

const BEGIN: &str = "begin; set local synchronous_commit = off; set local lock_timeout = 200";
const LOCK_NOT_AVAILABLE: &str = "55P03";

const VALUES: &str = "
v as (
  select * from unnest($1::bytea[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::text[], $7::text[], $8::int8[], $9::text[],
                       $10::int8[], $11::text[], $12::int8[], $13::int8[], $14::text[], $15::int8[], $16::bool[])
    as v (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax, snapshot, stored_at, expires_at, etag,
          stale_until, negative))";

/// Never back: a row gives way only to a fence that is not older, or if it is of another epoch and so unreachable.
/// Equal fences give way too, for then the later store is the newer one.
fn upsert(from: &str) -> String {
    format!(
        "
insert into walcast.cache_entries as c
  (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax, snapshot, stored_at, expires_at, etag,
   stale_until, negative)
select hash, namespace, key, value, content_type, string_to_array(tags, E'\\n'), epoch, floor, settled::pg_lsn, snapshot_xmax, snapshot,
       to_timestamp(stored_at / 1000.0), to_timestamp(expires_at / 1000.0), etag,
       to_timestamp(stale_until / 1000.0), negative
from {from}
order by hash
on conflict (hash) do update set
  namespace = excluded.namespace, key = excluded.key, value = excluded.value, content_type = excluded.content_type,
  tags = excluded.tags, epoch = excluded.epoch, floor = excluded.floor, settled = excluded.settled, snapshot_xmax = excluded.snapshot_xmax,
  snapshot = excluded.snapshot, stored_at = excluded.stored_at, expires_at = excluded.expires_at, etag = excluded.etag,
  stale_until = excluded.stale_until, negative = excluded.negative
where (excluded.floor, excluded.settled, excluded.snapshot_xmax) >= (c.floor, c.settled, c.snapshot_xmax) or excluded.epoch <> c.epoch
returning hash"
    )
}

/// Answers which were written, and which were left.
static UPSERT: LazyLock<String> = LazyLock::new(|| {
    format!("with {VALUES}, written as ({}) select array(select hash from written), '{{}}'::bytea[]", upsert("v"))
});

/// The same past rows that somebody's transaction holds: one that is there, by its lock; one that is only being made by
/// `walcast.cache_set`, which nobody sees yet, by the advisory lock that it takes first.
static UPSERT_AROUND_HELD: LazyLock<String> = LazyLock::new(|| {
    format!(
        "
with {VALUES},
nobodys as materialized (
  select hash from v where pg_try_advisory_xact_lock(hashtextextended(('walcast/' || namespace || '/' || key) collate \"C\", 3))),
ours as materialized (
  select c.hash from walcast.cache_entries c where c.hash = any($1) order by c.hash for update skip locked),
free as materialized (
  select v.* from v join nobodys using (hash)
  where hash in (select hash from ours) or not exists (select from walcast.cache_entries c where c.hash = v.hash)),
written as ({})
select array(select hash from written), array(select hash from v where hash not in (select hash from free))",
        upsert("free")
    )
});

pub(crate) async fn run(table: Arc<Table>, mut jobs: mpsc::Receiver<Job>) {
    let mut next = jobs.recv().await;
    while let Some(job) = next.take() {
        match job {
            Job::Flush(done) => drop(done.send(())),
            Job::Release { hash, holder } => {
                let (hashes, holders) = ([&hash[..]], [&holder]);
                let parameters: [Parameter<'_>; 2] = [(&&hashes[..], Type::BYTEA_ARRAY), (&&holders[..], Type::TEXT_ARRAY)];
                drop(table.guarded(table.transaction(lease::RELEASE, &parameters), 0).await);
            }
            first => {
                let (batch, other) = gather(&table, first, &mut jobs);
                let rows = batch.len() as u64;
                if let Ok(outcome) = table.guarded(table.upsert(&batch), rows).await {
                    table.stats.l2_written.add(outcome.written.len() as u64);
                    table.note_written(&batch);
                    tell(batch, &outcome);
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
        let Job::Write { entry, told, .. } = &job else { return (batch, Some(job)) };
        // Who waited for it has given it up, and said so.
        if told.as_ref().is_none_or(|told| !told.is_closed()) {
            bytes += entry.value.len();
            batch.push(job);
        }
        if batch.len() < table.config.batch_rows && bytes < table.config.batch_bytes {
            next = jobs.try_recv().ok();
        }
    }
    (batch, None)
}

impl Table {
    /// Behind the breaker, and counted. `rows` is what is lost if it is open.
    pub(crate) async fn guarded<T>(&self, work: impl Future<Output = Result<T, PgError>>, rows: u64) -> Result<T, PgError> {
        let Some(leave) = self.breaker.ask(Instant::now()) else {
            self.stats.l2_skipped.add(rows);
            return Err(PgError::Away { doing: DOING, source: "it failed several times and is left alone for a while".into() });
        };
        let result = work.await;
        match &result {
            Ok(_) => drop(leave.succeeded()),
            Err(PgError::Busy { .. }) => self.stats.l2_skipped.add(rows),
            // Somebody's transaction holds what we would write. That says nothing about the table: no verdict.
            Err(error) if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) => self.stats.l2_errors.add(1),
            Err(error) => {
                self.stats.l2_errors.add(1);
                if leave.failed(Instant::now()) {
                    tracing::warn!(%error, "the cache table cannot be written; going on without it");
                }
            }
        }
        result
    }

    /// One deadline for all of it, the wait for a connection included: a silent server must not stop the writer.
    pub(crate) async fn transaction(&self, statement: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>, PgError> {
        let deadline = tokio::time::Instant::now() + self.config.write_timeout;
        let slow = || PgError::Away { doing: DOING, source: "no answer within `write_timeout`".into() };
        let lease = self.pool.lease_by(deadline, DOING).await?;
        let statements = async {
            lease.batch_execute(BEGIN).await?;
            let rows = lease.query_typed(statement, parameters).await?;
            lease.batch_execute("commit").await?;
            Ok(rows)
        };
        let error = match timeout_at(deadline, statements).await {
            Ok(Ok(rows)) => return Ok(rows),
            Ok(Err(error)) => PgError::from_driver(DOING, error),
            Err(_) => slow(),
        };
        // Its transaction is in a state nobody should meet.
        lease.discard();
        Err(error)
    }

    async fn upsert(&self, batch: &[Job]) -> Result<Outcome, PgError> {
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
        let (stale_until, negative) =
            (number(|entry| entry.stale_until), rows.iter().map(|row| row.entry.negative).collect::<Vec<bool>>());
        let parameters: [Parameter<'_>; 16] = [
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
            (&stale_until, Type::INT8_ARRAY),
            (&negative, Type::BOOL_ARRAY),
        ];
        let answer = match self.transaction(&UPSERT, &parameters).await {
            Err(error) if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) => {
                self.transaction(&UPSERT_AROUND_HELD, &parameters).await?
            }
            answer => answer?,
        };
        let hashes = |column: usize| -> Result<HashSet<Vec<u8>>, PgError> {
            let hashes: Option<Vec<Vec<u8>>> =
                answer.first().map(|row| row.try_get(column)).transpose().map_err(PgError::when(DOING))?;
            Ok(hashes.unwrap_or_default().into_iter().collect())
        };
        let (written, held) = (hashes(0)?, hashes(1)?);
        self.stats.l2_dropped.add(held.len() as u64);
        Ok(Outcome { written, held })
    }

    /// Values may come faster than upkeep looks: it is called when much was written.
    fn note_written(&self, batch: &[Job]) {
        let bytes: usize =
            batch.iter().map(|job| if let Job::Write { key, entry, .. } = job { entry.weight(key) } else { 0 }).sum();
        let written = self.written.fetch_add(bytes as u64, Ordering::AcqRel) + bytes as u64;
        if written >= self.config.max_bytes / MEASURED_AFTER {
            self.crowded.notify_one();
        }
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

/// What became of the keys of a batch, by their hashes. What is in neither met a row that was read later.
struct Outcome {
    /// The row gave way, or was not there.
    written: HashSet<Vec<u8>>,
    /// Somebody's open transaction holds the row.
    held: HashSet<Vec<u8>>,
}

/// Those of a batch that failed are told by its end: their senders go with it.
fn tell(batch: Vec<Job>, outcome: &Outcome) {
    for job in batch {
        if let Job::Write { key, told: Some(told), .. } = job {
            let digest = key.digest();
            let _ = told.send(if outcome.written.contains(&digest[..]) {
                Confirmation::Written
            } else if outcome.held.contains(&digest[..]) {
                Confirmation::None
            } else {
                Confirmation::Older
            });
        }
    }
}

/// No tag holds a control character, so a line break parts them.
fn joined_tags(entry: &Entry) -> String {
    entry.tags.iter().map(|tag| tag.as_str()).collect::<Vec<_>>().join("\n")
}
