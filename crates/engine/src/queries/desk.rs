//! Queries without a server: for `walcast check` and `walcast explain`, which read files and ask the database, nothing more.

use std::{collections::HashMap, path::Path, time::Duration};

use walcast_model::Claims;
use walcast_pg::{ConnectConfig, Pool};
use walcast_query::{Advice, Queries, QueryError, advise, check, key};

use super::{read_dir, strangers};
use crate::doctor::{Finding, Level};

pub struct QueryDesk {
    queries: Queries,
    roles: Vec<String>,
    wrong: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    #[error("{0}")]
    Files(String),
    #[error("{0}")]
    Database(String),
    #[error(transparent)]
    Query(#[from] QueryError),
}

/// The column that narrows a table, with the expressions of its values.
pub type Narrowing = (String, Vec<String>);

/// Everything that decides about an answer, for one caller and one set of parameters.
#[derive(Debug, Clone)]
pub struct Explanation {
    pub name: String,
    pub file: String,
    pub role: String,
    pub namespace: String,
    pub key: String,
    /// The parts of the key: what must be equal for two callers to share an answer.
    pub key_parts: Vec<(String, String)>,
    pub dependencies: Vec<(String, Option<Narrowing>)>,
    pub tags: Vec<String>,
    pub not_kept: Option<(String, String)>,
    pub not_narrowed: Option<String>,
    pub for_anyone: bool,
    pub ttl: Option<Duration>,
    pub max_age: Option<Duration>,
    pub advice: Vec<Advice>,
    pub plan: serde_json::Value,
}

const WAIT: Duration = Duration::from_secs(5);

impl QueryDesk {
    /// Two connections, which end with it. Files that do not parse are an error; what PostgreSQL says of them is `check`'s.
    pub async fn open(
        connect: &ConnectConfig,
        dir: &Path,
        timeout: Duration,
        publication: &str,
        roles: Vec<String>,
        namespaces: &[String],
    ) -> Result<QueryDesk, DeskError> {
        let pool = Pool::new(connect, 2, WAIT).map_err(|error| DeskError::Database(error.to_string()))?;
        let files = read_dir(dir.to_owned()).await.map_err(DeskError::Files)?;
        let wrong = strangers(&files, namespaces).iter().map(ToString::to_string).collect();
        Ok(QueryDesk { queries: Queries::new(files, pool, timeout, publication), roles, wrong })
    }

    /// For `walcast check`; with `advice` also what would make the queries cheaper.
    pub async fn check(&self, advice: bool) -> Vec<Finding> {
        const CHECK: &str = "queries";
        const FIX: &str = "mend the file; `walcast serve` does not start with it, and a reload keeps the old ones";
        let finding = |level: Level, line: String, fix: Option<String>| Finding { check: CHECK, level, line, fix };
        let mut wrong = self.wrong.clone();
        match check(&self.queries, &self.roles).await {
            Ok(found) => wrong.extend(found.iter().map(ToString::to_string)),
            Err(error) => return vec![finding(Level::Fail, error.to_string(), Some("run `walcast check` again".into()))],
        }
        let mut findings: Vec<Finding> = wrong.into_iter().map(|line| finding(Level::Fail, line, Some(FIX.to_owned()))).collect();
        if findings.is_empty() {
            let count = self.queries.all().count();
            findings.push(finding(Level::Ok, format!("{count} queries are sound for every role that may run them"), None));
        }
        if advice {
            match self.advice().await {
                Ok(advice) => {
                    let warn = |(query, advice): (String, Advice)| {
                        finding(Level::Warn, format!("{query}: {}", advice.what), Some(advice.mend))
                    };
                    findings.extend(advice.into_iter().map(warn));
                }
                Err(error) => findings.push(finding(Level::Fail, error.to_string(), None)),
            }
        }
        findings
    }

    /// By query, said once where several roles have it.
    async fn advice(&self) -> Result<Vec<(String, Advice)>, DeskError> {
        let mut all = Vec::new();
        for query in self.queries.all() {
            for role in query.roles.as_deref().unwrap_or(&self.roles) {
                // What cannot be planned was said already.
                let Ok(plan) = self.queries.plan(&query.name, role).await else { continue };
                let advice = advise(&self.queries, query, &plan).await.map_err(|error| DeskError::Database(error.to_string()))?;
                for advice in advice {
                    if !all.iter().any(|(name, said)| *name == query.name && *said == advice) {
                        all.push((query.name.clone(), advice));
                    }
                }
            }
        }
        Ok(all)
    }

    pub async fn explain(&self, name: &str, claims: &Claims, params: &HashMap<String, String>) -> Result<Explanation, DeskError> {
        let question = self.queries.ask(name, params)?;
        let plan = self.queries.plan(name, claims.role()).await?;
        let tags = self.queries.tags(&question, claims).await?;
        let advice =
            advise(&self.queries, &question.query, &plan).await.map_err(|error| DeskError::Database(error.to_string()))?;
        let key = key(&question, claims)?;
        let query = &question.query;
        let mut key_parts = vec![("query".to_owned(), query.name.clone()), ("file".to_owned(), query.meaning.clone())];
        key_parts.extend(question.params().map(|(name, value)| (format!("parameter {name}"), value.to_owned())));
        key_parts.push(("role".to_owned(), claims.role().to_owned()));
        key_parts.push(("claims".to_owned(), format!("{:032x} (all but exp, iat, nbf, jti)", claims.fingerprint())));
        let dependency = |dependency: &walcast_query::Dependency| {
            let narrow = dependency.narrow.as_ref();
            let narrow = narrow.map(|(column, values)| (column.clone(), values.iter().map(|value| value.sql.clone()).collect()));
            (dependency.table.to_string(), narrow)
        };
        Ok(Explanation {
            name: query.name.clone(),
            file: query.file.clone(),
            role: claims.role().to_owned(),
            namespace: key.namespace().to_owned(),
            key: key.key().to_owned(),
            key_parts,
            dependencies: plan.dependencies.iter().map(dependency).collect(),
            tags: tags.iter().map(ToString::to_string).collect(),
            not_kept: plan.cacheable.as_ref().err().map(|why| (why.code().to_owned(), why.to_string())),
            not_narrowed: plan.not_narrowed.clone(),
            for_anyone: plan.for_anyone,
            ttl: query.ttl,
            max_age: plan.max_age,
            advice,
            plan: (*plan.explain).clone(),
        })
    }
}
