//! Connections to PostgreSQL and what every room needs to know about it.
//!
//! [`ConnectConfig`] and [`Pool`]: who connects, how often, over which TLS. [`Envelope`]: a transaction as somebody
//! else's role. [`Sampler`]: which commits are visible right now. [`Catalog`]: types, columns and keys.
//! [`table_marks()`]: whether somebody redefined a table.
//! Knows nothing of what the rooms ask for.

mod catalog;
mod connect;
mod envelope;
mod error;
mod pool;
mod quote;
mod sampler;
mod table_marks;

pub use catalog::{Catalog, ColumnFacts, TableFacts, TaggedColumns};
pub use connect::{ConnectConfig, ConnectError, TlsMode};
pub use envelope::{Envelope, EnvelopeScope};
pub use error::PgError;
pub use pool::{Lease, Pool};
pub use quote::{quote_ident, quote_literal};
pub use sampler::{Sample, Sampler};
pub use table_marks::{TableMark, table_marks};
