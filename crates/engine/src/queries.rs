//! Named queries: answers under the caller's role and claims, cached until a row behind them changes.
//!
//! The key holds the whole identity, the tags what the answer depends on, the fence what it was read from.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use walcast_cache::{AtLeast, ComputeError, ComputeOptions, Computed, Source, etag};
use walcast_model::{Claims, Fence, Position, TableName, Tag};
use walcast_pg::Pool;
use walcast_query::{Queries, QueryError, load_dir};

use crate::{Core, Engine, EngineConfig, freshness::Freshness, pipeline::acknowledge::rules_tag};

/// A commit that was asked for and is not visible in this time will not be waited for.
const WAIT_FOR_FRESH: Duration = Duration::from_secs(5);

/// The loaded files and their plans.
pub struct CachedQueries {
    queries: Queries,
    timeout: Duration,
}

#[derive(Debug, Clone)]
pub struct QueryAnswer {
    /// A JSON array of rows.
    pub body: Bytes,
    pub etag: Arc<str>,
    pub how: How,
    pub age: Duration,
    pub ttl: Duration,
    /// It contains every commit up to here.
    pub position: Position,
}

/// Where an answer came from, and why it was not kept if it was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    Hit(&'static str),
    Computed { shared: bool, not_stored: Option<String> },
}

#[derive(Debug, Clone)]
pub struct QueryFailure {
    pub status: u16,
    pub code: &'static str,
    pub message: String,
    pub hint: String,
}

impl CachedQueries {
    pub fn load(config: &EngineConfig, pool: &Pool) -> Result<CachedQueries, String> {
        let files = match &config.queries_dir {
            Some(dir) => load_dir(dir).map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?,
            None => Vec::new(),
        };
        let timeout = config.statement_timeout;
        Ok(CachedQueries { queries: Queries::new(files, pool.clone(), timeout), timeout })
    }

    /// The cache namespaces that answers are kept in.
    pub fn namespaces(&self) -> impl Iterator<Item = String> {
        self.queries.all().map(|query| walcast_query::namespace(&query.name))
    }

    pub fn forget_plans(&self) {
        self.queries.forget_plans();
    }

    pub fn forget_plans_of(&self, table: &TableName) {
        self.queries.forget_plans_of(table);
    }
}

impl Engine {
    /// Names and what they say of themselves.
    pub fn query_names(&self) -> Vec<(String, Option<String>)> {
        self.core.queries.queries.all().map(|query| (query.name.clone(), query.describe.clone())).collect()
    }

    pub async fn query(
        &self,
        name: &str,
        claims: &Claims,
        params: &HashMap<String, String>,
        freshness: Freshness,
    ) -> Result<QueryAnswer, QueryFailure> {
        let core = &self.core;
        let queries = &core.queries.queries;
        let key = queries.key(name, params, claims).map_err(|error| failure(&error))?;
        let plan = queries.plan(name, claims.role()).await.map_err(|error| failure(&error))?;
        let ttl = queries.get(name).map_err(|error| failure(&error))?.ttl;
        let ttl = plan.max_age.map_or(ttl, |max_age| ttl.min(max_age));
        let Some(at_least) = core.at_least(freshness).await else {
            return Err(not_that_fresh());
        };
        // What a hit contains: everything that had been invalidated when it was looked up.
        let invalidated = core.progress.invalidated();
        let compute = || async {
            let (floor, settled) = (core.clock.floor(), core.progress.settled());
            let (answer, plan) = queries.run(name, claims, params).await.map_err(Arc::new)?;
            let fence = Fence { snapshot: answer.snapshot, settled, floor };
            let mut tags = answer.tags;
            // The plan is younger than what had settled: a commit that the snapshot did not see may have been streamed
            // before the column that the plan narrows by was raised.
            if settled < plan.made_at {
                tags.extend(plan.dependencies.iter().map(|dependency| Tag::table(&dependency.table)));
            }
            tags.push(rules_tag());
            Ok::<_, Arc<QueryError>>(Computed {
                value: answer.body,
                content_type: "application/json".into(),
                tags,
                fence,
                ttl: Some(ttl),
                negative: false,
            })
        };
        if let Err(reason) = &plan.cacheable {
            let computed = fresh_enough(compute, at_least).await?;
            return Ok(core.uncached(computed, format!("{}: {reason}", reason.code())));
        }
        let timeout = core.queries.timeout + Duration::from_secs(5);
        let options = ComputeOptions { ttl: Some(ttl), at_least, timeout, ..ComputeOptions::default() };
        let answer = core.cache.get_or_compute_inline(&key, &options, compute).await.map_err(|error| match error {
            ComputeError::Failed(error) => failure(&error),
            ComputeError::TimedOut { after_ms } => QueryFailure {
                status: 504,
                code: "query_timeout",
                message: format!("query `{name}` was not answered within {after_ms} ms"),
                hint: "ask for less, add an index, or raise database.statement_timeout".into(),
            },
            ComputeError::Behind => not_that_fresh(),
        })?;
        // Rows under row security are never answered stale: a loss of the stream computes.
        if answer.stale.is_some() {
            let computed = fresh_enough(compute, at_least).await?;
            return Ok(core.uncached(computed, "not_hearing".into()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let (how, lsn) = match answer.source {
            Source::Tier(tier) => (How::Hit(tier.as_str()), invalidated),
            source => {
                let not_stored = answer.refusal.map(|refusal| refusal.as_str().to_owned());
                (How::Computed { shared: source == Source::Shared, not_stored }, answer.entry.fence.settled)
            }
        };
        Ok(QueryAnswer {
            body: answer.entry.value.clone(),
            etag: answer.entry.etag.clone(),
            how,
            age: answer.entry.age(now),
            ttl: answer.entry.ttl(now),
            position: Position { epoch: core.progress.epoch(), lsn, index: 0 },
        })
    }
}

impl Core {
    fn uncached(&self, computed: Computed, why: String) -> QueryAnswer {
        QueryAnswer {
            etag: etag(&computed.value, "application/json"),
            body: computed.value,
            how: How::Computed { shared: false, not_stored: Some(why) },
            age: Duration::ZERO,
            ttl: Duration::ZERO,
            position: Position { epoch: self.progress.epoch(), lsn: computed.fence.settled, index: 0 },
        }
    }
}

/// Computes until the answer's own snapshot contains what was asked for: a commit may be streamed, and so waited for,
/// before it is visible.
async fn fresh_enough<Fut>(compute: impl Fn() -> Fut, at_least: AtLeast) -> Result<Computed, QueryFailure>
where
    Fut: Future<Output = Result<Computed, Arc<QueryError>>>,
{
    let until = Instant::now() + WAIT_FOR_FRESH;
    loop {
        let computed = compute().await.map_err(|error| failure(&error))?;
        let contains = match at_least {
            AtLeast::Any => true,
            AtLeast::Xid(xid) => computed.fence.snapshot.sees(xid),
            AtLeast::Lsn(lsn) => computed.fence.settled >= lsn,
        };
        if contains {
            return Ok(computed);
        }
        if Instant::now() >= until {
            return Err(not_that_fresh());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn not_that_fresh() -> QueryFailure {
    QueryFailure {
        status: 503,
        code: "not_that_fresh",
        message: "no answer was certain to be as fresh as was asked for".into(),
        hint: "try again in a moment; a position must be of this epoch".into(),
    }
}

fn failure(error: &QueryError) -> QueryFailure {
    let status = match error {
        QueryError::Unknown { .. } => 404,
        QueryError::RoleNotAllowed { .. } | QueryError::Denied { .. } => 403,
        QueryError::UnknownParam { .. } | QueryError::MissingParam { .. } | QueryError::BadParam { .. } => 400,
        QueryError::TooManyRows { .. } | QueryError::Refused { .. } | QueryError::Key { .. } => 422,
        QueryError::Timeout { .. } => 504,
        QueryError::Database(_) => 503,
    };
    QueryFailure { status, code: error.code(), message: error.to_string(), hint: error.hint() }
}
