//! From the moment a commit is acknowledged to its writer until a subscriber holds the event, at a steady rate.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use walcast_testkit::{RealtimeSocket, SseStream, Vsn};

use crate::{
    Size,
    figures::{Figures, table},
    stage::{DEADLINE, Server, Stage},
};

const NURSE: &str = "11111111-1111-4111-8111-111111111111";
const TOPIC: &str = "realtime:vitals";

#[derive(Debug, Clone, Copy)]
enum Way {
    Socket,
    Sse,
}

#[derive(Debug, Clone, Copy)]
enum Who {
    /// No row security.
    Service,
    /// A policy with a sub-select, asked of PostgreSQL.
    Nurse,
}

type Arrivals = HashMap<i64, Instant>;

pub async fn run(size: &Size) -> anyhow::Result<()> {
    let stage = Stage::set().await?;
    let client = stage.postgres.connect().await?;
    let patient = format!("insert into care_team select n, '{NURSE}' from generate_series(0, 9) n");
    client.batch_execute(&patient).await?;
    let mut server = stage.serve(&[])?;
    server.ready().await?;
    let mut rows = Vec::new();
    for way in [Way::Socket, Way::Sse] {
        for together in [&[Who::Service][..], &[Who::Nurse], &[Who::Service, Who::Nurse]] {
            rows.extend(measure(&server, &client, size, way, together).await?);
        }
    }
    server.stop().await?;
    let title =
        format!("latency: {} commits/s for {} s each; commit acknowledged to event received, ms", size.rate, size.seconds);
    table(&title, &["", "p50", "p90", "p99", "max", "events"], &rows);
    Ok(())
}

async fn measure(server: &Server, client: &Client, size: &Size, way: Way, together: &[Who]) -> anyhow::Result<Vec<Vec<String>>> {
    let commits = size.rate * size.seconds;
    let mut listeners = Vec::new();
    for who in together {
        listeners.push((who, listen(server, way, *who, commits).await?));
    }
    let acknowledged = write(client, size.rate, commits).await?;
    let mut rows = Vec::new();
    for (who, listener) in listeners {
        let arrived = listener.await??;
        let mut figures = Figures::default();
        for (id, at) in &acknowledged {
            if let Some(arrival) = arrived.get(id) {
                figures.add(milliseconds(*at, *arrival));
            }
        }
        let name = format!("{}, {}{}", way.name(), who.name(), if together.len() > 1 { ", both at once" } else { "" });
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| format!("{:.2}", figures.at(share)));
        rows.push(vec![name, p50, p90, p99, max, format!("{} of {}", figures.len(), acknowledged.len())]);
    }
    Ok(rows)
}

/// Below zero when the event overtook the acknowledgement.
fn milliseconds(from: Instant, to: Instant) -> f64 {
    if to >= from { (to - from).as_secs_f64() * 1e3 } else { -(from - to).as_secs_f64() * 1e3 }
}

/// One commit at each tick, and when each was acknowledged.
async fn write(client: &Client, rate: u32, commits: u32) -> anyhow::Result<Arrivals> {
    let insert =
        client.prepare("insert into vitals (patient_id, kind, value) values ($1, 'heart_rate', 72) returning id").await?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut acknowledged = Arrivals::new();
    for n in 0..commits {
        ticks.tick().await;
        let row = client.query_one(&insert, &[&((n % 10) as i32)]).await.context("writing a vital")?;
        acknowledged.insert(row.get(0), Instant::now());
    }
    Ok(acknowledged)
}

/// Returns when the subscription is live; the task ends with the last event.
async fn listen(server: &Server, way: Way, who: Who, commits: u32) -> anyhow::Result<JoinHandle<anyhow::Result<Arrivals>>> {
    let token = match who {
        Who::Service => server.token("service_role", None),
        Who::Nurse => server.token("authenticated", Some(NURSE)),
    };
    match way {
        Way::Socket => {
            let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
            let wanted = json!({ "postgres_changes": [{ "event": "INSERT", "schema": "public", "table": "vitals" }] });
            socket.join_ok(TOPIC, wanted, Some(&token)).await?;
            Ok(tokio::spawn(async move {
                let mut arrivals = Arrivals::new();
                while arrivals.len() < commits as usize {
                    let frame = socket.next_event(DEADLINE).await?;
                    let at = Instant::now();
                    if frame.event == "postgres_changes" {
                        arrivals.insert(id_of(&frame.payload["data"])?, at);
                    }
                }
                socket.close().await?;
                Ok(arrivals)
            }))
        }
        Way::Sse => {
            let url = format!("{}/sse/v1/changes?table=vitals&event=INSERT", server.url);
            let mut stream = SseStream::open(&url, Some(&token), None).await?;
            stream.next_where(|event| event.event == "live", DEADLINE).await?;
            Ok(tokio::spawn(async move {
                let mut arrivals = Arrivals::new();
                while arrivals.len() < commits as usize {
                    let event = stream.next(DEADLINE).await?;
                    let at = Instant::now();
                    if event.event == "change" {
                        arrivals.insert(id_of(&event.json()?)?, at);
                    }
                }
                Ok(arrivals)
            }))
        }
    }
}

fn id_of(change: &Value) -> anyhow::Result<i64> {
    change["record"]["id"].as_i64().with_context(|| format!("a change without an id: {change}"))
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Socket => "WebSocket",
            Way::Sse => "SSE",
        }
    }
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Service => "service_role",
            Who::Nurse => "policy with sub-select",
        }
    }
}
