//! For tests: throw-away PostgreSQL, scripted commits, a socket client, wait handles.
//!
//! A dev-dependency of every room that talks to a real database or a real socket.

pub mod postgres;
pub mod wait;

pub use postgres::{TestPostgres, TestPostgresBuilder};
