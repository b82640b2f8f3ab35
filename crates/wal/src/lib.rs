//! The write-ahead log: from the replication slot to committed transactions.
//!
//! [`slot`]: the slot itself. [`stream`]: the replication connection. [`pgoutput`]: bytes to messages.
//! [`assemble`]: messages to commits. [`checkpoint`]: what survives a restart. Knows nothing of who wants a change.

pub mod assemble;
pub mod checkpoint;
pub mod pgoutput;
mod slot;
mod stream;

pub use slot::{SlotError, SlotState, ensure as ensure_slot};
pub use stream::{Heard, Identity, Session, Stream, StreamConfig, StreamError};

/// What this room puts into the database, in order.
pub const MIGRATIONS: &[(&str, &str)] = &[
    ("wal/0001_state", include_str!("../sql/0001_state.sql")),
    ("wal/0002_publications", include_str!("../sql/0002_publications.sql")),
    ("wal/0003_settled", include_str!("../sql/0003_settled.sql")),
    ("wal/0004_selections", include_str!("../sql/0004_selections.sql")),
];
