//! One file a command. Each takes the settings and its arguments, and answers with the exit code or a failure.

pub mod check;
pub mod dev;
pub mod explain;
pub mod explain_visibility;
pub mod invalidate;
pub mod migrate;
mod reach;
pub mod serve;
pub mod support;
pub mod tail;
pub mod token;
