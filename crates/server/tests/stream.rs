//! What a listener of the event stream is told: where it goes on, when it must read again, what its rows look like.
//!
//! Promises P1, P2 and P7 (bounds).

mod support;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, memory, migrate};
use walcast_engine::model::Position;
use walcast_testkit::{SseEvent, SseStream, TestPostgres};

const NOTES: &str = "create table notes (id bigint primary key, body text);
    grant select on notes to authenticated, service_role;";

/// A database with one schema, and Walcast beside it.
struct Scene {
    postgres: TestPostgres,
    server: Server,
}

impl Scene {
    async fn new(schema: &str, table: &str, settings: &[(&str, &str)]) -> Result<Scene> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, schema, &[table]).await?;
        let server = Server::start(&postgres, settings).await?;
        Ok(Scene { postgres, server })
    }

    /// Zero where it was never counted.
    async fn metric(&self, name: &str) -> Result<f64> {
        let text = reqwest::get(format!("{}/metrics", self.server.url)).await?.text().await?;
        Ok(text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or_default())
    }

    /// The stream and its first event.
    async fn listen(&self, table: &str, last_id: Option<&str>) -> Result<(SseStream, SseEvent)> {
        let token = self.server.token("service_role", None);
        let url = format!("{}/sse/v1/changes?table={table}", self.server.url);
        let mut stream = SseStream::open(&url, Some(&token), last_id).await?;
        let opening = stream.next(DEADLINE).await?;
        Ok((stream, opening))
    }

    async fn write(&self, sql: &str) -> Result<()> {
        self.postgres.execute(sql).await
    }
}

async fn change(stream: &mut SseStream) -> Result<SseEvent> {
    let event = stream.next_where(|event| event.event != "position", DEADLINE).await?;
    anyhow::ensure!(event.event == "change", "instead of a change there came {event:?}");
    Ok(event)
}

async fn record(stream: &mut SseStream) -> Result<Value> {
    Ok(change(stream).await?.json()?["record"].take())
}

fn id(event: &SseEvent) -> &str {
    event.id.as_deref().expect("every change has a position")
}

fn reason(event: &SseEvent) -> String {
    event.json().map(|data| data["reason"].as_str().unwrap_or_default().to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn p2_a_cursor_inside_a_transaction_goes_on_with_its_next_row() -> Result<()> {
    let scene = Scene::new(NOTES, "notes", &[]).await?;
    let (mut events, opening) = scene.listen("notes", None).await?;
    assert_eq!(opening.event, "live");
    scene.write("insert into notes select n, 'row' from generate_series(1, 4) n").await?;
    let mut heard = Vec::new();
    for _ in 0..4 {
        heard.push(change(&mut events).await?);
    }
    let positions: Vec<Position> = heard.iter().map(|event| id(event).parse()).collect::<Result<_, _>>()?;
    assert_eq!(positions.iter().map(|position| position.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(positions.iter().all(|position| position.lsn == positions[0].lsn));

    for cursor in 0..4 {
        let (mut again, opening) = scene.listen("notes", Some(id(&heard[cursor]))).await?;
        assert_eq!(opening.event, "resumed", "after row {cursor}");
        for expected in &heard[cursor + 1..] {
            assert_eq!(&change(&mut again).await?, expected, "after row {cursor}");
        }
        scene.write(&format!("insert into notes values ({}, 'later')", 100 + cursor)).await?;
        // Each came back before the next later row: what follows are the later rows, from its own on.
        let later = change(&mut again).await?.json()?;
        assert_eq!(later["record"]["body"], "later", "after row {cursor}");
        let later = change(&mut events).await?.json()?;
        assert_eq!(later["record"]["id"], 100 + cursor);
    }
    scene.server.stop().await
}

#[tokio::test]
async fn p2_a_cursor_that_cannot_be_continued_is_told_so_with_the_reason() -> Result<()> {
    let scene = Scene::new(NOTES, "notes", &[("WALCAST_STREAM__REPLAY_BYTES", "4KiB")]).await?;
    let (mut events, _) = scene.listen("notes", None).await?;
    let (mut first, mut last) = (None, None);
    for n in 0..40 {
        scene.write(&format!("insert into notes values ({n}, repeat('x', 200))")).await?;
        last = Some(change(&mut events).await?);
        first = first.or(last.clone());
    }
    let (old, newest) = (first.context("forty came")?, last.context("forty came")?);
    let place: Position = id(&newest).parse()?;
    let other_epoch = Position { epoch: walcast_engine::model::Epoch(place.epoch.0 ^ 1), ..place }.to_string();
    let ahead = Position { lsn: walcast_engine::model::Lsn(place.lsn.0 + (1 << 40)), ..place }.to_string();
    for (cursor, why) in [(id(&old), "older than what is kept"), (&other_epoch, "another epoch"), (&ahead, "ahead of the stream")]
    {
        let (mut again, opening) = scene.listen("notes", Some(cursor)).await?;
        assert_eq!(opening.event, "resync", "{why}");
        assert!(reason(&opening).contains(why), "{why}: {opening:?}");
        assert!(opening.id.is_some(), "a resync says where things go on");
        scene.write("insert into notes values ((select max(id) + 1 from notes), 'after the resync')").await?;
        assert_eq!(record(&mut again).await?["body"], "after the resync", "{why}");
    }
    let (_, opening) = scene.listen("notes", Some(id(&newest))).await?;
    assert_eq!(opening.event, "resumed", "control: the newest position is still good");

    let token = scene.server.token("service_role", None);
    let url = format!("{}/sse/v1/changes?table=notes", scene.server.url);
    for malformed in ["yesterday", "1/2/3", "00000000/0/0/x"] {
        let refused = SseStream::open(&url, Some(&token), Some(malformed)).await?;
        assert_eq!(refused.status(), 400, "{malformed}");
        let problem: Value = serde_json::from_str(&refused.text(DEADLINE).await?)?;
        assert_eq!(problem["code"], "bad_position", "{malformed}: {problem}");
        assert!(problem["hint"].is_string(), "{problem}");
    }
    scene.server.stop().await
}

#[tokio::test]
async fn p2_p7_a_replay_larger_than_the_outbox_comes_in_parts_and_whole() -> Result<()> {
    const ROWS: usize = 3_000;
    let scene = Scene::new(NOTES, "notes", &[("WALCAST_REALTIME__OUTBOX_BYTES", "64KiB")]).await?;
    let (mut live, opening) = scene.listen("notes", None).await?;
    for begin in (1..=ROWS).step_by(100) {
        scene.write(&format!("insert into notes select n, 'row' from generate_series({begin}, {}) n", begin + 99)).await?;
    }
    scene.write("insert into notes values (0, 'the last')").await?;
    let expected: Vec<i64> = (1..=ROWS as i64).chain([0]).collect();
    let all = async |stream: &mut SseStream| -> Result<Vec<i64>> {
        let mut heard = Vec::new();
        while heard.last() != Some(&0) {
            let event = stream.next(DEADLINE).await?;
            if event.event == "change" {
                heard.push(event.json()?["record"]["id"].as_i64().context("an id")?);
            }
        }
        Ok(heard)
    };
    assert!(all(&mut live).await? == expected, "the live one has missed something");
    let before = scene.metric("walcast_catch_ups_total ").await?;
    let (mut stream, resumed) = scene.listen("notes", opening.id.as_deref()).await?;
    assert_eq!(resumed.event, "resumed");
    assert!(all(&mut stream).await? == expected, "the resumed one has missed something");
    let parts = scene.metric("walcast_catch_ups_total ").await? - before;
    assert!(parts >= 2.0, "control: all came at once, so nothing was in parts ({parts})");
    scene.server.stop().await
}

#[tokio::test]
async fn a_quiet_stream_says_how_far_it_has_come() -> Result<()> {
    let scene = Scene::new(NOTES, "notes", &[]).await?;
    let (mut events, opening) = scene.listen("notes", None).await?;
    let opened: Position = id(&opening).parse()?;
    let moved = events.next(DEADLINE).await?;
    assert_eq!(moved.event, "position");
    let position: Position = id(&moved).parse()?;
    assert!(position.place() > opened.place(), "{position} is not after {opened}");
    assert_eq!(moved.json()?, json!({ "position": position.to_string() }));
    let (_, again) = scene.listen("notes", Some(id(&moved))).await?;
    assert_eq!(again.event, "resumed");
    scene.server.stop().await
}

#[tokio::test]
async fn p3_nothing_is_told_after_the_token_has_expired() -> Result<()> {
    let scene = Scene::new(NOTES, "notes", &[]).await?;
    let token = walcast_testkit::jwt(SECRET, "service_role", None, 3, json!({}));
    let url = format!("{}/sse/v1/changes?table=notes", scene.server.url);
    let mut events = SseStream::open(&url, Some(&token), None).await?;
    assert_eq!(events.next(DEADLINE).await?.event, "live");
    // Written all along, before and after.
    let writer = scene.postgres.connect().await?;
    let writing = tokio::spawn(async move {
        for n in 0i64.. {
            if writer.execute("insert into notes values ($1, extract(epoch from clock_timestamp())::text)", &[&n]).await.is_err()
            {
                return;
            }
        }
    });
    let mut told = events.until_end(DEADLINE).await?;
    let last = told.pop().context("something came")?;
    assert_eq!(last.event, "expired", "{last:?}");
    assert!(reason(&last).contains("expired"), "{last:?}");
    assert!(!told.is_empty() && told.iter().all(|event| event.event == "change"), "before it only changes came");
    assert_eq!(SseStream::open(&url, Some(&token), None).await?.status(), 401);
    writing.abort();
    scene.server.stop().await
}

#[tokio::test]
async fn a_change_of_the_schema_is_followed_in_mid_stream() -> Result<()> {
    let scene = Scene::new(
        "create table things (id bigint primary key, name text, size integer); grant select on things to service_role;",
        "things",
        &[],
    )
    .await?;
    let (mut events, _) = scene.listen("things", None).await?;
    let steps = [
        ("", "1, 'a', 10", json!({ "id": 1, "name": "a", "size": 10 })),
        (
            "alter table things add column seen boolean",
            "2, 'b', 20, true",
            json!({ "id": 2, "name": "b", "size": 20, "seen": true }),
        ),
        ("alter table things drop column size", "3, 'c', false", json!({ "id": 3, "name": "c", "seen": false })),
        ("alter table things rename column name to title", "4, 'd', null", json!({ "id": 4, "title": "d", "seen": null })),
        (
            "alter table things alter column title type integer using 0",
            "5, 55, true",
            json!({ "id": 5, "title": 55, "seen": true }),
        ),
        (
            "alter table things add column tags text[] default '{x}'",
            "6, 66, true",
            json!({ "id": 6, "title": 66, "seen": true, "tags": ["x"] }),
        ),
    ];
    for (ddl, values, expected) in steps {
        if !ddl.is_empty() {
            scene.write(ddl).await?;
        }
        scene.write(&format!("insert into things values ({values})")).await?;
        let heard = change(&mut events).await?.json()?;
        assert_eq!(heard["record"], expected, "after: {ddl}");
        let columns: Vec<&str> =
            heard["columns"].as_array().into_iter().flatten().filter_map(|column| column["name"].as_str()).collect();
        let names: Vec<&String> = expected.as_object().into_iter().flat_map(|object| object.keys()).collect();
        assert_eq!(columns, names, "after: {ddl}");
    }
    // In one transaction with the rows before and after it. Whether the role may read a column that is gone cannot be
    // told any more: it is withheld.
    scene.write("begin; insert into things values (7, 77, true); alter table things drop column seen; insert into things values (8, 88); commit").await?;
    assert_eq!(record(&mut events).await?, json!({ "id": 7, "title": 77, "tags": ["x"] }));
    assert_eq!(record(&mut events).await?, json!({ "id": 8, "title": 88, "tags": ["x"] }));
    scene.server.stop().await
}

#[tokio::test]
async fn a_large_value_that_did_not_change_is_absent_and_never_null() -> Result<()> {
    let scene = Scene::new(
        "create table documents (id bigint primary key, title text, body text, note text);
         alter table documents alter column body set storage external;
         grant select on documents to service_role;",
        "documents",
        &[],
    )
    .await?;
    let (mut events, _) = scene.listen("documents", None).await?;
    scene.write("insert into documents values (1, 'a', repeat('long ', 4000), null)").await?;
    assert_eq!(record(&mut events).await?["body"].as_str().map(str::len), Some(20_000));
    scene.write("update documents set title = 'b'").await?;
    assert_eq!(record(&mut events).await?, json!({ "id": 1, "title": "b", "note": null }), "not in the log: absent");
    scene.write("update documents set body = null").await?;
    assert_eq!(record(&mut events).await?, json!({ "id": 1, "title": "b", "body": null, "note": null }), "null is null");

    scene.write("alter table documents replica identity full").await?;
    scene.write("update documents set body = repeat('long ', 4000)").await?;
    assert_eq!(record(&mut events).await?["body"].as_str().map(str::len), Some(20_000));
    scene.write("update documents set title = 'c'").await?;
    let updated = record(&mut events).await?;
    assert_eq!(updated["title"], "c");
    assert_ne!(updated.get("body"), Some(&Value::Null), "the old image holds it: it may be there, but not as null");
    scene.server.stop().await
}

#[tokio::test]
async fn p7_a_huge_transaction_is_a_resync_and_does_not_fill_the_memory() -> Result<()> {
    let scene = Scene::new(NOTES, "notes", &[("WALCAST_STREAM__TRANSACTION_BYTES", "64KiB")]).await?;
    let (mut events, _) = scene.listen("notes", None).await?;
    scene.write("insert into notes values (-1, 'before')").await?;
    let before = change(&mut events).await?;
    let pid = scene.server.pid().context("it runs")?;
    let at_rest = memory::resident_bytes(pid)?;
    // About 100 MB of rows.
    scene.write("insert into notes select n, repeat('x', 500) from generate_series(1, 200000) n").await?;
    let told = events.next_where(|event| event.event != "position", DEADLINE).await?;
    assert_eq!((told.event.as_str(), reason(&told).as_str()), ("resync", "transaction too large"));
    let grown = memory::peak_bytes(pid)?.saturating_sub(at_rest);
    assert!(grown < 32 << 20, "memory grew by {} MB", grown >> 20);

    scene.write("insert into notes values (-2, 'after')").await?;
    assert_eq!(record(&mut events).await?["body"], "after");
    // Who was away meanwhile is told too, and who was told may go on from there.
    let (_, opening) = scene.listen("notes", Some(id(&before))).await?;
    assert_eq!((opening.event.as_str(), reason(&opening).as_str()), ("resync", "transaction too large"));
    let (mut again, opening) = scene.listen("notes", Some(id(&told))).await?;
    assert_eq!(opening.event, "resumed", "{opening:?}");
    assert_eq!(record(&mut again).await?["body"], "after");
    scene.server.stop().await
}
