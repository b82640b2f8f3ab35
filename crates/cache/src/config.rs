//! The cache's settings and their limits.

use std::{collections::HashMap, time::Duration};

/// No `Debug`: the ticket secret must not reach a log.
#[derive(Clone)]
pub struct CacheConfig {
    pub l1_bytes: u64,
    pub max_value_bytes: usize,
    pub default_ttl: Duration,
    pub max_tags: usize,
    /// Signs fill tickets. The default is random: tickets then end with the process.
    pub ticket_secret: [u8; 32],
    pub ticket_life: Duration,
    /// Only the namespaces named below exist.
    pub strict: bool,
    pub namespaces: HashMap<String, NamespaceConfig>,
    /// Computations at one time that others may join. Past it everyone computes for himself.
    pub max_flights: usize,
    /// Readers that wait for one computation. Past it everyone computes for himself.
    pub max_joiners: usize,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct NamespaceConfig {
    pub ttl: Option<Duration>,
    /// Its values do not come from the database (sessions, translations): time and tags by hand alone end them.
    pub external: bool,
    /// An old entry may be answered, marked stale, where computing failed.
    pub serve_stale: bool,
}

impl CacheConfig {
    pub const MIN_TTL: Duration = Duration::from_secs(1);
    pub const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
}

impl Default for CacheConfig {
    fn default() -> CacheConfig {
        CacheConfig {
            l1_bytes: 64 << 20,
            max_value_bytes: 1 << 20,
            default_ttl: Duration::from_secs(300),
            max_tags: 64,
            ticket_secret: rand::random(),
            ticket_life: Duration::from_secs(60),
            strict: false,
            namespaces: HashMap::new(),
            max_flights: 4096,
            max_joiners: 4096,
        }
    }
}
