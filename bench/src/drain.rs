//! A backlog through the whole pipeline, beside `pg_recvlogical` which throws the same changes away.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::future::try_join_all;
use tokio::process::Command;
use tokio_postgres::Client;

use crate::{
    Size,
    figures::{Figures, table},
    listener::{Wish, listen},
    load::{self, Backlog, PATIENTS, PLAIN_SLOT, Written},
    process,
    stage::{CACHE_PUBLICATION, DEADLINE, REALTIME_PUBLICATION, Stage},
};

/// A backlog comes faster than any client reads; with the default limits the clients would be closed and come back,
/// which measures something else.
const PATIENT: &[(&str, &str)] = &[("WALCAST_REALTIME__OUTBOX_BYTES", "512MiB"), ("WALCAST_STREAM__REPLAY_BYTES", "512MiB")];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Plain,
    Walcast { subscribers: u32 },
}

const SIDES: [Side; 4] =
    [Side::Plain, Side::Walcast { subscribers: 0 }, Side::Walcast { subscribers: 1 }, Side::Walcast { subscribers: PATIENTS }];

#[derive(Debug, Default)]
struct Measured {
    rate: Figures,
    ratio: Figures,
    listening_ms: Figures,
    serve_cpu: Figures,
    walsender_cpu: Figures,
    bench_cpu: Figures,
    reconnects: u32,
}

struct Run {
    took: Duration,
    listening: Option<Duration>,
    serve_cpu_s: f64,
    walsender_cpu_s: f64,
    bench_cpu_s: f64,
    reconnects: u32,
}

pub async fn run(size: &Size) -> anyhow::Result<()> {
    let one_by_one = Backlog { transactions: size.transactions, rows_each: 1 };
    let bulk = Backlog { transactions: size.rows / 1_000, rows_each: 1_000 };
    for backlog in [one_by_one, bulk] {
        let measured = measure(backlog, size.rounds).await.with_context(|| format!("draining {}", backlog.name()))?;
        print(backlog, size.rounds, &measured);
    }
    Ok(())
}

async fn measure(backlog: Backlog, rounds: u32) -> anyhow::Result<BTreeMap<Side, Measured>> {
    let stage = Stage::set().await?;
    let client = stage.postgres.connect().await?;
    let written = load::write(&stage, &client, backlog).await?;
    let millions = backlog.changes() as f64 / 1e6;
    let mut measured: BTreeMap<Side, Measured> = BTreeMap::new();
    // One round more than is counted: the first meets cold files.
    for round in 0..=rounds {
        let mut plain_rate = f64::NAN;
        for side in SIDES {
            load::rewind(&client).await?;
            let run = match side {
                Side::Plain => plain(&stage, &client, written).await?,
                Side::Walcast { subscribers } => walcast(&stage, &client, backlog, written, subscribers).await?,
            };
            let rate = backlog.changes() as f64 / run.took.as_secs_f64();
            if side == Side::Plain {
                plain_rate = rate;
            }
            if round == 0 {
                continue;
            }
            let of = measured.entry(side).or_default();
            of.rate.add(rate / 1e3);
            of.ratio.add(rate / plain_rate);
            of.listening_ms.add(run.listening.map_or(f64::NAN, |took| took.as_secs_f64() * 1e3));
            of.serve_cpu.add(run.serve_cpu_s / millions);
            of.walsender_cpu.add(run.walsender_cpu_s / millions);
            of.bench_cpu.add(run.bench_cpu_s / millions);
            of.reconnects += run.reconnects;
        }
    }
    Ok(measured)
}

async fn plain(stage: &Stage, client: &Client, written: Written) -> anyhow::Result<Run> {
    let row = client.query_one("select setting from pg_config where name = 'BINDIR'", &[]).await?;
    let program = PathBuf::from(row.get::<_, &str>(0)).join("pg_recvlogical");
    let mut command = Command::new(&program);
    command
        .args(["-d", &stage.postgres.url(), "--slot", PLAIN_SLOT, "-P", "pgoutput", "-o", "proto_version=1"])
        .args(["-o", &format!("publication_names={CACHE_PUBLICATION},{REALTIME_PUBLICATION}")])
        .args(["-f", "/dev/null", "-F", "0", "--no-loop", "--start", "-E", &written.end.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let bench_before = process::cpu_s(std::process::id())?;
    let started = Instant::now();
    let output = tokio::time::timeout(DEADLINE, command.output()).await.context("pg_recvlogical did not end")?;
    let took = started.elapsed();
    let output = output.with_context(|| format!("running {}; is postgresql-client installed?", program.display()))?;
    if !output.status.success() {
        bail!("pg_recvlogical: {}", String::from_utf8_lossy(&output.stderr));
    }
    let bench_cpu_s = process::cpu_s(std::process::id())? - bench_before;
    // Its walsender ended with it, and what that cost went with it.
    Ok(Run { took, listening: None, serve_cpu_s: f64::NAN, walsender_cpu_s: f64::NAN, bench_cpu_s, reconnects: 0 })
}

async fn walcast(stage: &Stage, client: &Client, backlog: Backlog, written: Written, subscribers: u32) -> anyhow::Result<Run> {
    let bench_before = process::cpu_s(std::process::id())?;
    let mut server = stage.serve(if subscribers == 0 { &[] } else { PATIENT })?;
    let listening = server.listening().await?;
    let token = server.token("service_role", None);
    let http = reqwest::Client::new();
    let wishes = (0..subscribers).map(|n| {
        let filter = if subscribers == 1 { String::new() } else { format!("&filter=patient_id=eq.{n}") };
        Wish {
            url: format!("{}/sse/v1/changes?table=vitals{filter}", server.url),
            token: token.clone(),
            cursor: written.cursor.to_string(),
            changes: backlog.changes() / u64::from(subscribers),
        }
    });
    let listening_all = try_join_all(wishes.map(|wish| {
        let listener = tokio::spawn(listen(http.clone(), wish));
        async move { listener.await? }
    }));
    let announced = async {
        loop {
            if server.position().await?.lsn >= written.last {
                return anyhow::Ok(Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let both = async { tokio::try_join!(announced, listening_all) };
    let (announced_at, heard) = match tokio::time::timeout(DEADLINE, both).await {
        Ok(drained) => drained?,
        Err(_) => {
            let report = server.report().await.unwrap_or_default();
            bail!(
                "with {subscribers} subscribers the backlog up to {} was not drained within {DEADLINE:?}: {report}",
                written.last
            );
        }
    };
    let ended = heard.iter().map(|heard| heard.last_at).fold(announced_at, Instant::max);
    let serve_cpu_s = process::cpu_s(server.pid)?;
    let walsender_cpu_s = match load::walsender(client).await? {
        Some(pid) => process::cpu_s(pid)?,
        None => f64::NAN,
    };
    let run = Run {
        took: ended - server.started,
        listening: Some(listening),
        serve_cpu_s,
        walsender_cpu_s,
        bench_cpu_s: process::cpu_s(std::process::id())? - bench_before,
        reconnects: heard.iter().map(|heard| heard.reconnects).sum(),
    };
    server.stop().await?;
    Ok(run)
}

fn print(backlog: Backlog, rounds: u32, measured: &BTreeMap<Side, Measured>) {
    let rows: Vec<Vec<String>> = measured
        .iter()
        .map(|(side, of)| {
            let name = match side {
                Side::Plain => "pg_recvlogical".to_owned(),
                Side::Walcast { subscribers: 0 } => "walcast, nobody listens".to_owned(),
                Side::Walcast { subscribers: 1 } => "walcast, 1 SSE subscriber of all".to_owned(),
                Side::Walcast { subscribers } => format!("walcast, {subscribers} SSE subscribers, one filter each"),
            };
            let or_dash = |figures: &Figures, decimals| {
                if figures.median().is_nan() { "-".to_owned() } else { format!("{:.decimals$}", figures.median()) }
            };
            let name = if of.reconnects == 0 { name } else { format!("{name}; {} reconnects", of.reconnects) };
            vec![
                name,
                of.rate.show(1),
                of.ratio.show(2),
                or_dash(&of.listening_ms, 0),
                or_dash(&of.serve_cpu, 2),
                or_dash(&of.walsender_cpu, 2),
                or_dash(&of.bench_cpu, 2),
            ]
        })
        .collect();
    let head = ["", "1,000 changes/s", "ratio", "start ms", "serve CPU", "walsender CPU", "bench CPU"];
    let title = format!(
        "drain: {}; rounds: {rounds}, median (least–most); ratio to pg_recvlogical in the same round; CPU in seconds per million changes",
        backlog.name()
    );
    table(&title, &head, &rows);
}
