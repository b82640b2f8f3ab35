//! A PostgreSQL of our own: find the binaries, initdb, start, supervise, stop.
//!
//! Used by `walcast dev` and by the tests. Never used against a database that
//! somebody else runs, and never listens anywhere but on the loopback.

mod binaries;
mod cluster;
mod error;
mod fetch;
mod lock;
mod passphrase;
mod port;
mod postmaster;
mod service_user;
mod supervisor;
mod tether;

pub use binaries::{Binaries, OLDEST_MAJOR};
pub use cluster::{Access, Cluster, ClusterConfig, Durability};
pub use error::ClusterError;
pub use lock::{DirLock, Patience};
pub use supervisor::{Supervised, supervise};
