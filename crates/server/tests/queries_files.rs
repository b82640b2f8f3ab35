//! The files of named queries: what a start, a reload and the commands make of them, sound and broken.

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::{
    DEADLINE, SECRET, SERVE_ROLE, Server, migrate,
    queries::{QueryDir, get},
};
use tokio::process::Command;
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "create table notes (id bigint primary key, of bigint not null, body text not null);
    insert into notes select n, n % 10, 'note ' || n from generate_series(1, 5000) n; analyze notes;
    grant select on notes to authenticated, service_role;";

async fn hang_up(server: &Server) -> Result<()> {
    let pid = server.pid().context("no process")?;
    let status = Command::new("kill").args(["-HUP", &pid.to_string()]).status().await?;
    ensure!(status.success());
    Ok(())
}

async fn queries_report(server: &Server) -> Result<Value> {
    let report: Value = reqwest::get(format!("{}/readyz", server.url)).await?.json().await?;
    Ok(report["queries"].clone())
}

#[tokio::test]
async fn a_changed_file_is_answered_anew_and_a_broken_one_keeps_the_old_set() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let dir = QueryDir::new(&[("a", "select 1 as v from notes limit 1"), ("b", "select 1 as v")])?;
    let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir.setting())]).await?;
    let service = server.token("service_role", None);
    let ask = async |name: &str| {
        let answer = get(&server, &service, &format!("/query/v1/{name}"), &[]).await?;
        anyhow::Ok((answer.status, answer.body.clone(), answer.header("cache-status").starts_with("walcast; hit")))
    };
    let one = || "[{\"v\":1}]".to_owned();
    ask("a").await?;
    ask("b").await?;
    ensure!(ask("a").await? == (200, one(), true) && ask("b").await? == (200, one(), true));

    // Changed, added, taken away; what did not change stays kept.
    dir.write("a", "select 2 as v from notes limit 1")?;
    dir.write("c", "select 3 as v")?;
    hang_up(&server).await?;
    wait::until(DEADLINE, "the new file is answered", async || ask("c").await.is_ok_and(|(status, ..)| status == 200)).await?;
    ensure!(ask("a").await? == (200, "[{\"v\":2}]".into(), false), "the changed file was answered from the old entry");
    ensure!(ask("b").await? == (200, one(), true), "a file that did not change lost its entry");

    // One broken file, and none of the new ones counts.
    dir.write("a", "select nope from notes")?;
    dir.write("d", "select 4 as v")?;
    hang_up(&server).await?;
    wait::until(DEADLINE, "the refusal is reported", async || {
        queries_report(&server).await.is_ok_and(|report| report["refused"].as_str().is_some_and(|why| why.contains("a.sql:2")))
    })
    .await?;
    ensure!(ask("a").await?.1 == "[{\"v\":2}]" && ask("d").await?.0 == 404);

    // Mended, and gone.
    dir.write("a", "select 1 as v from notes limit 1")?;
    dir.remove("b")?;
    hang_up(&server).await?;
    wait::until(DEADLINE, "the mended set is answered", async || ask("d").await.is_ok_and(|(status, ..)| status == 200)).await?;
    ensure!(ask("a").await?.1 == one() && ask("b").await?.0 == 404);
    let report = queries_report(&server).await?;
    ensure!(report["loaded"] == 3 && report["refused"].is_null(), "{report}");
    server.stop().await
}

#[tokio::test]
async fn a_start_with_broken_files_ends_and_names_each_of_them() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let dir = QueryDir::new(&[
        ("good", "select 1 as v"),
        ("column", "-- ttl: 5m\nselect\n  nope\nfrom notes"),
        ("missing", "select * from not_yet"),
        ("follows", "-- namespace: nowhere\nselect 1 as v"),
        ("order", "-- page: 5 by body\nselect body from notes"),
    ])?;
    let output = walcast(&postgres, &dir, &["serve"]).await?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success());
    for part in [
        "column.sql:4",
        "missing.sql:2",
        "relation \"not_yet\" does not exist",
        "create the table first",
        "follows.sql:1: it follows namespace `nowhere`",
        "order.sql:1",
        "not total",
    ] {
        ensure!(text.contains(part), "{part} is not in\n{text}");
    }
    ensure!(!text.contains("good.sql"), "{text}");
    Ok(())
}

#[tokio::test]
async fn check_and_explain_say_what_an_answer_hangs_on_and_what_would_help() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let dir = QueryDir::new(&[("of", "-- param: of bigint\n-- ttl: 5m\nselect id, body from notes where of = $1 order by id")])?;
    let run = async |args: &[&str]| {
        let output = walcast(&postgres, &dir, args).await?;
        anyhow::Ok((output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()))
    };
    let (_, text) = run(&["check", "--queries"]).await?;
    for part in [
        "1 queries are sound",
        "reads all 5000 rows of public.notes",
        "create index concurrently on \"public\".\"notes\" (\"of\")",
    ] {
        ensure!(text.contains(part), "{part} is not in\n{text}");
    }
    let (good, text) = run(&["explain", "of", "--param", "of= +07", "--role", "service_role", "--json"]).await?;
    ensure!(good, "{text}");
    let explained: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(explained["tags"] == serde_json::json!(["notes"]) && explained["kept"] == true, "{explained:#}");
    ensure!(explained["advice"].to_string().contains("of is known beforehand"), "{explained:#}");

    postgres.execute("create index on notes (of)").await?;
    let (good, text) = run(&["explain", "of", "--param", "of= +07", "--role", "service_role"]).await?;
    ensure!(good, "{text}");
    for part in
        ["rows whose of is $1", "notes:of=7", "notes:of=*", "replica identity full", "role: service_role", "parameter of:"]
    {
        ensure!(text.contains(part), "{part} is not in\n{text}");
    }
    let (good, text) = run(&["explain", "off"]).await?;
    ensure!(!good && text.contains("did you mean `of`?"), "{text}");

    dir.write("bad", "select nope from notes")?;
    let (good, text) = run(&["check"]).await?;
    ensure!(!good && text.contains("bad.sql:2") && text.contains("column \"nope\" does not exist"), "{text}");
    Ok(())
}

async fn walcast(postgres: &TestPostgres, dir: &QueryDir, args: &[&str]) -> Result<std::process::Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
    command
        .args(args)
        .env("WALCAST_DATABASE_URL", postgres.url_as(SERVE_ROLE, "postgres"))
        .env("WALCAST_JWT_SECRET", SECRET)
        .env("WALCAST_LISTEN", "127.0.0.1:0")
        .env("WALCAST_QUERIES__DIR", dir.setting())
        .kill_on_drop(true);
    tokio::time::timeout(DEADLINE, command.output()).await.context("walcast did not end")?.context("running walcast")
}
