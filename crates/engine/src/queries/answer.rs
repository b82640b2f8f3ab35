//! One question: from the cache if its entry holds, else computed as the caller, once for all who ask meanwhile.
//!
//! The key holds the whole identity, the tags what the answer depends on, the fence what it was read from.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use walcast_cache::{AtLeast, ComputeError, ComputeOptions, Computed, Entry, Source, etag};
use walcast_model::{CacheKey, Claims, Fence, Lsn, Position, Tag};
use walcast_query::{Answer, Plan, Queries, QueryError, Question};

use super::{QueryFailure, failure};
use crate::{Core, Engine, freshness::Freshness, pipeline::acknowledge::rules_tag};

/// A commit that was asked for and is not visible in this time will not be waited for.
const WAIT_FOR_FRESH: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct QueryAnswer {
    /// A JSON array of rows.
    pub body: Bytes,
    /// Where the next page begins.
    pub next: Option<String>,
    pub etag: Arc<str>,
    pub how: How,
    pub age: Duration,
    pub ttl: Duration,
    /// It contains every commit up to here.
    pub position: Position,
    pub expiry: Expiry,
}

/// What HTTP caches outside may do, whom no invalidation reaches: by default nothing without asking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expiry {
    pub client: Option<Duration>,
    /// Only where the answer is certainly the same for everybody.
    pub shared: Option<Duration>,
    pub while_revalidating: Option<Duration>,
}

/// Where an answer came from, and why it was not kept if it was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    Hit(&'static str),
    /// Old, as its namespace allows.
    Stale(&'static str),
    Computed {
        shared: bool,
        not_stored: Option<String>,
    },
}

/// A question with all that is known of it before it is asked.
pub(super) struct Asked {
    pub queries: Arc<Queries>,
    pub question: Question,
    pub key: CacheKey,
    pub plan: Arc<Plan>,
    pub claims: Claims,
}

/// Why there is nothing to keep or to share.
#[derive(Debug, Clone)]
enum Unkept {
    Error(Arc<QueryError>),
    /// It was made by a plan whose answers are not kept: nobody else may have it.
    Plan(String),
}

impl Engine {
    pub async fn query(
        &self,
        name: &str,
        claims: &Claims,
        params: &HashMap<String, String>,
        freshness: Freshness,
    ) -> Result<QueryAnswer, QueryFailure> {
        let core = &self.core;
        let asked = core.asked(name, claims, params).await?;
        let Some(at_least) = core.at_least(freshness).await else {
            return Err(not_that_fresh());
        };
        core.answer(&Arc::new(asked), at_least).await
    }
}

impl Core {
    pub(super) async fn asked(
        &self,
        name: &str,
        claims: &Claims,
        params: &HashMap<String, String>,
    ) -> Result<Asked, QueryFailure> {
        let queries = self.queries.current();
        let question = queries.ask(name, params).map_err(|error| failure(&error))?;
        let key = walcast_query::key(&question, claims).map_err(|error| failure(&error))?;
        let plan = queries.plan(name, claims.role()).await.map_err(|error| failure(&error))?;
        Ok(Asked { queries, question, key, plan, claims: claims.clone() })
    }

    pub(super) async fn answer(self: &Arc<Core>, asked: &Arc<Asked>, at_least: AtLeast) -> Result<QueryAnswer, QueryFailure> {
        // What a hit contains: everything that had been invalidated when it was looked up.
        let invalidated = self.progress.invalidated();
        // Owns what it needs: it may go on in the background while an old answer is given.
        let (core, question) = (self.clone(), asked.clone());
        let compute = move || {
            let (core, question) = (core.clone(), question.clone());
            async move { core.compute(&question).await.map(|(computed, _)| computed) }
        };
        let (core, question) = (self.clone(), asked.clone());
        let compute_to_keep = move || {
            let (core, question) = (core.clone(), question.clone());
            async move { core.compute_to_keep(&question).await }
        };
        if let Err(reason) = &asked.plan.cacheable {
            let computed = fresh_enough(compute, at_least).await?;
            return Ok(self.uncached(asked, computed, format!("{}: {reason}", reason.code())));
        }
        let options = ComputeOptions {
            at_least,
            timeout: self.queries.timeout + Duration::from_secs(5),
            // Only then may an answer that a commit ended be given, marked stale.
            grace: asked.plan.for_anyone,
            ..ComputeOptions::default()
        };
        let answer = match self.cache.get_or_compute(&asked.key, &options, compute_to_keep).await {
            Err(ComputeError::Failed(Unkept::Plan(reason))) => {
                let computed = fresh_enough(compute, at_least).await?;
                return Ok(self.uncached(asked, computed, reason));
            }
            answer => answer,
        };
        let answer = answer.map_err(|error| match error {
            ComputeError::Failed(Unkept::Plan(_)) => not_that_fresh(),
            ComputeError::Failed(Unkept::Error(error)) => failure(&error),
            ComputeError::TimedOut { after_ms } => QueryFailure {
                status: 504,
                code: "query_timeout",
                message: format!("query `{}` was not answered within {after_ms} ms", asked.question.query.name),
                hint: "ask for less, add an index, or raise database.statement_timeout".into(),
            },
            ComputeError::Behind => not_that_fresh(),
        })?;
        // Its author said how old it may be.
        if answer.stale.is_some() && asked.plan.max_age.is_some() {
            let computed = fresh_enough(compute, at_least).await?;
            return Ok(self.uncached(asked, computed, "max_age".into()));
        }
        let (how, lsn) = match (answer.stale, answer.source) {
            (Some(stale), _) => (How::Stale(stale.as_str()), answer.entry.fence.settled),
            (None, Source::Tier(tier)) => (How::Hit(tier.as_str()), invalidated),
            (None, source) => {
                let not_stored = answer.refusal.map(|refusal| refusal.as_str().to_owned());
                (How::Computed { shared: source == Source::Shared, not_stored }, answer.entry.fence.settled)
            }
        };
        Ok(self.of_entry(asked, &answer.entry, how, lsn))
    }

    /// The fence's place in the stream is read before the snapshot is taken.
    async fn compute(&self, asked: &Asked) -> Result<(Computed, Arc<Plan>), Arc<QueryError>> {
        let (floor, settled) = (self.clock.floor(), self.progress.settled());
        let began = Instant::now();
        let (answer, plan) = asked.queries.run(&asked.question, &asked.claims).await.map_err(Arc::new)?;
        let query = &asked.question.query;
        self.queries.slow.note(&query.name, &plan.role, began.elapsed(), answer.rows, 1, &plan.explain);
        let fence = Fence { snapshot: answer.snapshot.clone(), settled, floor };
        Ok((self.computed(asked, answer, &plan, fence), plan))
    }

    /// The plan may be younger than the one that was judged before the tiers were asked.
    async fn compute_to_keep(&self, asked: &Asked) -> Result<Computed, Unkept> {
        let (computed, plan) = self.compute(asked).await.map_err(Unkept::Error)?;
        match &plan.cacheable {
            Ok(()) => Ok(computed),
            Err(reason) => Err(Unkept::Plan(format!("{}: {reason}", reason.code()))),
        }
    }

    pub(super) fn computed(&self, asked: &Asked, answer: Answer, plan: &Plan, fence: Fence) -> Computed {
        let query = &asked.question.query;
        let mut tags = answer.tags;
        // The plan is younger than what had settled: a commit that the snapshot did not see may have been streamed
        // before the column that the plan narrows by was raised.
        if fence.settled < plan.made_at {
            tags.extend(plan.dependencies.iter().map(|dependency| Tag::table(&dependency.table)));
        }
        tags.push(rules_tag());
        // By hand: all answers of a query, or all that follow a namespace.
        tags.extend(Tag::parse(&format!("query:{}", query.name)).ok());
        tags.extend(query.namespace.as_deref().map(Tag::namespace));
        let namespace = self.cache.namespace(asked.key.namespace());
        let ttl = query.ttl.or(namespace.and_then(|namespace| namespace.ttl)).unwrap_or(self.config.cache.default_ttl);
        // "No rows" is an answer like any: exact, so kept where a namespace keeps nothing. Where it does, for so long.
        let nothing = namespace.and_then(|namespace| namespace.negative_ttl).filter(|_| answer.rows == 0);
        let ttl = [Some(ttl), plan.max_age, nothing].into_iter().flatten().min();
        let (value, content_type) = match asked.question.is_page() {
            // The cursor is part of the answer, and of its tag.
            true => ([answer.next.unwrap_or_default().as_bytes(), b"\n", &answer.body].concat().into(), PAGE_TYPE),
            false => (answer.body, ROWS_TYPE),
        };
        Computed { value, content_type: content_type.into(), tags, fence, ttl, negative: false }
    }

    pub(super) fn of_entry(&self, asked: &Asked, entry: &Entry, how: How, lsn: Lsn) -> QueryAnswer {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let (next, body) = parts(asked, &entry.value);
        QueryAnswer {
            body,
            next,
            etag: entry.etag.clone(),
            how,
            age: entry.age(now),
            ttl: entry.ttl(now),
            position: Position { epoch: self.progress.epoch(), lsn, index: 0 },
            expiry: self.expiry(asked),
        }
    }

    pub(super) fn uncached(&self, asked: &Asked, computed: Computed, why: String) -> QueryAnswer {
        let (next, body) = parts(asked, &computed.value);
        QueryAnswer {
            etag: etag(&computed.value, &computed.content_type),
            body,
            next,
            how: How::Computed { shared: false, not_stored: Some(why) },
            age: Duration::ZERO,
            ttl: Duration::ZERO,
            position: Position { epoch: self.progress.epoch(), lsn: computed.fence.settled, index: 0 },
            expiry: self.expiry(asked),
        }
    }

    fn expiry(&self, asked: &Asked) -> Expiry {
        let query = &asked.question.query;
        // A signed-in user's answer is his own, even where the rows would be the same.
        let shared = query.s_maxage.filter(|_| asked.plan.for_anyone && asked.claims.role() == "anon");
        let namespace = self.cache.namespace(asked.key.namespace());
        let revalidate = namespace.map(|namespace| namespace.stale_while_revalidate).filter(|time| !time.is_zero());
        let may = asked.plan.for_anyone && (shared.is_some() || query.client_max_age.is_some());
        Expiry { client: query.client_max_age, shared, while_revalidating: revalidate.filter(|_| may) }
    }
}

const ROWS_TYPE: &str = "application/json";
/// The cursor of the next page, or nothing; a line feed; the rows.
const PAGE_TYPE: &str = "application/vnd.walcast.page";

fn parts(asked: &Asked, value: &Bytes) -> (Option<String>, Bytes) {
    if !asked.question.is_page() {
        return (None, value.clone());
    }
    let Some(end) = value.iter().position(|byte| *byte == b'\n') else { return (None, value.clone()) };
    let next = String::from_utf8_lossy(&value[..end]).into_owned();
    (Some(next).filter(|next| !next.is_empty()), value.slice(end + 1..))
}

pub(super) fn contains(fence: &Fence, at_least: AtLeast) -> bool {
    match at_least {
        AtLeast::Any => true,
        AtLeast::Xid(xid) => fence.snapshot.sees(xid),
        AtLeast::Lsn(lsn) => fence.settled >= lsn,
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
        if contains(&computed.fence, at_least) {
            return Ok(computed);
        }
        if Instant::now() >= until {
            return Err(not_that_fresh());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn not_that_fresh() -> QueryFailure {
    QueryFailure {
        status: 503,
        code: "not_that_fresh",
        message: "no answer was certain to be as fresh as was asked for".into(),
        hint: "try again in a moment; a position must be of this epoch".into(),
    }
}
