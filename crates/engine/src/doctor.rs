//! Looks at a database and says whether Walcast can serve it, and what mends what is wrong.
//! Called by `walcast check`, and at every start of `serve`. Never changes anything.

mod publications;
mod rights;
mod server;
pub(crate) mod tag_rules;

use std::time::Duration;

use tokio_postgres::Client;
use walcast_pg::{ConnectConfig, PgError, Pool};

use crate::config::TagRuleConfig;

/// What the settings ask of the database.
#[derive(Debug, Clone)]
pub struct Expectations {
    pub slot: String,
    pub publication_cache: String,
    pub publication_realtime: String,
    /// Roles that tokens may name.
    pub allowed_roles: Vec<String>,
    /// How much WAL the slot is meant to hold back.
    pub acknowledge_bytes: u64,
    pub max_connections: u64,
    /// Length of the secret that tokens are signed with, if there is one.
    pub jwt_secret_bytes: Option<usize>,
    pub tags: Vec<TagRuleConfig>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok,
    Warn,
    Fail,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// One line of the doctor's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at; also the error code when it keeps `serve` from starting.
    pub check: &'static str,
    pub level: Level,
    pub line: String,
    /// SQL, a setting or a step that mends it.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, line: impl Into<String>) -> Finding {
        Finding { check, level: Level::Ok, line: line.into(), fix: None }
    }

    fn warn(check: &'static str, line: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { check, level: Level::Warn, line: line.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, line: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { check, level: Level::Fail, line: line.into(), fix: Some(fix.into()) }
    }
}

impl Finding {
    /// The lines of `/readyz` that are worth one.
    pub(crate) fn warnings(findings: Vec<Finding>) -> Vec<String> {
        let told = findings.into_iter().filter(|f| f.level == Level::Warn && f.check != server::SLOT_IN_USE);
        told.map(|f| format!("{}: {}", f.check, f.line)).collect()
    }
}

/// Why `serve` cannot start on this database.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    #[error(transparent)]
    Database(#[from] PgError),
    #[error("{sentence}")]
    Unfit { code: &'static str, sentence: String, hint: String },
}

impl NotReady {
    pub fn code(&self) -> &'static str {
        match self {
            NotReady::Database(error) if error.is_away() => "database_away",
            NotReady::Database(_) => "database_refused",
            NotReady::Unfit { code, .. } => code,
        }
    }

    pub fn hint(&self) -> Option<&str> {
        match self {
            NotReady::Database(PgError::Refused { hint, .. }) => hint.as_deref(),
            NotReady::Database(_) => None,
            NotReady::Unfit { hint, .. } => Some(hint),
        }
    }
}

/// A question that takes longer has met a database in trouble, which is an answer too.
const PATIENCE: Duration = Duration::from_secs(15);

/// Every finding, the good ones too, in the order in which one would look.
pub async fn check(database_url: Option<&str>, expect: &Expectations) -> Vec<Finding> {
    let mut findings = Vec::new();
    match connect(database_url).await {
        Err(finding) => findings.push(finding),
        Ok((client, config)) => {
            findings.push(server::connected(&config));
            let look = async {
                look(&client, expect, &mut findings).await?;
                rules(&client, &config, expect, &mut findings).await
            };
            match tokio::time::timeout(PATIENCE, look).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    findings.push(Finding::fail("connection", error.to_string(), "mend this, then run `walcast check` again"))
                }
                Err(_) => findings.push(Finding::fail(
                    "connection",
                    format!("the database did not answer all questions within {} s", PATIENCE.as_secs()),
                    "look at its load and at locks on pg_catalog, then run `walcast check` again",
                )),
            }
        }
    }
    findings.push(secret(expect.jwt_secret_bytes));
    findings
}

/// What is worth a line in `/readyz` although `serve` can start: an unlimited slot, above all. Not that the slot is in
/// use: that is how it should be while it serves, and who cannot start over it is told so then.
pub async fn warnings(client: &Client, expect: &Expectations) -> Result<Vec<String>, PgError> {
    let mut findings = Vec::new();
    look(client, expect, &mut findings).await?;
    Ok(Finding::warnings(findings))
}

/// What `serve` cannot do without: the first thing that is missing, in one sentence.
pub async fn before_serve(client: &Client, expect: &Expectations) -> Result<(), NotReady> {
    let mut findings = server::fitness(client).await?;
    if findings.iter().all(|finding| finding.level < Level::Fail) {
        findings.extend(rights::migrated(client).await?);
    }
    // Rights on what is not there yet cannot be looked at.
    if findings.iter().all(|finding| finding.level < Level::Fail) {
        findings.extend(rights::login(client).await?);
        findings.extend(rights::roles(client, &expect.allowed_roles).await?);
        findings.extend(rights::own_schema(client).await?);
        findings.extend(publications::exist(client, expect).await?);
    }
    match findings.into_iter().find(|finding| finding.level == Level::Fail) {
        None => Ok(()),
        Some(Finding { check, line, fix, .. }) => {
            Err(NotReady::Unfit { code: check, sentence: line, hint: fix.unwrap_or_else(|| "run `walcast check`".into()) })
        }
    }
}

async fn look(client: &Client, expect: &Expectations, findings: &mut Vec<Finding>) -> Result<(), PgError> {
    findings.extend(server::fitness(client).await?);
    findings.extend(server::capacity(client, expect).await?);
    findings.extend(server::slot(client, expect).await?);
    findings.push(server::clock(client).await?);
    findings.extend(rights::login(client).await?);
    findings.extend(rights::roles(client, &expect.allowed_roles).await?);
    let migrated = rights::migrated(client).await?;
    let complete = migrated.iter().all(|finding| finding.level < Level::Fail);
    findings.extend(migrated);
    if complete {
        findings.extend(rights::own_schema(client).await?);
    }
    findings.extend(publications::exist(client, expect).await?);
    findings.extend(publications::tables(client, expect).await?);
    findings.extend(publications::conflicts(client, expect).await?);
    Ok(())
}

async fn rules(
    client: &Client,
    config: &ConnectConfig,
    expect: &Expectations,
    findings: &mut Vec<Finding>,
) -> Result<(), PgError> {
    if !expect.tags.is_empty() {
        let pool = Pool::new(config, 2, PATIENCE)
            .map_err(|error| PgError::Unexpected { doing: "connecting", what: error.to_string() })?;
        findings.extend(tag_rules::examine(client, &pool, &expect.tags, &expect.publication_cache).await?.findings);
    }
    Ok(())
}

async fn connect(database_url: Option<&str>) -> Result<(Client, ConnectConfig), Finding> {
    let Some(url) = database_url else {
        return Err(Finding::fail(
            "connection",
            "no database URL is set",
            "set WALCAST_DATABASE_URL, or database.url in walcast.toml",
        ));
    };
    let config =
        ConnectConfig::parse(url).map_err(|error| Finding::fail("connection", error.to_string(), "correct the database URL"))?;
    match config.connect().await {
        Ok(client) => Ok((client, config)),
        Err(error) => {
            let why = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            let line = format!("{config} cannot be reached{why}");
            let refused = matches!(error, PgError::Refused { .. }).then(|| error.to_string());
            let fix = "is the server running, and do host, port, user, password and sslmode in the URL fit?";
            Err(Finding::fail("connection", refused.unwrap_or(line), fix))
        }
    }
}

fn secret(bytes: Option<usize>) -> Finding {
    const CHECK: &str = "jwt_secret";
    const FIX: &str =
        "set WALCAST_JWT_SECRET to the secret that your tokens are signed with, for a new one: openssl rand -base64 48";
    match bytes {
        None => Finding::fail(CHECK, "no secret is set, so no token can be verified and `serve` does not start", FIX),
        Some(bytes) if bytes < 32 => {
            Finding::warn(CHECK, format!("the secret has {bytes} bytes; under 32 it can be guessed from one token"), FIX)
        }
        Some(bytes) => Finding::ok(CHECK, format!("the secret has {bytes} bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_secret_is_warned_of_and_a_missing_one_fails() {
        assert_eq!(secret(None).level, Level::Fail);
        assert_eq!(secret(Some(31)).level, Level::Warn);
        assert_eq!(secret(Some(32)).level, Level::Ok);
    }
}
