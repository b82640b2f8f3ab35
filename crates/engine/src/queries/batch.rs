//! Many questions in one request: what is cached comes from the cache, and the rest of one query is one statement.
//!
//! Each answer is kept, tagged and fenced as its own. What cannot be merged (pages, answers that are not kept, a query
//! asked once) runs by itself, a few at a time, so that a batch leaves room in the pool.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};
use walcast_cache::{AtLeast, Computed, Lookup, NewValue, Stored};
use walcast_model::{CacheKey, Claims, Fence};
use walcast_query::Question;

use super::{
    How, QueryAnswer, QueryFailure,
    answer::{Asked, contains, not_that_fresh},
};
use crate::{Core, Engine, freshness::Freshness};

#[derive(Debug, Clone)]
pub struct BatchItem {
    pub name: String,
    pub params: HashMap<String, String>,
}

/// Questions in one statement.
const MERGED: usize = 100;

fn too_long() -> QueryFailure {
    QueryFailure {
        status: 504,
        code: "batch_timeout",
        message: "the batch took too long; what was answered in time is beside this".into(),
        hint: "ask for fewer at a time; /readyz shows whether the database answers".into(),
    }
}

/// A question by its place in the request.
type Open = (usize, Arc<Asked>);
type Outcome = Result<QueryAnswer, QueryFailure>;

impl Engine {
    /// In the order of the items.
    pub async fn query_batch(&self, items: &[BatchItem], claims: &Claims, freshness: Freshness) -> Vec<Outcome> {
        let core = &self.core;
        let Some(at_least) = core.at_least(freshness).await else {
            return items.iter().map(|_| Err(not_that_fresh())).collect();
        };
        // For all of it: a database that hangs must not be waited for once an item.
        let until = Instant::now() + core.queries.timeout * 2 + Duration::from_secs(10);
        let mut asked = Vec::with_capacity(items.len());
        for item in items {
            let one = timeout_at(until, core.asked(&item.name, claims, &item.params)).await;
            asked.push(one.unwrap_or_else(|_| Err(too_long())).map(Arc::new));
        }
        // Equal questions are asked once.
        let mut first: HashMap<&CacheKey, usize> = HashMap::new();
        let places: Vec<Option<usize>> = asked
            .iter()
            .enumerate()
            .map(|(place, asked)| asked.as_ref().ok().map(|asked| *first.entry(&asked.key).or_insert(place)))
            .collect();
        let mut open: Vec<Open> =
            first.values().filter_map(|place| Some((*place, asked[*place].as_ref().ok()?.clone()))).collect();
        open.sort_by_key(|(place, _)| *place);
        let found = core.answers(open, at_least, until).await;
        let answer = |(place, asked): (&Option<usize>, &Result<Arc<Asked>, QueryFailure>)| match (place, asked) {
            (_, Err(failure)) => Err(failure.clone()),
            (Some(place), Ok(_)) => found.get(place).cloned().unwrap_or_else(|| Err(too_long())),
            (None, Ok(_)) => Err(not_that_fresh()),
        };
        places.iter().zip(&asked).map(answer).collect()
    }
}

impl Core {
    /// What is not answered by then is left out.
    async fn answers(self: &Arc<Core>, open: Vec<Open>, at_least: AtLeast, until: Instant) -> HashMap<usize, Outcome> {
        let mut found = HashMap::new();
        // Pages and answers that are not kept go their own way from the start.
        let (merging, mut alone): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|(_, asked)| asked.plan.cacheable.is_ok() && !asked.question.is_page());
        let invalidated = self.progress.invalidated();
        let keys: Vec<CacheKey> = merging.iter().map(|(_, asked)| asked.key.clone()).collect();
        let mut missed: HashMap<String, Vec<Open>> = HashMap::new();
        for ((place, asked), look) in merging.into_iter().zip(self.cache.get_many(&keys, at_least).await) {
            match look {
                Lookup::Hit { entry, tier, stale: None } => {
                    found.insert(place, Ok(self.of_entry(&asked, &entry, How::Hit(tier.as_str()), invalidated)));
                }
                _ => missed.entry(asked.question.query.name.clone()).or_default().push((place, asked)),
            }
        }
        let mut merged = Vec::new();
        for of_one_query in missed.into_values() {
            for chunk in of_one_query.chunks(MERGED) {
                match chunk {
                    [one] => alone.push(one.clone()),
                    many => merged.push(many.to_vec()),
                }
            }
        }
        let together =
            stream::iter(merged).map(|many| timeout_at(until, self.together(many, at_least))).buffer_unordered(self.at_once());
        for (answered, left) in together.collect::<Vec<_>>().await.into_iter().flatten() {
            found.extend(answered);
            alone.extend(left);
        }
        let one_by_one = stream::iter(alone)
            .map(|(place, asked)| timeout_at(until, async move { (place, self.answer(&asked, at_least).await) }))
            .buffer_unordered(self.at_once());
        found.extend(one_by_one.collect::<Vec<_>>().await.into_iter().flatten());
        found
    }

    /// Half of the pool: the other half is for everybody else.
    fn at_once(&self) -> usize {
        (self.pool.status().2 / 2).clamp(1, 8)
    }

    /// One statement. What it does not answer is handed back: whose fault it was is found out one by one.
    async fn together(&self, many: Vec<Open>, at_least: AtLeast) -> (Vec<(usize, Outcome)>, Vec<Open>) {
        let Some((_, first)) = many.first().cloned() else { return (Vec::new(), many) };
        let questions: Vec<Question> = many.iter().map(|(_, asked)| asked.question.clone()).collect();
        // The fence's place in the stream is read before the snapshot is taken.
        let (floor, settled) = (self.clock.floor(), self.progress.settled());
        let began = Instant::now();
        let (answers, plan) = match first.queries.run_many(&questions, &first.claims).await {
            Ok(answers) => answers,
            Err(error) => {
                tracing::debug!(query = first.question.query.name, %error, "questions are asked one by one");
                return (Vec::new(), many);
            }
        };
        let rows = answers.iter().flatten().map(|answer| answer.rows).sum();
        self.queries.slow.note(&first.question.query.name, &plan.role, began.elapsed(), rows, many.len(), &plan.explain);
        let (mut answered, mut left) = (Vec::new(), Vec::new());
        for ((place, asked), answer) in many.into_iter().zip(answers) {
            match answer {
                Err(error) => answered.push((place, Err(super::failure(&error)))),
                Ok(answer) => {
                    let fence = Fence { snapshot: answer.snapshot.clone(), settled, floor };
                    if plan.cacheable.is_err() || !contains(&fence, at_least) {
                        left.push((place, asked));
                        continue;
                    }
                    let computed = self.computed(&asked, answer, &plan, fence);
                    answered.push((place, Ok(self.keep(&asked, computed))));
                }
            }
        }
        (answered, left)
    }

    /// Stores an answer that was made for one caller, if it may be stored; he gets it either way.
    fn keep(&self, asked: &Asked, computed: Computed) -> QueryAnswer {
        let Computed { value, content_type, tags, fence, ttl, negative } = computed.clone();
        let value = NewValue { value, content_type: Arc::clone(&content_type), tags, ttl, negative };
        match self.cache.put(&asked.key, value, fence) {
            Ok(Stored::Yes { entry }) => {
                let how = How::Computed { shared: false, not_stored: None };
                self.of_entry(asked, &entry, how, entry.fence.settled)
            }
            Ok(Stored::No(refusal)) => self.uncached(asked, computed, refusal.as_str().to_owned()),
            Err(error) => self.uncached(asked, computed, error.code().to_owned()),
        }
    }
}
