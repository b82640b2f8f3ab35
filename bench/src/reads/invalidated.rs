//! From the moment a commit is acknowledged to its writer until no reader is answered the entry it touched, over HTTP, while
//! others commit at a steady rate.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio_util::sync::CancellationToken;

use crate::{
    Size,
    figures::{Figures, table},
    stage::{DEADLINE, Stage},
    wire::{Wire, http_request},
};

const BACKGROUND_WRITERS: u32 = 4;
const PROBES: i64 = 2_000;
const RATES: [u32; 2] = [100, 1_000];

pub async fn run(_size: &Size) -> anyhow::Result<()> {
    let stage = Stage::set().await?;
    let mut server = stage.serve(&[])?;
    server.ready().await?;
    let token = server.token("service_role", None);
    let client = stage.postgres.connect().await?;
    client
        .batch_execute(&format!(
            "insert into vitals (patient_id, kind, value) select n, 'heart_rate', 60 from generate_series(1, {}) n",
            PROBES + 1_000
        ))
        .await?;
    let update = client.prepare("update vitals set value = value + 1 where id = $1").await?;
    let mut rows = Vec::new();
    for rate in RATES {
        let over = CancellationToken::new();
        let mut writers = tokio::task::JoinSet::new();
        for n in 0..BACKGROUND_WRITERS {
            let (client, over) = (stage.postgres.connect().await?, over.clone());
            writers.spawn(background(client, n, rate / BACKGROUND_WRITERS, over));
        }
        let mut wire = Wire::connect(server.address()).await?;
        let (mut figures, mut reads) = (Figures::default(), 0_u64);
        for id in 1..=PROBES {
            let path = format!("/cache/v1/bench/vital:{id}");
            let get = http_request("GET", &path, &token, "", b"");
            fill(&mut wire, &path, &token, &get, id).await?;
            client.execute(&update, &[&id]).await?;
            let acknowledged = Instant::now();
            while wire.http(&get).await?.is_fresh_hit() {
                reads += 1;
                ensure!(acknowledged.elapsed() < DEADLINE, "the entry of vital {id} is never invalidated");
            }
            figures.add(acknowledged.elapsed().as_secs_f64() * 1e3);
        }
        over.cancel();
        let mut commits = 0;
        while let Some(ended) = writers.join_next().await {
            commits += ended??;
        }
        let [p50, p90, p99, most] = [0.5, 0.9, 0.99, 1.0].map(|share| format!("{:.2}", figures.at(share)));
        rows.push(vec![format!("{rate} commits/s beside it"), p50, p90, p99, most, reads.to_string(), commits.to_string()]);
    }
    server.stop().await?;
    let title = format!(
        "invalidated: {PROBES} entries; commit acknowledged to first read that is not a hit, ms, one read's time included"
    );
    table(&title, &["", "p50", "p90", "p99", "max", "hits between", "other commits"], &rows);
    Ok(())
}

/// A fill may be refused while the row's last commit is not settled; then it is tried again.
async fn fill(wire: &mut Wire, path: &str, token: &str, get: &[u8], id: i64) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    loop {
        let answer = wire.http(get).await?;
        if answer.is_fresh_hit() {
            return Ok(());
        }
        let ticket = answer.header("walcast-ticket").context("a miss without a ticket")?;
        let headers = format!("walcast-ticket: {ticket}\r\ncache-tag: vitals:id={id}\r\n");
        wire.http(&http_request("PUT", path, token, &headers, b"60")).await?;
        ensure!(Instant::now() < until, "{path} is never stored");
    }
}

/// Rows that nobody has cached.
async fn background(client: tokio_postgres::Client, n: u32, rate: u32, over: CancellationToken) -> anyhow::Result<u64> {
    let update = client.prepare("update vitals set value = value + 1 where id = $1").await?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    let mut commits = 0;
    loop {
        tokio::select! {
            () = over.cancelled() => return Ok(commits),
            _ = ticks.tick() => {
                let id = PROBES + 1 + i64::from(n) + 4 * ((commits % 200) as i64);
                client.execute(&update, &[&id]).await?;
                commits += 1;
            }
        }
    }
}
