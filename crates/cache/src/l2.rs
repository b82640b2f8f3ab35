//! The second tier: the table `walcast.cache_entries`. This file reads; `l2_writer` writes.
//!
//! Called by the cache. Never an error to a reader (P6): what fails or is slow is skipped behind a breaker and counted.
//! A row says nothing about its own freshness. So it does no harm that L2 missed invalidations while it was away, or that
//! a dropped write left an older row behind: the clock judges every row by its fence when it is read.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry as Slot},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    time::timeout_at,
};
use tokio_postgres::{
    Row,
    types::{PgLsn, ToSql, Type},
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

/// What became of a write that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Confirmation {
    Written,
    /// The row that is there was read later.
    Older,
    /// Nobody knows.
    None,
}

const DOING: &str = "reading the cache table";
/// Keys a statement: bounds what one answer holds in memory.
const KEYS_A_STATEMENT: usize = 64;
const MAX_HIT_KEYS: usize = 8192;
/// More of them wait for the next reader, or for their hour.
const MAX_MET: usize = 1000;

/// The tags as one text: PostgreSQL takes an array apart element by element to send it. No tag holds a line break.
macro_rules! read_where {
    ($which:literal) => {
        concat!(
            "select hash, namespace, key, value, content_type, array_to_string(tags, E'\\n'), floor, settled, snapshot, \
             stored_at, expires_at, etag, stale_until, negative \
             from walcast.cache_entries where epoch = $2 and ",
            $which
        )
    };
}

/// Apart from many, for which PostgreSQL makes a dearer plan.
const READ_ONE: &str = read_where!("hash = $1");
const READ_MANY: &str = read_where!("hash = any($1)");

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
        self.queue(key, entry, None);
    }

    /// Waits until the table has the entry, but no longer than a write may take. Without an answer it may get there
    /// all the same, later.
    pub(crate) async fn confirm(&self, key: &CacheKey, entry: &Arc<Entry>) -> Confirmation {
        let (told, confirmed) = oneshot::channel();
        self.queue(key, entry, Some(told));
        match tokio::time::timeout(self.tier.config.write_timeout, confirmed).await {
            Ok(Ok(confirmation)) => confirmation,
            Ok(Err(_)) | Err(_) => Confirmation::None,
        }
    }

    fn queue(&self, key: &CacheKey, entry: &Arc<Entry>, told: Option<oneshot::Sender<Confirmation>>) {
        let bytes = u32::try_from(entry.weight(key)).unwrap_or(u32::MAX);
        let queued = self.room.clone().try_acquire_many_owned(bytes).ok().and_then(|room| {
            let job = Job::Write { key: key.clone(), entry: entry.clone(), epoch: self.tier.epoch(), told, _room: room };
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
        let wanted = Wanted::of(keys);
        let now = now_ms();
        let answer = self.rows(&wanted, deadline, |row| self.place(row, &wanted, now, &mut entries)).await;
        match answer {
            Ok(()) => {
                if leave.succeeded() {
                    tracing::info!("the cache table answers again");
                }
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

    async fn rows(&self, wanted: &Wanted<'_>, deadline: tokio::time::Instant, place: impl FnMut(&Row)) -> Result<(), PgError> {
        let slow = || PgError::Away { doing: DOING, source: "no answer within `read_timeout`".into() };
        let epoch = self.epoch().to_string();
        let lease = self.pool.lease_by(deadline, DOING).await?;
        let hashes: Vec<&[u8]> = wanted.0.iter().map(|(digest, ..)| &digest[..]).collect();
        let (statement, which): (_, (&(dyn ToSql + Sync), Type)) = match &hashes[..] {
            [one] => (READ_ONE, (one, Type::BYTEA)),
            _ => (READ_MANY, (&hashes, Type::BYTEA_ARRAY)),
        };
        let parameters = [which, (&epoch, Type::TEXT)];
        let answer = timeout_at(deadline, lease.query_kept(statement, &parameters, place)).await;
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
        let full = hits.len() >= MAX_HIT_KEYS;
        match hits.entry(key.digest()) {
            Slot::Vacant(_) if full => {}
            slot => *slot.or_default() += 1,
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
    fn place(&self, row: &Row, wanted: &Wanted<'_>, now: u64, entries: &mut [Option<Entry>]) {
        let text = |column| row.try_get::<_, &str>(column);
        let (Ok(hash), Ok(namespace), Ok(key_text)) = (row.try_get(0), text(1), text(2)) else {
            self.stats.l2_errors.add(1);
            return;
        };
        for (key, place) in wanted.with_hash(hash) {
            if key.namespace() == namespace && key.key() == key_text {
                let entry = decode(row, key);
                match &entry {
                    Some(entry) if entry.stale_until <= now => self.note_over(key),
                    Some(_) => {}
                    None => self.stats.l2_errors.add(1),
                }
                entries[place] = entry;
            }
        }
    }
}

/// The keys of one statement, each with its place in the answer, in the order of their hashes.
struct Wanted<'a>(Vec<([u8; 16], usize, &'a CacheKey)>);

impl<'a> Wanted<'a> {
    fn of(keys: &[&'a CacheKey]) -> Wanted<'a> {
        let mut wanted: Vec<_> = keys.iter().enumerate().map(|(place, key)| (key.digest(), place, *key)).collect();
        wanted.sort_unstable_by_key(|(digest, ..)| *digest);
        Wanted(wanted)
    }

    /// More than one if a key was asked for twice, or two share a hash.
    fn with_hash<'w>(&'w self, hash: &'w [u8]) -> impl Iterator<Item = (&'a CacheKey, usize)> + 'w {
        let first = self.0.partition_point(|(digest, ..)| &digest[..] < hash);
        self.0[first..].iter().take_while(move |(digest, ..)| &digest[..] == hash).map(|(_, place, key)| (*key, *place))
    }
}

fn unix_ms(row: &Row, column: usize) -> Option<u64> {
    let since = row.try_get::<_, SystemTime>(column).ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}

/// None if the row is not as we write them: somebody else's hand was in the table.
fn decode(row: &Row, key: &CacheKey) -> Option<Entry> {
    let tags: &str = row.try_get(5).ok()?;
    let settled = Lsn(row.try_get::<_, PgLsn>(7).ok()?.into());
    let fence = Fence {
        snapshot: row.try_get::<_, &str>(8).ok()?.parse().ok()?,
        settled,
        floor: Floor(u64::try_from(row.try_get::<_, i64>(6).ok()?).ok()?),
    };
    let value = NewValue {
        value: Bytes::copy_from_slice(row.try_get(3).ok()?),
        content_type: row.try_get::<_, &str>(4).ok()?.into(),
        tags: tags.split('\n').filter(|tag| !tag.is_empty()).map(Tag::stored).collect(),
        ttl: None,
        negative: row.try_get(13).ok()?,
    };
    let (stored_at, expires_at) = (unix_ms(row, 9)?, unix_ms(row, 10)?);
    let etag: &str = row.try_get(11).ok()?;
    let stale_until = unix_ms(row, 12)?;
    Some(Entry::stored(key, value, fence, [stored_at, expires_at, stale_until], etag.into()))
}
