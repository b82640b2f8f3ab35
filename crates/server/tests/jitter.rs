//! The jitter test: a thousand clients, each cut off every 15 s for 2 s, under steady writes, and the server killed in
//! the middle. Each hears every row once and in order, or is told `resync`.
//!
//! Promise P2. `WALCAST_JITTER_SECONDS` (45) and `WALCAST_JITTER_CLIENTS` (1,000) make it longer and larger.

#[path = "jitter/client.rs"]
mod client;
#[path = "jitter/judge.rs"]
mod judge;
mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use client::{Client, EVERY, Habit, Told, Way, World};
use judge::{Verdict, judge};
use support::{Server, migrate};
use tokio::task::JoinHandle;
use walcast_testkit::{SseStream, TestPostgres, wait};

const SCHEMA: &str = "
create table visits (id bigint primary key, note text);
grant select on visits to authenticated;";
/// Rows a second.
const RATE: u32 = 10;
/// Only catches hangs.
const DEADLINE: Duration = Duration::from_secs(180);

fn wanted(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

struct Scene {
    postgres: TestPostgres,
    server: Server,
    world: Arc<World>,
    clients: Vec<JoinHandle<Result<Told>>>,
}

impl Scene {
    async fn new(settings: &[(&str, &str)]) -> Result<Scene> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &["visits"]).await?;
        let server = Server::start(&postgres, settings).await?;
        let world = Arc::new(World { url: server.url.clone(), ..World::default() });
        Ok(Scene { postgres, server, world, clients: Vec::new() })
    }

    /// The `n`th of `of`: their cuts are spread evenly. One in ten is an event stream.
    fn add(&mut self, n: usize, of: usize, habit: Habit, from: Instant) {
        // Everybody is somebody else, as in life: what is limited by user does not meet.
        let user = format!("00000000-0000-4000-8000-{n:012x}");
        let way = if n % 10 == 9 { Way::Sse } else { Way::Socket };
        let first_cut = from + EVERY.mul_f64((n + 1) as f64 / of as f64);
        let client = Client::new(&self.world, self.server.token("authenticated", Some(&user)), way, habit, first_cut);
        self.clients.push(tokio::spawn(client.run()));
    }

    async fn all_live(&self) -> Result<()> {
        let all = self.clients.len();
        wait::until(DEADLINE, format!("{all} clients are live"), async || self.world.live.load(Ordering::SeqCst) == all).await
    }

    /// One row after the other at a steady rate, each counted when it is committed.
    async fn write(postgres: &TestPostgres, world: &World, rows: i64, rate: u32) -> Result<()> {
        let client = postgres.connect().await?;
        let insert = client.prepare("insert into visits values ($1, 'a note that a nurse has written')").await?;
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
        for _ in 0..rows {
            ticks.tick().await;
            let id = world.written.load(Ordering::SeqCst) + 1;
            client.execute(&insert, &[&id]).await?;
            world.written.store(id, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Lets everybody come back, then writes the last row; what each client was told.
    async fn end(self) -> Result<(Vec<Told>, i64)> {
        self.world.calm.store(true, Ordering::SeqCst);
        self.all_live().await?;
        let last = self.world.written.load(Ordering::SeqCst) + 1;
        self.world.last.store(last, Ordering::SeqCst);
        Scene::write(&self.postgres, &self.world, 1, RATE).await?;
        let mut told = Vec::new();
        for client in self.clients {
            told.push(tokio::time::timeout(DEADLINE, client).await.context("a client never heard the last row")???);
        }
        self.server.stop().await?;
        Ok((told, last))
    }
}

fn percentiles(times: impl Iterator<Item = Duration>) -> String {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    let at = |share: f64| times.get((share * times.len().saturating_sub(1) as f64) as usize).copied().unwrap_or_default();
    format!("p50 {} ms, p99 {} ms, longest {} ms", at(0.5).as_millis(), at(0.99).as_millis(), at(1.0).as_millis())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2_a_thousand_clients_on_bad_lines_hear_each_row_once_while_the_server_is_killed() -> Result<()> {
    let (seconds, count) = (wanted("WALCAST_JITTER_SECONDS", 45), wanted("WALCAST_JITTER_CLIENTS", 1_000));
    let mut scene = Scene::new(&[]).await?;
    // Cuts begin when all are there, so that nobody misses the first row.
    let from = Instant::now() + Duration::from_millis(10 * count as u64);
    for n in 0..count {
        scene.add(n, count, Habit::Honest, from);
        if n % 50 == 49 {
            let live = scene.clients.len();
            wait::until(DEADLINE, "these clients are live", async || scene.world.live.load(Ordering::SeqCst) >= live).await?;
        }
    }
    // The controls: cut sooner than the others, so that they have come back three times before the end.
    for habit in [Habit::Forgets, Habit::GoesBack] {
        scene.add(0, count, habit, from);
    }
    scene.all_live().await?;
    tokio::time::sleep_until(from.into()).await;

    let rows = (seconds as i64) * i64::from(RATE);
    let (postgres, world) = (&scene.postgres, scene.world.clone());
    let kill = async {
        tokio::time::sleep(Duration::from_secs(seconds as u64 / 2)).await;
        world.killed.store(true, Ordering::SeqCst);
        scene.server.kill9().await?;
        scene.server.start_again().await?;
        // Some are always away for their two seconds, on a busy machine for longer.
        let most = scene.clients.len() / 2;
        wait::until(DEADLINE, "most have come back", async || world.live.load(Ordering::SeqCst) >= most).await?;
        world.killed.store(false, Ordering::SeqCst);
        anyhow::Ok(())
    };
    let (written, killed) = tokio::join!(Scene::write(postgres, &scene.world, rows, RATE), kill);
    written.and(killed)?;
    let (mut told, last) = scene.end().await?;

    let controls = told.split_off(count);
    let mut total = Verdict::default();
    for (n, client) in told.iter().enumerate() {
        let verdict = judge(&client.heard, last).with_context(|| format!("client {n}, after {} returns", client.returns))?;
        total.delivered += verdict.delivered;
        total.told += verdict.told;
        ensure!(client.returns > 0, "client {n} was never cut off");
    }
    let replays = percentiles(told.iter().flat_map(|client| client.replays.iter().copied()));
    let after_kill = percentiles(told.iter().flat_map(|client| client.replays_after_kill.iter().copied()));
    println!(
        "{count} clients, {last} rows, {} returns: {} delivered, {} missed and told; replay {replays}; after the kill {after_kill}",
        told.iter().map(|client| client.returns).sum::<usize>(),
        total.delivered,
        total.told,
    );
    for (control, expected) in controls.iter().zip(["were lost", "came again"]) {
        let found = judge(&control.heard, last).expect_err("a client with a wrong habit was not noticed");
        ensure!(found.to_string().contains(expected), "{found}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2_who_was_away_longer_than_is_remembered_is_told_to_resync() -> Result<()> {
    const CLIENTS: usize = 20;
    let mut scene = Scene::new(&[("WALCAST_STREAM__REPLAY_BYTES", "16KiB")]).await?;
    let long = Instant::now() + Duration::from_secs(3600);
    for n in 0..CLIENTS {
        scene.add(n, CLIENTS, Habit::Honest, long);
    }
    scene.all_live().await?;
    Scene::write(&scene.postgres, &scene.world, 10, 1_000).await?;
    // All at once, and while they are away more is written than is kept; one who was there tells when.
    scene.world.away.store(true, Ordering::SeqCst);
    scene.server.kill9().await?;
    scene.server.start_again().await?;
    let token = scene.server.token("authenticated", None);
    let witness_url = format!("{}/sse/v1/changes?table=visits&event=INSERT", scene.server.url);
    let mut witness = SseStream::open(&witness_url, Some(&token), None).await?;
    witness.next_where(|event| event.event == "live", DEADLINE).await?;
    Scene::write(&scene.postgres, &scene.world, 1_000, 10_000).await?;
    witness.next_where(|event| event.event == "change" && event.data.contains("\"id\":1010"), DEADLINE).await?;
    drop(witness);
    scene.world.away.store(false, Ordering::SeqCst);
    let (told, last) = scene.end().await?;
    for (n, client) in told.iter().enumerate() {
        let verdict = judge(&client.heard, last).with_context(|| format!("client {n}"))?;
        ensure!(verdict.told > 0, "client {n} missed nothing: the memory was not too small");
        let silent: Vec<_> = client.heard.iter().copied().filter(|heard| *heard != judge::Heard::Resync).collect();
        ensure!(judge(&silent, last).is_err(), "client {n}: the gap would have been found without a word, too");
    }
    Ok(())
}
