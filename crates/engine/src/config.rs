//! What the engine needs to know, parsed at the door by whoever embeds it.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use walcast_cache::NamespaceConfig;
use walcast_model::TableName;
use walcast_pg::ConnectConfig;

pub use crate::namespaces::{Context, Grant, GrantError, Right};

#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub connect: ConnectConfig,
    /// All connections together, the replication connection included.
    pub max_connections: usize,
    pub statement_timeout: Duration,
    pub slot: String,
    pub publication_cache: String,
    pub publication_realtime: String,
    pub stream: StreamLimits,
    pub realtime: RealtimeLimits,
    pub auth: AuthConfig,
    pub cache: CacheSettings,
    pub queries_dir: Option<PathBuf>,
    pub tags: Vec<TagRuleConfig>,
    /// A query that takes longer is logged and kept for the operator.
    pub slow_query: Duration,
    /// Longest life of a stream of rows, which holds a connection and a snapshot.
    pub stream_timeout: Duration,
}

#[derive(Debug, Clone)]
pub struct StreamLimits {
    /// The slot is acknowledged this far behind, in time and in bytes of WAL, whichever is less.
    pub acknowledge_after: Duration,
    pub acknowledge_bytes: u64,
    pub replay_bytes: usize,
    pub settle_timeout: Duration,
    pub settle_bytes: usize,
    pub transaction_bytes: usize,
    pub heartbeat: Duration,
    pub intake_events: usize,
}

#[derive(Debug, Clone)]
pub struct RealtimeLimits {
    pub outbox_bytes: usize,
    pub outbox_frames: usize,
    /// A WebSocket that says nothing for so long is closed.
    pub idle_timeout: Duration,
    /// A change whose JSON is larger is told without its larger values.
    pub change_bytes: usize,
    /// Something that looks like a leak must look so for this long.
    pub leak_window: Duration,
    /// Traces may show the values of rows.
    pub trace_payloads: bool,
}

#[derive(Clone)]
pub struct AuthConfig {
    pub jwt_secret: String,
    pub allowed_roles: Vec<String>,
    /// A claim by its name, or by the way to it.
    pub tenant_claim: String,
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthConfig").field("allowed_roles", &self.allowed_roles).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
pub struct CacheSettings {
    pub l1_bytes: usize,
    /// None: the bytes alone bound L1.
    pub l1_entries: Option<usize>,
    pub max_value_bytes: usize,
    pub default_ttl: Duration,
    pub strict: bool,
    /// A node that has not heard its own heartbeat for this long answers nothing as fresh.
    pub max_staleness: Duration,
    pub l2: bool,
    pub l2_max_bytes: u64,
    pub l2_read_timeout: Duration,
    /// Between two full clean-ups of the cache table.
    pub upkeep_every: Duration,
    /// Of all processes that share the cache table one computes a key, the others wait for its row.
    pub lease: bool,
    pub deaf: Deaf,
    pub namespaces: HashMap<String, NamespaceSettings>,
}

/// What a node answers while it does not hear the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deaf {
    /// The entry, marked stale.
    Stale,
    /// A miss: the caller computes.
    Compute,
}

/// One `[cache.namespaces.NAME]`: how its entries live, who may use it, and who sees whose.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct NamespaceSettings {
    pub entries: NamespaceConfig,
    /// None: one entry for all who may read it.
    pub context: Option<Context>,
    /// Beside `service_role`.
    pub read: Vec<Grant>,
    pub write: Vec<Grant>,
    pub invalidate: Vec<Grant>,
}

impl NamespaceSettings {
    pub fn grants(&self, right: Right) -> &[Grant] {
        match right {
            Right::Read => &self.read,
            Right::Write => &self.write,
            Right::Invalidate => &self.invalidate,
        }
    }
}

/// What a change of a table raises beside its own tags.
#[derive(Debug, Clone)]
pub struct TagRuleConfig {
    /// Where it was written, for messages: `walcast.toml line 12`.
    pub place: String,
    pub table: TableName,
    pub on: walcast_matcher::EventMask,
    /// Empty: every update.
    pub when_changed: Vec<String>,
    /// Templates: `student:{student_id}`.
    pub raise: Vec<String>,
    /// A lookup whose columns the templates may use.
    pub cascade: Option<String>,
    /// Columns of the changed row for the lookup's $1, $2, …
    pub with: Vec<String>,
    /// Tables that the lookup reads behind functions.
    pub reads: Vec<TableName>,
}

impl TagRuleConfig {
    /// All of it but the place.
    pub fn meaning(&self) -> String {
        format!("{:?}", TagRuleConfig { place: String::new(), ..self.clone() })
    }
}

impl Default for StreamLimits {
    fn default() -> Self {
        StreamLimits {
            acknowledge_after: Duration::from_secs(60),
            acknowledge_bytes: 256 << 20,
            replay_bytes: 64 << 20,
            settle_timeout: Duration::from_secs(30),
            settle_bytes: 64 << 20,
            transaction_bytes: 64 << 20,
            heartbeat: Duration::from_secs(1),
            intake_events: 8192,
        }
    }
}
