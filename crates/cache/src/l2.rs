//! The second tier: the table `walcast.cache_entries`. This file reads; `l2_writer` writes.
//!
//! Called by the cache. Never an error to a reader (P6): what fails or is slow is skipped behind a breaker and counted.
//! A row says nothing about its own freshness. So it does no harm that L2 missed invalidations while it was away, or that
//! a dropped write left an older row behind: the clock judges every row by its fence when it is read.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    time::timeout_at,
};
use tokio_postgres::{
    Row,
    types::{PgLsn, Type},
};
use walcast_model::{CacheKey, Epoch, Fence, Floor, Lsn, Tag};
use walcast_pg::{PgError, Pool};

use crate::{
    Entry, L2Size, NewValue, Stats,
    breaker::Breaker,
    entry::now_ms,
    l2_writer::{self, Job},
};

#[derive(Debug, Clone)]
pub struct L2Config {
    /// A slower read is skipped.
    pub read_timeout: Duration,
    pub write_timeout: Duration,
    /// Statements at one time; more readers wait within their read timeout.
    pub concurrent_reads: usize,
    /// Values that wait to be written. Past either bound they are dropped and counted.
    pub queue_items: usize,
    pub queue_bytes: usize,
    pub batch_rows: usize,
    pub batch_bytes: usize,
    /// Past it the rows that bring the least go, until nine tenths are left. The file itself may be larger by what
    /// vacuum has yet to free.
    pub max_bytes: u64,
}

impl Default for L2Config {
    fn default() -> L2Config {
        L2Config {
            read_timeout: Duration::from_millis(250),
            write_timeout: Duration::from_secs(5),
            concurrent_reads: 4,
            queue_items: 4096,
            queue_bytes: 32 << 20,
            batch_rows: 256,
            batch_bytes: 4 << 20,
            max_bytes: 1 << 30,
        }
    }
}

/// A handle; the writer task ends when the last handle is dropped.
#[derive(Clone)]
pub struct L2 {
    pub(crate) tier: Arc<Table>,
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
}

/// What readers and the writer share.
pub(crate) struct Table {
    pub(crate) pool: Pool,
    pub(crate) config: L2Config,
    pub(crate) breaker: Breaker,
    pub(crate) stats: Arc<Stats>,
    /// Hits that the table does not know of yet: a read never writes.
    pub(crate) hits: Mutex<HashMap<[u8; 16], i64>>,
    /// Rows that readers met although their time was over.
    pub(crate) met: Mutex<HashSet<[u8; 16]>>,
    /// Bytes written since the table was last measured.
    pub(crate) written: AtomicU64,
    /// So much was written that it should be measured again.
    pub(crate) crowded: Notify,
    pub(crate) size: Mutex<Option<L2Size>>,
    epoch: AtomicU32,
    reads: Semaphore,
}

const DOING: &str = "reading the cache table";
/// Keys a statement: bounds what one answer holds in memory.
const KEYS_A_STATEMENT: usize = 64;
const MAX_HIT_KEYS: usize = 8192;
/// More of them wait for the next reader, or for their hour.
const MAX_MET: usize = 1000;

const READ: &str = "
select hash, namespace, key, value, content_type, tags, floor, settled, snapshot, stored_at, expires_at, etag, stale_until, negative
from walcast.cache_entries where hash = any($1) and epoch = $2";

impl L2 {
    /// The pool may be everybody's: to wait for a connection that others use is no failure of the table.
    pub fn start(pool: Pool, config: L2Config) -> L2 {
        let (jobs, inbox) = mpsc::channel(config.queue_items.max(1));
        let room = Arc::new(Semaphore::new(config.queue_bytes.min(Semaphore::MAX_PERMITS)));
        let tier = Arc::new(Table {
            pool,
            breaker: Breaker::default(),
            stats: Arc::default(),
            hits: Mutex::default(),
            met: Mutex::default(),
            written: AtomicU64::new(0),
            crowded: Notify::new(),
            size: Mutex::default(),
            epoch: AtomicU32::new(0),
            reads: Semaphore::new(config.concurrent_reads.max(1)),
            config,
        });
        tokio::spawn(l2_writer::run(tier.clone(), inbox));
        L2 { tier, jobs, room }
    }

    pub(crate) fn stats(&self) -> &Arc<Stats> {
        &self.tier.stats
    }

    pub(crate) fn table(&self) -> &Table {
        &self.tier
    }

    pub(crate) fn set_epoch(&self, epoch: Epoch) {
        self.tier.epoch.store(epoch.0, Ordering::Release);
    }

    /// Skipped at present, because it failed.
    pub fn is_away(&self) -> bool {
        self.tier.breaker.is_open()
    }

    /// In the order of the keys; none where there is no row, or no answer in time.
    pub(crate) async fn read(&self, keys: &[&CacheKey]) -> Vec<Option<Entry>> {
        let mut entries = Vec::with_capacity(keys.len());
        for keys in keys.chunks(KEYS_A_STATEMENT) {
            entries.extend(self.tier.read(keys).await);
        }
        entries
    }

    pub(crate) fn note_hit(&self, key: &CacheKey) {
        self.tier.note_hit(key);
    }

    /// Queues the entry for the writer; never waits.
    pub(crate) fn write(&self, key: &CacheKey, entry: &Arc<Entry>) {
        let bytes = u32::try_from(entry.weight(key)).unwrap_or(u32::MAX);
        let queued = self.room.clone().try_acquire_many_owned(bytes).ok().and_then(|room| {
            let job = Job::Write { key: key.clone(), entry: entry.clone(), epoch: self.tier.epoch(), _room: room };
            self.jobs.try_send(job).ok()
        });
        if queued.is_none() {
            self.tier.stats.l2_dropped.add(1);
        }
    }

    /// Queues the end of a lease behind what was written before; never waits. With the queue full it runs out by itself.
    pub(crate) fn release(&self, key: &CacheKey, holder: &str) {
        drop(self.jobs.try_send(Job::Release { hash: key.digest(), holder: holder.to_owned() }));
    }

    /// Waits until everything queued before was written or given up.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.jobs.send(Job::Flush(done)).await.is_ok() {
            let _ = written.await;
        }
    }
}

impl Table {
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    async fn read(&self, keys: &[&CacheKey]) -> Vec<Option<Entry>> {
        let mut entries: Vec<Option<Entry>> = keys.iter().map(|_| None).collect();
        if keys.is_empty() {
            return entries;
        }
        let deadline = tokio::time::Instant::now() + self.config.read_timeout;
        // Waiting for our own readers says nothing about the database: skipped, not failed.
        let Ok(Ok(_turn)) = timeout_at(deadline, self.reads.acquire()).await else {
            self.stats.l2_skipped.add(1);
            return entries;
        };
        let Some(leave) = self.breaker.ask(Instant::now()) else {
            self.stats.l2_skipped.add(1);
            return entries;
        };
        match self.rows(keys, deadline).await {
            Ok(rows) => {
                if leave.succeeded() {
                    tracing::info!("the cache table answers again");
                }
                rows.iter().for_each(|row| self.place(row, keys, &mut entries));
            }
            // No verdict: nobody asked the table.
            Err(PgError::Busy { .. }) => self.stats.l2_skipped.add(1),
            Err(error) => {
                self.stats.l2_errors.add(1);
                if leave.failed(Instant::now()) {
                    tracing::warn!(%error, "the cache table does not answer; going on without it");
                }
            }
        }
        entries
    }

    async fn rows(&self, keys: &[&CacheKey], deadline: tokio::time::Instant) -> Result<Vec<Row>, PgError> {
        let slow = || PgError::Away { doing: DOING, source: "no answer within `read_timeout`".into() };
        let digests: Vec<[u8; 16]> = keys.iter().map(|key| key.digest()).collect();
        let hashes: Vec<&[u8]> = digests.iter().map(|digest| &digest[..]).collect();
        let epoch = self.epoch().to_string();
        let lease = self.pool.lease_by(deadline, DOING).await?;
        let answer = timeout_at(deadline, lease.query_kept(READ, &[(&hashes, Type::BYTEA_ARRAY), (&epoch, Type::TEXT)])).await;
        match answer {
            Ok(rows) => rows.map_err(PgError::when(DOING)),
            Err(_) => {
                // The next borrower would wait behind our answer.
                lease.discard();
                Err(slow())
            }
        }
    }

    pub(crate) fn note_hit(&self, key: &CacheKey) {
        let mut hits = self.hits.lock();
        let digest = key.digest();
        if hits.len() < MAX_HIT_KEYS || hits.contains_key(&digest) {
            *hits.entry(digest).or_default() += 1;
        }
    }

    /// A read never deletes; upkeep does.
    fn note_over(&self, key: &CacheKey) {
        let mut met = self.met.lock();
        if met.len() < MAX_MET {
            met.insert(key.digest());
        }
    }

    /// Puts the row to the keys that it is for: the full key decides, the hash only found it.
    fn place(&self, row: &Row, keys: &[&CacheKey], entries: &mut [Option<Entry>]) {
        let names = |row: &Row| Ok::<_, tokio_postgres::Error>((row.try_get::<_, String>(1)?, row.try_get::<_, String>(2)?));
        let Ok((namespace, key_text)) = names(row) else {
            self.stats.l2_errors.add(1);
            return;
        };
        for (key, place) in keys.iter().zip(entries) {
            if key.namespace() == namespace && key.key() == key_text {
                *place = decode(row, key);
                match place {
                    Some(entry) if entry.stale_until <= now_ms() => self.note_over(key),
                    Some(_) => {}
                    None => self.stats.l2_errors.add(1),
                }
            }
        }
    }
}

fn unix_ms(row: &Row, column: usize) -> Option<u64> {
    let since = row.try_get::<_, SystemTime>(column).ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}

/// None if the row is not as we write them: somebody else's hand was in the table.
fn decode(row: &Row, key: &CacheKey) -> Option<Entry> {
    let tags: Vec<&str> = row.try_get(5).ok()?;
    let settled = Lsn(row.try_get::<_, PgLsn>(7).ok()?.into());
    let fence = Fence {
        snapshot: row.try_get::<_, &str>(8).ok()?.parse().ok()?,
        settled,
        floor: Floor(u64::try_from(row.try_get::<_, i64>(6).ok()?).ok()?),
    };
    let value = NewValue {
        value: row.try_get::<_, Vec<u8>>(3).ok()?.into(),
        content_type: row.try_get::<_, &str>(4).ok()?.into(),
        tags: tags.into_iter().map(Tag::stored).collect(),
        ttl: None,
        negative: row.try_get(13).ok()?,
    };
    let (stored_at, expires_at) = (unix_ms(row, 9)?, unix_ms(row, 10)?);
    let etag: &str = row.try_get(11).ok()?;
    let stale_until = unix_ms(row, 12)?;
    Some(Entry::stored(key, value, fence, [stored_at, expires_at, stale_until], etag.into()))
}
