//! The cache's settings and their limits.

use std::{collections::HashMap, time::Duration};

use walcast_model::Tag;

/// No `Debug`: the ticket secret must not reach a log.
#[derive(Clone)]
pub struct CacheConfig {
    pub l1_bytes: u64,
    /// At most so many entries in L1, however small. None: its bytes alone bound it.
    pub l1_entries: Option<usize>,
    pub max_value_bytes: usize,
    pub default_ttl: Duration,
    pub max_tags: usize,
    /// Signs fill tickets. The default is random: tickets then end with the process.
    pub ticket_secret: [u8; 32],
    pub ticket_life: Duration,
    /// Only the namespaces named below exist.
    pub strict: bool,
    pub namespaces: HashMap<String, NamespaceConfig>,
    /// What a namespace is that nobody named.
    pub unnamed: NamespaceConfig,
    /// Computations at one time that others may join. Past it everyone computes for himself.
    pub max_flights: usize,
    /// Readers that wait for one computation. Past it everyone computes for himself.
    pub max_joiners: usize,
    /// Computations that go on without their reader, or were begun ahead of one. Past it none is begun.
    pub max_background: usize,
    /// Values that wait to be stored while their callers go on. Past either bound nobody may go on.
    pub max_soon: usize,
    pub max_soon_bytes: usize,
    /// Of all processes that share the cache table one computes a key, and the others wait for its row. Costs a statement
    /// for each computation. A holder who dies delays the others by at most [`CacheConfig::LEASE`].
    pub lease: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NamespaceConfig {
    /// None: [`CacheConfig::default_ttl`].
    pub ttl: Option<Duration>,
    /// Each life is shortened by up to this share of it, so that what was stored together does not end together. 0 to 0.5.
    pub ttl_jitter: f64,
    /// Its values do not come from the database (sessions, translations): time and tags by hand alone end them.
    pub external: bool,
    /// What L1 lets go first when it is full.
    pub policy: Policy,
    /// Bytes of L1 for this namespace alone, taken from [`CacheConfig::l1_bytes`]. None: it shares the common room of its policy.
    pub l1_bytes: Option<u64>,
    /// Carried by every entry, beside its own tags.
    pub tags: Vec<Tag>,
    /// So long after its time an old entry may be answered, marked stale, where computing failed.
    pub grace: Duration,
    /// So long after its time an entry is answered, marked stale, while somebody computes it anew.
    pub stale_while_revalidate: Duration,
    /// From this share of its life on, an entry that is in use is computed anew before it ends. None: never.
    pub refresh_ahead: Option<f64>,
    /// How long "there is nothing" is kept. None: it is not kept.
    pub negative_ttl: Option<Duration>,
    /// An entry that a commit invalidated may be answered too, marked stale, within `grace` and `stale_while_revalidate`.
    /// Never for values under row security.
    pub serve_invalidated: bool,
}

/// What a full L1 lets go first.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Learns from use: neither one scan nor yesterday's favourites push out what is in use.
    #[default]
    Adaptive,
    /// What was longest not read.
    Lru,
    /// What is least often read.
    Lfu,
    /// What is oldest.
    Fifo,
}

impl Policy {
    pub const ALL: [Policy; 4] = [Policy::Adaptive, Policy::Lru, Policy::Lfu, Policy::Fifo];

    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Adaptive => "adaptive",
            Policy::Lru => "lru",
            Policy::Lfu => "lfu",
            Policy::Fifo => "fifo",
        }
    }
}

impl Default for NamespaceConfig {
    fn default() -> NamespaceConfig {
        NamespaceConfig {
            ttl: None,
            ttl_jitter: 0.1,
            external: false,
            policy: Policy::Adaptive,
            l1_bytes: None,
            tags: Vec::new(),
            grace: Duration::ZERO,
            stale_while_revalidate: Duration::ZERO,
            refresh_ahead: None,
            negative_ttl: None,
            serve_invalidated: false,
        }
    }
}

impl NamespaceConfig {
    /// How long after its time an entry is still worth keeping.
    pub fn stale_life(&self) -> Duration {
        self.grace.max(self.stale_while_revalidate)
    }
}

impl CacheConfig {
    pub const MIN_TTL: Duration = Duration::from_secs(1);
    pub const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
    /// So long it is for one caller alone to put a key anew.
    pub const TURN: Duration = Duration::from_secs(10);
    /// So long one process computes a key alone.
    pub const LEASE: Duration = Duration::from_secs(10);

    /// None: there is nothing, and the namespace does not keep that.
    pub(crate) fn ttl(&self, namespace: &NamespaceConfig, asked: Option<Duration>, negative: bool) -> Option<Duration> {
        if negative {
            return namespace.negative_ttl.map(|longest| asked.map_or(longest, |asked| asked.min(longest)));
        }
        Some(asked.or(namespace.ttl).unwrap_or(self.default_ttl))
    }
}

impl Default for CacheConfig {
    fn default() -> CacheConfig {
        CacheConfig {
            l1_bytes: 64 << 20,
            l1_entries: None,
            max_value_bytes: 1 << 20,
            default_ttl: Duration::from_secs(300),
            max_tags: 64,
            ticket_secret: rand::random(),
            ticket_life: Duration::from_secs(60),
            strict: false,
            namespaces: HashMap::new(),
            unnamed: NamespaceConfig::default(),
            max_flights: 4096,
            // A herd waits in memory for one computation: a seat costs less than a computation of one's own.
            max_joiners: 16_384,
            max_background: 64,
            max_soon: 256,
            max_soon_bytes: 32 << 20,
            lease: false,
        }
    }
}
