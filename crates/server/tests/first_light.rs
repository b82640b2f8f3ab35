//! All of it once: a commit goes in, a fresh read and a live event come out.

mod support;

use anyhow::Result;
use support::{DEADLINE, Server, migrate};
use walcast_testkit::{SseStream, TestPostgres};

const SCHEMA: &str = "create table notes (id bigint generated always as identity primary key, body text);
    grant select on notes to authenticated, service_role;";

#[tokio::test]
async fn a_commit_reaches_a_listener_and_ends_what_was_cached() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes"]).await?;
    let server = Server::start(&postgres, &[]).await?;
    let service = server.token("service_role", None);
    let http = reqwest::Client::new();
    let cached = format!("{}/cache/v1/notes/all", server.url);

    let miss = http.get(&cached).bearer_auth(&service).send().await?;
    assert_eq!(miss.status(), 404);
    let ticket = miss.headers()["walcast-ticket"].clone();
    let put = http.put(&cached).bearer_auth(&service).header("walcast-ticket", ticket).header("cache-tag", "notes").body("[]");
    assert_eq!(put.send().await?.text().await?, r#"{"stored":true}"#);
    assert_eq!(http.get(&cached).bearer_auth(&service).send().await?.text().await?, "[]");

    let mut events = SseStream::open(&format!("{}/sse/v1/changes?table=notes", server.url), Some(&service), None).await?;
    assert_eq!(events.next(DEADLINE).await?.event, "live");
    postgres.execute("insert into notes (body) values ('hello')").await?;
    let change = events.next(DEADLINE).await?;
    assert!(change.data.contains("hello"), "{}", change.data);
    assert_eq!(http.get(&cached).bearer_auth(&service).send().await?.status(), 404, "told of the commit, so not from before it");
    server.stop().await
}
