//! What an operator learns of one topic, connection or table while it happens, and what a support file says. Neither shows a
//! value of a row, nor who somebody is, unless the config permits it (P3).

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, Server, migrate, registry::admin};
use tokio::process::Command;
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, wait};

const ADA: &str = "00000000-0000-4000-8000-00000000000a";
const BOB: &str = "00000000-0000-4000-8000-00000000000b";
const SCHEMA: &str = "
create table notes (id bigint primary key, owner uuid, body text);
alter table notes enable row level security;
create policy own on notes for select to authenticated using (owner = auth.uid());
grant select on notes to authenticated, service_role;";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

fn notes() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "notes", "filter": "id=lt.4711" }] })
}

async fn send(server: &Server, method: reqwest::Method, path: &str, body: Value) -> Result<(u16, Value)> {
    let request = reqwest::Client::new().request(method, format!("{}{path}", server.url)).json(&body);
    let answer = request.bearer_auth(server.token("service_role", None)).send().await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

async fn tap(server: &Server, what: Value) -> Result<u64> {
    let (status, answer) = send(server, reqwest::Method::POST, "/admin/v1/trace", what).await?;
    ensure!(status == 201, "{status} {answer}");
    answer["id"].as_u64().context("no id")
}

/// The trace, once it has seen an event of each kind.
async fn seen(server: &Server, id: u64, kinds: &[&str]) -> Result<Value> {
    wait::until_some(DEADLINE, format!("trace {id} has seen {kinds:?}"), async || {
        let report = admin(server, &format!("/admin/v1/trace/{id}")).await.ok()?;
        let events = report["events"].as_array()?;
        kinds.iter().all(|kind| events.iter().any(|event| event["event"] == *kind)).then_some(report)
    })
    .await
}

fn first<'a>(report: &'a Value, kind: &str) -> &'a Value {
    report["events"].as_array().and_then(|events| events.iter().find(|event| event["event"] == kind)).unwrap_or(&Value::Null)
}

#[tokio::test]
async fn a_tap_tells_what_became_of_each_change_and_shows_no_value() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let topic = tap(&server, json!({ "topic": "realtime:ada", "seconds": 600, "payloads": true })).await?;
    let table = tap(&server, json!({ "table": "notes", "seconds": 600 })).await?;
    let mut ada = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(ADA)), Vsn::V2).await?;
    ada.join_ok("realtime:ada", notes(), None).await?;
    let mut bob = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(BOB)), Vsn::V1).await?;
    bob.join_ok("realtime:bob", notes(), None).await?;
    let page = admin(&server, "/admin/v1/subscriptions?topic=realtime:bob").await?;
    let bobs = page["subscriptions"][0]["connection"].as_u64().context("an id")?;
    let connection = tap(&server, json!({ "connection": bobs, "seconds": 600 })).await?;
    postgres.execute(&format!("insert into notes values (1, '{ADA}', 'a diagnosis')")).await?;
    ada.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
    bob.send_text("{ no frame").await?;
    ada.leave("realtime:ada").await?;

    let report = seen(&server, topic, &["join", "delivered", "leave"]).await?;
    let delivered = first(&report, "delivered");
    assert_eq!(delivered["table"], "public.notes", "{delivered}");
    assert!(delivered["bytes"].as_u64() > Some(100) && delivered["latency_ms"].is_number(), "{delivered}");
    assert!(delivered["position"].as_str().is_some_and(|position| position.split('/').count() == 4), "{delivered}");
    let text = report.to_string();
    assert!(text.contains("\"body\":\"text(11)\"") && !text.contains("diagnosis") && !text.contains(ADA), "{text}");
    assert_eq!(report["payloads"], "masked");
    // Bob's policy hides it; a trace says so, and nothing else of it.
    let report = seen(&server, table, &["delivered", "hidden"]).await?;
    assert_eq!(first(&report, "hidden")["connection"], bobs, "{report}");
    assert!(!report.to_string().contains("payload\""), "{report}");
    drop(bob);
    let report = seen(&server, connection, &["error", "hidden", "close"]).await?;
    assert_eq!(first(&report, "error")["detail"], "malformed_frame", "{report}");
    for (body, why) in [
        (json!({ "seconds": 60 }), "nothing"),
        (json!({ "topic": "a", "table": "b", "seconds": 60 }), "two things"),
        (json!({ "topic": "a", "seconds": 601 }), "for too long"),
        (json!({ "topic": "a", "seconds": 0 }), "for no time"),
        (json!({ "topic": "a", "seconds": 60, "colour": 1 }), "an unknown word"),
    ] {
        let (status, answer) = send(&server, reqwest::Method::POST, "/admin/v1/trace", body).await?;
        assert_eq!((status, &answer["code"]), (400, &json!("bad_trace")), "{why}: {answer}");
    }
    for expected in [200, 404] {
        let (status, answer) = send(&server, reqwest::Method::DELETE, &format!("/admin/v1/trace/{topic}"), json!({})).await?;
        assert_eq!(status, expected, "{answer}");
    }
    assert_eq!(admin(&server, "/admin/v1/trace").await?["traces"].as_array().map(Vec::len), Some(2));
    server.stop().await
}

#[tokio::test]
async fn p3_a_support_file_names_nobody_and_holds_no_secret() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let mut ada = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(ADA)), Vsn::V2).await?;
    ada.join_ok("realtime:patient:4711", notes(), None).await?;
    ada.join_ok("realtime:again", notes(), None).await?;
    postgres.execute(&format!("insert into notes values (1, '{ADA}', 'a diagnosis')")).await?;
    ada.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("support.json");
    let support = |out: &std::path::Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
        command.args(["support", "--url", &server.url, "--out"]).arg(out);
        command.env("WALCAST_JWT_SECRET", support::SECRET).env_remove("WALCAST_CONFIG");
        command
    };
    let output = support(&path).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&path)?;
    let file: Value = serde_json::from_str(&text)?;
    for part in
        ["settings", "health", "realtime", "cache", "warnings", "metrics", "connections", "subscriptions", "leaks", "traces"]
    {
        ensure!(!file[part].is_null(), "no {part} in {text}");
    }
    assert_eq!(file["subscriptions"]["total"], 2);
    assert!(
        file["subscriptions"]["subscriptions"][0]["bindings"][0]["filter"].as_str().is_some_and(|f| f.starts_with("id=lt.#"))
    );
    assert!(file["metrics"].as_str().is_some_and(|metrics| metrics.contains("walcast_connections 1")), "metrics");
    for secret in [support::SECRET, ADA, "4711", "diagnosis"] {
        assert!(!text.contains(secret), "{secret:?} is in the support file");
    }
    // For its owner's eyes, and never over another.
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    let output = support(&path).output().await?;
    ensure!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("cannot_write"));
    let output = support("-".as_ref()).output().await?;
    ensure!(serde_json::from_slice::<Value>(&output.stdout)?["walcast"].is_string());
    server.stop().await?;

    // The control: where the config permits it, all of this is there.
    let server = Server::start(&postgres, &[("WALCAST_REALTIME__TRACE_PAYLOADS", "true")]).await?;
    let mut ada = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(ADA)), Vsn::V2).await?;
    tap(&server, json!({ "topic": "realtime:patient:4711", "seconds": 600, "payloads": true })).await?;
    ada.join_ok("realtime:patient:4711", notes(), None).await?;
    postgres.execute(&format!("insert into notes values (2, '{ADA}', 'a diagnosis')")).await?;
    ada.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
    let text = admin(&server, "/admin/v1/support").await?.to_string();
    for shown in [ADA, "4711", "diagnosis"] {
        assert!(text.contains(shown), "{shown:?} is not in the support file");
    }
    assert!(!text.contains(support::SECRET), "the secret is in the support file");
    server.stop().await
}
