//! What a listener of the event stream is told when something breaks: PostgreSQL, the slot, the listener itself, or a
//! standby that never answers. Nothing is lost in silence, and nothing grows.
//!
//! Promises P2, P7 and P8 (the database is safe).

mod support;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::{DEADLINE, SECRET, SERVE_ROLE, Server, drop_slot, memory, migrate};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
};
use walcast_engine::model::Position;
use walcast_testkit::{SseEvent, SseStream, TestPostgres, wait};

const NOTES: &str = "create table notes (id bigint generated always as identity primary key, body text);
    grant select on notes to service_role;";

async fn scene(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, NOTES, &["notes"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

async fn listen(server: &Server, last_id: Option<&str>) -> Result<(SseStream, SseEvent)> {
    let url = format!("{}/sse/v1/changes?table=notes", server.url);
    let mut stream = SseStream::open(&url, Some(&server.token("service_role", None)), last_id).await?;
    let opening = stream.next(DEADLINE).await?;
    Ok((stream, opening))
}

async fn insert(postgres: &TestPostgres, body: &str) -> Result<()> {
    postgres.execute(&format!("insert into notes (body) values ('{body}')")).await
}

/// What comes next, but for news of the position.
async fn told(stream: &mut SseStream) -> Result<SseEvent> {
    stream.next_where(|event| event.event != "position", DEADLINE).await
}

async fn body(stream: &mut SseStream) -> Result<String> {
    let event = told(stream).await?;
    ensure!(event.event == "change", "instead of a change there came {event:?}");
    Ok(event.json()?["record"]["body"].as_str().unwrap_or_default().to_owned())
}

fn position(event: &SseEvent) -> Result<Position> {
    Ok(event.id.as_deref().context("it has a position")?.parse()?)
}

fn reason(event: &SseEvent) -> String {
    event.json().map(|data| data["reason"].as_str().unwrap_or_default().to_owned()).unwrap_or_default()
}

async fn readiness(server: &Server) -> Result<(u16, Value)> {
    let answer = reqwest::get(format!("{}/readyz", server.url)).await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

#[tokio::test]
async fn p2_postgresql_goes_away_and_comes_back_and_nothing_is_lost() -> Result<()> {
    let (postgres, server) = scene(&[]).await?;
    let (mut events, _) = listen(&server, None).await?;
    for (round, crash) in [(0, false), (1, true)] {
        insert(&postgres, &format!("before {round}")).await?;
        match crash {
            true => postgres.kill9().await?,
            false => postgres.stop().await?,
        }
        server.wait_ready(false).await?;
        let (status, report) = readiness(&server).await?;
        assert_eq!((status, &report["stream"]["state"]), (503, &Value::from("away")), "{report}");
        let why = report["reasons"][0].as_str().unwrap_or_default();
        assert!(why.starts_with("the stream is away: ") && !why.ends_with("db error"), "{report}");
        postgres.start_again().await?;
        // As soon as it can be written to, whether we are back or not.
        insert(&postgres, &format!("after {round}")).await?;
        server.wait_ready(true).await?;
        assert_eq!(body(&mut events).await?, format!("before {round}"));
        assert_eq!(body(&mut events).await?, format!("after {round}"));
    }
    server.stop().await
}

#[tokio::test]
async fn p8_an_orderly_stop_of_postgresql_does_not_wait_for_us() -> Result<()> {
    let (postgres, server) = scene(&[]).await?;
    let (mut events, _) = listen(&server, None).await?;
    for n in 0..3 {
        insert(&postgres, &format!("row {n}")).await?;
        assert_eq!(body(&mut events).await?, format!("row {n}"));
        postgres.restart().await?;
        server.wait_ready(true).await?;
    }
    let log = postgres.log();
    assert!(!log.contains("immediate shutdown request"), "it had to be stopped by force:\n{log}");
    server.stop().await
}

#[tokio::test]
async fn p7_a_listener_that_does_not_read_costs_no_memory_and_is_told_what_it_missed() -> Result<()> {
    const ROWS: usize = 8_000;
    let settings = [
        ("WALCAST_REALTIME__OUTBOX_BYTES", "256KiB"),
        ("WALCAST_STREAM__REPLAY_BYTES", "2MiB"),
        ("WALCAST_STREAM__SETTLE_BYTES", "2MiB"),
    ];
    let (postgres, server) = scene(&settings).await?;
    let (mut reads, _) = listen(&server, None).await?;
    let mut sleeps = TcpStream::connect(server.url.trim_start_matches("http://")).await?;
    let token = server.token("service_role", None);
    let request = format!("GET /sse/v1/changes?table=notes HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {token}\r\n\r\n");
    sleeps.write_all(request.as_bytes()).await?;
    wait::until(DEADLINE, "both are subscribed", async || {
        readiness(&server).await.is_ok_and(|(_, report)| report["subscriptions"] == 2)
    })
    .await?;
    let pid = server.pid().context("it runs")?;
    let at_rest = memory::resident_bytes(pid)?;

    // 80 MB of events, each heard by the one that reads before the next is written.
    let writer = postgres.connect().await?;
    for _ in 0..ROWS / 10 {
        writer.execute("insert into notes (body) select repeat('x', 10000) from generate_series(1, 10)", &[]).await?;
        for _ in 0..10 {
            assert_eq!(body(&mut reads).await?.len(), 10_000, "who reads hears all");
        }
    }
    let grown = memory::peak_bytes(pid)?.saturating_sub(at_rest);
    assert!(grown < 32 << 20, "memory grew by {} MB", grown >> 20);
    let (_, report) = readiness(&server).await?;
    assert_eq!(report["ready"], true, "{report}");

    // It wakes: what the kernel and its outbox held, then that it has missed some, then what comes from then on.
    let mut rest = String::new();
    let mut until = async |word: &str| {
        tokio::time::timeout(DEADLINE, async {
            let mut chunk = vec![0; 1 << 20];
            while !rest.contains(word) {
                let count = sleeps.read(&mut chunk).await?;
                ensure!(count > 0, "the stream ended before `{word}`");
                rest.push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
            anyhow::Ok(())
        })
        .await?
    };
    until("event: resync").await?;
    insert(&postgres, "fresh").await?;
    until("fresh").await?;
    assert!(!rest.contains("event: closed"), "nobody was sent away");
    drop(sleeps);
    wait::until(DEADLINE, "it is unsubscribed", async || {
        readiness(&server).await.is_ok_and(|(_, report)| report["subscriptions"] == 1)
    })
    .await?;
    server.stop().await
}

#[tokio::test]
async fn p8_a_second_serve_on_the_same_database_ends_and_says_why() -> Result<()> {
    let (postgres, server) = scene(&[]).await?;
    let second = Command::new(env!("CARGO_BIN_EXE_walcast"))
        .arg("serve")
        .env("WALCAST_DATABASE_URL", postgres.url_as(SERVE_ROLE, "postgres"))
        .env("WALCAST_LISTEN", "127.0.0.1:0")
        .env("WALCAST_JWT_SECRET", SECRET)
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(DEADLINE, second).await.context("the second serve goes on")??;
    assert!(!ended.status.success(), "it ended with {}", ended.status);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("is in use by PID") && said.contains("database.slot"), "{said}");

    let (mut events, _) = listen(&server, None).await?;
    insert(&postgres, "the first goes on").await?;
    assert_eq!(body(&mut events).await?, "the first goes on");
    server.stop().await
}

#[tokio::test]
async fn p2_a_slot_that_is_dropped_while_running_begins_a_new_epoch_and_all_resync() -> Result<()> {
    let (postgres, server) = scene(&[]).await?;
    let (mut events, _) = listen(&server, None).await?;
    insert(&postgres, "old").await?;
    let old = told(&mut events).await?;
    drop_slot(&postgres).await?;
    let resync = told(&mut events).await?;
    assert_eq!(resync.event, "resync", "{resync:?}");
    assert!(reason(&resync).contains("slot is new"), "{resync:?}");
    assert_ne!(position(&resync)?.epoch, position(&old)?.epoch);
    server.wait_ready(true).await?;
    insert(&postgres, "new").await?;
    let new = told(&mut events).await?;
    assert!(new.data.contains("new"), "{new:?}");
    assert_eq!(position(&new)?.epoch, position(&resync)?.epoch);

    let (_, opening) = listen(&server, old.id.as_deref()).await?;
    assert_eq!(opening.event, "resync");
    assert!(reason(&opening).contains("another epoch"), "{opening:?}");
    let (mut again, opening) = listen(&server, resync.id.as_deref()).await?;
    assert_eq!(opening.event, "resumed");
    assert_eq!(told(&mut again).await?, new);
    server.stop().await
}

#[tokio::test]
async fn p2_p8_a_slot_that_lost_its_wal_while_we_were_down_is_replaced_and_all_resync() -> Result<()> {
    let postgres =
        TestPostgres::builder().setting("max_slot_wal_keep_size", "32MB").setting("min_wal_size", "32MB").start().await?;
    migrate(&postgres, NOTES, &["notes"]).await?;
    let mut server = Server::start(&postgres, &[]).await?;
    let (mut events, _) = listen(&server, None).await?;
    insert(&postgres, "old").await?;
    let old = told(&mut events).await?;
    server.kill9().await?;
    let control = postgres.connect().await?;
    wait::until(DEADLINE, "the slot has lost its WAL", async || {
        // Each is one segment of 16 MB.
        let write = "select pg_switch_wal(); insert into notes (body) values ('missed'); checkpoint";
        if control.batch_execute(write).await.is_err() {
            return false;
        }
        let sql = "select wal_status = 'lost' from pg_replication_slots where slot_name = 'walcast'";
        control.query_one(sql, &[]).await.is_ok_and(|row| row.get(0))
    })
    .await?;
    server.start_again().await?;
    let (mut again, opening) = listen(&server, old.id.as_deref()).await?;
    assert_eq!(opening.event, "resync");
    assert!(reason(&opening).contains("another epoch"), "{opening:?}");
    insert(&postgres, "new").await?;
    assert_eq!(body(&mut again).await?, "new");
    server.stop().await
}

#[tokio::test]
async fn p4_p5_what_is_streamed_and_not_yet_visible_is_invalidated_at_once_and_announced_to_nobody() -> Result<()> {
    let (postgres, server) = scene(&[("WALCAST_STREAM__SETTLE_TIMEOUT", "1s")]).await?;
    let (mut events, _) = listen(&server, None).await?;
    let (http, service) = (reqwest::Client::new(), server.token("service_role", None));
    let cached = format!("{}/cache/v1/notes/all", server.url);
    let get = || http.get(&cached).bearer_auth(&service).send();
    let put = |ticket| {
        http.put(&cached).bearer_auth(&service).header("walcast-ticket", ticket).header("cache-tag", "notes").body("[]").send()
    };
    let ticket = get().await?.headers()["walcast-ticket"].clone();
    assert_eq!(put(ticket).await?.text().await?, r#"{"stored":true}"#);
    assert_eq!(get().await?.status(), 200);

    // From here on no commit that waits for its standby ends.
    postgres.execute("alter system set synchronous_standby_names = 'nobody'").await?;
    postgres.execute("select pg_reload_conf()").await?;
    let hanging = postgres.connect().await?;
    let shown = async || -> Result<bool> {
        Ok(hanging.query_one("show synchronous_standby_names", &[]).await?.get::<_, String>(0) == "nobody")
    };
    wait::until(DEADLINE, "the setting is in force", async || shown().await.unwrap_or(false)).await?;
    let hangs =
        tokio::spawn(async move { hanging.execute("insert into notes (body) values ('waits for its standby')", &[]).await });
    wait::until(DEADLINE, "the cached entry is a miss", async || get().await.is_ok_and(|answer| answer.status() == 404)).await?;
    assert!(!hangs.is_finished());
    let visible = postgres.connect().await?.query_one("select count(*) from notes", &[]).await?;
    assert_eq!(visible.get::<_, i64>(0), 0, "control: nobody sees the row yet");
    // Read now, it would hold what was before the commit.
    let ticket = get().await?.headers()["walcast-ticket"].clone();
    let refused: Value = put(ticket).await?.json().await?;
    assert_eq!(refused["stored"], false, "{refused}");
    // A commit that waits for nobody is visible, but it comes after the one that is not.
    let quick = postgres.connect().await?;
    quick.batch_execute("set synchronous_commit = local; insert into notes (body) values ('visible at once')").await?;

    let first = told(&mut events).await?;
    assert_eq!(
        (first.event.as_str(), reason(&first).as_str()),
        ("resync", "unsettled"),
        "nothing is announced before it settles"
    );
    let waiting = quick.query_one("select backend_xid::text from pg_stat_activity where wait_event = 'SyncRep'", &[]).await?;
    let xid: String = waiting.get(0);
    let (status, report) = readiness(&server).await?;
    let why = report["reasons"].to_string();
    assert!(status == 503 && why.contains(&format!("transaction {xid} ")), "{xid}: {report}");
    quick.execute("insert into notes (body) values ('also while it waits')", &[]).await?;
    let silence = events.next_where(|event| event.event != "position", Duration::from_secs(2)).await;
    assert!(silence.is_err(), "announced while unsettled: {silence:?}");

    postgres.execute("alter system reset synchronous_standby_names").await?;
    postgres.execute("select pg_reload_conf()").await?;
    hangs.await??;
    let settled = told(&mut events).await?;
    assert_eq!((settled.event.as_str(), reason(&settled).as_str()), ("resync", "settled"));
    server.wait_ready(true).await?;
    insert(&postgres, "arrives").await?;
    assert_eq!(body(&mut events).await?, "arrives");

    let (mut again, opening) = listen(&server, first.id.as_deref()).await?;
    assert!(
        opening.event == "resync" || body(&mut again).await? == "waits for its standby",
        "what was let go is not skipped in silence"
    );
    server.stop().await
}
