//! What can go wrong with a PostgreSQL of our own. Every sentence ends with how to mend it.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(
        "no PostgreSQL {oldest} or newer was found ({tried}); install one (Debian: apt-get install postgresql) \
         or point WALCAST_PG_BIN at the directory that holds `postgres` and `initdb`"
    )]
    NotFound { oldest: u32, tried: String },
    #[error("{dir} holds no usable PostgreSQL: {reason}; point WALCAST_PG_BIN at a directory that holds `postgres` and `initdb`")]
    BadBinaries { dir: PathBuf, reason: String },
    #[error("PostgreSQL could not be fetched: {reason}; type: {hint}")]
    Fetch { reason: String, hint: String },
    #[error("{dir} is in use by process {pid}; stop that one first, or choose another directory")]
    Locked { dir: PathBuf, pid: String },
    #[error(
        "PostgreSQL refuses to run as root, and no user `postgres` or `nobody` exists; run as an ordinary user, or add one: useradd postgres"
    )]
    NoServiceUser,
    #[error("user {user} cannot reach {dir}; chmod o+x {dir}, or choose a directory outside it")]
    Unreachable { user: String, dir: PathBuf },
    #[error("port {port} on 127.0.0.1 is taken; stop what listens there, or choose another port")]
    PortTaken { port: u16 },
    #[error("no free port was found on 127.0.0.1 between {from} and {to}; choose one")]
    NoPort { from: u16, to: u16 },
    #[error(
        "{data} was made by PostgreSQL {made_by}, but the binaries are {binaries}; use those of {made_by}, or another directory"
    )]
    VersionMismatch { data: PathBuf, made_by: String, binaries: u32 },
    #[error("initdb failed: {output}")]
    Initdb { output: String },
    #[error("PostgreSQL did not start: {reason}; its log ends with:\n{log}")]
    Start { reason: String, log: String },
    #[error("PostgreSQL (process {pid}) did not stop within {seconds} s; look at {log}, then: kill -9 {pid}")]
    Stop { pid: i32, seconds: u64, log: PathBuf },
    #[error("PostgreSQL is not running; start it first")]
    NotRunning,
    #[error("the supervisor of PostgreSQL ended: {reason}")]
    Supervisor { reason: String },
    #[error("{doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl ClusterError {
    /// For `map_err`: keeps what was being done to which path.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClusterError {
        move |source| ClusterError::Io { doing, path: path.to_path_buf(), source }
    }
}
