//! The frames of the wire and the error codes; the only serialised shapes. Knows nothing of sockets or the cache.
//!
//! [`phoenix`] and [`join`]: what Supabase clients speak. [`change`]: the data of a row change. [`value`]: PostgreSQL's text
//! forms as JSON. [`sse`]: events. [`websocket`]: what is around a text on its way out. [`problem`]: errors over HTTP. [`message`]: our own words in the WAL.

pub mod builtin_types;
pub mod change;
pub mod join;
pub mod message;
pub mod phoenix;
pub mod problem;
pub mod sse;
pub mod value;
pub mod websocket;
