//! Clients that never read while 27 MB are published to them and to twenty others. What they are owed is kept nowhere: each
//! costs the server less than 1 MB, the others hear everything, and they are closed, whether they read that or not.
//!
//! Promise P7.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, Server, memory, migrate};
use tokio_postgres::Client;
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, wait};

const SCHEMA: &str = "
create table notes (id bigint primary key, body text);
grant select on notes to service_role;";
const HEALTHY: usize = 20;
const ROWS: i64 = 1_728;
const ROW_BYTES: i64 = 15_625;
/// Rows in one transaction; nobody is further behind than this.
const TOGETHER: i64 = 64;
/// At once: what one costs is less than what memory moves by itself.
const STUCK: usize = 8;
/// Of several rounds the calmest counts.
const ROUNDS: usize = 3;
const MIB: u64 = 1 << 20;

/// Published, heard by the healthy ones, and what the server occupied at most meanwhile.
#[derive(Debug)]
struct Round {
    peak_bytes: u64,
    slowest: Duration,
}

struct Scene {
    server: Server,
    writer: Client,
    healthy: Vec<RealtimeSocket>,
    next: i64,
}

impl Scene {
    async fn publish(&mut self) -> Result<Round> {
        let pid = self.server.pid().context("no process")?;
        memory::forget_peak(pid)?;
        let mut slowest = Duration::ZERO;
        let end = self.next + ROWS;
        while self.next < end {
            let until = self.next + TOGETHER;
            let begun = Instant::now();
            let sql = "insert into notes select n, repeat('x', $3::int) from generate_series($1::bigint, $2::bigint - 1) n";
            self.writer.execute(sql, &[&self.next, &until, &(ROW_BYTES as i32)]).await?;
            let range = self.next..until;
            for socket in &mut self.healthy {
                // Who is silent for a minute is let go, too; the answers are of no interest.
                socket.send("phoenix", "heartbeat", json!({})).await?;
                socket.take_backlog();
            }
            let hear = self.healthy.iter_mut().map(|socket| hear(socket, range.clone()));
            for heard in futures_util::future::join_all(hear).await {
                heard?;
            }
            slowest = slowest.max(begun.elapsed());
            self.next = until;
        }
        Ok(Round { peak_bytes: memory::peak_bytes(pid)?, slowest })
    }

    async fn connections(&self) -> Option<f64> {
        metric(&self.server, "walcast_connections ").await
    }
}

/// Exactly these, in order.
async fn hear(socket: &mut RealtimeSocket, ids: std::ops::Range<i64>) -> Result<()> {
    for id in ids {
        let frame = socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
        let found = &frame.payload["data"]["record"]["id"];
        ensure!(*found == id, "a healthy client heard {found} where {id} was due");
    }
    Ok(())
}

async fn join(server: &Server, topic: &str) -> Result<RealtimeSocket> {
    let token = server.token("service_role", None);
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    socket.join_ok(topic, wanted(), None).await?;
    Ok(socket)
}

fn wanted() -> Value {
    json!({ "postgres_changes": [{ "event": "INSERT", "schema": "public", "table": "notes" }] })
}

/// The sum of a metric's lines.
async fn metric(server: &Server, name: &str) -> Option<f64> {
    let text = reqwest::get(format!("{}/metrics", server.url)).await.ok()?.text().await.ok()?;
    let values =
        text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Some(values.sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p7_a_client_that_never_reads_costs_no_memory_and_nobody_else_waits() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes"]).await?;
    // Small, so that what is remembered for those who come back is full before anything is compared.
    let server = Server::start(&postgres, &[("WALCAST_STREAM__REPLAY_BYTES", "8MiB")]).await?;
    let mut healthy = Vec::new();
    for _ in 0..HEALTHY {
        healthy.push(join(&server, "realtime:notes").await?);
    }
    let mut scene = Scene { server, writer: postgres.connect().await?, healthy, next: 1 };
    for _ in 0..2 {
        scene.publish().await?;
    }
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(scene.publish().await?);
        // The topic that the others are in: it stands in the same row as they do.
        let mut stuck = Vec::new();
        for _ in 0..STUCK {
            stuck.push(join(&scene.server, "realtime:notes").await?);
        }
        with.push(scene.publish().await?);
        let closed = async || scene.connections().await == Some(HEALTHY as f64);
        wait::until(DEADLINE, "the clients that never read are let go", closed).await?;
        // Once they read, they find a beginning without gaps, and then the end.
        for stuck in &mut stuck {
            let closing = stuck.until_closed(DEADLINE).await?;
            let read = stuck.take_backlog().into_iter().filter(|frame| frame.event == "postgres_changes").count() as i64;
            ensure!(read < ROWS, "it read all {read} rows: it was never stuck");
            if let Some((code, reason)) = closing {
                ensure!(code == 1013, "closed with {code}: {reason}");
            }
        }
    }
    let calmest = |rounds: &[Round]| rounds.iter().map(|round| round.peak_bytes).min().unwrap_or_default();
    let slowest = |rounds: &[Round]| rounds.iter().map(|round| round.slowest).max().unwrap_or_default();
    let grown = (calmest(&with) as i64 - calmest(&without) as i64) / STUCK as i64;
    println!(
        "27 MB to {HEALTHY} clients and {STUCK} stuck ones: the server grew by {} KiB for each; slowest megabyte {:?} with it, {:?} without",
        grown >> 10,
        slowest(&with),
        slowest(&without)
    );
    println!("peaks without: {:?}", without.iter().map(|round| round.peak_bytes >> 10).collect::<Vec<_>>());
    println!("peaks with:    {:?}", with.iter().map(|round| round.peak_bytes >> 10).collect::<Vec<_>>());
    assert!(grown < MIB as i64, "a client that never reads costs the server {} KiB", grown >> 10);
    // It could not be told, so the operator is.
    let told = metric(&scene.server, "walcast_connections_closed_total{code=\"1013\"}").await;
    assert_eq!(told, Some((ROUNDS * STUCK) as f64), "clients were let go and no metric says that they were too slow");
    scene.server.stop().await
}
