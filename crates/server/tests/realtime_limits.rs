//! What a client of the realtime wire should not do: send nonsense, come with a wrong key, not read, vanish. It gets a
//! reason where there is one to give; the program and the others live on.
//!
//! Promises P7 and P9 (no orphan).

mod support;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, migrate};
use walcast_testkit::{Frame, RealtimeSocket, Refused, TestPostgres, Vsn, jwt, wait};

const ADA: &str = "00000000-0000-4000-8000-00000000000a";
const SCHEMA: &str = "
create table plain (id bigint primary key, n int);
grant select on plain to anon, authenticated, service_role;
create table todos (id bigint primary key, title text);
grant select on todos to service_role;";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["todos", "plain"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

fn todos() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "todos" }] })
}

fn plain() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain" }] })
}

async fn change(socket: &mut RealtimeSocket) -> Result<Value> {
    Ok(socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?.payload)
}

#[tokio::test]
async fn frames_that_no_client_should_send_harm_nobody() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_REALTIME__MAX_FRAME_BYTES", "100000")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut other = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    other.join_ok("realtime:o", plain(), None).await?;
    for vsn in [Vsn::V1, Vsn::V2] {
        let mut socket = RealtimeSocket::connect(&server.url, &token, vsn).await?;
        socket.join_ok("realtime:a", plain(), None).await?;
        for text in [
            "",
            "{",
            "[]",
            "null",
            "7",
            "\"x\"",
            "[1,2,3]",
            "[null,null,null,null,null]",
            "[null,\"1\",\"t\",7,{}]",
            "{\"topic\":1}",
            "{\"topic\":\"phoenix\"}",
            "[[[[[[[[",
            "[\"1\",\"2\",\"realtime:a\",\"phx_join\"]",
            "\u{0}",
            "[null,null,\"realtime:a\",\"presence\",[]]",
            "[\"1\",\"1\",\"realtime:x\",\"phx_join\",\"no object\"]",
            "[\"1\",\"9\",\"realtime:a\",\"access_token\",7]",
        ] {
            socket.send_text(text).await?;
        }
        socket.send_text(&"[".repeat(50_000)).await?;
        for bytes in [
            &[][..],
            &[0],
            &[3, 1, 1, 10],
            &[3, 255, 255, 255, 255, 255, 1],
            &[9, 9, 9],
            &[3, 1, 1, 10, 0, 1, 0, b'1', b'2', b'r'],
            &[0, 0, 0, 0, 0, 255],
        ] {
            socket.send_binary(bytes.to_vec()).await?;
        }
        assert_eq!(socket.heartbeat().await?["status"], "ok", "the connection is kept");
        socket.leave("realtime:a").await?;
        socket.join_ok("realtime:a", plain(), None).await?;
    }
    // Larger than allowed: that connection ends, and only that.
    let mut huge = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    huge.join_ok("realtime:h", plain(), None).await?;
    let _ = huge.send_text(&format!("[null,\"1\",\"phoenix\",\"heartbeat\",\"{}\"]", "x".repeat(200_000))).await;
    huge.until_closed(DEADLINE).await?;

    postgres.execute("insert into plain values (1, 1)").await?;
    assert_eq!(change(&mut other).await?["data"]["record"]["id"], 1);
    assert_eq!(other.heartbeat().await?["status"], "ok");
    server.stop().await
}

#[tokio::test]
async fn the_door_refuses_bad_keys_and_unknown_versions_with_json() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let good = server.token("anon", None);
    let forged = jwt("another secret, of the same length and more", "service_role", None, 3600, json!({}));
    let cases = [
        ("no key", "vsn=2.0.0".to_owned(), 401),
        ("an empty key", "apikey=&vsn=2.0.0".into(), 401),
        ("garbage", "apikey=garbage&vsn=2.0.0".into(), 401),
        ("expired", format!("apikey={}&vsn=2.0.0", jwt(SECRET, "anon", None, -60, json!({}))), 401),
        ("forged", format!("apikey={forged}&vsn=1.0.0"), 401),
        ("a role that is not allowed", format!("apikey={}&vsn=1.0.0", jwt(SECRET, "postgres", None, 60, json!({}))), 401),
        ("without exp", format!("apikey={}", jwt(SECRET, "anon", None, 60, json!({ "exp": null }))), 401),
        ("an unknown version", format!("apikey={good}&vsn=3.0.0"), 400),
        ("a version of words", format!("apikey={good}&vsn=newest"), 400),
    ];
    for endpoint in ["/realtime/v1/websocket", "/socket/websocket"] {
        for (what, query, status) in &cases {
            let url = format!("{}{endpoint}?{query}", server.url.replacen("http", "ws", 1));
            let error = RealtimeSocket::connect_to(&url, Vsn::V2).await.err().with_context(|| format!("{what} was let in"))?;
            let refused = error.downcast_ref::<Refused>().with_context(|| format!("{what}: {error:#}"))?;
            let body: Value = serde_json::from_str(&refused.body).with_context(|| format!("{what}: {refused}"))?;
            ensure!(refused.status == *status && body["error"].as_str().is_some_and(|text| text.len() > 5), "{what}: {refused}");
        }
        // Without the upgrade it is a plain request.
        let plain = reqwest::get(format!("{}{endpoint}?apikey={good}", server.url)).await?;
        ensure!(plain.status().is_client_error(), "{}", plain.status());
    }
    // No version means 1, as in Phoenix.
    let url = format!("{}/socket/websocket?apikey={good}", server.url.replacen("http", "ws", 1));
    let mut socket = RealtimeSocket::connect_to(&url, Vsn::V1).await?;
    assert_eq!(socket.heartbeat().await?["status"], "ok");
    server.stop().await
}

fn rss_kb(server: &Server) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid().context("no process")?))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}

#[tokio::test]
async fn p7_who_reads_late_is_told_what_is_missing_and_memory_stays_flat() -> Result<()> {
    let settings = [("WALCAST_REALTIME__OUTBOX_BYTES", "512KiB"), ("WALCAST_STREAM__REPLAY_BYTES", "1MiB")];
    let (postgres, server) = serving(&settings).await?;
    let token = server.token("service_role", None);
    let mut fast = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    fast.join_ok("realtime:fast", todos(), None).await?;
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
        socket.join_ok("realtime:slow", todos(), None).await?;
        slow.push(socket);
    }
    let writer = postgres.connect().await?;
    let mut before = 0;
    // 80 rows of 64 kB at a time: no more than the fast one has read is under way.
    for batch in 0..8_i64 {
        for n in 0..80_i64 {
            let id = batch * 80 + n;
            let sql = "insert into todos (id, title) values ($1, repeat('x', 65536))";
            writer.execute(sql, &[&id]).await?;
            assert_eq!(change(&mut fast).await?["data"]["record"]["id"], id, "the fast one hears all");
        }
        if batch == 1 {
            before = rss_kb(&server)?;
        }
    }
    let grown = rss_kb(&server)?.saturating_sub(before);
    // 30 MB more were written and 240 MB more were due to the slow ones.
    assert!(grown < 24_000, "grown by {grown} kB");
    let mut last = 640;
    postgres.execute(&format!("insert into todos values ({last}, 'the last')")).await?;
    for socket in &mut slow {
        let (mut next, mut told) = (0, false);
        while next <= 640 {
            let heard = |frame: &Frame| matches!(frame.event.as_str(), "postgres_changes" | "system");
            let frame = socket.next_where(heard, DEADLINE).await?;
            if frame.event == "system" {
                if frame.payload["message"].as_str().is_some_and(|message| message.starts_with("resync")) {
                    told = true;
                    // What was written before may be among what is missing.
                    last += 1;
                    postgres.execute(&format!("insert into todos values ({last}, 'after it was told')")).await?;
                }
                continue;
            }
            let id = frame.payload["data"]["record"]["id"].as_i64().context("an id")?;
            ensure!(id == next || (told && id > next), "{id} came where {next} was due, and nobody said so");
            (next, told) = (id + 1, false);
        }
    }
    server.stop().await
}

async fn gauge(server: &Server, name: &str) -> Option<f64> {
    let text = reqwest::get(format!("{}/metrics", server.url)).await.ok()?.text().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[tokio::test]
async fn p9_clients_that_vanish_leave_no_subscription_behind() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut sockets = Vec::new();
    for n in 0..30 {
        let mut socket = RealtimeSocket::connect(&server.url, &token, if n % 2 == 0 { Vsn::V1 } else { Vsn::V2 }).await?;
        for topic in ["realtime:a", "realtime:b"] {
            socket.join_ok(topic, plain(), None).await?;
        }
        sockets.push(socket);
    }
    assert_eq!(gauge(&server, "walcast_subscriptions ").await, Some(60.0));
    sockets.truncate(15);
    wait::until(DEADLINE, "half are gone", async || gauge(&server, "walcast_subscriptions ").await == Some(30.0)).await?;
    // Some leave in order, some in the middle of a stream of changes.
    sockets[0].leave("realtime:a").await?;
    postgres.execute("insert into plain select n, n from generate_series(1, 5000) n").await?;
    drop(sockets);
    wait::until(DEADLINE, "all are gone", async || {
        gauge(&server, "walcast_subscriptions ").await == Some(0.0) && gauge(&server, "walcast_connections ").await == Some(0.0)
    })
    .await?;
    server.stop().await
}

#[tokio::test]
async fn a_server_that_is_stopped_tells_every_socket() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut sockets = Vec::new();
    for vsn in [Vsn::V1, Vsn::V2] {
        let mut socket = RealtimeSocket::connect(&server.url, &token, vsn).await?;
        socket.join_ok("realtime:a", plain(), None).await?;
        sockets.push(socket);
    }
    let idle = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    sockets.push(idle);
    let started = std::time::Instant::now();
    let stopping = tokio::spawn(server.stop());
    for mut socket in sockets {
        let (code, reason) = socket.until_closed(DEADLINE).await?.context("closed without a reason")?;
        assert_eq!(code, 1012, "{reason}");
        assert!(reason.contains("shutting down"), "{reason}");
    }
    stopping.await??;
    assert!(started.elapsed() < Duration::from_secs(30));
    Ok(())
}
