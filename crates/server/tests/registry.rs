//! Who is connected and subscribed, as an operator sees it: by the admin JSON, by SQL, and after crashes of either side.
//!
//! Promises P9 and P10.

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{
    DEADLINE, SERVE_ROLE, Server, migrate,
    registry::{admin, gauge, in_memory, in_the_table},
};
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, wait};

const ADA: &str = "00000000-0000-4000-8000-00000000000a";
const SCHEMA: &str = "
create table plain (id bigint primary key, n int);
grant select on plain to anon, authenticated, service_role;";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["plain"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

/// As supabase-js connects with `realtime: { params: { app, component } }`.
async fn connect(server: &Server, params: &str) -> Result<RealtimeSocket> {
    let base = server.url.replacen("http", "ws", 1);
    let key = server.token("authenticated", Some(ADA));
    RealtimeSocket::connect_to(&format!("{base}/realtime/v1/websocket?apikey={key}&vsn=2.0.0{params}"), Vsn::V2).await
}

fn plain() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain" }] })
}

async fn status(server: &Server, method: reqwest::Method, path: &str, role: &str) -> Result<u16> {
    let request = reqwest::Client::new().request(method, format!("{}{path}", server.url));
    Ok(request.bearer_auth(server.token(role, None)).send().await?.status().as_u16())
}

#[tokio::test]
async fn an_operator_sees_whose_a_connection_is_and_ends_it() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_AUTH__TENANT_CLAIM", "sub")]).await?;
    let mut ward = connect(&server, "&app=clinic&component=Ward%0AList").await?;
    let mut own = plain();
    own["walcast"] = json!({ "component": "Beds" });
    ward.join_ok("realtime:beds", own, None).await?;
    ward.join_ok("realtime:ward", plain(), None).await?;
    let _other = connect(&server, "&app=billing").await?;
    postgres.execute("insert into plain values (1, 1)").await?;
    ward.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;

    let page = admin(&server, "/admin/v1/connections?app=clinic").await?;
    assert_eq!(page["total"], 1, "{page}");
    let connection = &page["connections"][0];
    for (field, expected) in [
        ("component", json!("WardList")),
        ("tenant", json!(ADA)),
        ("role", json!("authenticated")),
        ("subject", json!(ADA)),
        ("ip", json!("127.0.0.1")),
        ("kind", json!("websocket_v2")),
        ("state", json!("healthy")),
        ("subscriptions", json!(2)),
    ] {
        assert_eq!(connection[field], expected, "{field} of {connection}");
    }
    let page = admin(&server, "/admin/v1/subscriptions?component=Beds").await?;
    assert_eq!(page["total"], 1, "{page}");
    assert_eq!(page["subscriptions"][0]["bindings"], json!([{ "event": "*", "schema": "public", "table": "plain" }]));
    wait::until(DEADLINE, "the delivery is counted", async || {
        admin(&server, "/admin/v1/subscriptions?topic=realtime:beds")
            .await
            .is_ok_and(|page| page["subscriptions"][0]["delivered"] == 1 && page["subscriptions"][0]["dropped"] == 0)
    })
    .await?;
    for (filter, total) in [("tenant=nobody", 0), ("ip=127.0.0.1", 2), ("ip=10.0.0.1", 0), ("state=slow", 0), ("sort=outbox", 2)]
    {
        assert_eq!(admin(&server, &format!("/admin/v1/connections?{filter}")).await?["total"], total, "{filter}");
    }
    for (path, expected) in [("?state=odd", 400), ("?limit=0", 400), ("?limit=1001", 400), ("?colour=red", 400)] {
        let path = format!("/admin/v1/connections{path}");
        assert_eq!(status(&server, reqwest::Method::GET, &path, "service_role").await?, expected, "{path}");
    }

    let whole = admin(&server, "/admin/v1/realtime").await?;
    assert_eq!((&whole["connections"], &whole["subscriptions"]), (&json!(2), &json!(2)), "{whole}");
    assert_eq!(whole["since_start"]["delivered"], 2, "{whole}");
    assert_eq!(whole["since_start"]["success_rate"], json!({ "deliveries": 1.0, "joins": 1.0 }), "{whole}");

    let id = connection["id"].as_u64().context("an id")?;
    assert_eq!(status(&server, reqwest::Method::DELETE, &format!("/admin/v1/connections/{id}"), "service_role").await?, 200);
    let (code, reason) = ward.until_closed(DEADLINE).await?.context("closed without a reason")?;
    assert_eq!((code, reason.as_str()), (1012, "ended by an operator"));
    assert_eq!(status(&server, reqwest::Method::DELETE, &format!("/admin/v1/connections/{id}"), "service_role").await?, 404);
    assert_eq!(admin(&server, "/admin/v1/connections").await?["total"], 1);
    server.stop().await
}

#[tokio::test]
async fn p10_the_registry_is_for_the_service_role_alone() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let mut socket = connect(&server, "").await?;
    socket.join_ok("realtime:a", plain(), None).await?;
    for path in ["connections", "subscriptions", "leaks", "realtime", "cache"] {
        let path = format!("/admin/v1/{path}");
        for (role, expected) in [("authenticated", 403), ("anon", 403), ("service_role", 200)] {
            assert_eq!(status(&server, reqwest::Method::GET, &path, role).await?, expected, "{path} as {role}");
        }
        assert_eq!(reqwest::get(format!("{}{path}", server.url)).await?.status().as_u16(), 401, "{path} of nobody");
    }
    assert_eq!(status(&server, reqwest::Method::DELETE, "/admin/v1/connections/1", "authenticated").await?, 403);
    let client = postgres.connect().await?;
    for (role, allowed) in [("anon", false), ("authenticated", false), ("service_role", true)] {
        for relation in ["subscription_registry", "subscription_health"] {
            client.batch_execute(&format!("set role {role}")).await?;
            let seen = client.query(&format!("select * from walcast.{relation}"), &[]).await;
            client.batch_execute("reset role").await?;
            assert_eq!(seen.is_ok(), allowed, "{relation} as {role}: {seen:?}");
        }
        client.batch_execute(&format!("set role {role}")).await?;
        let written = client.execute("delete from walcast.subscription_registry", &[]).await;
        client.batch_execute("reset role").await?;
        assert!(written.is_err(), "{role} writes the registry");
    }
    // Nothing of it may reach the stream.
    let published = "select count(*) from pg_publication_tables where schemaname = 'walcast' and tablename ~ 'registry'";
    assert_eq!(client.query_one(published, &[]).await?.get::<_, i64>(0), 0);
    ensure!(postgres.connect_as(SERVE_ROLE).await?.query("select * from walcast.subscription_health", &[]).await.is_ok());
    server.stop().await
}

#[tokio::test]
async fn p9_the_table_equals_the_memory_again_after_either_side_has_crashed() -> Result<()> {
    let (postgres, mut server) = serving(&[]).await?;
    let mut socket = connect(&server, "&app=clinic").await?;
    // No text of a client's may stand in the mirror's way.
    let topics = ["realtime:a", "realtime:'; drop table plain; --", "realtime:nul\u{0}nul", "realtime:\u{1F9A6}\\u0000\""];
    for topic in topics {
        socket.join_ok(topic, plain(), None).await?;
    }
    let mirrored = async |count: usize, what: &str| {
        wait::until(DEADLINE, what, async || in_the_table(&postgres).await.is_ok_and(|found| found.len() == count)).await
    };
    mirrored(4, "four rows").await?;
    socket.leave("realtime:a").await?;
    mirrored(3, "three rows").await?;

    postgres.kill9().await?;
    postgres.start_again().await?;
    ensure!(in_memory(&server).await?.len() == 3, "the connection outlived PostgreSQL");
    mirrored(3, "three rows, written anew after the crash had emptied the table").await?;

    // Its rows stay behind, and the next one clears them.
    server.kill9().await?;
    ensure!(in_the_table(&postgres).await?.len() == 3);
    server.start_again().await?;
    mirrored(0, "the dead server's rows are gone").await?;
    let mut socket = connect(&server, "").await?;
    socket.join_ok("realtime:b", plain(), None).await?;
    mirrored(1, "one row").await?;
    // In peace it leaves nothing.
    server.stop().await?;
    ensure!(in_the_table(&postgres).await?.is_empty(), "a server that stopped left rows");
    let instances = postgres.connect().await?.query("select from walcast.registry_instances", &[]).await?;
    ensure!(instances.is_empty(), "a server that stopped left itself");
    Ok(())
}

#[tokio::test]
async fn leaks_of_an_application_are_told_in_words() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_REALTIME__LEAK_WINDOW", "1s")]).await?;
    let mut tidy = connect(&server, "&app=clinic&component=Tidy").await?;
    tidy.join_ok("realtime:tidy", plain(), None).await?;
    let mut board = connect(&server, "&app=clinic&component=Board").await?;
    for topic in ["realtime:1", "realtime:2"] {
        board.join_ok(topic, plain(), None).await?;
    }
    board.join_ok("realtime:silent", json!({}), None).await?;
    let found = async |kind: &str| {
        wait::until_some(DEADLINE, format!("a leak: {kind}"), async || {
            let report = admin(&server, "/admin/v1/leaks").await.ok()?;
            let leak = report["leaks"].as_array()?.iter().find(|leak| leak["kind"] == kind)?.clone();
            (report["counts"][kind] == 1).then_some(leak)
        })
        .await
    };
    let duplicate = found("duplicate").await?;
    assert_eq!((&duplicate["component"], &duplicate["subscriptions"]), (&json!("Board"), &json!(2)), "{duplicate}");
    let unheard = found("unheard").await?;
    assert_eq!(unheard["topic"], "realtime:silent", "{unheard}");
    // One component opens and never closes; each a subscription of its own.
    let mut leaky = connect(&server, "&app=clinic&component=Leaky").await?;
    let mut growing = None;
    for n in 0..90 {
        let own = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain", "filter": format!("id=eq.{n}") }] });
        leaky.join_ok(&format!("realtime:{n}"), own, None).await?;
        let report = admin(&server, "/admin/v1/leaks").await?;
        growing = report["leaks"].as_array().context("a list")?.iter().find(|leak| leak["kind"] == "growing").cloned();
        if growing.is_some() {
            break;
        }
        // A leak takes time: ten looks are one window.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let growing = growing.context("the component that only grows was not found")?;
    assert_eq!(growing["component"], "Leaky", "{growing}");
    assert!(growing["text"].as_str().is_some_and(|text| text.contains("only become more")), "{growing}");
    ensure!(gauge(&server, "walcast_leaks{kind=\"duplicate\"} ").await? == Some(1.0), "no metric");
    let client = postgres.connect().await?;
    wait::until(DEADLINE, "the view names the leak", async || {
        let sql = "select count(*) from walcast.subscription_health where state = 'leaking' and component = 'Board' and reason ~ 'more than once'";
        client.query_one(sql, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 2)
    })
    .await?;
    // What was mended is a leak no more.
    board.leave("realtime:2").await?;
    wait::until(DEADLINE, "the duplicate is over", async || {
        admin(&server, "/admin/v1/leaks").await.is_ok_and(|report| report["counts"]["duplicate"] == 0)
    })
    .await?;
    let tidy = admin(&server, "/admin/v1/subscriptions?component=Tidy").await?;
    assert_eq!(tidy["subscriptions"][0]["state"], "healthy", "{tidy}");
    server.stop().await
}
