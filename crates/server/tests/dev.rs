//! The life of `walcast dev`, as the real program in a directory of its own: first start, second start, reset, a second
//! `dev` beside it, Ctrl-C, kill -9, and its PostgreSQL dying under it. After each end no PostgreSQL is left.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio_postgres::NoTls;
use walcast_testkit::{SseStream, wait};

/// Far above what a start takes: a machine without PostgreSQL fetches one first.
const READY: Duration = Duration::from_secs(180);
const ENDED: Duration = Duration::from_secs(30);

/// A directory for one `dev` after another.
struct Place(TempDir);

impl Place {
    fn new() -> Result<Place> {
        let dir = tempfile::Builder::new().prefix("walcast-dev-").tempdir()?;
        // As root, PostgreSQL runs as another user, who must be able to walk through.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711))?;
        Ok(Place(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if (name.starts_with("WALCAST_") && name != "WALCAST_PG_BIN") || name == "DATABASE_URL" {
                command.env_remove(&*name);
            }
        }
        command
            .current_dir(self.path())
            .env("WALCAST_DEV_DIR", self.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Ready when this returns.
    async fn dev(&self, arguments: &[&str]) -> Result<Dev> {
        let file = self.path().join("state.json");
        // One that was killed leaves its own behind; here it would look like the new one's.
        let _ = fs::remove_file(&file);
        let mut child = self.command(&["dev", "--port", "0"]).args(arguments).spawn()?;
        wait::until(READY, "walcast dev to write its state, or to end", || {
            let settled = file.is_file() || child.try_wait().is_ok_and(|status| status.is_some());
            std::future::ready(settled)
        })
        .await?;
        if !file.is_file() {
            anyhow::bail!("walcast dev ended: {:?}", child.wait_with_output().await?);
        }
        let state = serde_json::from_slice(&fs::read(&file)?)?;
        Ok(Dev { child, state })
    }

    fn postmaster_file(&self) -> PathBuf {
        self.path().join("postgres/pgdata/postmaster.pid")
    }

    fn postmaster(&self) -> Result<u32> {
        let text = fs::read_to_string(self.postmaster_file()).context("reading postmaster.pid")?;
        Ok(text.lines().next().context("postmaster.pid is empty")?.trim().parse()?)
    }

    /// No process of a PostgreSQL works in our data.
    async fn nothing_is_left(&self, postmaster: u32) -> Result<()> {
        wait::until(ENDED, "PostgreSQL to be gone", async || !is_alive(postmaster) && !self.postmaster_file().exists()).await
    }
}

struct Dev {
    child: Child,
    state: Value,
}

impl Dev {
    fn text(&self, name: &str) -> &str {
        self.state[name].as_str().unwrap_or_default()
    }

    fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    async fn sql(&self, sql: &str) -> Result<Vec<tokio_postgres::SimpleQueryMessage>> {
        let (client, connection) = tokio_postgres::connect(self.text("admin_database_url"), NoTls).await?;
        let driving = tokio::spawn(connection);
        let answer = client.simple_query(sql).await;
        drop(client);
        driving.await??;
        Ok(answer?)
    }

    async fn count(&self, from: &str) -> Result<i64> {
        let answer = self.sql(&format!("select count(*) from {from}")).await?;
        let row = answer.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(row.context("no row")?.parse()?)
    }

    /// Exit code, stdout, stderr.
    async fn ends_by(self, signal: &str) -> Result<(i32, String, String)> {
        send(signal, self.pid()).await?;
        self.ends().await
    }

    async fn ends(self) -> Result<(i32, String, String)> {
        let output = tokio::time::timeout(ENDED, self.child.wait_with_output()).await.context("walcast dev did not end")??;
        Ok(told(&output))
    }
}

fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

async fn send(signal: &str, pid: u32) -> Result<()> {
    ensure!(pid > 1, "no such process");
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status().await?;
    ensure!(sent.success(), "kill {signal} {pid}");
    Ok(())
}

/// A zombie that nobody has waited for yet counts as gone.
fn is_alive(pid: u32) -> bool {
    match std::process::Command::new("ps").args(["-o", "stat=", "-p", &pid.to_string()]).output() {
        Ok(output) => {
            let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            !state.is_empty() && !state.starts_with('Z')
        }
        Err(_) => false,
    }
}

#[tokio::test]
async fn the_first_start_shows_everything_and_ctrl_c_ends_everything() -> Result<()> {
    let place = Place::new()?;
    let dev = place.dev(&["--rate", "50"]).await?;
    let postmaster = place.postmaster()?;
    let (url, provider) = (dev.text("url").to_owned(), dev.state["provider"]["token"].as_str().unwrap_or_default().to_owned());
    let http = reqwest::Client::new();

    let page = http.get(format!("{url}/demo")).send().await?;
    assert_eq!(page.status(), 200);
    let policy = page.headers()["content-security-policy"].to_str()?.to_owned();
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let session: Value = serde_json::from_str(&http.get(format!("{url}/demo/session.json")).send().await?.text().await?)?;
    assert_eq!(session["provider"]["token"].as_str(), Some(provider.as_str()));
    assert!(session["patient"]["patient_id"].is_i64(), "{session}");
    assert!(!session.to_string().contains(dev.text("service_key")) && !session.to_string().contains(dev.text("jwt_secret")));

    // The writer writes, the stream hears, row security lets the provider see it.
    let changes = format!("{url}/sse/v1/changes?table=vital_signs&event=INSERT");
    let mut events = SseStream::open(&changes, Some(&provider), None).await?;
    assert_eq!(events.next(READY).await?.event, "live");
    assert!(events.next(READY).await?.data.contains("heart_rate"));

    // What the banner says to copy.
    let mode = fs::metadata(place.path().join("state.json"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the keys are their owner's alone");
    let subject = dev.state["patient"]["user_id"].as_str().unwrap_or_default().to_owned();
    let (code, token, err) = told(&place.command(&["token", "--sub", &subject]).output().await?);
    assert_eq!((code, err.as_str()), (0, ""));
    let query = format!("{url}/query/v1/patient_dashboard?patient_id={}", dev.state["patient"]["patient_id"]);
    let answer = http.get(query).bearer_auth(token.trim()).send().await?;
    assert_eq!(answer.status(), 200);
    assert!(answer.headers()["cache-status"].to_str()?.starts_with("walcast; "));

    drop(events);
    let (code, out, err) = dev.ends_by("-INT").await?;
    assert_eq!((code, err.as_str()), (0, ""));
    for part in [&format!("{url}/demo"), "tail --table vital_signs", "token --sub", "WALCAST_DEV_DIR=", "50 changes"] {
        assert!(out.contains(part), "{part} in {out}");
    }
    assert!(!out.contains('\x1b'), "no terminal, so plain lines: {out:?}");
    assert!(!place.path().join("state.json").exists(), "nobody takes a dead server for a running one");
    place.nothing_is_left(postmaster).await
}

#[tokio::test]
async fn the_second_start_goes_on_and_reset_begins_anew() -> Result<()> {
    let place = Place::new()?;
    let dev = place.dev(&["--no-writer"]).await?;
    let patients = dev.count("patients").await?;
    assert!(patients >= 100, "{patients} patients");
    dev.sql("insert into messages (patient_id, provider_id, sender, body) values (1, 1, 'patient', 'still here?')").await?;
    let (database, secret) = (dev.text("admin_database_url").to_owned(), dev.text("jwt_secret").to_owned());
    let (readings, alerts) = (dev.count("vital_signs").await?, dev.count("patient_alerts").await?);
    assert_eq!(dev.ends_by("-TERM").await?.0, 0);

    let dev = place.dev(&["--no-writer"]).await?;
    assert_eq!(dev.text("admin_database_url"), database, "the port and the password are kept");
    assert_eq!(dev.text("jwt_secret"), secret, "yesterday's tokens hold");
    assert_eq!(dev.count("messages where body = 'still here?'").await?, 1);
    assert_eq!(dev.count("patients").await?, patients, "the people were loaded once");
    assert_eq!((dev.count("vital_signs").await?, dev.count("patient_alerts").await?), (readings, alerts), "nobody wrote");
    assert_eq!(dev.ends_by("-INT").await?.0, 0);

    let dev = place.dev(&["--no-writer", "--reset"]).await?;
    assert_eq!(dev.count("messages where body = 'still here?'").await?, 0);
    assert_eq!(dev.count("patients").await?, patients);
    assert_eq!(dev.text("jwt_secret"), secret, "what an application was given still works");
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn a_second_dev_is_told_who_is_here_and_a_taken_port_is_said_before_anything_is_made() -> Result<()> {
    let place = Place::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let (code, _, err) = told(&place.command(&["dev", "--port", &port]).output().await?);
    assert_eq!(code, 1);
    assert!(err.contains("is taken") && err.contains("--port") && err.contains("[cannot_listen]"), "{err}");
    assert!(!place.path().join("postgres").exists(), "no database was made for nothing");

    let dev = place.dev(&["--no-writer"]).await?;
    let same_port = dev.text("url").rsplit(':').next().unwrap_or_default().to_owned();
    for arguments in [&["dev", "--port", &same_port][..], &["dev", "--port", "0"], &["dev", "--port", "0", "--reset"]] {
        let (code, _, err) = told(&place.command(arguments).output().await?);
        assert_eq!(code, 1);
        assert!(err.contains(&format!("as process {}", dev.pid())) && err.contains(dev.text("url")), "{err}");
    }
    assert!(dev.count("patients").await? >= 100, "the first one was left in peace, also by --reset");
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn after_kill_9_no_postgresql_is_left_and_the_next_start_has_all_that_was_committed() -> Result<()> {
    let place = Place::new()?;
    let dev = place.dev(&["--no-writer"]).await?;
    let postmaster = place.postmaster()?;
    dev.sql("insert into messages (patient_id, provider_id, sender, body) values (1, 1, 'patient', 'committed')").await?;
    send("-KILL", dev.pid()).await?;
    let mut dev = dev;
    dev.child.wait().await?;
    place.nothing_is_left(postmaster).await?;

    let dev = place.dev(&["--no-writer"]).await?;
    let postmaster = place.postmaster()?;
    assert_eq!(dev.count("messages where body = 'committed'").await?, 1);
    // At once, while the dead one's supervisor is still stopping its server: it is waited for.
    send("-KILL", dev.pid()).await?;
    let mut dev = dev;
    dev.child.wait().await?;
    let dev = place.dev(&["--no-writer"]).await?;
    assert_ne!(place.postmaster()?, postmaster);
    assert_eq!(dev.count("messages where body = 'committed'").await?, 1);
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn if_postgresql_dies_dev_says_so_and_ends() -> Result<()> {
    let place = Place::new()?;
    let dev = place.dev(&["--no-writer"]).await?;
    let postmaster = place.postmaster()?;
    send("-KILL", postmaster).await?;
    let (code, _, err) = dev.ends().await?;
    assert_eq!(code, 1);
    assert!(err.contains("[postgres_ended]") && err.contains("server.log"), "{err}");
    wait::until(ENDED, "PostgreSQL to be gone", async || !is_alive(postmaster)).await?;

    let dev = place.dev(&["--no-writer"]).await?;
    assert!(dev.count("patients").await? >= 100, "it recovered");
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn a_start_that_is_broken_off_leaves_nothing_and_is_taken_up_again() -> Result<()> {
    let place = Place::new()?;
    let child = place.command(&["dev", "--port", "0", "--no-writer"]).spawn()?;
    wait::until(READY, "PostgreSQL to come up", async || place.postmaster().is_ok()).await?;
    let postmaster = place.postmaster()?;
    let dev = Dev { child, state: Value::Null };
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    place.nothing_is_left(postmaster).await?;

    let dev = place.dev(&["--no-writer"]).await?;
    assert!(dev.count("patients").await? >= 100 && dev.count("providers").await? >= 10);
    assert_eq!(dev.ends_by("-INT").await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn beyond_loopback_it_gives_out_no_keys() -> Result<()> {
    let place = Place::new()?;
    let (code, _, err) = told(&place.command(&["dev", "--server.listen", "0.0.0.0:0"]).output().await?);
    assert_eq!(code, 2);
    assert!(err.contains("loopback") && err.contains("[not_loopback]"), "{err}");
    Ok(())
}
