//! Rows of any number as lines: all of them, in constant memory, with their end or their error, and for the reader alone.

mod support;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use serde_json::Value;
use support::{
    DEADLINE, Server,
    memory::{peak_bytes, resident_bytes},
    migrate,
    queries::{QueryDir, get},
};
use walcast_testkit::{TestPostgres, wait};

const ROWS: u64 = 1_000_000;
/// What a stream may add at its peak: chunks, the connection's buffers, and what an allocator keeps.
const ROOM: u64 = 48 << 20;

async fn server(files: &[(&str, &str)]) -> Result<(TestPostgres, QueryDir, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, "create table notes (id bigint primary key); grant select on notes to authenticated, service_role", &[])
        .await?;
    let dir = QueryDir::new(files)?;
    let server =
        Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir.setting()), ("WALCAST_DATABASE__STATEMENT_TIMEOUT", "60s")])
            .await?;
    Ok((postgres, dir, server))
}

async fn lines(server: &Server, path: &str) -> Result<reqwest::Response> {
    let request = reqwest::Client::new().get(format!("{}{path}", server.url)).bearer_auth(server.token("service_role", None));
    Ok(request.header("accept", "application/x-ndjson").send().await?.error_for_status()?)
}

#[tokio::test]
async fn p7_a_million_rows_stream_in_constant_memory_and_the_last_is_the_last() -> Result<()> {
    let sql = "-- param: n bigint\nselect i, md5(i::text) as a, repeat('x', 60) as b from generate_series(1, $1) i";
    let (_postgres, _dir, server) = server(&[("rows", sql)]).await?;
    // Whatever the first use of anything takes is taken.
    lines(&server, "/query/v1/rows?n=20000").await?.bytes().await?;
    let pid = server.pid().context("no process")?;
    let before = resident_bytes(pid)?;
    let answer = lines(&server, &format!("/query/v1/rows?n={ROWS}")).await?;
    ensure!(answer.headers()["content-type"] == "application/x-ndjson");
    ensure!(answer.headers()["cache-control"] == "private, no-store" && answer.headers().contains_key("walcast-position"));
    let (mut rows, mut bytes, mut tail) = (0, 0, Vec::new());
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        rows += chunk.iter().filter(|byte| **byte == b'\n').count() as u64;
        bytes += chunk.len() as u64;
        tail.extend_from_slice(&chunk);
        let keep = tail.len().saturating_sub(300);
        tail.drain(..keep);
    }
    let last: Value = serde_json::from_str(String::from_utf8_lossy(&tail).trim_end().rsplit('\n').next().unwrap_or_default())?;
    ensure!((rows, last["i"].as_u64()) == (ROWS, Some(ROWS)), "{rows} rows, the last {last}");
    let grown = peak_bytes(pid)?.saturating_sub(before);
    println!("{rows} rows, {} MB, memory grew by {} MB at its peak", bytes >> 20, grown >> 20);
    ensure!(grown < ROOM, "memory grew by {} MB for {} MB of rows", grown >> 20, bytes >> 20);
    server.stop().await
}

#[tokio::test]
async fn an_error_in_the_middle_is_the_last_line_and_one_at_the_start_is_a_status() -> Result<()> {
    let sql = "-- param: n bigint\nselect i, 100 / (i - $1) as x from generate_series(1, 50000) i";
    let (_postgres, _dir, server) = server(&[("rows", sql)]).await?;
    let text = lines(&server, "/query/v1/rows?n=40000").await?.text().await?;
    let all: Vec<&str> = text.lines().collect();
    let last: Value = serde_json::from_str(all.last().context("no line")?)?;
    ensure!(
        last["error"]["code"] == "query_refused" && last["error"]["title"].to_string().contains("division by zero"),
        "{last}"
    );
    ensure!(all.len() > 1000 && all.len() < 40_001, "{} lines", all.len());
    let service = server.token("service_role", None);
    let ndjson = [("accept", "text/html, application/x-ndjson;q=0.9")];
    for (path, status, code) in [
        ("/query/v1/rows?n=1", 422, "query_refused"),
        ("/query/v1/rows?n=x", 400, "bad_parameter"),
        ("/query/v1/nope", 404, "unknown_query"),
    ] {
        let answer = get(&server, &service, path, &ndjson).await?;
        ensure!((answer.status, answer.json()?["code"].as_str()) == (status, Some(code)), "{path}: {}", answer.body);
    }
    server.stop().await
}

#[tokio::test]
async fn p8_a_reader_who_goes_away_takes_his_query_with_him() -> Result<()> {
    let sql =
        "select repeat('x', 1000) as b from generate_series(1, 1000) i, generate_series(1, 1000) j, generate_series(1, 1000) k";
    let (postgres, _dir, server) = server(&[("endless", sql)]).await?;
    let client = postgres.connect().await?;
    let busy = async || {
        let sql = "select count(*) from pg_stat_activity where query like '%walcast_c%' and pid <> pg_backend_pid() and state <> 'idle'";
        client.query_one(sql, &[]).await.map_or(-1, |row| row.get::<_, i64>(0))
    };
    let mut readers = Vec::new();
    for _ in 0..2 {
        let mut body = lines(&server, "/query/v1/endless").await?.bytes_stream();
        body.next().await.context("no rows")??;
        readers.push(body);
    }
    ensure!(busy().await == 2, "control: the streams do not run");
    drop(readers);
    wait::until(DEADLINE, "their queries are gone", async || busy().await == 0).await?;
    server.stop().await
}
