//! The second tier alone: one get, one get of 50 keys, and sets, beside plain prepared SQL on a table of key and value, and
//! beside Redis. The library is called directly, with an L1 too small to hold anything.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rand::Rng;
use tokio_postgres::types::Type;
use walcast_cache::{AtLeast, Cache, CacheConfig, Hearing, L2, L2Config, Lookup, NewValue};
use walcast_model::{CacheKey, Epoch, Fence, Floor, Lsn, Snapshot, TagClock};
use walcast_pg::{ConnectConfig, Pool};

use crate::{
    Size,
    figures::{Figures, table},
    process,
    redis::Redis,
    stage::{DEADLINE, Stage},
    wire::{Wire, redis_command},
};

const KEYS: usize = 20_000;
const VALUE_BYTES: usize = 1_024;
const MANY: usize = 50;

/// What one round of one way did.
#[derive(Debug, Clone, Copy)]
struct Spent {
    operations: f64,
    seconds: f64,
    /// Of PostgreSQL or Redis.
    server_cpu_s: f64,
}

#[derive(Default)]
struct Row {
    name: &'static str,
    per_second: Figures,
    server_cpu_us: Figures,
}

impl Row {
    fn named(name: &'static str) -> Row {
        Row { name, ..Row::default() }
    }

    fn add(&mut self, spent: Spent) {
        self.per_second.add(spent.operations / spent.seconds);
        self.server_cpu_us.add(spent.server_cpu_s / spent.operations * 1e6);
    }
}

pub async fn run(size: &Size) -> anyhow::Result<()> {
    let stage = Stage::set().await?;
    let sql = stage.postgres.connect().await?;
    sql.batch_execute("create unlogged table plain (key text primary key, value bytea not null); set synchronous_commit = off")
        .await?;
    let (get, set) = (
        sql.prepare("select value from plain where key = $1").await?,
        sql.prepare("insert into plain values ($1, $2) on conflict (key) do update set value = excluded.value").await?,
    );
    let get_many = sql.prepare_typed("select key, value from plain where key = any($1)", &[Type::TEXT_ARRAY]).await?;
    let cache = cache(&stage)?;
    let redis = Redis::start().await?;
    let mut wire = match &redis {
        Some(redis) => Some((Wire::connect(&redis.address).await?, redis.pid)),
        None => None,
    };
    let postmaster = stage.postmaster().await?;
    let value: Arc<[u8]> = vec![b'v'; VALUE_BYTES].into();
    let keys: Vec<CacheKey> = (0..KEYS).map(|n| CacheKey::new("bench", &format!("key:{n}"))).collect::<Result<_, _>>()?;
    let some = || rand::rng().random_range(0..KEYS);
    let lasting = Duration::from_secs(u64::from(size.seconds).min(3));

    let mut rows = [
        ["L2 set (batched writer)", "plain SQL upsert", "Redis SET"].map(Row::named),
        ["L2 get", "plain SQL select", "Redis GET"].map(Row::named),
        ["L2 get of 50", "plain SQL select of 50", "Redis MGET of 50"].map(Row::named),
    ];
    for _ in 0..size.rounds {
        let cpu = process::cpu_tree_s(postmaster)?;
        let began = Instant::now();
        for chunk in keys.chunks(1_000) {
            for key in chunk {
                let value = NewValue {
                    value: value.to_vec().into(),
                    content_type: "text/plain".into(),
                    tags: Vec::new(),
                    ttl: None,
                    negative: false,
                };
                cache.put(key, value, fence())?;
            }
            // A queue that overflows would forget, not write.
            flush(&cache).await?;
        }
        let seconds = began.elapsed().as_secs_f64();
        rows[0][0].add(Spent { operations: KEYS as f64, seconds, server_cpu_s: process::cpu_tree_s(postmaster)? - cpu });

        let cpu = process::cpu_tree_s(postmaster)?;
        let began = Instant::now();
        for key in &keys {
            sql.execute(&set, &[&key.key(), &&value[..]]).await?;
        }
        let seconds = began.elapsed().as_secs_f64();
        rows[0][1].add(Spent { operations: KEYS as f64, seconds, server_cpu_s: process::cpu_tree_s(postmaster)? - cpu });

        rows[1][0].add(
            timed(lasting, postmaster, async || {
                anyhow::ensure!(matches!(cache.get(&keys[some()], AtLeast::Any).await, Lookup::Hit { .. }), "L2 misses");
                Ok(())
            })
            .await?,
        );
        rows[1][1].add(
            timed(lasting, postmaster, async || {
                let row = sql.query_one(&get, &[&keys[some()].key()]).await?;
                anyhow::ensure!(row.get::<_, &[u8]>(0).len() == VALUE_BYTES, "another value");
                Ok(())
            })
            .await?,
        );
        rows[2][0].add(
            timed(lasting, postmaster, async || {
                let asked: Vec<CacheKey> = (0..MANY).map(|_| keys[some()].clone()).collect();
                let answers = cache.get_many(&asked, AtLeast::Any).await;
                anyhow::ensure!(answers.iter().all(|answer| matches!(answer, Lookup::Hit { .. })), "L2 misses");
                Ok(())
            })
            .await?,
        );
        rows[2][1].add(
            timed(lasting, postmaster, async || {
                let asked: Vec<&str> = (0..MANY).map(|_| keys[some()].key()).collect();
                anyhow::ensure!(!sql.query(&get_many, &[&asked]).await?.is_empty(), "SQL misses");
                Ok(())
            })
            .await?,
        );
        if let Some((wire, pid)) = &mut wire {
            let began = Instant::now();
            let cpu = process::cpu_s(*pid)?;
            for key in &keys {
                wire.redis(&redis_command(&[b"SET", key.key().as_bytes(), &value])).await?;
            }
            let seconds = began.elapsed().as_secs_f64();
            rows[0][2].add(Spent { operations: KEYS as f64, seconds, server_cpu_s: process::cpu_s(*pid)? - cpu });
            for (row, many) in [(1, 1), (2, MANY)] {
                let (began, cpu, mut operations) = (Instant::now(), process::cpu_s(*pid)?, 0.0);
                while began.elapsed() < lasting {
                    let asked: Vec<&[u8]> = (0..many).map(|_| keys[some()].key().as_bytes()).collect();
                    let command: &[u8] = if many == 1 { b"GET" } else { b"MGET" };
                    anyhow::ensure!(
                        wire.redis(&redis_command(&[&[command], &asked[..]].concat())).await? >= VALUE_BYTES,
                        "redis misses"
                    );
                    operations += 1.0;
                }
                let seconds = began.elapsed().as_secs_f64();
                rows[row][2].add(Spent { operations, seconds, server_cpu_s: process::cpu_s(*pid)? - cpu });
            }
        }
    }
    let lines: Vec<Vec<String>> = rows
        .iter()
        .flat_map(|group| {
            let plain = group[1].per_second.median();
            group.iter().filter(|row| row.per_second.len() > 0).map(move |row| {
                let rate = row.per_second.median();
                vec![
                    row.name.to_owned(),
                    format!("{:.1}", rate / 1e3),
                    format!("{:.2}", rate / plain),
                    format!("{:.1}", row.server_cpu_us.median()),
                ]
            })
        })
        .collect();
    let title = format!(
        "l2: {KEYS} values of {VALUE_BYTES} bytes, one after the other on one connection; medians of {} rounds",
        size.rounds
    );
    table(&title, &["", "1,000/s", "to plain SQL", "server CPU µs each"], &lines);
    Ok(())
}

async fn timed(lasting: Duration, pid: u32, mut ask: impl AsyncFnMut() -> anyhow::Result<()>) -> anyhow::Result<Spent> {
    let (began, cpu, mut operations) = (Instant::now(), process::cpu_tree_s(pid)?, 0.0);
    while began.elapsed() < lasting {
        ask().await?;
        operations += 1.0;
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(Spent { operations, seconds, server_cpu_s: process::cpu_tree_s(pid)? - cpu })
}

/// Nothing fits its L1, so that each read is L2's. Its clock is raised by nobody.
fn cache(stage: &Stage) -> anyhow::Result<Cache> {
    let pool = Pool::new(&ConnectConfig::parse(&stage.postgres.url())?, 2, DEADLINE)?.direct();
    let l2 = L2::start(pool, L2Config { read_timeout: DEADLINE, ..L2Config::default() });
    let config = CacheConfig { l1_bytes: 1, ..CacheConfig::default() };
    let cache = Cache::new(config, Arc::new(TagClock::new(TagClock::DEFAULT_SLOTS, Floor(1))), Some(l2));
    cache.set_epoch(Epoch(1));
    cache.set_hearing(Hearing::Live);
    Ok(cache)
}

async fn flush(cache: &Cache) -> anyhow::Result<()> {
    let l2 = cache.l2().ok_or_else(|| anyhow::anyhow!("the cache has no L2"))?;
    l2.flush().await;
    anyhow::ensure!(cache.stats().l2_dropped.get() == 0 && cache.stats().l2_errors.get() == 0, "L2 did not write everything");
    Ok(())
}

fn fence() -> Fence {
    Fence { snapshot: Snapshot::blind(), settled: Lsn(1), floor: Floor(1) }
}
