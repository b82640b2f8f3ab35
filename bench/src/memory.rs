//! Resident memory of `serve`: idle, for each idle WebSocket subscription, after a drained backlog.

use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::json;
use walcast_testkit::{RealtimeSocket, Vsn, wait};

use crate::{
    Size,
    figures::table,
    load::{self, Backlog},
    process::{self, Resident},
    stage::{DEADLINE, Server, Stage},
};

/// So long nothing happens before memory is read.
const REST: Duration = Duration::from_secs(2);
/// Joins under way at once.
const AT_ONCE: usize = 16;

pub async fn run(size: &Size) -> anyhow::Result<()> {
    let connections = idle_connections(size.connections).await?;
    let backlog = Backlog { transactions: size.rows / 1_000, rows_each: 1_000 };
    let drained = after_a_backlog(backlog).await?;
    let rows: Vec<Vec<String>> = connections
        .into_iter()
        .chain([(format!("after {} were drained, nobody listening", backlog.name()), drained, None)])
        .map(|(name, resident, each)| {
            let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
            let each = each.map_or_else(|| "-".to_owned(), |bytes: f64| format!("{bytes:.0}"));
            vec![name, mib(resident.now_kib), mib(resident.most_kib), each]
        })
        .collect();
    table("memory: resident size of serve", &["", "now MiB", "most MiB", "bytes each"], &rows);
    Ok(())
}

type Row = (String, Resident, Option<f64>);

async fn idle_connections(count: u32) -> anyhow::Result<Vec<Row>> {
    let stage = Stage::set().await?;
    let mut server = stage.serve(&[])?;
    server.ready().await?;
    tokio::time::sleep(REST).await;
    let idle = process::resident(server.pid)?;
    let mut rows = vec![("idle".to_owned(), idle, None)];
    let token = server.token("service_role", None);
    let mut sockets = Vec::new();
    // Twice: the first thousand may also pay for what is made once.
    for wave in 1..=2 {
        let before = process::resident(server.pid)?;
        let opened = (0..count).map(|n| join(&server, &token, n));
        sockets.extend(stream::iter(opened).buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await?);
        tokio::time::sleep(REST).await;
        let now = process::resident(server.pid)?;
        let each = (now.now_kib as f64 - before.now_kib as f64) * 1024.0 / f64::from(count);
        rows.push((format!("{} idle WebSocket subscriptions", count * wave), now, Some(each)));
    }
    drop(sockets);
    let gone = async || server.report().await.is_some_and(|report| report["subscriptions"] == 0);
    wait::until(DEADLINE, "no subscription is left", gone).await?;
    tokio::time::sleep(REST).await;
    rows.push(("all of them closed".to_owned(), process::resident(server.pid)?, None));
    server.stop().await?;
    Ok(rows)
}

async fn join(server: &Server, token: &str, n: u32) -> anyhow::Result<RealtimeSocket> {
    let mut socket = RealtimeSocket::connect(&server.url, token, Vsn::V2).await?;
    let binding = json!({ "event": "*", "schema": "public", "table": "vitals", "filter": format!("patient_id=eq.{n}") });
    socket.join_ok(&format!("realtime:patient-{n}"), json!({ "postgres_changes": [binding] }), Some(token)).await?;
    Ok(socket)
}

async fn after_a_backlog(backlog: Backlog) -> anyhow::Result<Resident> {
    let stage = Stage::set().await?;
    let client = stage.postgres.connect().await?;
    let written = load::write(&stage, &client, backlog).await?;
    let mut server = stage.serve(&[])?;
    server.listening().await?;
    let drained = async || server.position().await.is_ok_and(|position| position.lsn >= written.last);
    wait::until(DEADLINE, "the backlog is drained", drained).await?;
    tokio::time::sleep(REST).await;
    let resident = process::resident(server.pid)?;
    server.stop().await?;
    Ok(resident)
}
