//! A server that is told to end: it says so, lets nobody in, sends its clients away one by one with a hint when to return,
//! and whoever returns to the next one has missed nothing.
//!
//! Promises P2 and P9.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, Server, migrate};
use walcast_testkit::{RealtimeSocket, Refused, SseStream, TestPostgres, Vsn, wait};

const SCHEMA: &str = "create table plain (id bigint primary key, n int);
    grant select on plain to authenticated, service_role;";
const ADA: &str = "00000000-0000-4000-8000-00000000000a";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["plain"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

fn plain(after: Option<&str>) -> Value {
    let mut config = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain" }], "walcast": {} });
    if let Some(after) = after {
        config["walcast"]["after"] = after.into();
    }
    config
}

/// When a client was sent away, where it stood, and what it was told.
struct Left {
    at: Instant,
    position: String,
    text: String,
}

async fn socket(url: &str, token: &str) -> Result<(RealtimeSocket, String)> {
    let mut socket = RealtimeSocket::connect(url, token, Vsn::V2).await?;
    let joined = socket.join_ok("realtime:a", plain(None), None).await?;
    let position = joined["walcast"]["position"].as_str().with_context(|| format!("no position in {joined}"))?.to_owned();
    Ok((socket, position))
}

#[tokio::test]
async fn p2_on_drain_clients_leave_spread_over_the_window_and_resume_at_the_next_server() -> Result<()> {
    const SOCKETS: usize = 200;
    const STREAMS: usize = 50;
    let (postgres, mut server) =
        serving(&[("WALCAST_SERVER__DRAIN", "4s"), ("WALCAST_SSE__MAX_STREAMS_PER_RESOURCE", "0")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let url = format!("{}/sse/v1/changes?table=plain", server.url);
    let mut leaving = Vec::new();
    for _ in 0..SOCKETS {
        let (mut socket, mut position) = socket(&server.url, &token).await?;
        leaving.push(tokio::spawn(async move {
            let closed = socket.until_closed(2 * DEADLINE).await?;
            let at = Instant::now();
            let (code, text) = closed.context("closed without a reason")?;
            ensure!(code == 1012, "{code}: {text}");
            for frame in socket.take_backlog() {
                if let Some(later) = frame.payload["position"].as_str() {
                    position = later.to_owned();
                }
            }
            Ok(Left { at, position, text })
        }));
    }
    for _ in 0..STREAMS {
        let mut stream = SseStream::open(&url, Some(&token), None).await?;
        let live = stream.next(DEADLINE).await?;
        leaving.push(tokio::spawn(async move {
            let events = stream.until_end(2 * DEADLINE).await?;
            let at = Instant::now();
            let last = events.last().context("no last words")?;
            ensure!(last.event == "closed", "{last:?}");
            let position = events.iter().rev().find_map(|event| event.id.clone()).or(live.id).context("no id")?;
            Ok(Left { at, position, text: last.data.clone() })
        }));
    }
    // One that shows the line which makes an `EventSource` wait.
    let raw = reqwest::Client::new().get(&url).bearer_auth(&token).send().await?;
    assert!(leaving.iter().all(|leaving| !leaving.is_finished()), "nobody left before");

    let told = Instant::now();
    server.terminate().await?;
    wait::until(DEADLINE, "/readyz to say draining", async || {
        let Ok(answer) = reqwest::get(format!("{}/readyz", server.url)).await else { return false };
        answer.status() == 503 && answer.text().await.is_ok_and(|text| text.contains("draining"))
    })
    .await?;
    let refused = SseStream::open(&url, Some(&token), None).await?;
    assert_eq!(refused.status(), 503);
    assert!(refused.header("retry-after").is_some());
    assert!(refused.text(DEADLINE).await?.contains("\"draining\""));
    let refused = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await.err().context("was let in")?;
    let refused = refused.downcast_ref::<Refused>().context("no answer")?;
    assert_eq!(refused.status, 503);
    assert!(refused.body.contains("retry in"), "{refused}");
    // Some hear it still, the others when they come back.
    postgres.execute("insert into plain values (1, 1)").await?;

    let mut left = Vec::new();
    for leaving in leaving {
        left.push(leaving.await??);
    }
    let raw = raw.text().await?;
    let last = raw.rsplit("\n\n").find(|event| !event.is_empty()).context("nothing came")?;
    ensure!(last.starts_with("retry: ") && last.contains("\nevent: closed\n"), "{last}");
    server.ended().await?;
    postgres.execute("insert into plain values (2, 2)").await?;

    let (first, last) = (left.iter().map(|left| left.at).min(), left.iter().map(|left| left.at).max());
    let (first, last) = (first.context("nobody")?, last.context("nobody")?);
    println!("first after {:?}, last after {:?}", first - told, last - told);
    assert!(last - first > Duration::from_millis(500), "all left in one moment: {:?}", last - first);
    let mut hints: Vec<u64> = Vec::new();
    for left in &left {
        let hint = left.text.split("retry in ").nth(1).and_then(|rest| rest.split(' ').next()).context("no hint")?;
        hints.push(hint.parse()?);
    }
    hints.sort_unstable();
    hints.dedup();
    assert!(hints.len() > 100, "all were told to come back at once: {hints:?}");

    server.start_again().await?;
    let heard_last = async |position: &str| -> Result<()> {
        let mut stream = SseStream::open(&url, Some(&token), Some(position)).await?;
        ensure!(stream.next(DEADLINE).await?.event == "resumed", "from {position}");
        stream.next_where(|event| event.json().is_ok_and(|data| data["record"]["id"] == 2), DEADLINE).await?;
        Ok(())
    };
    for left in &left[SOCKETS..] {
        heard_last(&left.position).await?;
    }
    for left in &left[..SOCKETS] {
        let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
        let joined = socket.join_ok("realtime:a", plain(Some(&left.position)), None).await?;
        assert_eq!(joined["walcast"]["status"], "resumed", "{joined}");
        let is_last = |frame: &walcast_testkit::Frame| frame.payload["data"]["record"]["id"] == 2;
        socket.next_where(is_last, DEADLINE).await?;
    }
    server.stop().await
}

#[tokio::test]
async fn a_second_signal_ends_at_once() -> Result<()> {
    let (_postgres, mut server) = serving(&[("WALCAST_SERVER__DRAIN", "1h")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let (_socket, _) = socket(&server.url, &token).await?;
    let _stream = SseStream::open(&format!("{}/sse/v1/changes?table=plain", server.url), Some(&token), None).await?;
    server.terminate().await?;
    server.wait_ready(false).await?;
    server.terminate().await?;
    server.ended().await?;
    server.start_again().await?;
    server.stop().await
}

#[tokio::test]
async fn a_server_without_clients_does_not_wait() -> Result<()> {
    let (_postgres, server) = serving(&[("WALCAST_SERVER__DRAIN", "1h")]).await?;
    server.stop().await
}
