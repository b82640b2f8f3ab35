//! A running server: engine and listener together. Used by `serve`, by `dev`, and by tests in their own process.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::task::JoinHandle;
use walcast_engine::{
    ConnectConfig, Engine, EngineError, EventMask,
    config::{AuthConfig, CacheSettings, Deaf, EngineConfig, RealtimeLimits, StreamLimits, TagRuleConfig},
    model::TableName,
};

use crate::{
    failure::Failure,
    http::{
        self, App, DemoSession,
        drain::Drain,
        limits::{Limits, Sizes, TrustedProxies},
        sse::Sse,
    },
    settings::{self, Settings, TagRuleSettings},
};

pub struct Running {
    pub engine: Engine,
    pub address: SocketAddr,
    drain: Drain,
    window: Duration,
    serving: JoinHandle<std::io::Result<()>>,
}

/// Attaches to the database and listens, or says in one sentence why not, having touched nothing but the slot.
pub async fn start(settings: &Settings, demo: Option<DemoSession>) -> Result<Running, Failure> {
    walcast_engine::install_crypto();
    // The port first: who cannot listen has no business with the slot.
    let listener = http::bind(settings.server.listen).await.map_err(|text| Failure::new("cannot_listen", text))?;
    let address = listener.local_addr().map_err(|error| Failure::new("cannot_listen", error.to_string()))?;
    // Before the engine: counters that are registered with no recorder count for nobody.
    let metrics = recorder();
    let config = engine_config(settings)?;
    let sse = Arc::new(Sse::new(settings, &config.auth.jwt_secret));
    let engine = Engine::start(config).await.map_err(|error| engine_failure(&error))?;
    let drain = Drain::default();
    let app = App {
        engine: engine.clone(),
        limits: limits(settings)?,
        metrics,
        // Secrets hide themselves.
        settings: format!("{settings:#?}").into(),
        shows_people: settings.realtime.trace_payloads,
        demo: demo.map(Arc::new),
        sse,
        drain: drain.clone(),
    };
    tokio::spawn(tend(app.metrics.clone(), drain.clone()));
    let serving = tokio::spawn(http::serve(listener, app));
    Ok(Running { engine, address, drain, window: settings.server.drain, serving })
}

impl Running {
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Says goodbye to every connection, spread over `server.drain`, then lets go of the slot.
    pub async fn drain(self) {
        let window = self.window;
        self.stop_within(window).await;
    }

    /// The same, to all at once.
    pub async fn stop(self) {
        self.stop_within(Duration::ZERO).await;
    }

    async fn stop_within(self, window: Duration) {
        self.drain.begin(window);
        let _ = self.serving.await;
        self.engine.stop().await;
    }
}

/// Times that are recorded wait in blocks until somebody reads `/metrics`: where nobody does, they would grow for ever.
async fn tend(metrics: PrometheusHandle, drain: Drain) {
    while tokio::time::timeout(Duration::from_secs(5), drain.over()).await.is_err() {
        metrics.run_upkeep();
    }
}

fn limits(settings: &Settings) -> Result<Limits, Failure> {
    let sizes = Sizes {
        max_topics: settings.realtime.max_topics_per_connection as usize,
        max_frame_bytes: settings.realtime.max_frame_bytes as usize,
        max_value_bytes: settings.cache.max_value_bytes as usize,
        max_connections: settings.server.max_connections,
    };
    let proxies = TrustedProxies::parse(&settings.server.trusted_proxies).map_err(|text| {
        Failure::usage("bad_proxy", format!("server.trusted_proxies: {text:?} is neither an IP address nor a network"))
    })?;
    Ok(Limits::new(&settings.limits, &sizes, proxies))
}

/// One per process: counters live as long as it does.
fn recorder() -> PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    const SECONDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];
    RECORDER
        .get_or_init(|| {
            let builder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
                .unwrap_or_else(|_| PrometheusBuilder::new());
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            // Another recorder can only be a test's own.
            let _ = metrics::set_global_recorder(recorder);
            handle
        })
        .clone()
}

fn engine_config(settings: &Settings) -> Result<EngineConfig, Failure> {
    let url = settings.database.url.as_ref().ok_or_else(|| {
        Failure::usage("no_database", "no database is named")
            .hint("set WALCAST_DATABASE_URL, or try `walcast dev`, which needs none".to_owned())
    })?;
    let secret = settings.auth.jwt_secret.as_ref().ok_or_else(|| {
        Failure::usage("no_secret", "there is no secret to verify tokens with")
            .hint("set WALCAST_JWT_SECRET, or WALCAST_JWT_SECRET_FILE, to the secret that signs your tokens".to_owned())
    })?;
    let connect = ConnectConfig::parse(url.expose()).map_err(|error| Failure::usage("bad_database_url", error.to_string()))?;
    let stream = &settings.stream;
    Ok(EngineConfig {
        connect,
        max_connections: settings.database.max_connections as usize,
        statement_timeout: settings.database.statement_timeout,
        slot: settings.database.slot.clone(),
        publication_cache: settings.database.publication_cache.clone(),
        publication_realtime: settings.database.publication_realtime.clone(),
        stream: StreamLimits {
            acknowledge_after: stream.acknowledge_after,
            acknowledge_bytes: stream.acknowledge_bytes,
            replay_bytes: stream.replay_bytes as usize,
            settle_timeout: stream.settle_timeout,
            settle_bytes: stream.settle_bytes as usize,
            transaction_bytes: stream.transaction_bytes as usize,
            heartbeat: stream.heartbeat,
            intake_events: stream.intake_events as usize,
        },
        realtime: RealtimeLimits {
            outbox_bytes: settings.realtime.outbox_bytes as usize,
            outbox_frames: settings.realtime.outbox_frames as usize,
            idle_timeout: settings.realtime.idle_timeout,
            change_bytes: settings.realtime.change_bytes as usize,
            leak_window: settings.realtime.leak_window,
            trace_payloads: settings.realtime.trace_payloads,
        },
        auth: AuthConfig {
            jwt_secret: secret.expose().to_owned(),
            allowed_roles: settings.auth.allowed_roles.clone(),
            tenant_claim: settings.auth.tenant_claim.clone(),
        },
        cache: cache_settings(settings),
        queries_dir: settings.queries.dir.clone(),
        tags: tag_rules(settings),
        slow_query: Duration::from_millis(settings.queries.slow_ms),
        stream_timeout: settings.queries.stream_timeout,
    })
}

/// `[[tags]]` as the engine and the doctor take them.
pub fn tag_rules(settings: &Settings) -> Vec<TagRuleConfig> {
    let rule = |rule: &TagRuleSettings| TagRuleConfig {
        place: rule.place.clone(),
        table: TableName::parse(&rule.table),
        on: rule.on.iter().map(|name| EventMask::parse(name)).reduce(EventMask::and).unwrap_or(EventMask::ALL),
        when_changed: rule.when_changed.clone(),
        raise: rule.raise.clone(),
        cascade: rule.cascade.clone(),
        with: rule.with.clone(),
        reads: rule.reads.iter().map(|table| TableName::parse(table)).collect(),
    };
    settings.tags.iter().map(rule).collect()
}

/// What the cache obeys; `migrate` writes a part of it into the database, for SQL.
pub fn cache_settings(settings: &Settings) -> CacheSettings {
    let cache = &settings.cache;
    CacheSettings {
        l1_bytes: cache.l1_bytes as usize,
        l1_entries: cache.l1_entries.map(|most| most as usize),
        max_value_bytes: cache.max_value_bytes as usize,
        default_ttl: cache.default_ttl,
        strict: cache.strict,
        max_staleness: cache.max_staleness,
        l2: cache.l2,
        l2_max_bytes: cache.l2_max_bytes,
        l2_read_timeout: cache.l2_read_timeout,
        upkeep_every: cache.upkeep_every,
        lease: cache.lease,
        deaf: match cache.deaf {
            settings::Deaf::Stale => Deaf::Stale,
            settings::Deaf::Compute => Deaf::Compute,
        },
        namespaces: cache.namespaces.iter().map(|(name, settings)| (name.clone(), settings.clone())).collect(),
    }
}

fn engine_failure(error: &EngineError) -> Failure {
    match error {
        EngineError::NotReady(not_ready) => {
            Failure::new(not_ready.code(), not_ready.to_string()).hint(not_ready.hint().map(str::to_owned))
        }
        EngineError::Slot(slot) => Failure::new("slot", slot.to_string()),
        EngineError::Queries(text) => {
            Failure::new("queries", text.clone()).hint("mend the files, or name another folder with --queries.dir".to_owned())
        }
        EngineError::Database(error) if error.is_away() => Failure::new("database_away", error.to_string())
            .hint("is PostgreSQL running, and is the URL right? `walcast check` looks".to_owned()),
        other => Failure::new("start", other.to_string()).hint("`walcast check` says what is wrong and what mends it".to_owned()),
    }
}
