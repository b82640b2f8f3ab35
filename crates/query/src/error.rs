//! Why a query has no answer, or an answer that must not be kept. Each variant has a code that clients see and a hint.

use std::time::Duration;

use walcast_model::TableName;
use walcast_pg::{PgError, quote_ident};

use crate::file::nearest;

#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error("there is no query named `{name}`")]
    Unknown { name: String, near: Option<String> },
    #[error("role `{role}` may not run query `{name}`")]
    RoleNotAllowed { name: String, role: String },
    #[error("query `{name}` has no parameter `{param}`")]
    UnknownParam { name: String, param: String, known: Vec<String> },
    #[error("query `{name}` needs parameter `{param}` ({type_name})")]
    MissingParam { name: String, param: String, type_name: String },
    #[error("parameter `{param}`: {message}")]
    BadParam { param: String, type_name: String, message: String },
    #[error("query `{name}` found more than {limit} rows")]
    TooManyRows { name: String, limit: usize },
    #[error("query `{name}`: {message}")]
    Denied { name: String, message: String },
    #[error("query `{name}` was stopped after {after_ms} ms")]
    Timeout { name: String, after_ms: u128 },
    #[error("query `{name}` was refused by PostgreSQL: {message} (SQLSTATE {sqlstate})")]
    Refused {
        name: String,
        sqlstate: String,
        message: String,
        hint: Option<String>,
        /// Of its file, where PostgreSQL says at which place.
        line: Option<usize>,
    },
    #[error("the cursor is not one of query `{name}`, or its file has changed since")]
    BadCursor { name: String },
    #[error("query `{name}` cannot be answered by pages: their order is not total: {why}")]
    NoTotalOrder { name: String, why: String },
    #[error("query `{name}` has no cache key: {why}")]
    Key { name: String, why: String },
    /// Away, busy or confused: the connection's own story.
    #[error(transparent)]
    Database(PgError),
}

impl QueryError {
    pub(crate) fn unknown<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> QueryError {
        QueryError::Unknown { name: name.to_owned(), near: nearest(name, known).map(str::to_owned) }
    }

    pub(crate) fn from_pg(name: &str, error: PgError, timeout: Duration) -> QueryError {
        let name = name.to_owned();
        match error {
            PgError::Refused { code, message, hint, .. } => match code.as_str() {
                "42501" => QueryError::Denied { name, message },
                "57014" => QueryError::Timeout { name, after_ms: timeout.as_millis() },
                _ => QueryError::Refused { name, sqlstate: code, message, hint, line: None },
            },
            other => QueryError::Database(other),
        }
    }

    pub(crate) fn at_line(self, at: Option<usize>) -> QueryError {
        match self {
            QueryError::Refused { name, sqlstate, message, hint, .. } => {
                QueryError::Refused { name, sqlstate, message, hint, line: at }
            }
            other => other,
        }
    }

    pub fn code(&self) -> &'static str {
        match self {
            QueryError::Unknown { .. } => "unknown_query",
            QueryError::RoleNotAllowed { .. } => "role_not_allowed",
            QueryError::UnknownParam { .. } => "unknown_parameter",
            QueryError::MissingParam { .. } => "missing_parameter",
            QueryError::BadParam { .. } => "bad_parameter",
            QueryError::TooManyRows { .. } => "too_many_rows",
            QueryError::Denied { .. } => "permission_denied",
            QueryError::Timeout { .. } => "query_timeout",
            QueryError::Refused { .. } => "query_refused",
            QueryError::BadCursor { .. } => "bad_cursor",
            QueryError::NoTotalOrder { .. } => "no_total_order",
            QueryError::Key { .. } => "no_cache_key",
            QueryError::Database(PgError::Busy { .. }) => "database_busy",
            QueryError::Database(_) => "database_away",
        }
    }

    pub fn hint(&self) -> String {
        match self {
            QueryError::Unknown { near: Some(near), .. } => format!("did you mean `{near}`?"),
            QueryError::Unknown { .. } => "queries are the `.sql` files of the queries folder".into(),
            QueryError::RoleNotAllowed { .. } => "the header `-- roles:` of its file lists who may".into(),
            QueryError::UnknownParam { param, known, .. } => match nearest(param, known.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`?"),
                None if known.is_empty() => "it takes none".into(),
                None => format!("it takes {}", known.join(", ")),
            },
            QueryError::MissingParam { param, .. } => format!("add `{param}=…` to the request"),
            QueryError::BadParam { type_name, .. } => format!("it must be a value of type {type_name}"),
            QueryError::TooManyRows { .. } => "ask for less, add a LIMIT, or raise `-- max_rows:` in its file".into(),
            QueryError::Denied { .. } => "grant the role SELECT on the tables and USAGE on their schemas".into(),
            QueryError::Timeout { .. } => "add an index, ask for less, or raise the timeout".into(),
            QueryError::Refused { sqlstate, .. } if sqlstate == "42P01" => {
                "create the table first, or take the file away until it exists".into()
            }
            QueryError::BadCursor { .. } => "take `after` from the answer's Walcast-Next, or leave it out to begin anew".into(),
            QueryError::NoTotalOrder { .. } => {
                "end the order with a unique column of the table, as in `-- page: 50 by created_at desc, id desc`; \
                 where only you know that no two rows are equal, add `unique`"
                    .into()
            }
            QueryError::Refused { hint, .. } => hint.clone().unwrap_or_else(|| "try the query in psql as the same role".into()),
            QueryError::Key { .. } => "shorten the role's name".into(),
            QueryError::Database(_) => "try again in a moment".into(),
        }
    }
}

/// Why an answer is computed each time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Uncacheable {
    #[error("`{0}` cannot be looked into; declare the tables it reads: `-- depends: table, schema.table`")]
    Opaque(String),
    #[error("`{0}` gives another answer each time; take it out of the query, its views and its policies")]
    Volatile(String),
    #[error("`{0}` reads the clock or the server's state; if answers of some age will do, declare it: `-- max_age: 10s`")]
    Clock(String),
    #[error("unpublished: {table}; {mend}")]
    Unpublished { table: TableName, mend: String },
    #[error("{table} is {what}, whose changes are not in the log; query the tables behind it")]
    Untracked { table: TableName, what: &'static str },
}

impl Uncacheable {
    /// What makes answers kept.
    pub fn mend(&self) -> String {
        match self {
            Uncacheable::Opaque(_) => "add `-- depends: table, schema.table` to its file".into(),
            Uncacheable::Volatile(name) => format!("take `{name}` out of the query, its views and its policies"),
            Uncacheable::Clock(_) => "add `-- max_age: 10s` to its file, if answers of that age will do".into(),
            Uncacheable::Unpublished { mend, .. } => mend.clone(),
            Uncacheable::Untracked { .. } => "query the tables behind it".into(),
        }
    }

    pub(crate) fn unpublished(table: &TableName, publication: &str) -> Uncacheable {
        let mend = if matches!(table.schema(), "pg_catalog" | "information_schema") {
            "the system catalogs cannot be followed".to_owned()
        } else {
            let (schema, name) = (quote_ident(table.schema()), quote_ident(table.table()));
            format!("alter publication {} add table {schema}.{name}", quote_ident(publication))
        };
        Uncacheable::Unpublished { table: table.clone(), mend }
    }

    pub fn code(&self) -> &'static str {
        match self {
            Uncacheable::Opaque(_) => "opaque",
            Uncacheable::Volatile(_) => "volatile",
            Uncacheable::Clock(_) => "clock",
            Uncacheable::Unpublished { .. } => "unpublished",
            Uncacheable::Untracked { .. } => "untracked",
        }
    }
}
