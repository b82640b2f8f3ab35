//! A PostgreSQL for one test: its own server, port and data, gone when the value is dropped and
//! never outliving the test process. The data are copied from a template made once per machine
//! and version, so a start costs a fraction of a second.

mod template;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::proxy::Proxy;
use anyhow::Context;
use tempfile::TempDir;
use tokio::task::spawn_blocking;
use tokio_postgres::{Client, NoTls};
use walcast_cluster::{Access, Binaries, Cluster, ClusterConfig, ClusterError, Durability};

/// Names the directory of server binaries to test against.
const BINARIES_ENV: &str = "WALCAST_TEST_PG_BIN";
const SUPERUSER: &str = "postgres";

/// What a test's server has unless the builder says otherwise.
const SETTINGS: &[(&str, &str)] = &[
    ("wal_level", "logical"),
    ("max_replication_slots", "20"),
    ("max_wal_senders", "20"),
    ("max_slot_wal_keep_size", "2GB"),
    ("wal_sender_timeout", "10s"),
    ("shared_buffers", "32MB"),
];

/// Drop stops the server at once and removes its directory.
#[derive(Debug)]
pub struct TestPostgres {
    // Before the directory: fields drop in order, and the server must be gone first.
    cluster: Arc<Mutex<Cluster>>,
    directory: TempDir,
    port: u16,
}

/// A server with settings of its own.
#[derive(Debug, Clone, Default)]
pub struct TestPostgresBuilder {
    settings: Vec<(String, String)>,
    own_identity: bool,
}

impl TestPostgresBuilder {
    /// As in postgresql.conf; comes after our own and wins.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs initdb instead of copying the template, whose system identifier all copies share.
    /// For tests in which one database takes another's place.
    pub fn own_identity(mut self) -> Self {
        self.own_identity = true;
        self
    }

    pub async fn start(self) -> anyhow::Result<TestPostgres> {
        spawn_blocking(move || self.start_blocking()).await.context("starting PostgreSQL for a test")?
    }

    fn start_blocking(self) -> anyhow::Result<TestPostgres> {
        let explicit = std::env::var_os(BINARIES_ENV).map(PathBuf::from);
        let binaries = Binaries::find(explicit.as_deref())?;
        let directory = template::new_directory()?;
        if !self.own_identity {
            template::copy_into(&binaries, directory.path())?;
        }
        let mut config = config(binaries, directory.path());
        config.settings = SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        config.settings.extend(self.settings);
        let mut cluster = Cluster::open(config)?;
        cluster.start()?;
        let port = cluster.port();
        Ok(TestPostgres { cluster: Arc::new(Mutex::new(cluster)), directory, port })
    }
}

impl TestPostgres {
    pub async fn start() -> anyhow::Result<TestPostgres> {
        TestPostgres::builder().start().await
    }

    pub fn builder() -> TestPostgresBuilder {
        TestPostgresBuilder::default()
    }

    /// For superuser and database `postgres`. Stays the same over restarts.
    pub fn url(&self) -> String {
        self.url_as(SUPERUSER, "postgres")
    }

    /// No role needs a password.
    pub fn url_as(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}", self.port)
    }

    /// As [`TestPostgres::url`], but over a proxy that leads here.
    pub fn url_through(&self, proxy: &Proxy) -> String {
        format!("postgres://{SUPERUSER}@127.0.0.1:{}/postgres", proxy.port())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// 15, 16, …
    pub fn major(&self) -> u32 {
        self.with(|cluster| cluster.binaries().major())
    }

    /// Where the server writes its log, for the one who looks into a failure.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("server.log")).unwrap_or_default()
    }

    /// A connection of its own; it ends when the client is dropped.
    pub async fn connect(&self) -> anyhow::Result<Client> {
        self.connect_as(SUPERUSER).await
    }

    pub async fn connect_as(&self, role: &str) -> anyhow::Result<Client> {
        self.connect_url(&self.url_as(role, "postgres")).await
    }

    /// Runs a batch of statements as superuser, on a connection of its own.
    pub async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        let client = self.connect().await?;
        client.batch_execute(sql).await.with_context(|| format!("running {sql}"))
    }

    /// Orderly: clients are disconnected, a checkpoint is written.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.change(Cluster::stop).await
    }

    /// Without a checkpoint: the next start recovers from the WAL.
    pub async fn stop_immediate(&self) -> anyhow::Result<()> {
        self.change(Cluster::stop_immediate).await
    }

    /// kill -9 of the whole server; returns when no process of it is left.
    pub async fn kill9(&self) -> anyhow::Result<()> {
        self.change(Cluster::kill9).await
    }

    /// On the same data and the same port.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        self.change(Cluster::start).await
    }

    pub async fn restart(&self) -> anyhow::Result<()> {
        self.change(Cluster::restart).await
    }

    pub fn is_running(&self) -> bool {
        self.with(|cluster| cluster.is_running())
    }

    async fn connect_url(&self, url: &str) -> anyhow::Result<Client> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.with_context(|| format!("connecting to {url}"))?;
        // Ends with the client or the server; the client's own calls report why.
        tokio::spawn(connection);
        Ok(client)
    }

    async fn change(&self, step: fn(&mut Cluster) -> Result<(), ClusterError>) -> anyhow::Result<()> {
        let cluster = Arc::clone(&self.cluster);
        let done = spawn_blocking(move || step(&mut cluster.lock().unwrap_or_else(PoisonError::into_inner)));
        Ok(done.await??)
    }

    fn with<T>(&self, look: impl FnOnce(&Cluster) -> T) -> T {
        look(&self.cluster.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn config(binaries: Binaries, directory: &std::path::Path) -> ClusterConfig {
    // The port is fixed once chosen: clients of a test come back to where they were. It is left
    // open here, so that a port lost to another test at the very start is replaced.
    ClusterConfig { access: Access::Trust, durability: Durability::Unsynced, ..ClusterConfig::new(binaries, directory) }
}
