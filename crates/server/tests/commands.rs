//! The commands as a person runs them: the real program, its exit code, what it prints where.

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
};

use walcast_testkit::TestPostgres;

const SECRET: &str = "a secret that has at least thirty-two bytes";

/// Without anything of ours in the environment, in a directory of its own.
fn walcast(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WALCAST_") || name == "DATABASE_URL" {
            command.env_remove(name);
        }
    }
    command.current_dir(directory).env("WALCAST_DEV_DIR", directory).env("NO_COLOR", "1").args(arguments);
    command
}

fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn what_is_not_understood_ends_with_two_and_a_hint() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("walcast.toml"), "[cache]\nl1_byte = 5\n")?;
    let (code, out, err) = told(&walcast(directory.path(), &["check"]).output()?);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        err.contains("walcast.toml line 2")
            && err.contains("did you mean `cache.l1_bytes`?")
            && err.contains("[unknown_setting]"),
        "{err}"
    );

    for arguments in [
        &["chek"][..],
        &[],
        &["check", "--jsn"],
        &["token", "--expires", "soon"],
        &["migrate", "--tables", "a", "--schemas", "b"],
    ] {
        let empty = tempfile::tempdir()?;
        let (code, out, err) = told(&walcast(empty.path(), arguments).output()?);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
    }
    Ok(())
}

#[test]
fn token_prints_only_the_token() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (code, out, err) = told(&walcast(directory.path(), &["token"]).output()?);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("WALCAST_JWT_SECRET") && err.contains("[no_secret]"), "{err}");

    let (code, out, err) =
        told(&walcast(directory.path(), &["token", "--sub", "u1"]).env("WALCAST_JWT_SECRET", SECRET).output()?);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!((out.lines().count(), out.trim().split('.').count()), (1, 3));
    Ok(())
}

#[test]
fn config_shows_where_each_value_comes_from_and_no_secret() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (code, out, _) =
        told(&walcast(directory.path(), &["config", "--cache.l1-bytes", "5MB"]).env("WALCAST_JWT_SECRET", SECRET).output()?);
    assert_eq!(code, 0);
    assert!(out.contains("cache.l1_bytes = \"5MB\"  # flag --cache.l1-bytes"), "{out}");
    assert!(
        out.contains("auth.jwt_secret = (secret)  # environment variable WALCAST_JWT_SECRET") && !out.contains(SECRET),
        "{out}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_then_check_is_well() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute("create table patients (id bigint primary key); create table notes (body text)").await?;
    let directory = tempfile::tempdir()?;

    let (code, out, _) = told(&walcast(directory.path(), &["migrate", "--print"]).output()?);
    assert_eq!(code, 0);
    assert!(out.contains("create table if not exists walcast.state") && out.contains("Left out"), "{out}");
    assert_eq!(told(&walcast(directory.path(), &["migrate"]).output()?).0, 2, "needs a URL");

    let (code, out, err) = told(&walcast(directory.path(), &["migrate", "--database-url", &server.url()]).output()?);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("applied    wal/0001_state") && out.contains("published  public.patients"), "{out}");
    assert!(out.contains("public.notes is not published") && out.contains("replica identity full"), "{out}");

    let check = |url: String| {
        let output = walcast(directory.path(), &["check", "--json"])
            .env("DATABASE_URL", url)
            .env("WALCAST_JWT_SECRET", SECRET)
            .output()?;
        let (code, out, _) = told(&output);
        anyhow::Ok((code, serde_json::from_str::<serde_json::Value>(&out)?))
    };
    let (code, report) = check(server.url_as("walcast", "postgres"))?;
    assert_eq!((code, &report["ok"]), (0, &true.into()), "{report:#}");
    server.execute("alter role walcast noreplication").await?;
    let (code, report) = check(server.url_as("walcast", "postgres"))?;
    assert_eq!((code, &report["ok"]), (1, &false.into()), "{report:#}");
    Ok(())
}

/// Answers one request with these events; gives back the request's head.
fn answer(listener: &TcpListener, events: &str) -> anyhow::Result<(TcpStream, String)> {
    let (mut socket, _) = listener.accept()?;
    let mut head = String::new();
    let mut reader = BufReader::new(socket.try_clone()?);
    while !head.ends_with("\r\n\r\n") {
        anyhow::ensure!(reader.read_line(&mut head)? > 0, "the request ended early");
    }
    write!(socket, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{events}")?;
    socket.flush()?;
    Ok((socket, head))
}

#[test]
fn tail_comes_back_with_its_last_position_and_says_resync() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let directory = tempfile::tempdir()?;
    let url = format!("http://{}", listener.local_addr()?);
    let arguments = ["tail", "--table", "patients", "--event", "update", "--url", &url];
    let mut tail = walcast(directory.path(), &arguments)
        .env("WALCAST_JWT_SECRET", SECRET)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (Some(out), Some(mut err)) = (tail.stdout.take(), tail.stderr.take()) else { anyhow::bail!("no pipes") };
    let mut out = BufReader::new(out);

    let change = r#"{"schema":"public","table":"patients","type":"UPDATE","commit_timestamp":"2026-01-02T03:04:05Z","record":{"id":7,"name":"Bo"},"old_record":{"id":7}}"#;
    let (socket, head) =
        answer(&listener, &format!("event: live\nid: e/0/1/0\ndata: {{}}\n\nevent: change\nid: e/0/2/0\ndata: {change}\n\n"))?;
    assert!(head.starts_with("GET /sse/v1/changes?table=patients&event=UPDATE "), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer ey") && !head.to_lowercase().contains("last-event-id"), "{head}");
    let mut line = String::new();
    out.read_line(&mut line)?;
    assert_eq!(line, "03:04:05 UPDATE public.patients id=7  name=\"Bo\"\n");
    drop(socket);

    let (socket, head) = answer(
        &listener,
        &format!(
            "event: resync\nid: e/0/9/0\ndata: {{\"reason\":\"slot lost\"}}\n\nevent: change\nid: e/0/9/1\ndata: {change}\n\n"
        ),
    )?;
    assert!(head.to_lowercase().contains("last-event-id: e/0/2/0"), "{head}");
    line.clear();
    out.read_line(&mut line)?;
    // The alarm was written before the change that we have just read.
    tail.kill()?;
    tail.wait()?;
    drop(socket);
    let mut said = String::new();
    err.read_to_string(&mut said)?;
    assert!(said.contains("RESYNC") && said.contains("slot lost"), "{said}");
    Ok(())
}

#[test]
fn tail_stops_when_it_is_refused() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let directory = tempfile::tempdir()?;
    let url = format!("http://{}", listener.local_addr()?);
    let mut command = walcast(directory.path(), &["tail", "--table", "x", "--url", &url, "--token", "t"]);
    let tail = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut socket, _) = listener.accept()?;
    let mut byte = [0; 1024];
    let _ = socket.read(&mut byte)?;
    let body = r#"{"title":"Unauthorized","detail":"the token's signature does not hold","code":"InvalidJWT"}"#;
    write!(
        socket,
        "HTTP/1.1 401 Unauthorized\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let (code, _, err) = told(&tail.wait_with_output()?);
    assert_eq!(code, 1);
    assert!(err.contains("signature does not hold") && err.contains("InvalidJWT") && err.contains("hint:"), "{err}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn invalidate_drops_what_is_named_and_says_how_many_and_from_where_on() -> anyhow::Result<()> {
    let postgres = TestPostgres::start().await?;
    support::migrate(&postgres, "create table items (id bigint primary key)", &[]).await?;
    let server = support::Server::start(&postgres, &[]).await?;
    let reads = support::reads::Reads::service(&server);
    for id in 1..=3 {
        let stored = reads.fill(&format!("/cache/v1/n/{id}"), &format!("items:id={id}, round"), async || Ok("x".into())).await?;
        anyhow::ensure!(stored == "stored");
    }
    let directory = tempfile::tempdir()?;
    let run = |arguments: &[&str]| {
        let arguments = [&["invalidate", "--url", &server.url][..], arguments].concat();
        anyhow::Ok(told(&walcast(directory.path(), &arguments).env("WALCAST_JWT_SECRET", support::SECRET).output()?))
    };
    let (code, out, err) = run(&["--tag", "round", "--dry-run"])?;
    assert!(code == 0 && out.contains("would go  3 entries; nothing was done") && out.contains("such as   n/"), "{out}{err}");
    assert!(reads.get("/cache/v1/n/1").await?.is_hit());
    let (code, out, err) = run(&["--namespace", "n", "--key", "1"])?;
    assert!(code == 0 && out.contains("1 entry\nposition     "), "{out}{err}");
    assert!(!reads.get("/cache/v1/n/1").await?.is_hit() && reads.get("/cache/v1/n/2").await?.is_hit());
    let (code, out, err) = run(&["--tag", "round", "--tag", "items:id=3", "--all-of", "--json"])?;
    assert!(code == 0 && serde_json::from_str::<serde_json::Value>(&out)?["invalidated"] == 1, "{out}{err}");
    assert!(reads.get("/cache/v1/n/2").await?.is_hit() && !reads.get("/cache/v1/n/3").await?.is_hit());
    let (code, _, err) = run(&["--table", "nowhere"])?;
    assert!(code == 1 && err.contains("unknown_table") && err.contains("hint:"), "{err}");
    let (code, _, err) = run(&["--all", "--token", "x"])?;
    assert!(code == 1 && err.contains("401"), "{err}");
    assert_eq!(run(&["--key", "1"])?.0, 2, "a key needs its namespace");
    assert_eq!(run(&["--all"])?.0, 0);
    assert!(!reads.get("/cache/v1/n/2").await?.is_hit());
    server.stop().await
}
