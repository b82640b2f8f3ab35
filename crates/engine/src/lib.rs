//! The corridor: wires the rooms into the pipeline, owns the tasks, is the embeddable face.
//!
//! [`Engine::start`] attaches to a database; [`Engine::subscribe`], [`Engine::cache_get`] and [`Engine::query`] are the three
//! ways through the house. What happens when a row changes: [`pipeline`].

mod cache_batch;
pub mod cache_face;
pub mod config;
pub mod doctor;
mod echoes;
mod filters;
mod freshness;
mod health;
mod invalidation;
mod metrics;
pub mod migrate;
pub mod namespaces;
pub mod pipeline;
mod progress;
mod queries;
mod readback;
pub mod registry;
mod stuck;
mod subscribe;
mod subscriptions;
mod table_marks;
mod tag_rules;
mod trace;
mod upkeep;
mod visibility;
mod vitals;

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use rand::Rng;
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore, mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use walcast_auth::Tokens;
use walcast_cache::{Cache, CacheConfig, Hearing, L2, L2Config};
use walcast_hub::{OutboxLimits, ReplayRing, Writers};
use walcast_model::{Fence, Floor, Lsn, TagClock};
use walcast_pg::{Catalog, ConnectError, PgError, Pool, Sampler};
use walcast_wal::{SlotError, StreamError, checkpoint::Standing};

pub use cache_face::{Put, PutFailure, Written};
pub use config::EngineConfig;
pub use freshness::{Freshness, FreshnessError};
pub use health::{Health, Readiness};
pub use invalidation::{InvalidateError, Invalidated, Invalidation, What};
pub use namespaces::{NamespaceError, Right};
pub use progress::StreamState;
pub use queries::{
    BatchItem, DeskError, Expiry, Explanation, How, QueryAnswer, QueryDesk, QueryFailure, QueryLines, Reloaded, Segment,
};
pub use subscribe::{Asked, Opened, Opening, SubscribeError, SubscribeRequest, resync_event};
pub use subscriptions::{Shape, SubscriptionHandle};
pub use trace::{LONGEST_S as LONGEST_TRACE_S, Tapped, TraceError, Traces};
pub use visibility::{ExplainError as ExplainVisibilityError, RowAsked};
pub use vitals::{Vital, Vitals};
pub use walcast_auth::{TokenError, install_crypto};
pub use walcast_cache::{
    Entry, Glob, Lookup, MissReason, NamespaceConfig, NewValue, Policy, Precondition, PutError, Refusal as NotStored, Source,
    Stale, Stored, Survey, TicketError, Tier,
};
pub use walcast_hub::{Attention, CloseReason, Goodbye, Outbox, OutboxReader, SocketEnd};
pub use walcast_matcher::EventMask;
pub use walcast_model as model;
pub use walcast_pg::{ConnectConfig, ConnectError as DatabaseUrlError};

use crate::{
    cache_face::TrackedTables,
    echoes::Echoes,
    metrics::Metrics,
    pipeline::{Remembered, acknowledge, announce, cascade, heartbeat, intake::IntakeTask, settle},
    progress::Progress,
    queries::CachedQueries,
    stuck::Stuck,
    subscriptions::Subscriptions,
    tag_rules::TagRules,
    visibility::RuleBook,
};

/// What this room puts into the database, in order.
pub const MIGRATIONS: &[(&str, &str)] = &[("engine/0001_registry", include_str!("../sql/0001_registry.sql"))];

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Url(#[from] ConnectError),
    #[error(transparent)]
    Database(#[from] PgError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{0}")]
    NotReady(#[from] doctor::NotReady),
    #[error("the database was rewound: it has written up to {flushed}, and {handled} was handled here already")]
    Rewound { handled: Lsn, flushed: Lsn },
    #[error("max_connections is {0}; give at least {least}", least = EngineConfig::LEAST_CONNECTIONS)]
    TooFewConnections(usize),
    #[error("{0}")]
    Queries(String),
    #[error("threads that write to clients cannot be started: {0}")]
    Writers(#[from] std::io::Error),
}

/// What all stages share. Each field has one writer; see the task table in ARCHITECTURE.md.
pub struct Core {
    pub(crate) config: EngineConfig,
    pub(crate) pool: Pool,
    pub(crate) catalog: Catalog,
    pub(crate) sampler: Sampler,
    pub(crate) clock: Arc<TagClock>,
    pub(crate) cache: Cache,
    pub(crate) queries: CachedQueries,
    pub(crate) tokens: Tokens,
    pub(crate) progress: Progress,
    pub(crate) ring: Mutex<ReplayRing<Remembered>>,
    pub(crate) subscriptions: Arc<Subscriptions>,
    pub(crate) writers: Writers,
    pub(crate) registry: Arc<registry::Registry>,
    pub(crate) vitals: Arc<Vitals>,
    pub(crate) traces: Arc<Traces>,
    /// Replays that run at once.
    pub(crate) replays: Semaphore,
    pub(crate) rules: RuleBook,
    pub(crate) tag_rules: TagRules,
    pub(crate) table_marks: table_marks::TableMarks,
    /// Commits whose cascades are not raised yet.
    pub(crate) cascades: cascade::Holds,
    /// Commits that describe a table, until it is judged: within seconds, whatever a standby does.
    pub(crate) suspected: cascade::Holds,
    pub(crate) echoes: Echoes,
    pub(crate) metrics: Metrics,
    pub(crate) standing: Mutex<Option<Standing>>,
    pub(crate) fingerprint: Mutex<String>,
    /// When the keeper last asked for it and was answered.
    pub(crate) rules_read: Mutex<Instant>,
    pub(crate) stuck: Stuck,
    hearing: Mutex<()>,
    pub(crate) shared_fence: Mutex<Option<(Fence, Instant)>>,
    pub(crate) tracked: Mutex<TrackedTables>,
    /// What the doctor warned of at the start.
    pub(crate) warnings: Mutex<Vec<String>>,
    /// Somebody waits for the stream to pass what is written but not flushed.
    pub(crate) nudge: Notify,
    /// PostgreSQL is shutting down: the stream must go, or the shutdown would wait for it.
    pub(crate) server_leaves: Notify,
    /// Our heartbeats carry it: nobody else's make us believe that we hear.
    pub(crate) nonce: String,
    nonces: AtomicU64,
    pub(crate) acknowledge_bytes: u64,
    pub(crate) started: Instant,
}

/// Cheap to clone; [`Engine::stop`] ends its tasks.
#[derive(Clone)]
pub struct Engine {
    pub(crate) core: Arc<Core>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    failed: watch::Receiver<Option<&'static str>>,
}

/// Waiting for a free connection of the pool.
const LEASE_WAIT: Duration = Duration::from_secs(5);
/// Connections outside the pool: replication, sampler, keeper, heartbeat, and one to attach.
const OWN_CONNECTIONS: usize = 5;
/// Of the pool: one for what takes long, and one beside it.
const LEAST_POOLED: usize = 2;
const REPLAYS: usize = 4;
/// Messages between stages; their bytes are bounded by the intake's room.
const STAGE_QUEUE: usize = 4_096;

/// They only write: two keep up with more than a machine's network takes.
fn writer_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 4)
}

impl EngineConfig {
    /// With fewer the budget could not be kept.
    pub const LEAST_CONNECTIONS: usize = OWN_CONNECTIONS + LEAST_POOLED;
}

impl Engine {
    /// Attaches to the database, or says clearly why not. On return the stream is open.
    pub async fn start(config: EngineConfig) -> Result<Engine, EngineError> {
        let pooled = config.max_connections.saturating_sub(OWN_CONNECTIONS);
        if pooled < LEAST_POOLED {
            return Err(EngineError::TooFewConnections(config.max_connections));
        }
        let control = config.connect.connect().await?;
        let expect = expectations(&config);
        doctor::before_serve(&control, &expect).await?;
        let mut warnings = doctor::warnings(&control, &expect).await?;
        let acknowledge_bytes = acknowledge_bytes(&control, config.stream.acknowledge_bytes).await?;
        let pool = Pool::new(&config.connect, pooled, LEASE_WAIT)?;
        // The stream needs the server itself at this address.
        let pool = pool.direct();
        let tag_rules = TagRules::start(&control, &pool, &config.tags, &config.publication_cache).await?;
        warnings.extend(tag_rules.warnings());
        drop(control);

        let clock = Arc::new(TagClock::new(TagClock::DEFAULT_SLOTS, Floor(0)));
        let l2 = config.cache.l2.then(|| L2::start(pool.clone(), l2_config(&config)));
        let queries = CachedQueries::load(&config, &pool).await.map_err(EngineError::Queries)?;
        let cache = Cache::new(cache_config(&config), clock.clone(), l2);
        let vitals = Arc::<Vitals>::default();
        let timed = vitals.clone();
        let traces = Arc::new(Traces::new(config.realtime.trace_payloads));
        let core = Arc::new(Core {
            catalog: Catalog::new(pool.clone()),
            sampler: Sampler::start(config.connect.clone()),
            tokens: Tokens::new(&config.auth.jwt_secret, config.auth.allowed_roles.clone()),
            progress: Progress::default(),
            ring: Mutex::new(ReplayRing::new(config.stream.replay_bytes, Lsn::ZERO)),
            subscriptions: Arc::default(),
            registry: registry::Registry::new(&config.auth.tenant_claim, vitals.clone(), traces.clone()),
            vitals,
            traces,
            replays: Semaphore::new(REPLAYS),
            rules: RuleBook::default(),
            tag_rules,
            table_marks: table_marks::TableMarks::default(),
            cascades: cascade::Holds::default(),
            suspected: cascade::Holds::default(),
            echoes: Echoes::default(),
            writers: Writers::start(writer_threads(), Arc::new(move |us| timed.commit_to_socket(Duration::from_micros(us))))?,
            metrics: Metrics::register(),
            standing: Mutex::new(None),
            fingerprint: Mutex::default(),
            rules_read: Mutex::new(Instant::now()),
            stuck: Stuck::default(),
            hearing: Mutex::new(()),
            shared_fence: Mutex::new(None),
            tracked: Mutex::default(),
            warnings: Mutex::new(warnings),
            nudge: Notify::new(),
            server_leaves: Notify::new(),
            nonce: format!("{:032x}", rand::rng().random::<u128>()),
            nonces: AtomicU64::new(0),
            started: Instant::now(),
            acknowledge_bytes,
            clock,
            cache,
            queries,
            pool,
            config,
        });

        let (to_settle, settle_inbox) = mpsc::channel(STAGE_QUEUE);
        let (to_announce, announce_inbox) = mpsc::channel(4);
        let (acknowledge, acknowledged) = watch::channel(Lsn::ZERO);
        let mut intake = IntakeTask::new(core.clone(), to_settle, acknowledged);
        let stream = intake.attach().await?;
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (fail, failed) = watch::channel(None);
        let spawn = |name: &'static str, task: BoxFuture<'static, ()>| {
            let (fail, cancel) = (fail.clone(), cancel.clone());
            tasks.spawn(async move {
                let ended = AssertUnwindSafe(task).catch_unwind().await;
                if ended.is_err() || !cancel.is_cancelled() {
                    tracing::error!(task = name, "a task of the pipeline has died");
                    fail.send_replace(Some(name));
                }
            });
        };
        spawn("intake", intake.run(stream, cancel.clone()).boxed());
        // Between the two only where a rule has something to look up.
        let to_announce = if core.tag_rules.has_cascades() {
            let (to_cascade, cascade_inbox) = mpsc::channel(4);
            spawn("cascade", cascade::run(core.clone(), cascade_inbox, to_announce).boxed());
            to_cascade
        } else {
            to_announce
        };
        spawn("settle", settle::run(core.clone(), settle_inbox, to_announce).boxed());
        spawn("announce", announce::run(core.clone(), announce_inbox).boxed());
        spawn("keeper", acknowledge::run(core.clone(), acknowledge, cancel.clone()).boxed());
        spawn("heartbeat", heartbeat::run(core.clone(), cancel.clone()).boxed());
        spawn("hearing", health::listen(core.clone(), cancel.clone()).boxed());
        spawn("wheel", registry::wheel::run(core.clone(), cancel.clone()).boxed());
        spawn("registry", registry::rounds::run(core.clone(), cancel.clone()).boxed());
        spawn("registry mirror", registry::mirror::run(core.clone(), cancel.clone()).boxed());
        spawn("vitals", vitals::run(core.clone(), cancel.clone()).boxed());
        spawn("upkeep", upkeep::run(core.clone(), cancel.clone()).boxed());
        tasks.close();
        Ok(Engine { core, cancel, tasks, failed })
    }

    /// Ends every task and waits for them, so that the slot is free afterwards.
    pub async fn stop(&self) {
        self.cancel.cancel();
        if tokio::time::timeout(Duration::from_secs(10), self.tasks.wait()).await.is_err() {
            tracing::warn!("some tasks did not end in 10 s");
        }
        self.core.pool.close();
    }

    /// Resolves with the name of a pipeline task that died. The slot is the log: whoever ends the process now
    /// and starts it anew loses nothing, whoever goes on would answer from a standing stream.
    pub async fn failed(&self) -> &'static str {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(name) => name.unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    pub fn verify(&self, token: &str) -> Result<model::Claims, TokenError> {
        self.core.tokens.verify(token)
    }

    /// Whom a client belongs to, as the configured claim says.
    pub fn tenant_of(&self, claims: &model::Claims) -> Option<String> {
        self.core.registry.tenant_of(claims)
    }

    /// Every connection and subscription that is open now.
    pub fn registry(&self) -> &Arc<registry::Registry> {
        &self.core.registry
    }

    /// An operator's taps.
    pub fn traces(&self) -> &Traces {
        &self.core.traces
    }

    /// Counts and times of the live side as a whole.
    pub fn vitals(&self) -> &Arc<Vitals> {
        &self.core.vitals
    }

    /// What one client has still to be sent, for a task that sends it.
    pub fn outbox(&self) -> (Outbox, OutboxReader) {
        walcast_hub::outbox(self.outbox_limits())
    }

    /// The same, written straight into the client's socket. The connection's last words are `goodbye`'s.
    pub fn socket_outbox(&self, socket: TcpStream, goodbye: Goodbye) -> (Outbox, SocketEnd) {
        self.core.writers.outbox(self.outbox_limits(), socket, goodbye)
    }

    fn outbox_limits(&self) -> OutboxLimits {
        let limits = &self.core.config.realtime;
        OutboxLimits { bytes: limits.outbox_bytes, frames: limits.outbox_frames }
    }

    /// Everything up to here has been handed to its subscribers.
    pub fn announced(&self) -> model::Position {
        self.core.progress.announced()
    }
}

impl Core {
    pub(crate) fn next_nonce(&self) -> u64 {
        self.nonces.fetch_add(1, Ordering::Relaxed)
    }

    /// Fresh only while we hear ourselves.
    pub(crate) fn hearing_changed(&self) {
        // One at a time: who saw us hear must not overrule who has just seen the stream go.
        let _one = self.hearing.lock();
        let caught_up = self.invalidated_whole() >= self.progress.catch_up();
        let heard = caught_up && self.progress.heard_ago().is_some_and(|ago| ago <= self.config.cache.max_staleness);
        match (heard, self.cache.hearing()) {
            (true, Hearing::Lost { .. }) => self.cache.set_hearing(Hearing::Live),
            (false, Hearing::Live) => self.cache.set_hearing(Hearing::Lost { since_ms: now_ms() }),
            _ => {}
        }
    }

    pub(crate) fn note_latency(&self, committed_at_us: i64) {
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64);
        self.metrics.commit_to_announced.record((now_us - committed_at_us).max(0) as f64 / 1e6);
    }

    /// Both publications, or the cache's alone where a column list of the other makes PostgreSQL refuse the pair.
    pub(crate) async fn publications(&self, client: &tokio_postgres::Client) -> Result<Vec<String>, PgError> {
        let both = vec![self.config.publication_cache.clone(), self.config.publication_realtime.clone()];
        let sql = "select coalesce(string_agg(distinct a.schemaname || '.' || a.tablename, ', '), '') \
                   from pg_catalog.pg_publication_tables a join pg_catalog.pg_publication_tables b \
                   on b.schemaname = a.schemaname and b.tablename = a.tablename and b.pubname = $2 \
                   where a.pubname = $1 and a.attnames is distinct from b.attnames";
        let text = tokio_postgres::types::Type::TEXT;
        let rows = client
            .query_typed(sql, &[(&both[0], text.clone()), (&both[1], text)])
            .await
            .map_err(PgError::when("comparing publications"))?;
        let conflicting: &str = rows.first().map(|row| row.get(0)).unwrap_or_default();
        if conflicting.is_empty() {
            return Ok(both);
        }
        tracing::warn!(
            tables = conflicting,
            "publication `{}` has column lists of its own for tables of `{}`: only the latter is streamed, and the lists are applied here",
            both[1],
            both[0]
        );
        Ok(both.into_iter().take(1).collect())
    }
}

/// What is wrong with a template of a tag rule, if anything is.
pub fn tag_template_error(text: &str) -> Option<String> {
    walcast_matcher::Template::parse(text).err().map(|error| error.to_string())
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

pub(crate) fn expectations(config: &EngineConfig) -> doctor::Expectations {
    doctor::Expectations {
        slot: config.slot.clone(),
        publication_cache: config.publication_cache.clone(),
        publication_realtime: config.publication_realtime.clone(),
        allowed_roles: config.auth.allowed_roles.clone(),
        acknowledge_bytes: config.stream.acknowledge_bytes,
        max_connections: config.max_connections as u64,
        jwt_secret_bytes: Some(config.auth.jwt_secret.len()),
        tags: config.tags.clone(),
    }
}

/// At most a tenth of what the server lets a slot hold back.
async fn acknowledge_bytes(client: &tokio_postgres::Client, configured: u64) -> Result<u64, PgError> {
    let sql = "select setting::int8 from pg_catalog.pg_settings where name = 'max_slot_wal_keep_size'";
    let rows = client.query_typed(sql, &[]).await.map_err(PgError::when("reading max_slot_wal_keep_size"))?;
    match rows.first().map(|row| row.get::<_, i64>(0)) {
        Some(megabytes) if megabytes >= 0 => Ok(configured.min(((megabytes as u64) << 20) / 10)),
        _ => Ok(configured),
    }
}

fn l2_config(config: &EngineConfig) -> L2Config {
    L2Config { max_bytes: config.cache.l2_max_bytes, read_timeout: config.cache.l2_read_timeout, ..L2Config::default() }
}

fn cache_config(config: &EngineConfig) -> CacheConfig {
    let namespaces = config.cache.namespaces.iter().map(|(name, settings)| (name.clone(), settings.entries.clone()));
    let mut namespaces: HashMap<String, NamespaceConfig> = namespaces.collect();
    // Not the config's own: known also where it is strict.
    namespaces.extend(queries::namespaces(&namespaces));
    CacheConfig {
        l1_bytes: config.cache.l1_bytes as u64,
        l1_entries: config.cache.l1_entries,
        lease: config.cache.lease,
        max_value_bytes: config.cache.max_value_bytes,
        default_ttl: config.cache.default_ttl,
        // Of this process: a ticket of the one before is refused, as its snapshot may be from before a crash.
        ticket_secret: rand::rng().random(),
        strict: config.cache.strict,
        namespaces,
        ..CacheConfig::default()
    }
}
