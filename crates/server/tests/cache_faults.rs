//! P4, P5, P6 and the connection half of P8 seen from outside, while PostgreSQL is killed, hangs, falls silent, or loses
//! our slot: many readers and a writer go on all the time, and somebody counts our connections.
//!
//! No reader meets an error of the cache, nothing stays stale, and Walcast is never started anew.

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;
use support::{
    DEADLINE, SERVE_ROLE, Server, drop_slot, migrate,
    queries::QueryDir,
    reads::{By, Reads, Seen},
};
use tokio::{process::Command, task::JoinHandle};
use walcast_testkit::{Proxy, TestPostgres, wait};

const ITEMS: i64 = 200;
const BUDGET: i64 = 10;

const SCHEMA: &str = "create table items (id bigint primary key, version bigint not null);
    insert into items select i, 1 from generate_series(1, 200) i;
    grant select on items to service_role;";

const ITEM: &str = "-- param: id bigint\nselect id, version from items where id = $1\n";

struct Scene {
    postgres: TestPostgres,
    server: Server,
    proxy: Proxy,
    reads: Reads,
    _queries: QueryDir,
}

async fn scene() -> Result<Scene> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["items"]).await?;
    let queries = QueryDir::new(&[("item", ITEM)])?;
    let dir = queries.setting();
    let proxy = Proxy::to(postgres.port()).await?;
    let url = format!("postgres://{SERVE_ROLE}@127.0.0.1:{}/postgres", proxy.port());
    let budget = BUDGET.to_string();
    let settings = [("WALCAST_QUERIES__DIR", dir.as_str()), ("WALCAST_DATABASE__MAX_CONNECTIONS", budget.as_str())];
    let server = Server::start_at(&url, &settings).await?;
    let reads = Reads::service(&server);
    Ok(Scene { postgres, server, proxy, reads, _queries: queries })
}

async fn under_load() -> Result<(Scene, Busy)> {
    let scene = scene().await?;
    scene.fill_all().await?;
    let busy = Busy::start(&scene);
    Ok((scene, busy))
}

fn by_key(id: i64) -> String {
    format!("/cache/v1/items/{id}")
}

fn by_query(id: i64) -> String {
    format!("/query/v1/item?id={id}")
}

/// Goes on until the scene is over.
struct Busy {
    over: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<()>>>,
    most_connections: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    hits: Arc<AtomicU64>,
}

impl Busy {
    fn start(scene: &Scene) -> Busy {
        let over = Arc::new(AtomicBool::new(false));
        let [most_connections, answered, hits] = [0; 3].map(|_| Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for reader in 0..8 {
            let (reads, over, answered, hits) = (scene.reads.clone(), over.clone(), answered.clone(), hits.clone());
            tasks.push(tokio::spawn(async move {
                for step in 0.. {
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                    let id = (step * 7 + reader * 31) % ITEMS + 1;
                    let path = if step % 2 == 0 { by_key(id) } else { by_query(id) };
                    let seen =
                        tokio::time::timeout(DEADLINE, reads.get(&path)).await.with_context(|| format!("{path} hangs"))??;
                    no_error(&path, &seen)?;
                    answered.fetch_add(1, Ordering::Relaxed);
                    hits.fetch_add(u64::from(seen.is_hit()), Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Ok(())
            }));
        }
        let (direct, stop) = (scene.postgres.url(), over.clone());
        tasks.push(tokio::spawn(async move {
            for step in 0_i64.. {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                let id = step % ITEMS + 1;
                let sql = format!("update items set version = version + 1 where id = {id}");
                // While PostgreSQL is away there is nothing to write to.
                let _ = tokio::time::timeout(Duration::from_secs(2), run(&direct, &sql)).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        }));
        tasks.push(counting(scene.postgres.url(), over.clone(), most_connections.clone()));
        Busy { over, tasks, most_connections, answered, hits }
    }

    async fn end(self) -> Result<()> {
        self.over.store(true, Ordering::Release);
        for task in self.tasks {
            task.await??;
        }
        within_budget(self.most_connections.load(Ordering::Relaxed) as i64)?;
        ensure!(self.answered.load(Ordering::Relaxed) > 100 && self.hits.load(Ordering::Relaxed) > 10, "the readers idled");
        Ok(())
    }
}

fn within_budget(most: i64) -> Result<()> {
    ensure!(most > 3, "the counter saw nothing: {most}");
    ensure!(most <= BUDGET, "P8: {most} connections of a budget of {BUDGET}");
    Ok(())
}

/// Also while PostgreSQL comes and goes.
fn counting(url: String, stop: Arc<AtomicBool>, most: Arc<AtomicU64>) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        while !stop.load(Ordering::Acquire) {
            let _ = tokio::time::timeout(Duration::from_secs(2), count_connections(&url, &stop, &most)).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    })
}

async fn run(url: &str, sql: &str) -> Result<()> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client.batch_execute(sql).await?)
}

/// Until the connection breaks or the time is up; the most is kept.
async fn count_connections(url: &str, stop: &AtomicBool, most: &AtomicU64) -> Result<()> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    let sql = format!("select count(*) from pg_stat_activity where usename = '{SERVE_ROLE}'");
    while !stop.load(Ordering::Acquire) {
        let count: i64 = client.query_one(&sql, &[]).await?.get(0);
        most.fetch_max(count as u64, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// P6: the cache answers or misses; a query may say that the database is away, and how to go on.
fn no_error(path: &str, seen: &Seen) -> Result<()> {
    if path.starts_with("/cache") {
        ensure!(matches!(seen.status, 200 | 404), "{path}: {seen:?}");
        return Ok(());
    }
    ensure!(matches!(seen.status, 200 | 503 | 504), "{path}: {seen:?}");
    if seen.status != 200 {
        ensure!(seen.json()?["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{path}: no hint in {seen:?}");
    }
    Ok(())
}

impl Scene {
    async fn truth(&self) -> Result<HashMap<i64, i64>> {
        let rows = self.postgres.connect().await?.query("select id, version from items", &[]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Every miss that comes with a ticket, as an application does it.
    async fn fill_all(&self) -> Result<()> {
        let client = self.postgres.connect().await?;
        for id in 1..=ITEMS {
            let (path, query) = (by_key(id), by_query(id));
            if let Some(ticket) = self.reads.get(&path).await?.ticket {
                let row = client.query_one("select version from items where id = $1", &[&id]).await?;
                let version = row.get::<_, i64>(0).to_string();
                self.reads.put(&path, By::Ticket(&ticket), &format!("items:id={id}"), &version).await?;
            }
            no_error(&query, &self.reads.get(&query).await?)?;
        }
        Ok(())
    }

    /// Two hundred readers at once, the moment that all is well again.
    async fn herd(&self) -> Result<()> {
        let read = |id: i64| {
            let reads = self.reads.clone();
            async move {
                let (path, query) = (by_key(id), by_query(id));
                no_error(&path, &reads.get(&path).await?)?;
                no_error(&query, &reads.get(&query).await?)
            }
        };
        try_join_all((1..=ITEMS).map(read)).await.map(drop)
    }

    async fn ends_well(self, busy: Busy) -> Result<()> {
        busy.end().await?;
        self.all_is_fresh().await?;
        self.server.stop().await
    }

    /// With the writer gone: what is answered as fresh is what stands in the table, now and from now on.
    async fn all_is_fresh(&self) -> Result<()> {
        self.server.wait_ready(true).await?;
        self.reads.heard().await?;
        let truth = self.truth().await?;
        for (id, version) in &truth {
            let seen = self.reads.get(&by_key(*id)).await?;
            ensure!(!seen.is_fresh_hit() || seen.body == version.to_string(), "stale for ever: {id} is {version}, not {seen:?}");
            let path = by_query(*id);
            wait::until(DEADLINE, "queries are answered again", async || {
                self.reads.get(&path).await.is_ok_and(|seen| seen.status == 200)
            })
            .await?;
            let seen = self.reads.get(&path).await?;
            ensure!(seen.json()?[0]["version"] == *version, "stale for ever: {id} is {version}, not {seen:?}");
        }
        // And the cache works again: what is filled is kept.
        self.fill_all().await?;
        wait::until(DEADLINE, "what is filled is kept", async || {
            self.reads.get(&by_key(1)).await.is_ok_and(|seen| seen.is_fresh_hit())
        })
        .await?;
        Ok(())
    }

    async fn l2_state(&self) -> Result<String> {
        let report: Value = reqwest::get(format!("{}/readyz", self.server.url)).await?.json().await?;
        Ok(report["cache"]["l2"].as_str().unwrap_or_default().to_owned())
    }

    async fn backends(&self) -> Result<Vec<i32>> {
        let sql = "select pid from pg_stat_activity where usename = $1";
        let rows = self.postgres.connect().await?.query(sql, &[&SERVE_ROLE]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// Only processes of our own PostgreSQL, by their ids.
async fn signal(name: &str, pids: &[i32]) -> Result<()> {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    // One that has ended meanwhile needs no signal.
    Command::new("kill").arg(name).args(pids).stderr(std::process::Stdio::null()).status().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_p6_p8_postgresql_is_killed_under_load_and_comes_back() -> Result<()> {
    let (scene, busy) = under_load().await?;
    for _ in 0..2 {
        scene.postgres.kill9().await?;
        scene.server.wait_ready(false).await?;
        scene.herd().await?;
        scene.postgres.start_again().await?;
        scene.herd().await?;
        scene.server.wait_ready(true).await?;
        scene.herd().await?;
        scene.fill_all().await?;
    }
    scene.ends_well(busy).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_p6_p8_the_network_falls_silent_under_load() -> Result<()> {
    let (scene, busy) = under_load().await?;
    scene.proxy.pause();
    scene.server.wait_ready(false).await?;
    wait::until(DEADLINE, "the second tier is left alone", async || {
        // Only a reader whom L1 cannot serve asks it.
        let _ = scene.reads.get(&by_key(ITEMS + 1)).await;
        scene.l2_state().await.is_ok_and(|state| state == "away")
    })
    .await?;
    let seen = scene.reads.get(&by_key(1)).await?;
    ensure!(seen.cache_status.contains("; l2=away\""), "it is said on every answer: {seen:?}");
    let metrics = reqwest::get(format!("{}/metrics", scene.server.url)).await?.text().await?;
    ensure!(metrics.contains("walcast_cache_l2_away 1"), "{metrics}");
    scene.herd().await?;
    scene.proxy.resume();
    scene.herd().await?;
    scene.server.wait_ready(true).await?;
    scene.herd().await?;
    wait::until(DEADLINE, "the second tier is used again", async || {
        // A trial takes a reader whom L1 cannot serve.
        let _ = scene.reads.get(&by_key(ITEMS + 1)).await;
        scene.l2_state().await.is_ok_and(|state| state == "on")
    })
    .await?;
    let seen = scene.reads.get(&by_key(1)).await?;
    ensure!(!seen.cache_status.contains("l2=away"), "{seen:?}");
    scene.ends_well(busy).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_p6_p8_the_backends_of_postgresql_hang_under_load() -> Result<()> {
    let (scene, busy) = under_load().await?;
    let hung = scene.backends().await?;
    signal("-STOP", &hung).await?;
    let outcome = async {
        scene.server.wait_ready(false).await?;
        scene.herd().await
    };
    let outcome = outcome.await;
    signal("-CONT", &hung).await?;
    outcome?;
    scene.herd().await?;
    scene.server.wait_ready(true).await?;
    scene.herd().await?;
    scene.ends_well(busy).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_p6_p8_the_slot_is_dropped_under_load() -> Result<()> {
    let (scene, busy) = under_load().await?;
    let before = scene.reads.get(&by_key(1)).await?.position;
    drop_slot(&scene.postgres).await?;
    scene.herd().await?;
    wait::until(DEADLINE, "a new epoch begins", async || {
        let epoch = |position: &str| position.split('/').next().map(str::to_owned);
        scene.reads.get(&by_key(1)).await.is_ok_and(|seen| epoch(&seen.position) != epoch(&before))
    })
    .await?;
    scene.server.wait_ready(true).await?;
    scene.herd().await?;
    scene.fill_all().await?;
    scene.ends_well(busy).await
}

/// Control of every test above: somebody else takes more connections as the server's role, for a moment and under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p8_one_connection_above_the_budget_would_be_counted() -> Result<()> {
    let (scene, busy) = under_load().await?;
    let most = busy.most_connections.clone();
    wait::until(DEADLINE, "the server's own are counted", async || within_budget(most.load(Ordering::Relaxed) as i64).is_ok())
        .await?;
    let url = scene.postgres.url_as(SERVE_ROLE, "postgres");
    let mut excess = Vec::new();
    for _ in 0..=BUDGET {
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        excess.push(client);
    }
    wait::until(DEADLINE, "the excess is counted", async || most.load(Ordering::Relaxed) as i64 > BUDGET).await?;
    drop(excess);
    let error = busy.end().await.err().context("an excess that nobody complains of")?;
    ensure!(error.to_string().contains("P8"), "{error}");
    scene.server.stop().await
}

/// As a GET, which answers without a ticket, or a single question: a batch waits no longer than its slowest part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p6_batches_wait_no_longer_than_one_question_while_the_network_is_silent() -> Result<()> {
    let scene = scene().await?;
    wait::until(DEADLINE, "it hears", async || scene.reads.get(&by_key(1)).await.is_ok_and(|seen| seen.ticket.is_some())).await?;
    // No plan is known yet.
    let items: Vec<Value> = (1..=ITEMS).map(|id| serde_json::json!({ "name": "item", "params": { "id": id } })).collect();
    let (http, token) = (reqwest::Client::new(), scene.server.token("service_role", None));
    let post = |path: &str, body: Value| {
        http.post(format!("{}{path}", scene.server.url)).bearer_auth(&token).timeout(DEADLINE).json(&body).send()
    };
    scene.proxy.pause();
    let (first, second, queries) = tokio::join!(
        post("/cache/v1/items/mget", serde_json::json!({ "keys": ["1", "2"] })),
        // The sampler's connection is given up meanwhile, and a new one is met with silence.
        async {
            for _ in 0..3 {
                post("/cache/v1/items/mget", serde_json::json!({ "keys": ["1", "2"] })).await?.error_for_status()?;
            }
            post("/cache/v1/items/mget", serde_json::json!({ "keys": ["1", "2"] })).await
        },
        post("/query/v1", serde_json::json!({ "queries": items })),
    );
    for answer in [first, second] {
        let answer: Value = answer.context("mget hangs")?.error_for_status()?.json().await?;
        ensure!(answer["entries"].as_array().is_some_and(|entries| entries.len() == 2), "{answer}");
    }
    let answer: Value = queries.context("the batch hangs")?.error_for_status()?.json().await?;
    let results = answer["results"].as_array().context("results")?;
    ensure!(results.len() == items.len() && results.iter().all(|one| one["status"].as_u64() >= Some(500)), "{answer}");
    scene.proxy.resume();
    scene.server.wait_ready(true).await?;
    scene.server.stop().await
}

/// A backend that waits for a lock does not notice that nobody waits for it any more: whoever gives up and connects anew
/// leaves one behind each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p6_p8_a_lock_on_our_own_table_costs_no_connection_and_no_freshness_and_readyz_names_it() -> Result<()> {
    let scene = scene().await?;
    scene.fill_all().await?;
    let busy = Busy::start(&scene);
    let (holder, eye) = (scene.postgres.connect().await?, scene.postgres.connect().await?);
    holder.batch_execute("begin; lock table walcast.sentinel in access exclusive mode").await?;
    let pid: i32 = holder.query_one("select pg_backend_pid()", &[]).await?.get(0);
    let waiting = format!(
        "select count(*) from pg_stat_activity where usename = '{SERVE_ROLE}' and wait_event_type = 'Lock' and wait_event = 'relation'"
    );
    let (url, http) = (format!("{}/readyz", scene.server.url), reqwest::Client::new());
    let until = tokio::time::Instant::now() + DEADLINE;
    // Longer than a round may take, and than the cache may be without news.
    loop {
        let answer = http.get(&url).send().await?;
        let status = answer.status().as_u16();
        let report: Value = answer.json().await?;
        ensure!(status == 200, "the heartbeat does not wait for the lock: {report}");
        let count: i64 = eye.query_one(&waiting, &[]).await?.get(0);
        ensure!(count <= 1, "{count} of our connections wait for one lock");
        let stuck = &report["stuck"][0];
        if stuck["for_s"].as_u64().is_some_and(|seconds| seconds >= 25) {
            let why = stuck["why"].as_str().unwrap_or_default();
            ensure!(stuck["task"] == "keeper" && why.contains("checkpoint"), "{stuck}");
            ensure!(why.contains("walcast.sentinel") && why.contains(&pid.to_string()), "who holds what: {stuck}");
            break;
        }
        ensure!(tokio::time::Instant::now() < until, "/readyz does not say what is stuck: {report}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    holder.batch_execute("rollback").await?;
    wait::until(DEADLINE, "the checkpoint is written again", async || {
        let Ok(answer) = http.get(&url).send().await else { return false };
        answer.json::<Value>().await.is_ok_and(|report| report["stuck"] == serde_json::json!([]))
    })
    .await?;
    busy.end().await?;
    scene.all_is_fresh().await?;
    scene.server.stop().await
}
