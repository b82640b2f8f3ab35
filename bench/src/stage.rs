//! A throw-away PostgreSQL with the bench's schema, migrated, and `walcast serve` as a process on it.

use std::{
    env,
    net::TcpListener,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::process::{Child, Command};
use walcast_model::Position;
use walcast_testkit::{TestPostgres, wait};

const SECRET: &str = "a secret of the bench, at least thirty-two bytes";
/// The role that `migrate` makes for `serve`.
const SERVE_ROLE: &str = "walcast";
/// Only catches hangs.
pub const DEADLINE: Duration = Duration::from_secs(120);
pub const CACHE_PUBLICATION: &str = "walcast";
pub const REALTIME_PUBLICATION: &str = "supabase_realtime";

/// `service_role` reads everything; `authenticated` reads the vitals of patients in its care.
const SCHEMA: &str = "
create table care_team (patient_id int not null, user_id uuid not null, primary key (patient_id, user_id));
create table vitals (
  id bigint generated always as identity primary key, patient_id int not null, kind text not null,
  value numeric not null, taken_at timestamptz not null default now());
create index on vitals (patient_id);
alter table vitals enable row level security;
create policy in_my_care on vitals for select to authenticated
  using (patient_id in (select patient_id from care_team where user_id = (select auth.uid())));
grant select on vitals, care_team to authenticated, service_role;";

/// The program under measurement.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(named) = env::var_os("WALCAST_BIN").filter(|named| !named.is_empty()) {
        return Ok(PathBuf::from(named));
    }
    let beside = env::current_exe().context("finding this program's own folder")?.with_file_name("walcast");
    if !beside.is_file() {
        bail!("{} is missing; run `cargo build --release -p walcast-server`, or name it with WALCAST_BIN", beside.display());
    }
    Ok(beside)
}

pub struct Stage {
    pub postgres: TestPostgres,
    binary: PathBuf,
}

impl Stage {
    /// With the bench's own schema.
    pub async fn set() -> anyhow::Result<Stage> {
        let stage = Stage::set_sql(SCHEMA).await?;
        stage.postgres.execute(&format!("alter publication {REALTIME_PUBLICATION} add table vitals")).await?;
        Ok(stage)
    }

    /// With the schema of SQL files, run in this order.
    pub async fn set_with(files: &[&str]) -> anyhow::Result<Stage> {
        let mut sql = String::new();
        for file in files {
            sql.push_str(&tokio::fs::read_to_string(file).await.with_context(|| format!("reading {file}"))?);
        }
        Stage::set_sql(&sql).await
    }

    pub async fn set_sql(schema: &str) -> anyhow::Result<Stage> {
        let postgres = TestPostgres::builder().setting("shared_buffers", "128MB").setting("max_wal_size", "2GB").start().await?;
        let stage = Stage { postgres, binary: binary()? };
        stage.migrate().await?;
        stage.postgres.execute(schema).await?;
        // Again, now that there are tables to publish.
        stage.migrate().await?;
        Ok(stage)
    }

    /// The process that all of PostgreSQL's are children of.
    pub async fn postmaster(&self) -> anyhow::Result<u32> {
        let client = self.postgres.connect().await?;
        let file = "select (regexp_match(pg_read_file('postmaster.pid'), '^[0-9]+'))[1]::int";
        Ok(u32::try_from(client.query_one(file, &[]).await?.get::<_, i32>(0))?)
    }

    async fn migrate(&self) -> anyhow::Result<()> {
        let mut command = walcast(&self.binary);
        command.args(["migrate", "--database-url", &self.postgres.url(), "--serve-role", SERVE_ROLE]);
        let output = command.output().await.context("running walcast migrate")?;
        if !output.status.success() {
            bail!("walcast migrate: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// `settings` are environment variables. Returns at once: nothing of the start is hidden.
    pub fn serve(&self, settings: &[(&str, &str)]) -> anyhow::Result<Server> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = walcast(&self.binary);
        command
            .arg("serve")
            .env("WALCAST_DATABASE_URL", self.postgres.url_as(SERVE_ROLE, "postgres"))
            .env("WALCAST_LISTEN", format!("127.0.0.1:{port}"))
            .env("WALCAST_JWT_SECRET", SECRET)
            .env("WALCAST_LOG__LEVEL", "error")
            .envs(settings.iter().copied());
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("starting {}", self.binary.display()))?;
        let pid = child.id().context("walcast serve ended at once")?;
        Ok(Server { child, pid, started, url: format!("http://127.0.0.1:{port}"), http: reqwest::Client::new() })
    }
}

/// Free of what the caller's shell has set for another walcast.
fn walcast(binary: &PathBuf) -> Command {
    let mut command = Command::new(binary);
    let foreign = env::vars_os().map(|(name, _)| name).filter(|name| name.to_string_lossy().starts_with("WALCAST_"));
    foreign.for_each(|name| {
        command.env_remove(name);
    });
    command.env_remove("DATABASE_URL").stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// `walcast serve`. Ends with this value.
pub struct Server {
    child: Child,
    pub pid: u32,
    pub started: Instant,
    pub url: String,
    http: reqwest::Client,
}

impl Server {
    pub fn token(&self, role: &str, subject: Option<&str>) -> String {
        walcast_testkit::jwt(SECRET, role, subject, 3600, Value::Null)
    }

    pub fn token_with(&self, role: &str, claims: Value) -> String {
        walcast_testkit::jwt(SECRET, role, None, 3600, claims)
    }

    /// As `127.0.0.1:4000`.
    pub fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// `/readyz`, ready or not; none while nobody listens.
    pub async fn report(&self) -> Option<Value> {
        let answer = self.http.get(format!("{}/readyz", self.url)).send().await.ok()?;
        answer.json().await.ok()
    }

    /// Waits until it answers, and tells how long that took since the start.
    pub async fn listening(&mut self) -> anyhow::Result<Duration> {
        while self.report().await.is_none() {
            if let Some(status) = self.child.try_wait()? {
                bail!("walcast serve ended with {status}");
            }
            if self.started.elapsed() > DEADLINE {
                bail!("walcast serve does not listen after {DEADLINE:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(self.started.elapsed())
    }

    pub async fn ready(&mut self) -> anyhow::Result<()> {
        self.listening().await?;
        let ready = async || self.report().await.is_some_and(|report| report["ready"] == true);
        wait::until(DEADLINE, "walcast serve is ready", ready).await
    }

    /// What has been announced to subscribers.
    pub async fn position(&self) -> anyhow::Result<Position> {
        let report = self.report().await.context("/readyz does not answer")?;
        let text = report["position"].as_str().context("/readyz names no position")?;
        Ok(text.parse()?)
    }

    /// As a service manager stops it.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        Command::new("kill").args(["-TERM", &self.pid.to_string()]).status().await?;
        tokio::time::timeout(DEADLINE, self.child.wait()).await.context("walcast serve did not end")??;
        Ok(())
    }
}
