//! For the tests of promises: a migrated database, and the real program as its own process, serving as the role that
//! `migrate` made, with exactly its rights (P10).

#![allow(dead_code)] // Each test binary uses its own part.

pub mod control_feed;
pub mod memory;
pub mod queries;
pub mod reads;
pub mod registry;
pub mod school;
pub mod unseen;

use std::{net::TcpListener, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::process::{Child, Command};
use walcast_testkit::{TestPostgres, wait};

pub const SECRET: &str = "a secret for tests, at least thirty-two bytes";
/// Ten times what anything here should take: it only catches hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The role that every test serves as.
pub const SERVE_ROLE: &str = "walcast";

/// Runs `schema` as the superuser, then `walcast migrate`, which publishes its tables to the cache; then publishes
/// `realtime` tables to clients.
pub async fn migrate(postgres: &TestPostgres, schema: &str, realtime: &[&str]) -> Result<()> {
    run_migrate(postgres).await?;
    postgres.execute(schema).await?;
    run_migrate(postgres).await?;
    for table in realtime {
        postgres.execute(&format!("alter publication supabase_realtime add table {table}")).await?;
    }
    Ok(())
}

/// As an operator's mistake would, under a server that holds it.
pub async fn drop_slot(postgres: &TestPostgres) -> Result<()> {
    let sql = "do $$ begin loop
            begin
                perform pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = 'walcast' and active_pid is not null;
                perform pg_drop_replication_slot('walcast');
                exit;
            exception when object_in_use then perform pg_sleep(0.001);
            end;
        end loop; end $$";
    postgres.execute(sql).await
}

async fn run_migrate(postgres: &TestPostgres) -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_walcast"))
        .args(["migrate", "--database-url", &postgres.url(), "--serve-role", SERVE_ROLE])
        .env_remove("WALCAST_CONFIG")
        .output()
        .await?;
    if !output.status.success() {
        bail!("walcast migrate: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// `walcast serve` as a process of its own. Ends with this value.
pub struct Server {
    child: Child,
    pub url: String,
    port: u16,
    database_url: String,
    settings: Vec<(String, String)>,
    /// Read anew whenever the server starts.
    config: Option<tempfile::NamedTempFile>,
}

impl Server {
    /// With `toml` as its `walcast.toml`.
    pub async fn configured(postgres: &TestPostgres, toml: &str, settings: &[(&str, &str)]) -> Result<Server> {
        let file = tempfile::Builder::new().suffix(".toml").tempfile()?;
        std::fs::write(file.path(), toml)?;
        let path = file.path().to_str().context("a path that is text")?;
        let settings: Vec<_> = [("WALCAST_CONFIG", path)].into_iter().chain(settings.iter().copied()).collect();
        let mut server = Server::start(postgres, &settings).await?;
        server.config = Some(file);
        Ok(server)
    }

    /// `settings` are environment variables, such as `("WALCAST_STREAM__REPLAY_BYTES", "1MiB")`.
    pub async fn start(postgres: &TestPostgres, settings: &[(&str, &str)]) -> Result<Server> {
        Server::start_at(&postgres.url_as(SERVE_ROLE, "postgres"), settings).await
    }

    pub async fn start_at(database_url: &str, settings: &[(&str, &str)]) -> Result<Server> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let settings: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let child = spawn(port, database_url, &settings)?;
        let (url, database_url) = (format!("http://127.0.0.1:{port}"), database_url.to_owned());
        let mut server = Server { child, url, port, database_url, settings, config: None };
        server.ready().await?;
        Ok(server)
    }

    /// As a power cut would end it.
    pub async fn kill9(&mut self) -> Result<()> {
        self.child.kill().await.context("killing walcast serve")
    }

    /// On the same port, with the same settings, as soon as PostgreSQL has let go of the slot.
    pub async fn start_again(&mut self) -> Result<()> {
        let until = std::time::Instant::now() + DEADLINE;
        loop {
            self.child = spawn(self.port, &self.database_url, &self.settings)?;
            match self.ready().await {
                Ok(()) => return Ok(()),
                // The dead process's walsender may still hold the slot, or the server be in recovery.
                Err(_) if std::time::Instant::now() < until => {
                    let _ = self.child.kill().await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// SIGTERM, as a service manager sends it.
    pub async fn stop(mut self) -> Result<()> {
        self.terminate().await?;
        self.ended().await
    }

    /// SIGTERM, and back at once.
    pub async fn terminate(&self) -> Result<()> {
        if let Some(pid) = self.child.id() {
            Command::new("kill").args(["-TERM", &pid.to_string()]).status().await?;
        }
        Ok(())
    }

    pub async fn ended(&mut self) -> Result<()> {
        tokio::time::timeout(DEADLINE, self.child.wait()).await.context("walcast serve did not end")??;
        Ok(())
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    pub fn token(&self, role: &str, subject: Option<&str>) -> String {
        walcast_testkit::jwt(SECRET, role, subject, 3600, serde_json::json!({}))
    }

    async fn ready(&mut self) -> Result<()> {
        let url = format!("{}/readyz", self.url);
        let until = std::time::Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("walcast serve ended with {status}");
            }
            if let Ok(answer) = reqwest::get(&url).await
                && answer.status().is_success()
            {
                return Ok(());
            }
            if std::time::Instant::now() > until {
                bail!("walcast serve was not ready in time");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until `/readyz` answers `ready`.
    pub async fn wait_ready(&self, ready: bool) -> Result<()> {
        let url = format!("{}/readyz", self.url);
        wait::until(DEADLINE, format!("/readyz to say ready = {ready}"), async || {
            reqwest::get(&url).await.is_ok_and(|answer| answer.status().is_success() == ready)
        })
        .await
    }
}

fn spawn(port: u16, database_url: &str, settings: &[(String, String)]) -> Result<Child> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walcast"));
    command
        .arg("serve")
        .env("WALCAST_DATABASE_URL", database_url)
        .env("WALCAST_LISTEN", format!("127.0.0.1:{port}"))
        .env("WALCAST_JWT_SECRET", SECRET)
        // Whom a test leaves connected is sent away at once.
        .env("WALCAST_SERVER__DRAIN", "0s")
        .envs(settings.iter().map(|(k, v)| (k.as_str(), v.as_str())))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command.spawn().context("starting walcast serve")
}
