//! Limits from outside: each refuses what is too much, says which it was and when to come back, counts it, and leaves
//! everybody else alone.
//!
//! Promise P7.

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, migrate};
use walcast_testkit::{RealtimeSocket, Refused, SseStream, TestPostgres, Vsn, jwt, wait};

const SCHEMA: &str = "create table plain (id bigint primary key, n int);
    grant select on plain to anon, authenticated, service_role;";
const ADA: &str = "00000000-0000-4000-8000-00000000000a";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["plain"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

fn plain() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain" }] })
}

async fn metrics(server: &Server) -> Result<String> {
    Ok(reqwest::get(format!("{}/metrics", server.url)).await?.text().await?)
}

async fn reached(server: &Server, setting: &str) -> Result<u64> {
    let name = format!("walcast_limits_reached_total{{limit=\"{setting}\"}} ");
    let text = metrics(server).await?;
    Ok(text.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or("0").parse()?)
}

async fn status_from(server: &Server, token: &str, forwarded: &str) -> Result<reqwest::Response> {
    let asked = reqwest::Client::new().get(format!("{}/sse/v1/changes?table=plain", server.url)).bearer_auth(token);
    Ok(asked.header("x-forwarded-for", forwarded).send().await?)
}

#[tokio::test]
async fn p7_one_address_has_so_many_connections_and_only_a_trusted_proxy_says_which_address() -> Result<()> {
    let settings = [("WALCAST_LIMITS__CONNECTIONS_PER_IP", "2"), ("WALCAST_SERVER__TRUSTED_PROXIES", "127.0.0.0/8")];
    let (_postgres, server) = serving(&settings).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut held = Vec::new();
    for forwarded in ["6.6.6.6, 1.1.1.1", "7.7.7.7, 1.1.1.1", "2.2.2.2", "2001:db8::1", "2001:db8::2"] {
        let answer = status_from(&server, &token, forwarded).await?;
        assert_eq!(answer.status(), 200, "{forwarded}");
        held.push(answer);
    }
    for full in ["1.1.1.1", "2001:db8::3"] {
        let refused = status_from(&server, &token, full).await?;
        assert_eq!(refused.status(), 429, "{full}");
        assert!(refused.headers().contains_key("retry-after"));
        let problem: Value = serde_json::from_str(&refused.text().await?)?;
        assert_eq!(problem["code"], "too_many_connections");
        assert!(problem["title"].as_str().is_some_and(|title| title.contains("limits.connections_per_ip = 2")), "{problem}");
    }
    assert_eq!(reached(&server, "limits.connections_per_ip").await?, 2);
    drop(held);
    wait::until(DEADLINE, "there is room again", async || {
        status_from(&server, &token, "1.1.1.1").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await?;
    server.stop().await?;

    // A proxy that nobody named is a client.
    let (_postgres, server) = serving(&settings[..1]).await?;
    let _held = (status_from(&server, &token, "1.1.1.1").await?, status_from(&server, &token, "2.2.2.2").await?);
    assert_eq!(status_from(&server, &token, "3.3.3.3").await?.status(), 429);
    let refused = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await.err().context("was let in")?;
    let refused = refused.downcast_ref::<Refused>().context("no answer")?;
    assert_eq!(refused.status, 429);
    assert!(
        refused.body.contains("ConnectionRateLimitReached") && refused.body.contains("limits.connections_per_ip"),
        "{refused}"
    );
    server.stop().await
}

#[tokio::test]
async fn p7_a_tenant_has_so_many_connections_and_joins_and_is_counted() -> Result<()> {
    let settings = [
        ("WALCAST_AUTH__TENANT_CLAIM", "app_metadata.tenant"),
        ("WALCAST_LIMITS__CONNECTIONS_PER_TENANT", "2"),
        ("WALCAST_LIMITS__JOINS_PER_SECOND_PER_TENANT", "1"),
    ];
    let (_postgres, server) = serving(&settings).await?;
    let of = |tenant: &str| jwt(SECRET, "authenticated", Some(ADA), 3600, json!({ "app_metadata": { "tenant": tenant } }));
    let key = server.token("anon", None);
    // By its key, and by the token of its first topic, as supabase-js brings it.
    let mut one = RealtimeSocket::connect(&server.url, &of("north"), Vsn::V2).await?;
    one.join_ok("realtime:a", plain(), None).await?;
    let mut two = RealtimeSocket::connect(&server.url, &key, Vsn::V2).await?;
    two.join_ok("realtime:a", plain(), Some(&of("north"))).await?;
    let mut three = RealtimeSocket::connect(&server.url, &key, Vsn::V2).await?;
    let refused = three.join("realtime:a", plain(), Some(&of("north"))).await?;
    let reason = refused["response"]["reason"].as_str().context("no reason")?.to_owned();
    assert!(reason.starts_with("ConnectionRateLimitReached: "), "{reason}");
    assert!(reason.contains("limits.connections_per_tenant = 2"), "{reason}");
    assert!(RealtimeSocket::connect(&server.url, &of("north"), Vsn::V2).await.is_err());
    three.join_ok("realtime:a", plain(), Some(&of("south"))).await?;
    let text = metrics(&server).await?;
    for line in [
        "walcast_tenants 2",
        "walcast_tenant_connections{tenant=\"north\"} 2",
        "walcast_tenant_subscriptions{tenant=\"north\"} 2",
        "walcast_tenant_connections{tenant=\"south\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    // Ten seconds' worth may come at once; three joins of the north have been.
    let mut refusal = None;
    for n in 0..40 {
        let reply = one.join(&format!("realtime:{n}"), plain(), None).await?;
        if reply["status"] == "error" {
            refusal = reply["response"]["reason"].as_str().map(str::to_owned);
            break;
        }
    }
    let refusal = refusal.context("forty joins were let in")?;
    assert!(
        refusal.starts_with("ClientJoinRateLimitReached: ") && refusal.contains("joins_per_second_per_tenant = 1"),
        "{refusal}"
    );
    three.join_ok("realtime:b", plain(), Some(&of("south"))).await?;

    drop((one, two));
    wait::until(DEADLINE, "the north is forgotten", async || {
        metrics(&server).await.is_ok_and(|text| text.contains("walcast_tenants 1\n") && !text.contains("north"))
    })
    .await?;
    server.stop().await
}

#[tokio::test]
async fn p7_joins_frames_and_subscribers_have_limits_with_upstreams_codes() -> Result<()> {
    let settings = [
        ("WALCAST_LIMITS__JOINS_PER_SECOND_PER_CONNECTION", "1"),
        ("WALCAST_LIMITS__MESSAGES_IN_PER_SECOND_PER_CONNECTION", "5"),
        ("WALCAST_LIMITS__SUBSCRIBERS_PER_TOPIC", "1"),
        ("WALCAST_LIMITS__PAYLOAD_BYTES", "1000"),
    ];
    let (postgres, server) = serving(&settings).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut other = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    other.join_ok("realtime:shared", plain(), None).await?;
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    let reason = |reply: &Value| reply["response"]["reason"].as_str().unwrap_or_default().to_owned();

    let shared = reason(&socket.join("realtime:shared", plain(), None).await?);
    assert!(shared.starts_with("ChannelRateLimitReached: ") && shared.contains("limits.subscribers_per_topic = 1"), "{shared}");
    let mut refused = String::new();
    for n in 0..30 {
        refused = reason(&socket.join(&format!("realtime:{n}"), json!({}), None).await?);
        if !refused.is_empty() {
            break;
        }
    }
    assert!(refused.starts_with("ClientJoinRateLimitReached: "), "{refused}");
    assert!(refused.contains("limits.joins_per_second_per_connection = 1") && refused.contains("try again in"), "{refused}");

    let mut large = RealtimeSocket::connect(&server.url, &token, Vsn::V1).await?;
    let answer = large.ask("phoenix", "heartbeat", json!({ "x": "x".repeat(2_000) })).await?;
    assert!(reason(&answer).contains("limits.payload_bytes = 1000"), "{answer}");
    let mut flood = String::new();
    for _ in 0..200 {
        flood = reason(&large.heartbeat().await?);
        if !flood.is_empty() {
            break;
        }
    }
    assert!(flood.starts_with("MessageRateLimitReached: Too many messages per second"), "{flood}");
    assert!(flood.contains("limits.messages_in_per_second_per_connection = 5"), "{flood}");
    for setting in
        ["joins_per_second_per_connection", "subscribers_per_topic", "payload_bytes", "messages_in_per_second_per_connection"]
    {
        ensure!(reached(&server, &format!("limits.{setting}")).await? > 0, "{setting} was not counted");
    }
    // Nobody else noticed.
    postgres.execute("insert into plain values (1, 1)").await?;
    other.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
    // Who leaves makes room.
    drop(other);
    wait::until(DEADLINE, "it is gone", async || {
        metrics(&server).await.is_ok_and(|text| text.lines().any(|line| line == "walcast_connections 2"))
    })
    .await?;
    let mut late = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    late.join_ok("realtime:shared", plain(), None).await?;
    server.stop().await
}

#[tokio::test]
async fn p7_a_herd_is_let_in_at_a_bounded_rate_and_all_are_back() -> Result<()> {
    let (_postgres, server) = serving(&[("WALCAST_LIMITS__CONNECTS_PER_SECOND", "20")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let url = format!("{}/sse/v1/changes?table=plain&filter=id=eq.", server.url);
    let comes = (0..100).map(|n| {
        let (url, token) = (format!("{url}{n}"), token.clone());
        tokio::spawn(async move {
            let mut told = Vec::new();
            loop {
                let stream = SseStream::open(&url, Some(&token), None).await?;
                if stream.status() == 200 {
                    return anyhow::Ok((stream, told));
                }
                ensure!(stream.status() == 503, "{}", stream.status());
                let seconds: u64 = stream.header("retry-after").context("no Retry-After")?.parse()?;
                told.push(seconds);
                tokio::time::sleep(std::time::Duration::from_secs(seconds)).await;
            }
        })
    });
    let comes: Vec<_> = comes.collect();
    let (mut streams, mut told) = (Vec::new(), Vec::new());
    for comes in comes {
        let (stream, waits) = comes.await??;
        streams.push(stream);
        told.extend(waits);
    }
    assert_eq!(streams.len(), 100);
    told.sort_unstable();
    told.dedup();
    assert!(told.len() > 1, "all were told to come back at once: {told:?}");
    assert!(reached(&server, "limits.connects_per_second").await? > 0);
    server.stop().await
}

#[tokio::test]
async fn p7_what_may_not_go_out_yet_waits_and_nothing_is_lost() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_LIMITS__MESSAGES_OUT_PER_SECOND_PER_CONNECTION", "50")]).await?;
    let mut socket = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(ADA)), Vsn::V2).await?;
    socket.join_ok("realtime:a", plain(), None).await?;
    let writer = postgres.connect().await?;
    for id in 0..700_i64 {
        writer.execute("insert into plain values ($1, 1)", &[&id]).await?;
    }
    for id in 0..700 {
        let change = socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
        assert_eq!(change.payload["data"]["record"]["id"], id);
    }
    assert!(reached(&server, "limits.messages_out_per_second_per_connection").await? > 0, "it never had to wait");
    server.stop().await
}

#[tokio::test]
async fn a_socket_that_joins_nothing_is_closed_with_a_reason() -> Result<()> {
    let (_postgres, server) = serving(&[("WALCAST_LIMITS__IDLE_WITHOUT_TOPIC", "1s")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut busy = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    busy.join_ok("realtime:a", plain(), None).await?;
    let mut idle = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    let (code, reason) = idle.until_closed(DEADLINE).await?.context("closed without a reason")?;
    assert_eq!(code, 1012);
    assert!(reason.contains("limits.idle_without_topic"), "{reason}");
    assert_eq!(busy.heartbeat().await?["status"], "ok", "who has a topic may be silent");
    server.stop().await
}
