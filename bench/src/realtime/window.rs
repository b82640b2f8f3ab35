//! One measurement: send at a pace, wait until everybody has everything, and tell what that cost whom.

use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::time::MissedTickBehavior;
use tokio_postgres::{Client, Statement};

use crate::{
    process::{self, Cpu},
    realtime::crowd::{Crowd, SENT_AT},
    wire::{self, Wire},
};

/// So long the last deliveries may take; what is not there then is counted as missing.
const DRAIN: Duration = Duration::from_secs(30);
const WARM_UP: Duration = Duration::from_secs(1);
/// Changes under way in `AsFastAsItGoes`: enough to keep every side busy, far from any limit of a slow client.
const WINDOW: u64 = 64;

#[derive(Debug, Clone, Copy)]
pub enum Pace {
    ASecond(u32),
    /// The next is sent when all but a few have arrived everywhere.
    AsFastAsItGoes,
}

/// Where the messages come from.
pub enum Source {
    Rows { client: Client, insert: Statement, patient_of: fn(u64) -> i32, user_of: fn(i32) -> i32 },
    Posts { wire: Wire, padding: String },
}

/// Whose CPU is counted.
#[derive(Debug, Clone, Copy)]
pub struct Payers {
    pub server: u32,
    pub postmaster: Option<u32>,
}

#[derive(Debug)]
pub struct Outcome {
    pub deliveries: u64,
    pub expected: u64,
    pub seconds: f64,
    pub server: Cpu,
    pub postgres_s: f64,
    pub bench_s: f64,
    pub latency: Histogram<u64>,
    pub bytes_each: f64,
}

impl Source {
    pub async fn rows(
        client: Client,
        table: &str,
        patient_of: fn(u64) -> i32,
        user_of: fn(i32) -> i32,
    ) -> anyhow::Result<Source> {
        let sql = format!(
            "insert into {table} (patient_id, owner, kind, value) \
             values ($1, ('00000000-0000-4000-8000-' || lpad(to_hex($2::int), 12, '0'))::uuid, 'heart_rate', 72)"
        );
        let insert = client.prepare(&sql).await.with_context(|| format!("preparing: {sql}"))?;
        Ok(Source::Rows { client, insert, patient_of, user_of })
    }

    async fn send(&mut self, n: u64) -> anyhow::Result<()> {
        match self {
            Source::Rows { client, insert, patient_of, user_of } => {
                let patient = patient_of(n);
                client.execute(insert, &[&patient, &user_of(patient)]).await.context("writing a row")?;
            }
            Source::Posts { wire, padding } => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
                let body = format!("{{{SENT_AT}{},\"padding\":\"{padding}\"}}", since.as_micros());
                let answer = wire.http(&wire::http_request("POST", "/pub", "", "", body.as_bytes())).await?;
                anyhow::ensure!(answer.status < 300, "the publisher was answered {}", answer.head);
            }
        }
        Ok(())
    }
}

/// `each`: how many clients a message goes to.
pub async fn measure(
    crowd: &Crowd,
    source: &mut Source,
    pace: Pace,
    seconds: u32,
    each: u64,
    payers: Payers,
) -> anyhow::Result<Outcome> {
    // What one is sent more than another is found in the first round, too.
    send(crowd, source, pace, WARM_UP, each).await?;
    crowd.take_latency()?;
    let (deliveries, bytes) = (crowd.deliveries(), crowd.delivered_bytes());
    let cost = Cost::of(payers)?;
    let begun = Instant::now();
    let changes = send(crowd, source, pace, Duration::from_secs(seconds.into()), each).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let paid = Cost::of(payers)?;
    let deliveries = crowd.deliveries() - deliveries;
    Ok(Outcome {
        deliveries,
        expected: changes * each,
        seconds,
        server: paid.server - cost.server,
        postgres_s: paid.postgres_s - cost.postgres_s,
        bench_s: paid.bench_s - cost.bench_s,
        latency: crowd.take_latency()?,
        bytes_each: (crowd.delivered_bytes() - bytes) as f64 / deliveries.max(1) as f64,
    })
}

/// Until everything has arrived, or will not.
async fn send(crowd: &Crowd, source: &mut Source, pace: Pace, time: Duration, each: u64) -> anyhow::Result<u64> {
    let before = crowd.deliveries();
    let arrived = || (crowd.deliveries() - before) / each;
    let until = Instant::now() + time;
    let mut sent = 0;
    match pace {
        Pace::ASecond(rate) => {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            while sent < (time.as_secs_f64() * f64::from(rate)) as u64 && Instant::now() < until + DRAIN {
                ticks.tick().await;
                source.send(sent).await?;
                sent += 1;
            }
        }
        Pace::AsFastAsItGoes => {
            while Instant::now() < until {
                if sent >= arrived() + WINDOW {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                } else {
                    source.send(sent).await?;
                    sent += 1;
                }
            }
        }
    }
    let drained = Instant::now() + DRAIN;
    while crowd.deliveries() - before < sent * each && Instant::now() < drained {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(sent)
}

struct Cost {
    server: Cpu,
    postgres_s: f64,
    bench_s: f64,
}

impl Cost {
    fn of(payers: Payers) -> anyhow::Result<Cost> {
        Ok(Cost {
            server: process::cpu(payers.server)?,
            postgres_s: payers.postmaster.map_or(Ok(0.0), process::cpu_tree_s)?,
            bench_s: process::cpu_s(std::process::id())?,
        })
    }
}
