//! What can go wrong between us and PostgreSQL, sorted by who acts on it.

use std::error::Error;

use tokio_postgres::error::{DbError, SqlState};

#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// Retry with backoff: nothing was decided.
    #[error("PostgreSQL cannot be reached while {doing}: {source}")]
    Away { doing: &'static str, source: Box<dyn Error + Send + Sync> },
    /// The statement was refused: its SQLSTATE says why.
    #[error("{doing}: {message} (SQLSTATE {code})")]
    Refused { doing: &'static str, code: String, message: String, hint: Option<String> },
    #[error("{doing}: PostgreSQL answered something unexpected: {what}")]
    Unexpected { doing: &'static str, what: String },
    /// Every connection of the budget is in use.
    #[error("{doing}: no database connection became free within {waited_ms} ms; raise `database.max_connections`")]
    Busy { doing: &'static str, waited_ms: u64 },
}

impl PgError {
    /// Sorts a driver error: what carries an SQLSTATE was refused, the rest is a lost or missing connection.
    pub fn from_driver(doing: &'static str, error: tokio_postgres::Error) -> PgError {
        match error.as_db_error() {
            // Shutdown, crash and "cannot connect now" end the session: the same as an unreachable server.
            Some(db) if !matches!(db.code().code(), "57P01" | "57P02" | "57P03") => PgError::Refused {
                doing,
                code: db.code().code().to_owned(),
                message: db.message().to_owned(),
                hint: db.hint().map(str::to_owned),
            },
            Some(db) => PgError::Away { doing, source: db.clone().into() },
            // The driver's own text says only at which step; its cause says why.
            None => match error.source() {
                Some(cause) => PgError::Away { doing, source: format!("{error}: {cause}").into() },
                None => PgError::Away { doing, source: error.into() },
            },
        }
    }

    /// For `.map_err(PgError::when("reading …"))`.
    pub fn when(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> PgError {
        move |error| PgError::from_driver(doing, error)
    }

    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            PgError::Refused { code, .. } => Some(code),
            _ => None,
        }
    }

    pub fn is_away(&self) -> bool {
        matches!(self, PgError::Away { .. })
    }

    /// The server is there and lets nobody in: it is shutting down, or not yet up.
    pub fn lets_nobody_in(&self) -> bool {
        let PgError::Away { source, .. } = self else { return false };
        source.downcast_ref::<DbError>().is_some_and(|db| *db.code() == SqlState::CANNOT_CONNECT_NOW)
    }
}
