//! Every setting of the program, as plain typed values. Read once at start; nothing changes them afterwards.
//!
//! One [`table`] holds key, type, default and help of each; flags, environment, file and the reference page follow
//! from it. Order: default < file < environment < flag. What is not in the table is an error with a suggestion.

mod error;
mod file;
mod layers;
mod namespace;
mod reference;
mod resolved;
mod secret;
pub mod table;
mod tag_rule;
mod value;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

pub use error::{SettingsError, SettingsErrors};
pub use layers::{Effective, Inputs, Loaded, load};
pub use reference::reference;
pub use secret::Secret;
pub use tag_rule::TagRuleSettings;
pub use value::{parse_time as parse_duration, parse_ttl};

use resolved::Resolved;
use walcast_engine::config::NamespaceSettings;

#[derive(Debug, Clone)]
pub struct Settings {
    pub database: DatabaseSettings,
    pub server: ServerSettings,
    pub auth: AuthSettings,
    pub cache: CacheSettings,
    pub queries: QueriesSettings,
    pub stream: StreamSettings,
    pub realtime: RealtimeSettings,
    pub limits: LimitsSettings,
    pub sse: SseSettings,
    pub log: LogSettings,
    /// `[[tags]]`, in the file's order.
    pub tags: Vec<TagRuleSettings>,
}

#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    pub url: Option<Secret>,
    pub max_connections: u64,
    pub statement_timeout: Duration,
    pub slot: String,
    pub publication_cache: String,
    pub publication_realtime: String,
}

#[derive(Debug, Clone)]
pub struct ServerSettings {
    pub listen: SocketAddr,
    pub max_connections: u64,
    pub drain: Duration,
    pub trusted_proxies: Vec<String>,
    pub allowed_origins: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct AuthSettings {
    pub jwt_secret: Option<Secret>,
    pub allowed_roles: Vec<String>,
    pub tenant_claim: String,
}

#[derive(Debug, Clone)]
pub struct CacheSettings {
    pub l1_bytes: u64,
    pub l1_entries: Option<u64>,
    pub max_value_bytes: u64,
    pub default_ttl: Duration,
    /// Only namespaces that the file names exist.
    pub strict: bool,
    pub max_staleness: Duration,
    pub l2: bool,
    /// For `migrate`: the table is logged.
    pub l2_logged: bool,
    pub l2_max_bytes: u64,
    pub l2_read_timeout: Duration,
    pub upkeep_every: Duration,
    pub lease: bool,
    pub deaf: Deaf,
    pub namespaces: BTreeMap<String, NamespaceSettings>,
}

/// What is answered while the stream has not been heard for `cache.max_staleness`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deaf {
    /// Cached values, marked stale.
    Stale,
    /// What the source says now.
    Compute,
}

#[derive(Debug, Clone)]
pub struct QueriesSettings {
    pub dir: Option<PathBuf>,
    pub slow_ms: u64,
    pub stream_timeout: Duration,
}

#[derive(Debug, Clone)]
pub struct StreamSettings {
    pub acknowledge_after: Duration,
    pub acknowledge_bytes: u64,
    pub replay_bytes: u64,
    pub settle_timeout: Duration,
    pub settle_bytes: u64,
    pub transaction_bytes: u64,
    pub heartbeat: Duration,
    pub intake_events: u64,
}

#[derive(Debug, Clone)]
pub struct RealtimeSettings {
    pub outbox_bytes: u64,
    pub outbox_frames: u64,
    pub change_bytes: u64,
    pub max_topics_per_connection: u64,
    pub max_frame_bytes: u64,
    pub idle_timeout: Duration,
    pub leak_window: Duration,
    pub trace_payloads: bool,
}

/// 0 is no limit.
#[derive(Debug, Clone, Default)]
pub struct LimitsSettings {
    pub connects_per_second: u32,
    pub connections_per_ip: u64,
    pub connections_per_tenant: u64,
    pub joins_per_second_per_connection: u32,
    pub joins_per_second_per_tenant: u32,
    pub subscribers_per_topic: u64,
    pub messages_in_per_second_per_connection: u32,
    pub messages_in_per_second_per_topic: u32,
    pub messages_in_per_second_per_tenant: u32,
    pub messages_out_per_second_per_connection: u32,
    pub messages_out_per_second_per_tenant: u32,
    pub payload_bytes: u64,
    pub idle_without_topic: Duration,
}

#[derive(Debug, Clone)]
pub struct SseSettings {
    pub max_streams_per_resource: u64,
    pub cookie: Option<String>,
}

#[derive(Debug, Clone)]
pub struct LogSettings {
    pub format: LogFormat,
    /// As in `info,walcast_wal=debug`.
    pub level: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

impl Settings {
    /// Takes each key of the table once; a test holds both to each other.
    fn from_resolved(from: &mut Resolved, namespaces: BTreeMap<String, NamespaceSettings>) -> Settings {
        Settings {
            database: DatabaseSettings {
                url: from.secret("database.url"),
                max_connections: from.number("database.max_connections"),
                statement_timeout: from.time("database.statement_timeout"),
                slot: from.text("database.slot"),
                publication_cache: from.text("database.publication_cache"),
                publication_realtime: from.text("database.publication_realtime"),
            },
            server: ServerSettings {
                listen: from.address("server.listen"),
                max_connections: from.number("server.max_connections"),
                drain: from.time("server.drain"),
                trusted_proxies: from.list("server.trusted_proxies"),
                allowed_origins: from.list("server.allowed_origins"),
            },
            auth: AuthSettings {
                jwt_secret: from.secret("auth.jwt_secret"),
                allowed_roles: from.list("auth.allowed_roles"),
                tenant_claim: from.text("auth.tenant_claim"),
            },
            cache: CacheSettings {
                l1_bytes: from.number("cache.l1_bytes"),
                l1_entries: from.optional_number("cache.l1_entries"),
                max_value_bytes: from.number("cache.max_value_bytes"),
                default_ttl: from.time("cache.default_ttl"),
                strict: from.flag("cache.strict"),
                max_staleness: from.time("cache.max_staleness"),
                l2: from.flag("cache.l2"),
                l2_logged: from.flag("cache.l2_logged"),
                l2_max_bytes: from.number("cache.l2_max_bytes"),
                l2_read_timeout: from.time("cache.l2_read_timeout"),
                upkeep_every: from.time("cache.upkeep_every"),
                lease: from.flag("cache.lease"),
                deaf: if from.text("cache.deaf") == "compute" { Deaf::Compute } else { Deaf::Stale },
                namespaces,
            },
            queries: QueriesSettings {
                dir: from.optional_text("queries.dir").map(PathBuf::from),
                slow_ms: from.number("queries.slow_ms"),
                stream_timeout: from.time("queries.stream_timeout"),
            },
            stream: StreamSettings {
                acknowledge_after: from.time("stream.acknowledge_after"),
                acknowledge_bytes: from.number("stream.acknowledge_bytes"),
                replay_bytes: from.number("stream.replay_bytes"),
                settle_timeout: from.time("stream.settle_timeout"),
                settle_bytes: from.number("stream.settle_bytes"),
                transaction_bytes: from.number("stream.transaction_bytes"),
                heartbeat: from.time("stream.heartbeat"),
                intake_events: from.number("stream.intake_events"),
            },
            realtime: RealtimeSettings {
                outbox_bytes: from.number("realtime.outbox_bytes"),
                outbox_frames: from.number("realtime.outbox_frames"),
                change_bytes: from.number("realtime.change_bytes"),
                max_topics_per_connection: from.number("realtime.max_topics_per_connection"),
                max_frame_bytes: from.number("realtime.max_frame_bytes"),
                idle_timeout: from.time("realtime.idle_timeout"),
                leak_window: from.time("realtime.leak_window"),
                trace_payloads: from.flag("realtime.trace_payloads"),
            },
            limits: LimitsSettings::from_resolved(from),
            sse: SseSettings {
                max_streams_per_resource: from.number("sse.max_streams_per_resource"),
                cookie: from.optional_text("sse.cookie"),
            },
            log: LogSettings {
                format: if from.text("log.format") == "json" { LogFormat::Json } else { LogFormat::Text },
                level: from.text("log.level"),
            },
            tags: Vec::new(),
        }
    }
}

impl LimitsSettings {
    fn from_resolved(from: &mut Resolved) -> LimitsSettings {
        // The table allows no more than fits.
        let mut rate = |key| from.number(key) as u32;
        LimitsSettings {
            connects_per_second: rate("limits.connects_per_second"),
            joins_per_second_per_connection: rate("limits.joins_per_second_per_connection"),
            joins_per_second_per_tenant: rate("limits.joins_per_second_per_tenant"),
            messages_in_per_second_per_connection: rate("limits.messages_in_per_second_per_connection"),
            messages_in_per_second_per_topic: rate("limits.messages_in_per_second_per_topic"),
            messages_in_per_second_per_tenant: rate("limits.messages_in_per_second_per_tenant"),
            messages_out_per_second_per_connection: rate("limits.messages_out_per_second_per_connection"),
            messages_out_per_second_per_tenant: rate("limits.messages_out_per_second_per_tenant"),
            connections_per_ip: from.number("limits.connections_per_ip"),
            connections_per_tenant: from.number("limits.connections_per_tenant"),
            subscribers_per_topic: from.number("limits.subscribers_per_topic"),
            payload_bytes: from.number("limits.payload_bytes"),
            idle_without_topic: from.time("limits.idle_without_topic"),
        }
    }
}

#[cfg(test)]
mod tests;
