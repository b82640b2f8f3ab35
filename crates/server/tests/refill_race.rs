//! The refill race over 1,000 hot keys: writers bump versions while fillers read and store. Whatever is cached when
//! the dust has settled must equal the database, and nobody who was told of a version may meet an older one.
//!
//! The same reads feed two controls, caches that hear the same commits and have no fence: one stores always, one when
//! the LSN of its read is not below the last commit that it heard of. Both must be left with stale entries, or the
//! test would prove nothing.
//!
//! Some writers wait for a synchronous standby that is slow to answer: their commits are in the stream, and not yet
//! visible, for some milliseconds. PostgreSQL without a standby has the same window, only shorter.

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use support::{
    DEADLINE, Server,
    control_feed::ControlFeed,
    migrate,
    reads::{By, Reads},
};
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls, types::ToSql};
use walcast_testkit::{SseStream, TestPostgres};

const KEYS: i64 = 1_000;
const QUICK_WRITERS: usize = 2;
const SLOW_WRITERS: usize = 6;
const FILLERS: usize = 12;
const READERS: usize = 12;
/// One round of the race; rounds go on until each control has failed.
const ROUND: Duration = Duration::from_secs(8);
const ROUNDS: usize = 5;
/// The races would take each other's processor.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const SCHEMA: &str = "create table items (id bigint primary key, version bigint not null);
    insert into items select i, 0 from generate_series(1, 1000) i;
    grant select on items to service_role;";

const ITEM_QUERY: &str =
    "-- name: item\n-- param: id bigint\n-- ttl: 10m\n-- max_rows: 1\nselect id, version from items where id = $1\n";

struct Race {
    postgres: TestPostgres,
    server: Server,
    reads: Reads,
    _queries: tempfile::TempDir,
}

/// Counts that the test's judgement is made of.
#[derive(Default)]
struct Counts {
    commits: AtomicU64,
    stored: AtomicU64,
    refused: AtomicU64,
    hits: AtomicU64,
    told: AtomicU64,
}

impl Race {
    async fn prepare() -> Result<Race> {
        let postgres = TestPostgres::builder().setting("max_connections", "120").start().await?;
        migrate(&postgres, SCHEMA, &["items"]).await?;
        let queries = tempfile::tempdir()?;
        std::fs::write(queries.path().join("item.sql"), ITEM_QUERY)?;
        let dir = queries.path().to_string_lossy().into_owned();
        let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir)]).await?;
        let reads = Reads::service(&server);
        // From here on a commit with synchronous_commit = on waits for a standby that the writers themselves play.
        postgres.execute("alter system set synchronous_standby_names = 'slow'").await?;
        postgres.execute("set synchronous_commit = local; select pg_reload_conf()").await?;
        Ok(Race { postgres, server, reads, _queries: queries })
    }

    async fn client(&self, synchronous_commit: &str) -> Result<Client> {
        let client = self.postgres.connect().await?;
        client.batch_execute(&format!("set synchronous_commit = {synchronous_commit}")).await?;
        Ok(client)
    }

    /// Writers for one round; they return when all that they wrote is visible.
    async fn write(&self, until: Instant, counts: &Arc<Counts>) -> Result<JoinSet<Result<()>>> {
        let mut writers = JoinSet::new();
        for _ in 0..QUICK_WRITERS {
            writers.spawn(quick_writer(self.client("local").await?, until, counts.clone()));
        }
        for _ in 0..SLOW_WRITERS {
            writers.spawn(slow_writer(self.client("on").await?, until, counts.clone()));
        }
        Ok(writers)
    }

    /// Listens as a client does and asks again for each row that it is told of.
    async fn listen(
        &self,
        path: fn(i64) -> String,
        version: fn(&str) -> Option<i64>,
        counts: Arc<Counts>,
        over: Arc<AtomicBool>,
    ) -> Result<tokio::task::JoinHandle<Result<()>>> {
        let token = self.server.token("service_role", None);
        let mut events =
            SseStream::open(&format!("{}/sse/v1/changes?table=items&event=UPDATE", self.server.url), Some(&token), None).await?;
        ensure!(events.next(DEADLINE).await?.event == "live");
        let reads = self.reads.clone();
        Ok(tokio::spawn(async move {
            while !over.load(Ordering::Acquire) {
                let Ok(event) = events.next(Duration::from_millis(500)).await else { continue };
                if event.event != "change" {
                    ensure!(event.event == "position", "an unexpected event: {event:?}");
                    continue;
                }
                let record = &event.json()?["record"];
                let (id, told) = (record["id"].as_i64().context("id")?, record["version"].as_i64().context("version")?);
                let seen = reads.get(&path(id)).await?;
                counts.told.fetch_add(1, Ordering::Relaxed);
                if let Some(met) = version(&seen.body).filter(|_| seen.status == 200 && !seen.is_stale()) {
                    ensure!(met >= told, "P4: told of version {told} of item {id}, then met {met}: {seen:?}");
                }
            }
            Ok(())
        }))
    }

    async fn truth(&self) -> Result<HashMap<i64, i64>> {
        let rows = self.postgres.connect().await?.query("select id, version from items", &[]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Stale answers, and how many were cached at all. Fills nothing by key; a query that is not cached is computed.
    async fn stale(&self, path: fn(i64) -> String, version: fn(&str) -> Option<i64>) -> Result<(Vec<String>, usize)> {
        let truth = self.truth().await?;
        let (mut stale, mut hits) = (Vec::new(), 0);
        for (id, expected) in truth {
            let seen = self.reads.get(&path(id)).await?;
            ensure!(!seen.is_stale(), "the stream was lost: {seen:?}");
            if !seen.is_hit() {
                continue;
            }
            hits += 1;
            if version(&seen.body) != Some(expected) {
                stale.push(format!("item {id}: {} instead of {expected} ({})", seen.body, seen.cache_status));
            }
        }
        Ok((stale, hits))
    }
}

async fn quick_writer(client: Client, until: Instant, counts: Arc<Counts>) -> Result<()> {
    while Instant::now() < until {
        let id = rand::rng().random_range(1..=KEYS);
        client.execute("update items set version = version + 1 where id = $1", &[&id]).await?;
        counts.commits.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Commits, and is let go by its standby only after a while. Cancelling ends the wait, not the commit.
async fn slow_writer(client: Client, until: Instant, counts: Arc<Counts>) -> Result<()> {
    let cancel = client.cancel_token();
    while Instant::now() < until {
        let id = rand::rng().random_range(1..=KEYS);
        let params: [&(dyn ToSql + Sync); 1] = [&id];
        let update = client.execute("update items set version = version + 1 where id = $1", &params);
        tokio::pin!(update);
        let written = loop {
            let patience = Duration::from_millis(rand::rng().random_range(5..60));
            tokio::select! {
                written = &mut update => break written,
                () = tokio::time::sleep(patience) => cancel.cancel_query(NoTls).await?,
            }
        };
        // Cancelled before it had committed: nothing was written.
        if written.is_ok() {
            counts.commits.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// A cache without a fence: what it holds, and the last commit that it heard of, by key.
#[derive(Default)]
struct Control {
    held: HashMap<i64, i64>,
    heard: HashMap<i64, u64>,
}

#[derive(Default)]
struct Controls {
    naive: Mutex<Control>,
    by_lsn: Mutex<Control>,
}

impl Controls {
    fn hear(&self, lsn: u64, rows: &[i64]) {
        for control in [&self.naive, &self.by_lsn] {
            let mut control = control.lock().unwrap();
            for id in rows {
                control.held.remove(id);
                control.heard.insert(*id, lsn);
            }
        }
    }

    fn misses(&self, id: i64) -> (bool, bool) {
        let miss = |control: &Mutex<Control>| !control.lock().unwrap().held.contains_key(&id);
        (miss(&self.naive), miss(&self.by_lsn))
    }

    /// The naive rule.
    fn store(&self, id: i64, version: i64) {
        self.naive.lock().unwrap().held.insert(id, version);
    }

    /// The LSN rule: the read began when that commit was in the WAL already, so it "must have seen it".
    fn store_if_read_after(&self, id: i64, version: i64, read_at: u64) {
        let mut control = self.by_lsn.lock().unwrap();
        if control.heard.get(&id).is_none_or(|heard| read_at >= *heard) {
            control.held.insert(id, version);
        }
    }

    fn stale(&self, truth: &HashMap<i64, i64>) -> (usize, usize) {
        let count =
            |control: &Mutex<Control>| control.lock().unwrap().held.iter().filter(|(id, version)| truth[id] != **version).count();
        (count(&self.naive), count(&self.by_lsn))
    }
}

fn key(id: i64) -> String {
    format!("/cache/v1/race/{id}")
}

fn query(id: i64) -> String {
    format!("/query/v1/item?id={id}")
}

fn cached_version(body: &str) -> Option<i64> {
    body.parse().ok()
}

fn answered_version(body: &str) -> Option<i64> {
    serde_json::from_str::<serde_json::Value>(body).ok()?[0]["version"].as_i64()
}

/// Reads a random key; where a cache has it not, reads the row in a transaction of its own and fills.
async fn filler(client: Client, reads: Reads, controls: Arc<Controls>, counts: Arc<Counts>, until: Instant) -> Result<()> {
    while Instant::now() < until {
        let id = rand::rng().random_range(1..=KEYS);
        let seen = reads.get(&key(id)).await?;
        let (naive_misses, by_lsn_misses) = controls.misses(id);
        if seen.is_hit() {
            counts.hits.fetch_add(1, Ordering::Relaxed);
        }
        if seen.is_hit() && !naive_misses && !by_lsn_misses {
            continue;
        }
        // LSN first, then the row, in one transaction that began after the ticket.
        let row = client
            .query_one("select (select pg_current_wal_lsn() - '0/0'::pg_lsn)::int8, version from items where id = $1", &[&id])
            .await?;
        let (read_at, version): (i64, i64) = (row.get(0), row.get(1));
        if let Some(ticket) = &seen.ticket {
            let stored = reads.put(&key(id), By::Ticket(ticket), &format!("items:id={id}"), &version.to_string()).await?;
            let count = if stored == "stored" { &counts.stored } else { &counts.refused };
            count.fetch_add(1, Ordering::Relaxed);
        }
        if naive_misses {
            controls.store(id, version);
        }
        if by_lsn_misses {
            controls.store_if_read_after(id, version, read_at as u64);
        }
    }
    Ok(())
}

async fn all(mut tasks: JoinSet<Result<()>>) -> Result<()> {
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_refills_of_1000_hot_keys_leave_none_stale_where_caches_without_a_fence_do() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut race = Race::prepare().await?;
    let (counts, controls) = (Arc::<Counts>::default(), Arc::<Controls>::default());
    let over = Arc::new(AtomicBool::new(false));
    let feed = Arc::new(ControlFeed::open(&race.postgres).await?);
    let listening = {
        let (feed, controls, over) = (feed.clone(), controls.clone(), over.clone());
        tokio::spawn(async move {
            while !over.load(Ordering::Acquire) {
                feed.poll().await?.iter().for_each(|(lsn, rows)| controls.hear(*lsn, rows));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            anyhow::Ok(())
        })
    };
    let told = race.listen(key, cached_version, counts.clone(), over.clone()).await?;

    let (mut naive, mut by_lsn) = (0, 0);
    for round in 1..=ROUNDS {
        let until = Instant::now() + ROUND;
        let writers = race.write(until, &counts).await?;
        let mut fillers = JoinSet::new();
        for _ in 0..FILLERS {
            // A moment longer than the writers: the last commits are what stays stale.
            let until = until + Duration::from_millis(500);
            fillers.spawn(filler(race.client("local").await?, race.reads.clone(), controls.clone(), counts.clone(), until));
        }
        all(writers).await?;
        all(fillers).await?;
        race.reads.heard().await?;
        // The controls hear the rest too: what is stale now, stays.
        for _ in 0..3 {
            feed.poll().await?.iter().for_each(|(lsn, rows)| controls.hear(*lsn, rows));
            tokio::task::yield_now().await;
        }
        let truth = race.truth().await?;
        let (stale, hits) = race.stale(key, cached_version).await?;
        let failed = controls.stale(&truth);
        (naive, by_lsn) = (naive + failed.0, by_lsn + failed.1);
        eprintln!(
            "round {round}: {} commits, {} stored, {} refused, {} hits, {} told; of {hits} cached {} stale; controls: naive {}, LSN {}",
            counts.commits.load(Ordering::Relaxed),
            counts.stored.load(Ordering::Relaxed),
            counts.refused.load(Ordering::Relaxed),
            counts.hits.load(Ordering::Relaxed),
            counts.told.load(Ordering::Relaxed),
            stale.len(),
            failed.0,
            failed.1,
        );
        ensure!(stale.is_empty(), "P5: stale for ever: {stale:#?}");
        ensure!(hits > KEYS as usize / 10, "only {hits} keys were cached: nothing was raced for");
        if naive > 0 && by_lsn > 0 {
            break;
        }
    }
    over.store(true, Ordering::Release);
    told.await??;
    listening.await??;
    ensure!(naive > 0, "the naive rule left nothing stale: the race is no race");
    ensure!(by_lsn > 0, "the LSN rule left nothing stale: no fill fell into a window");
    ensure!(counts.told.load(Ordering::Relaxed) > 20, "the listener was told of too little");

    // What reached the second tier is judged by the same clock in the next process.
    race.server.kill9().await?;
    race.server.start_again().await?;
    let (stale, hits) = race.stale(key, cached_version).await?;
    ensure!(stale.is_empty(), "P5: stale after a restart: {stale:#?}");
    ensure!(hits > 0, "the second tier kept nothing: the restart proves nothing");
    race.server.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_answers_of_a_named_query_over_1000_hot_keys_leave_none_stale() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let race = Race::prepare().await?;
    let counts = Arc::<Counts>::default();
    let over = Arc::new(AtomicBool::new(false));
    let told = race.listen(query, answered_version, counts.clone(), over.clone()).await?;

    let until = Instant::now() + ROUND;
    let writers = race.write(until, &counts).await?;
    let mut readers = JoinSet::new();
    for _ in 0..READERS {
        let (reads, counts) = (race.reads.clone(), counts.clone());
        let until = until + Duration::from_millis(500);
        readers.spawn(async move {
            let mut newest = HashMap::new();
            while Instant::now() < until {
                // A tenth of the keys draws half of the reads, so that readers meet in flights.
                let most = if rand::rng().random() { KEYS } else { KEYS / 10 };
                let id = rand::rng().random_range(1..=most);
                let seen = reads.get(&query(id)).await?;
                ensure!(seen.status == 200, "{seen:?}");
                let version = answered_version(&seen.body).context("a version")?;
                let before = newest.insert(id, version).unwrap_or(0);
                ensure!(version >= before, "P4: version {before} of item {id}, then {version}: {seen:?}");
                let count = if seen.is_hit() { &counts.hits } else { &counts.stored };
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
    }
    all(writers).await?;
    all(readers).await?;
    race.reads.heard().await?;
    over.store(true, Ordering::Release);
    told.await??;
    let (stale, hits) = race.stale(query, answered_version).await?;
    eprintln!(
        "{} commits, {} hits, {} computed, {} told; of {hits} cached {} stale",
        counts.commits.load(Ordering::Relaxed),
        counts.hits.load(Ordering::Relaxed),
        counts.stored.load(Ordering::Relaxed),
        counts.told.load(Ordering::Relaxed),
        stale.len(),
    );
    ensure!(stale.is_empty(), "P5: stale for ever: {stale:#?}");
    ensure!(hits > KEYS as usize / 10, "only {hits} answers were cached: nothing was raced for");
    ensure!(counts.hits.load(Ordering::Relaxed) > 100 && counts.told.load(Ordering::Relaxed) > 20);
    race.server.stop().await
}
