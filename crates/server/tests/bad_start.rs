//! What a bad start gets: an exit code, one clear sentence and a hint; nothing made in the database; and never a secret,
//! neither then nor while it runs.

mod support;

use std::{
    net::TcpListener,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use reqwest::Client;
use serde_json::json;
use support::{DEADLINE, SECRET, SERVE_ROLE, Server, migrate};
use tokio::{io::AsyncReadExt, process::Command};
use walcast_testkit::{TestPostgres, jwt};

const SCHEMA: &str = "
create table notes (id bigint primary key, body text);
grant select on notes to authenticated, service_role;";

/// `walcast serve` that must not come up: exit code, stdout and stderr.
async fn fails(directory: &Path, url: &str, edit: impl FnOnce(&mut Command)) -> Result<(i32, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WALCAST_") || name == "DATABASE_URL" {
            command.env_remove(name);
        }
    }
    command
        .arg("serve")
        .current_dir(directory)
        .env("NO_COLOR", "1")
        .env("WALCAST_DATABASE_URL", url)
        .env("WALCAST_JWT_SECRET", SECRET)
        .env("WALCAST_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    edit(&mut command);
    let Output { status, stdout, stderr } =
        tokio::time::timeout(DEADLINE, command.output()).await.context("serve did not end")??;
    let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    ensure!(!said.contains(SECRET) && !said.contains("hunter2"), "a secret was printed: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok((status.code().unwrap_or(-1), said))
}

fn says(what: &str, (code, said): &(i32, String), exit: i32, words: &[&str]) -> Result<()> {
    ensure!(*code == exit, "{what}: exit code {code} instead of {exit}: {said}");
    ensure!(said.matches("error: ").count() >= 1 && said.contains("hint: "), "{what}: no sentence or no hint: {said}");
    for word in words {
        ensure!(said.contains(word), "{what}: `{word}` is not in {said}");
    }
    Ok(())
}

async fn untouched(postgres: &TestPostgres) -> Result<()> {
    let client = postgres.connect().await?;
    let slots: i64 = client.query_one("select count(*) from pg_replication_slots", &[]).await?.get(0);
    assert_eq!(slots, 0, "a slot was made");
    Ok(())
}

#[tokio::test]
async fn a_database_that_does_not_fit_ends_serve_and_nothing_is_made() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let dir = directory.path();

    let replica = TestPostgres::builder().setting("wal_level", "replica").start().await?;
    let told = fails(dir, &replica.url(), |_| {}).await?;
    says("wal_level=replica", &told, 1, &["wal_level", "logical", "restart"])?;
    untouched(&replica).await?;
    let client = replica.connect().await?;
    let schemas: i64 = client.query_one("select count(*) from pg_namespace where nspname = 'walcast'", &[]).await?.get(0);
    assert_eq!(schemas, 0, "a schema was made");

    let empty = TestPostgres::start().await?;
    let told = fails(dir, &empty.url(), |_| {}).await?;
    says("not migrated", &told, 1, &["walcast migrate"])?;
    untouched(&empty).await?;
    let client = empty.connect().await?;
    let schemas: i64 = client.query_one("select count(*) from pg_namespace where nspname = 'walcast'", &[]).await?.get(0);
    assert_eq!(schemas, 0, "a schema was made");

    migrate(&empty, SCHEMA, &[]).await?;
    empty.execute("alter role walcast noreplication").await?;
    let told = fails(dir, &empty.url_as(SERVE_ROLE, "postgres"), |_| {}).await?;
    says("no replication right", &told, 1, &["alter role", "replication"])?;
    empty.execute("alter role walcast replication; drop publication walcast").await?;
    let told = fails(dir, &empty.url_as(SERVE_ROLE, "postgres"), |_| {}).await?;
    says("no publication", &told, 1, &["publication"])?;
    untouched(&empty).await
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_or_named_ends_serve() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let dir = directory.path();
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let told = fails(dir, &format!("postgres://walcast:hunter2@127.0.0.1:{free}/app"), |_| {}).await?;
    says("nobody listens", &told, 1, &["database_away", "PostgreSQL"])?;
    let told = fails(dir, "postgres://walcast:hunter2@no-such-host.invalid/app", |_| {}).await?;
    says("no such host", &told, 1, &["database_away"])?;
    let told = fails(dir, "mysql://walcast:hunter2@localhost/app", |_| {}).await?;
    ensure!(told.0 == 2 && told.1.contains("postgresql://"), "another scheme: {told:?}");
    let told = fails(dir, "postgres://walcast:hunter2@localhost:notaport/app", |_| {}).await?;
    ensure!(told.0 == 2 && told.1.contains("bad_database_url"), "a port of letters: {told:?}");
    let told = fails(dir, "postgres://walcast:hunter2@localhost/app?sslmode=perhaps", |_| {}).await?;
    ensure!(told.0 == 2 && told.1.contains("sslmode"), "an sslmode of its own: {told:?}");

    let postgres = TestPostgres::start().await?;
    let told = fails(dir, &postgres.url_as("postgres", "no_such_database"), |_| {}).await?;
    ensure!(told.0 == 1 && told.1.contains("no_such_database"), "no such database: {told:?}");
    let told = fails(dir, &postgres.url_as("nobody_here", "postgres"), |_| {}).await?;
    ensure!(told.0 == 1 && told.1.contains("nobody_here"), "no such role: {told:?}");
    let told = fails(dir, "", |command| {
        command.env_remove("WALCAST_DATABASE_URL");
    })
    .await?;
    says("no database", &told, 2, &["WALCAST_DATABASE_URL", "no_database"])?;
    let told = fails(dir, &postgres.url(), |command| {
        command.env_remove("WALCAST_JWT_SECRET");
    })
    .await?;
    says("no secret", &told, 2, &["WALCAST_JWT_SECRET", "no_secret"])?;
    untouched(&postgres).await
}

#[tokio::test]
async fn a_taken_port_and_a_slot_in_use_end_the_second_serve_and_not_the_first() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes"]).await?;
    let server = Server::start(&postgres, &[]).await?;
    let directory = tempfile::tempdir()?;
    let url = postgres.url_as(SERVE_ROLE, "postgres");
    let address = server.url.trim_start_matches("http://").to_owned();
    let told = fails(directory.path(), &url, |command| {
        command.env("WALCAST_LISTEN", &address);
    })
    .await?;
    ensure!(told.0 == 1 && told.1.contains("taken by another program") && told.1.contains("WALCAST_LISTEN"), "{told:?}");
    let told = fails(directory.path(), &url, |_| {}).await?;
    ensure!(told.0 == 1 && told.1.contains("in use by PID") && told.1.contains("database.slot"), "{told:?}");
    assert_eq!(reqwest::get(format!("{}/readyz", server.url)).await?.status(), 200, "the first serves on");
    server.stop().await
}

#[tokio::test]
async fn an_unknown_setting_is_told_the_nearest_wherever_it_stands() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let url = "postgres://walcast:hunter2@127.0.0.1:1/app";
    let told = fails(directory.path(), url, |command| {
        command.env("WALCAST_CACHE__L1_BYTE", "5MB").env("WALCAST_STREAM__HEARTBEAT", "often");
    })
    .await?;
    says("environment", &told, 2, &["WALCAST_CACHE__L1_BYTE", "did you mean", "L1_BYTES", "stream.heartbeat"])?;
    let told = fails(directory.path(), url, |command| {
        command.arg("--cache.strikt");
    })
    .await?;
    ensure!(told.0 == 2 && told.1.contains("--cache.strict"), "flag: {told:?}");
    std::fs::write(directory.path().join("walcast.toml"), "[realtime]\nmax_frame_byte = 1\n\n[auth]\njwt_secret = 5\n")?;
    let told = fails(directory.path(), url, |_| {}).await?;
    says("file", &told, 2, &["walcast.toml line 2", "realtime.max_frame_bytes"])?;
    std::fs::write(directory.path().join("walcast.toml"), "[realtime\nx")?;
    let told = fails(directory.path(), url, |_| {}).await?;
    ensure!(told.0 == 2 && told.1.contains("walcast.toml"), "broken file: {told:?}");
    std::fs::remove_file(directory.path().join("walcast.toml"))?;
    let told = fails(directory.path(), url, |command| {
        command.env_remove("WALCAST_JWT_SECRET").env("WALCAST_JWT_SECRET_FILE", "/no/such/file");
    })
    .await?;
    ensure!(told.0 == 2 && told.1.contains("/no/such/file"), "secret file: {told:?}");
    Ok(())
}

/// Everything that a running server says, at its most talkative, while it is asked good and bad things.
#[tokio::test]
async fn the_secret_the_password_and_tokens_are_never_printed() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes"]).await?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut child = Command::new(env!("CARGO_BIN_EXE_walcast"))
        .arg("serve")
        .env("WALCAST_DATABASE_URL", format!("postgres://walcast:hunter2@127.0.0.1:{}/postgres", postgres.port()))
        .env("WALCAST_LISTEN", format!("127.0.0.1:{port}"))
        .env("WALCAST_JWT_SECRET", SECRET)
        .env("WALCAST_LOG__LEVEL", "trace")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (mut out, mut err) = (child.stdout.take().context("stdout")?, child.stderr.take().context("stderr")?);
    let reading = tokio::spawn(async move {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let _ = tokio::join!(out.read_to_end(&mut a), err.read_to_end(&mut b));
        a.extend(b);
        String::from_utf8_lossy(&a).into_owned()
    });
    let url = format!("http://127.0.0.1:{port}");
    walcast_testkit::wait::until(DEADLINE, "the server is ready", async || {
        reqwest::get(format!("{url}/readyz")).await.is_ok_and(|answer| answer.status().is_success())
    })
    .await?;
    let token = jwt(SECRET, "service_role", None, 600, json!({}));
    let http = Client::new();
    for path in ["/cache/v1/n/k", "/sse/v1/changes?table=no", "/query/v1/x"] {
        http.get(format!("{url}{path}")).bearer_auth(&token).send().await?;
        http.get(format!("{url}{path}{}apikey={token}", if path.contains('?') { '&' } else { '?' })).send().await?;
    }
    for path in ["/", "/readyz", "/metrics"] {
        let text = http.get(format!("{url}{path}")).send().await?.text().await?;
        ensure!(!text.contains(SECRET) && !text.contains("hunter2"), "{path} tells a secret");
    }
    let pid = child.id().context("the server is gone")?;
    Command::new("kill").args(["-TERM", &pid.to_string()]).status().await?;
    let status = tokio::time::timeout(Duration::from_secs(30), child.wait()).await.context("serve did not end")??;
    ensure!(status.success(), "{status}");
    let said = reading.await?;
    ensure!(said.len() > 500, "hardly anything was logged: {said}");
    for (name, secret) in [("secret", SECRET), ("password", "hunter2"), ("token", &token)] {
        let line = said.lines().find(|line| line.contains(secret));
        ensure!(line.is_none(), "the {name} was logged: {line:?}");
    }
    Ok(())
}
