//! `walcast dev`: a PostgreSQL of its own, the clinic, generated keys, everything on loopback.
//!
//! [`clinic`]: schema, people and the steady writer. [`banner`]: what a person reads first. PostgreSQL ends with this
//! process, however it ends: a supervisor holds the other end of a pipe.

mod banner;
mod clinic;

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rand::Rng;
use serde_json::{Map, Value, json};
use walcast_cluster::{Binaries, ClusterConfig, ClusterError, DirLock, Patience, Supervised};
use walcast_engine::migrate::{MigrateOptions, migrate};

use crate::{
    cli::DevArgs,
    commands::{serve::told_to_end, token::mint},
    dev_state::{DevPerson, DevState, dev_dir},
    failure::Failure,
    http::DemoSession,
    log, running,
    settings::{Secret, Settings},
};

/// Long enough that a demo left open over a holiday still works.
const TOKEN_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
const DEFAULT_RATE: u32 = 5;
/// The role that the server itself connects as, with exactly the rights that `migrate` grants.
const SERVE_ROLE: &str = "walcast";

pub async fn run(mut settings: Settings, args: DevArgs) -> Result<ExitCode, Failure> {
    log::start(&settings.log);
    if let Some(port) = args.port {
        settings.server.listen.set_port(port);
    }
    if !settings.server.listen.ip().is_loopback() {
        return Err(Failure::usage(
            "not_loopback",
            format!(
                "`walcast dev` gives its keys to every page, so it listens on loopback only, not on {}",
                settings.server.listen
            ),
        )
        .hint("leave --server.listen out, or use 127.0.0.1".to_owned()));
    }
    let say = banner::Progress::new(std::io::stdout().is_terminal());
    let dir = dev_dir(rustix::process::geteuid().is_root());
    if args.reset {
        reset(&dir, &say)?;
    }
    prepare(&dir)?;
    let (postgres, settings, state) = prepare_server(settings, &dir, &say).await?;
    let demo = DemoSession(demo_session(&state));
    let running = running::start(&settings, Some(demo)).await?;
    let state = DevState { url: running.url(), ..state };
    state.write(&dir).map_err(|error| file_failure("writing", &dir, &error))?;

    let admin = state.admin_database_url.clone();
    let publisher = tokio::spawn(clinic::publish_new_tables(admin.clone()));
    let rate = if args.no_writer { 0 } else { args.rate.unwrap_or(DEFAULT_RATE) };
    let writer = tokio::spawn(clinic::write_steadily(admin, rate));
    say.ready(&banner::banner(&state, &dir, rate, say.is_terminal()));

    let code = tokio::select! {
        () = told_to_end() => ExitCode::SUCCESS,
        () = ended(postgres.clone()) => {
            eprintln!("error: the private PostgreSQL has ended [postgres_ended]\n  hint: its log is {}", dir.join("postgres/server.log").display());
            ExitCode::FAILURE
        }
    };
    say.step("ending");
    publisher.abort();
    writer.abort();
    let _ = DevState::remove(&dir);
    running.stop().await;
    let stopped = tokio::task::spawn_blocking(move || postgres.lock().take().map(Supervised::stop)).await;
    if let Ok(Some(Err(error))) = stopped {
        eprintln!("error: {error}");
    }
    Ok(code)
}

type Private = Arc<Mutex<Option<Supervised>>>;

async fn ended(postgres: Private) {
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        if postgres.lock().as_mut().is_none_or(|server| !server.is_running()) {
            return;
        }
    }
}

/// PostgreSQL, schema, people, keys: everything before the server itself.
async fn prepare_server(
    mut settings: Settings,
    dir: &Path,
    say: &banner::Progress,
) -> Result<(Private, Settings, DevState), Failure> {
    say.step("starting PostgreSQL");
    let binaries = binaries(dir, say).await?;
    let mut config = ClusterConfig::new(binaries, dir.join("postgres"));
    config.settings = [("max_slot_wal_keep_size", "2GB"), ("wal_sender_timeout", "10s"), ("max_connections", "60")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let program =
        std::env::current_exe().map_err(|error| Failure::new("program", format!("this program cannot find itself: {error}")))?;
    let spawned = tokio::task::spawn_blocking(move || Supervised::spawn(&program, &["supervise"], &config)).await;
    let postgres = spawned.map_err(|error| Failure::new("postgres", error.to_string()))?.map_err(cluster_failure)?;
    let admin_url = postgres.url().to_owned();

    say.step("migrating");
    let options = MigrateOptions { serve_role: SERVE_ROLE.into(), ..MigrateOptions::default() };
    migrate(&admin_url, &options).await.map_err(|error| Failure::new("migrate", error.to_string()))?;
    let password = kept_secret(&dir.join("serve_password"))?;
    let people = clinic::load(&admin_url, SERVE_ROLE, &password, say).await?;
    // Again, now that the clinic's tables are there.
    migrate(&admin_url, &options).await.map_err(|error| Failure::new("migrate", error.to_string()))?;

    let secret = match &settings.auth.jwt_secret {
        Some(secret) => secret.expose().to_owned(),
        None => kept_secret(&dir.join("jwt_secret"))?,
    };
    let serve_url = format!("postgresql://{SERVE_ROLE}:{password}@127.0.0.1:{}/postgres", postgres.port());
    settings.database.url = Some(Secret::new(serve_url.clone()));
    settings.auth.jwt_secret = Some(Secret::new(secret.clone()));
    if settings.queries.dir.is_none() {
        settings.queries.dir = Some(clinic::queries_dir(dir)?);
    }
    let state = DevState {
        url: String::new(),
        database_url: serve_url,
        admin_database_url: admin_url,
        anon_key: token(&secret, "anon", None)?,
        service_key: token(&secret, "service_role", None)?,
        provider: person(&secret, people.provider)?,
        patient: person(&secret, people.patient)?,
        jwt_secret: secret,
    };
    Ok((Arc::new(Mutex::new(Some(postgres))), settings, state))
}

async fn binaries(dir: &Path, say: &banner::Progress) -> Result<Binaries, Failure> {
    match Binaries::find(None) {
        Ok(found) => Ok(found),
        Err(ClusterError::NotFound { .. }) => {
            say.step("no PostgreSQL is installed: fetching one");
            let (into, terminal) = (dir.join("binaries"), say.is_terminal());
            let fetched =
                tokio::task::spawn_blocking(move || Binaries::fetch(&into, |line| banner::Progress::new(terminal).step(line)))
                    .await;
            fetched.map_err(|error| Failure::new("postgres", error.to_string()))?.map_err(cluster_failure)
        }
        Err(other) => Err(cluster_failure(other)),
    }
}

fn demo_session(state: &DevState) -> Value {
    let person = |person: &DevPerson| json!({ "token": person.token, "user_id": person.user_id, "name": person.name, "patient_id": person.patient_id });
    json!({ "anon_key": state.anon_key, "provider": person(&state.provider), "patient": person(&state.patient), "url": "" })
}

fn person(secret: &str, person: clinic::Person) -> Result<DevPerson, Failure> {
    let token = token(secret, "authenticated", Some(&person.user_id))?;
    Ok(DevPerson { token, user_id: person.user_id, name: person.name, patient_id: person.patient_id })
}

fn token(secret: &str, role: &str, subject: Option<&str>) -> Result<String, Failure> {
    let mut claims = Map::new();
    claims.insert("role".into(), role.into());
    if let Some(subject) = subject {
        claims.insert("sub".into(), subject.into());
    }
    mint(secret, claims, TOKEN_LIFE)
}

/// Made once, kept 0600, used again: tokens and passwords outlive a restart.
fn kept_secret(path: &Path) -> Result<String, Failure> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().len() >= 32 => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(file_failure("reading", path, &error)),
    }
    let secret = format!("{:032x}{:032x}", rand::rng().random::<u128>(), rand::rng().random::<u128>());
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(secret.as_bytes())).map_err(|error| file_failure("writing", path, &error))?;
    Ok(secret)
}

/// The directory is ours; PostgreSQL's own folder in it belongs to the user that runs it, who must be able to pass.
fn prepare(dir: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(dir).map_err(|error| file_failure("making", dir, &error))?;
    let mode = if rustix::process::geteuid().is_root() { 0o711 } else { 0o700 };
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).map_err(|error| file_failure("protecting", dir, &error))
}

fn reset(dir: &Path, say: &banner::Progress) -> Result<(), Failure> {
    let data = dir.join("postgres");
    if !data.exists() {
        return Ok(());
    }
    say.step("removing the old data");
    let owner = rustix::process::getpid().as_raw_nonzero().get() as u32;
    // Nobody's server may be running in it; the lock goes with the folder.
    let lock = DirLock::take(&data, owner, Patience::ForTheDead(Duration::from_secs(30))).map_err(cluster_failure)?;
    let removed = std::fs::remove_dir_all(&data).map_err(|error| file_failure("removing", &data, &error));
    drop(lock);
    removed
}

fn cluster_failure(error: ClusterError) -> Failure {
    Failure::new("postgres", error.to_string())
}

fn file_failure(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new("files", format!("{doing} {} failed: {error}", path.display()))
        .hint("choose another directory with WALCAST_DEV_DIR".to_owned())
}

/// For those who want to know where everything is.
pub(super) fn places(dir: &Path) -> [(&'static str, PathBuf); 2] {
    [("data", dir.join("postgres")), ("log", dir.join("postgres/server.log"))]
}

pub(super) fn websocket_url(address: &str) -> String {
    address.replacen("http", "ws", 1)
}
