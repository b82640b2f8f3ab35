//! `walcast dev`: a PostgreSQL of its own, the clinic, generated keys, everything on loopback.
//!
//! [`home`]: the directory, its lock and secrets. [`clinic`]: schema, people and the steady writer. [`banner`]: what a
//! person reads first. PostgreSQL ends with this process, however it ends: a supervisor holds the other end of a pipe.

mod banner;
mod clinic;
mod home;

use std::{
    io::IsTerminal,
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use walcast_cluster::{Binaries, ClusterConfig, ClusterError, Supervised};
use walcast_engine::migrate::{MigrateOptions, migrate};

use crate::{
    cli::DevArgs,
    commands::{serve::told_to_end, token::mint},
    dev_state::{DevPerson, DevState},
    failure::Failure,
    http::DemoSession,
    log,
    running::{self, Running},
    settings::{Secret, Settings},
};
use banner::{Banner, Progress};
pub use clinic::{SETTINGS_NAME, SETTINGS_TEXT};
use home::Home;

/// Long enough that a demo left open over a holiday still works.
const TOKEN_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
const DEFAULT_RATE: u32 = 5;
/// The role that the server itself connects as, with exactly the rights that `migrate` grants.
const SERVE_ROLE: &str = "walcast";

pub async fn run(mut settings: Settings, args: DevArgs) -> Result<ExitCode, Failure> {
    let began = Instant::now();
    log::start(&settings.log);
    if let Some(port) = args.port {
        settings.server.listen.set_port(port);
    }
    let say = Progress::new(std::io::stdout().is_terminal());
    // The directory before the port: whoever is here already is then named, and not only its port.
    let home = Home::open()?;
    may_listen(settings.server.listen)?;
    if args.reset {
        say.step("removing the old data");
        home.reset()?;
    }
    let mut dev = tokio::select! {
        dev = start(settings, &home, &say) => dev?,
        () = told_to_end() => {
            say.step("ended before it was ready");
            return Ok(ExitCode::SUCCESS);
        }
    };
    home.write(&dev.state)?;

    let admin = dev.state.admin_database_url.clone();
    let publisher = tokio::spawn(clinic::publish_new_tables(admin.clone()));
    let rate = if args.no_writer { 0 } else { args.rate.unwrap_or(DEFAULT_RATE) };
    let writer = tokio::spawn(clinic::write_steadily(admin, rate));
    let queries = dev.running.engine.clone();
    let watcher = tokio::spawn(async move { queries.watch_queries().await });
    say.ready(&Banner { state: &dev.state, home: &home, postgres: &dev.version, rate, took: began.elapsed() });

    let code = tokio::select! {
        () = told_to_end() => ExitCode::SUCCESS,
        task = dev.running.engine.failed() => {
            eprintln!("error: the task `{task}` died; the log above says why [task_died]");
            ExitCode::FAILURE
        }
        () = ended(&mut dev.postgres) => {
            let failure = Failure::new("postgres_ended", "the private PostgreSQL has ended by itself, or by somebody's hand");
            let hint = format!("its log is {}; `walcast dev` starts it again with the same data", home.log_file().display());
            eprint!("{}", failure.hint(hint).report());
            ExitCode::FAILURE
        }
    };
    say.step("ending");
    publisher.abort();
    writer.abort();
    watcher.abort();
    home.remove_state();
    dev.running.stop().await;
    let stopped = tokio::task::spawn_blocking(move || dev.postgres.stop()).await;
    if let Ok(Err(error)) = stopped {
        eprint!("{}", cluster_failure(error).report());
    }
    Ok(code)
}

/// All that runs, and what others may know of it.
struct Dev {
    /// Stops where it is dropped.
    postgres: Supervised,
    version: String,
    running: Running,
    state: DevState,
}

/// Before a database is made: loopback only, and the port must be free.
fn may_listen(listen: SocketAddr) -> Result<(), Failure> {
    if !listen.ip().is_loopback() {
        let why = format!("`walcast dev` gives its keys to every page, so it listens on loopback only, not on {listen}");
        return Err(Failure::usage("not_loopback", why).hint("leave --server.listen out, or use 127.0.0.1".to_owned()));
    }
    match std::net::TcpListener::bind(listen) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(Failure::new("cannot_listen", format!("{listen} is taken by another program"))
                .hint(format!("choose another port: walcast dev --port {}", listen.port().checked_add(1).unwrap_or(4000))))
        }
        Err(error) => Err(Failure::new("cannot_listen", format!("cannot listen on {listen}: {error}"))
            .hint("choose another port: walcast dev --port 4001".to_owned())),
    }
}

async fn ended(postgres: &mut Supervised) {
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        if !postgres.is_running() {
            return;
        }
    }
}

/// PostgreSQL, schema, people, keys, and then the server itself.
async fn start(mut settings: Settings, home: &Home, say: &Progress) -> Result<Dev, Failure> {
    let binaries = binaries(home.dir(), say).await?;
    let version = binaries.version().to_owned();
    let doing = if home.is_new() { "making a database with" } else { "starting" };
    say.step(&format!("{doing} PostgreSQL {version}"));
    let postgres = spawn_postgres(home, binaries).await?;
    let (admin_url, port) = (postgres.url().to_owned(), postgres.port());

    say.step("migrating");
    let cache = (&running::cache_settings(&settings)).into();
    let options = MigrateOptions { serve_role: SERVE_ROLE.into(), cache, ..MigrateOptions::default() };
    migrate(&admin_url, &options).await.map_err(|error| Failure::new("migrate", error.to_string()))?;
    let password = home.secret("serve_password")?;
    let people = clinic::load(&admin_url, SERVE_ROLE, &password, say).await?;
    // Again, now that the clinic's tables are there.
    migrate(&admin_url, &options).await.map_err(|error| Failure::new("migrate", error.to_string()))?;

    let secret = match &settings.auth.jwt_secret {
        Some(secret) => secret.expose().to_owned(),
        None => home.secret("jwt_secret")?,
    };
    let serve_url = format!("postgresql://{SERVE_ROLE}:{password}@127.0.0.1:{port}/postgres");
    settings.database.url = Some(Secret::new(serve_url.clone()));
    settings.auth.jwt_secret = Some(Secret::new(secret.clone()));
    if settings.queries.dir.is_none() {
        settings.queries.dir = Some(clinic::queries_dir(home.dir())?);
    }
    let mut state = DevState {
        url: String::new(),
        database_url: serve_url,
        admin_database_url: admin_url,
        anon_key: token(&secret, "anon", None)?,
        service_key: token(&secret, "service_role", None)?,
        provider: person(&secret, people.provider)?,
        patient: person(&secret, people.patient)?,
        jwt_secret: secret,
    };
    say.step("starting the server");
    let running = running::start(&settings, Some(DemoSession(demo_session(&state)))).await?;
    state.url = running.url();
    Ok(Dev { postgres, version, running, state })
}

async fn spawn_postgres(home: &Home, binaries: Binaries) -> Result<Supervised, Failure> {
    let mut config = ClusterConfig::new(binaries, home.postgres());
    // Ten times what the stream likes to hold back for replay, and a bound on what a forgotten slot costs.
    config.settings = [("max_slot_wal_keep_size", "3GB"), ("wal_sender_timeout", "10s"), ("max_connections", "60")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let program =
        std::env::current_exe().map_err(|error| Failure::new("program", format!("this program cannot find itself: {error}")))?;
    let spawned = tokio::task::spawn_blocking(move || Supervised::spawn(&program, &["supervise"], &config)).await;
    spawned.map_err(|error| Failure::new("postgres", error.to_string()))?.map_err(cluster_failure)
}

async fn binaries(dir: &Path, say: &Progress) -> Result<Binaries, Failure> {
    match Binaries::find(None) {
        Ok(found) => Ok(found),
        Err(ClusterError::NotFound { .. }) => {
            let (into, say) = (dir.join("binaries"), *say);
            let fetched = tokio::task::spawn_blocking(move || Binaries::fetch(&into, |line| say.step(line))).await;
            fetched.map_err(|error| Failure::new("postgres", error.to_string()))?.map_err(cluster_failure)
        }
        Err(other) => Err(cluster_failure(other)),
    }
}

/// What the demo's page may know: no service key, no secret.
fn demo_session(state: &DevState) -> Value {
    let person = |person: &DevPerson| {
        json!({
            "token": person.token, "user_id": person.user_id, "name": person.name, "patient_id": person.patient_id,
        })
    };
    json!({ "anon_key": state.anon_key, "provider": person(&state.provider), "patient": person(&state.patient) })
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

fn cluster_failure(error: ClusterError) -> Failure {
    Failure::new("postgres", error.to_string())
}
