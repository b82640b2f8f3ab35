//! The cache: L1 in memory over L2 in a PostgreSQL table, with tickets, fences and flights.
//!
//! [`Cache`] is the face: `get`, `put`, `get_or_compute`. What decides is never here but in
//! [`walcast_model::TagClock`], which somebody else raises as commits come in: each answer is judged by it.
//! Knows nothing of WAL or HTTP.
//!
//! | question | file |
//! |---|---|
//! | what a read is answered, from which tier | `lookup` |
//! | may this value be stored | `put` |
//! | why was this entry dropped | `invalidate` |
//! | how are stampedes stopped | `flight`, `reader`; across processes `lease` |
//! | what is answered stale, and when | `stale` |
//! | how values from elsewhere get into both tiers | `external` |
//! | what waits to be stored while its caller goes on | `soon` |
//! | what goes on in the background | `refresh` |
//! | what leaves a full L1, and who has how much of it | `l1/room`, `l1/plan` |
//! | what does a hand invalidate that no tag says | `selection`, `selections` |
//! | what is a fill ticket | `ticket` |
//! | what is in the table, who writes it | `l2`, `l2_writer`, `sql/` |
//! | what leaves the table, and when | `upkeep`, `cleanups` |

mod breaker;
mod cache;
mod cleanups;
mod coarse_clock;
mod compute;
mod config;
mod entry;
mod external;
mod flight;
mod invalidate;
mod jitter;
mod l1;
mod l2;
mod l2_writer;
mod lease;
mod lookup;
mod many;
mod precondition;
mod put;
mod reader;
mod refresh;
mod refusal;
mod selection;
mod selections;
mod soon;
mod stale;
mod standalone;
mod stats;
mod survey;
mod ticket;
mod turns;
mod upkeep;

pub use cache::Cache;
pub use cleanups::{CleanupDay, LoggedCleanup};
pub use compute::{Answer, ComputeError, ComputeOptions, Computed, Source};
pub use config::{CacheConfig, NamespaceConfig, Policy};
pub use entry::{Entry, NewValue, etag};
pub use external::Arrival;
pub use invalidate::{AtLeast, Hearing, MissReason};
pub use l1::RoomFigures;
pub use l2::{L2, L2Config};
pub use lookup::{Lookup, Stale, Tier};
pub use many::{NewEntry, Preloaded};
pub use precondition::Precondition;
pub use put::Stored;
pub use refusal::{PutError, Refusal};
pub use selection::{Glob, GlobError, Selection};
pub use selections::{Keeping, Kept};
pub use soon::SoonRoom;
pub use standalone::Hand;
pub use stats::{Counter, Stats};
pub use survey::Survey;
pub use ticket::{TicketError, Tickets};
pub use upkeep::{Cleanup, L2Size, Reason};

/// What this room puts into the database, in order.
pub const MIGRATIONS: &[(&str, &str)] = &[
    ("cache/0001_entries", include_str!("../sql/0001_entries.sql")),
    ("cache/0002_upkeep", include_str!("../sql/0002_upkeep.sql")),
    ("cache/0003_leases", include_str!("../sql/0003_leases.sql")),
    ("cache/0004_grants", include_str!("../sql/0004_grants.sql")),
    ("cache/0005_judge", include_str!("../sql/0005_judge.sql")),
    ("cache/0006_tags", include_str!("../sql/0006_tags.sql")),
    ("cache/0007_functions", include_str!("../sql/0007_functions.sql")),
    ("cache/0008_cached", include_str!("../sql/0008_cached.sql")),
];

/// Functions that callers may execute, in schema `walcast`. Each checks the caller's grants at every call.
pub const SQL_FACE: &[&str] = &[
    "cache_get(text, text)",
    "cache_get_bytes(text, text)",
    "cache_set(text, text, jsonb, interval, text[], text)",
    "cache_fence()",
    "cache_invalidate_tags(text[])",
    "cache_invalidate_key(text, text)",
    "cache_invalidate_namespace(text)",
    "cached(regprocedure, jsonb, interval, text[], text, text[])",
    // What `cached` does with its owner's rights.
    "cache_caller()",
    "cached_call(regprocedure, jsonb)",
    "cached_args(jsonb)",
    "cached_find(regprocedure, jsonb, interval, text[], text, text[], text)",
    "cached_keep(regprocedure, jsonb, interval, text[], text, text[], text, jsonb, text)",
];

/// Tables that say who may do what; written by `migrate` alone.
pub const SQL_SETTINGS: &[&str] = &["cache_settings", "cache_namespaces", "namespace_grants"];
