//! What the engine needs to know, parsed at the door by whoever embeds it.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use walcast_pg::ConnectConfig;

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
}

#[derive(Clone)]
pub struct AuthConfig {
    pub jwt_secret: String,
    pub allowed_roles: Vec<String>,
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthConfig").field("allowed_roles", &self.allowed_roles).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
pub struct CacheSettings {
    pub l1_bytes: usize,
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

#[derive(Debug, Clone)]
pub struct NamespaceSettings {
    pub ttl: Option<Duration>,
    /// Values that do not come from this database: put without a ticket.
    pub external: bool,
    pub serve_stale: bool,
    /// Who may use the namespace beside `service_role`.
    pub roles: Vec<String>,
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
