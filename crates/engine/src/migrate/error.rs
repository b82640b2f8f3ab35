//! Why a migration stopped, and whom to ask for what is missing.

use walcast_pg::{ConnectError, PgError};

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    Url(#[from] ConnectError),
    #[error(transparent)]
    Pg(#[from] PgError),
    #[error("PostgreSQL {0} is too old: Walcast needs 15 or newer")]
    TooOld(String),
    #[error("this server is a standby: nothing can be written to it")]
    Standby,
    #[error("table `{name}` does not exist, or is of a kind that cannot be published")]
    UnknownTable { name: String, nearest: Option<String> },
    #[error("schema `{0}` does not exist")]
    UnknownSchema(String),
    /// The step was rolled back; those before it stand.
    #[error("migration step `{step}` was refused: {message} (SQLSTATE {sqlstate}){at}", at = at(.statement))]
    Refused { step: String, sqlstate: String, message: String, statement: Option<String> },
}

fn at(statement: &Option<String>) -> String {
    statement.as_ref().map_or_else(String::new, |sql| format!(", at: {sql}"))
}

impl MigrateError {
    pub(super) fn from_step(step: &str, error: tokio_postgres::Error) -> MigrateError {
        let Some(db) = error.as_db_error().filter(|db| !db.code().code().starts_with("57P")) else {
            return MigrateError::Pg(PgError::from_driver("migrating", error));
        };
        MigrateError::Refused {
            step: step.to_owned(),
            sqlstate: db.code().code().to_owned(),
            message: db.message().to_owned(),
            statement: db.where_().and_then(statement_in),
        }
    }

    pub fn code(&self) -> &'static str {
        match self {
            MigrateError::Url(_) => "database_url",
            MigrateError::Pg(error) if error.is_away() => "database_away",
            MigrateError::Pg(_) => "database_refused",
            MigrateError::TooOld(_) => "database_too_old",
            MigrateError::Standby => "database_standby",
            MigrateError::UnknownTable { .. } => "unknown_table",
            MigrateError::UnknownSchema(_) => "unknown_schema",
            MigrateError::Refused { .. } => "migration_refused",
        }
    }

    pub fn hint(&self) -> Option<String> {
        Some(match self {
            MigrateError::Url(_) => return None,
            MigrateError::Pg(error) if error.is_away() => {
                "is the server running, and do host, port and sslmode in the database URL fit?".into()
            }
            MigrateError::Pg(PgError::Refused { hint, .. }) => return hint.clone(),
            MigrateError::Pg(_) => return None,
            MigrateError::TooOld(_) => "upgrade the database server".into(),
            MigrateError::Standby => "give the URL of the primary".into(),
            MigrateError::UnknownTable { nearest: Some(nearest), .. } => format!("did you mean `{nearest}`?"),
            MigrateError::UnknownTable { .. } => {
                "ordinary and partitioned tables can be published, written as `schema.table`".into()
            }
            MigrateError::UnknownSchema(_) => "name schemas as the catalog spells them, separated by commas".into(),
            MigrateError::Refused { sqlstate, message, statement, .. } => {
                advice(sqlstate, message, statement.as_deref().unwrap_or_default())
            }
        })
    }
}

/// PL/pgSQL names the failing statement in the error's context.
fn statement_in(context: &str) -> Option<String> {
    let (_, rest) = context.split_once("SQL statement \"")?;
    let (statement, _) = rest.split_once("\"\nPL/pgSQL").or_else(|| rest.rsplit_once('"'))?;
    Some(statement.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn advice(sqlstate: &str, message: &str, statement: &str) -> String {
    if sqlstate == "55P03" {
        return "another session holds a lock on what is to be changed for more than 15 s; run `walcast migrate` again".into();
    }
    if sqlstate != "42501" {
        return "nothing of this step was kept; `walcast migrate --print` shows its SQL".into();
    }
    if statement.contains("bypassrls") {
        return format!(
            "giving BYPASSRLS takes a superuser or, from PostgreSQL 16 on, a role that has it: ask your provider or administrator \
             to run `{statement};`, then run `walcast migrate` again"
        );
    }
    if statement.contains("login replication") {
        return format!(
            "giving REPLICATION takes a superuser or, from PostgreSQL 16 on, a role that has it: ask your provider or administrator \
             to run `{statement};` (where the provider has a group for it, such as rds_replication: \
             `create role … login noinherit; grant rds_replication to …;`), then run `walcast migrate` again"
        );
    }
    if statement.starts_with("grant") && statement.contains(" to ") && !statement.contains(" on ") {
        return format!(
            "granting a role takes a superuser or, from PostgreSQL 16 on, ADMIN OPTION on it: ask your provider or administrator \
             to run `{statement};`, then run `walcast migrate` again"
        );
    }
    if message.contains("for database") {
        return "connect as the database's owner, or let the owner run: grant create on database … to …".into();
    }
    if statement.starts_with("create role") {
        return format!(
            "creating roles takes CREATEROLE: ask your administrator to run `{statement};`, then run `walcast migrate` again"
        );
    }
    "connect as the database's owner or an administrator; `walcast migrate --print` shows the SQL to hand over".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failing_statement_is_found_in_the_context() {
        let context = "SQL statement \"create role service_role\n  nologin noinherit bypassrls\"\nPL/pgSQL function inline_code_block line 10 at SQL statement";
        assert_eq!(statement_in(context).unwrap(), "create role service_role nologin noinherit bypassrls");
        assert_eq!(statement_in("PL/pgSQL function inline_code_block line 3 at RAISE"), None);
    }
}
