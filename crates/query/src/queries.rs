//! All named queries of a server, with their plans for each role that asked. Cheap to clone.
//!
//! A plan is made when first needed and kept until somebody says that a table moved. Bounded: past [`MAX_PLANS`] all
//! plans are forgotten and made again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use walcast_model::{Claims, TableName, Tag};
use walcast_pg::Pool;

use crate::{
    error::QueryError,
    file::NamedQuery,
    plan::{Plan, plan},
    question::Question,
    run::{Answer, run, run_many, tags},
    stream::RowLines,
};

const MAX_PLANS: usize = 4096;

#[derive(Clone)]
pub struct Queries(Arc<Inner>);

struct Inner {
    queries: BTreeMap<String, Arc<NamedQuery>>,
    pool: Pool,
    timeout: Duration,
    /// The one that feeds the cache.
    publication: String,
    /// Shared with the sets before and after this one: what is forgotten is forgotten for all.
    plans: Arc<Mutex<Plans>>,
}

#[derive(Default)]
struct Plans {
    /// By query, its file's meaning, and role.
    kept: HashMap<(String, String, String), Arc<Plan>>,
    /// Counts what was forgotten: a plan begun before that is not kept.
    forgotten: u64,
}

impl Queries {
    pub fn new(queries: Vec<NamedQuery>, pool: Pool, timeout: Duration, publication: &str) -> Queries {
        let inner =
            Inner { queries: by_name(queries), pool, timeout, publication: publication.to_owned(), plans: Arc::default() };
        Queries(Arc::new(inner))
    }

    /// Other files, the same database. Plans of what did not change stay.
    pub fn with(&self, queries: Vec<NamedQuery>) -> Queries {
        let Inner { pool, timeout, publication, plans, .. } = &*self.0;
        Queries(Arc::new(Inner {
            queries: by_name(queries),
            pool: pool.clone(),
            timeout: *timeout,
            publication: publication.clone(),
            plans: plans.clone(),
        }))
    }

    /// In the order of their names.
    pub fn all(&self) -> impl Iterator<Item = &Arc<NamedQuery>> {
        self.0.queries.values()
    }

    pub fn get(&self, name: &str) -> Result<&Arc<NamedQuery>, QueryError> {
        self.0.queries.get(name).ok_or_else(|| QueryError::unknown(name, self.0.queries.keys().map(String::as_str)))
    }

    pub fn ask(&self, name: &str, params: &HashMap<String, String>) -> Result<Question, QueryError> {
        Question::new(self.get(name)?.clone(), params)
    }

    pub async fn plan(&self, name: &str, role: &str) -> Result<Arc<Plan>, QueryError> {
        self.plan_of(self.get(name)?, role).await
    }

    async fn plan_of(&self, query: &NamedQuery, role: &str) -> Result<Arc<Plan>, QueryError> {
        let place = (query.name.clone(), query.meaning.clone(), role.to_owned());
        let forgotten = {
            let plans = self.plans();
            if let Some(kept) = plans.kept.get(&place) {
                return Ok(Arc::clone(kept));
            }
            plans.forgotten
        };
        let made = Arc::new(plan(&self.0.pool, query, role, self.0.timeout, &self.0.publication).await?);
        let mut plans = self.plans();
        if plans.forgotten == forgotten {
            if plans.kept.len() >= MAX_PLANS {
                plans.kept.clear();
            }
            plans.kept.insert(place, Arc::clone(&made));
        }
        Ok(made)
    }

    /// The answer with the plan that it was made by, which says whether it may be kept.
    pub async fn run(&self, question: &Question, claims: &Claims) -> Result<(Answer, Arc<Plan>), QueryError> {
        let plan = self.plan_of(&question.query, claims.role()).await?;
        let answer = run(&self.0.pool, question, claims, &plan, self.0.timeout).await?;
        Ok((answer, plan))
    }

    /// Questions to one query, in their order; see [`run_many`].
    pub async fn run_many(
        &self,
        questions: &[Question],
        claims: &Claims,
    ) -> Result<(Vec<Result<Answer, QueryError>>, Arc<Plan>), QueryError> {
        let first = questions.first().map(|question| &question.query);
        let query = first.ok_or_else(|| QueryError::unknown("", None))?;
        let plan = self.plan_of(query, claims.role()).await?;
        let answers = run_many(&self.0.pool, questions, claims, &plan, self.0.timeout).await?;
        Ok((answers, plan))
    }

    /// What an answer would hang on.
    pub async fn tags(&self, question: &Question, claims: &Claims) -> Result<Vec<Tag>, QueryError> {
        let plan = self.plan_of(&question.query, claims.role()).await?;
        tags(&self.0.pool, question, claims, &plan, self.0.timeout).await
    }

    /// Rows of any number, as lines.
    pub async fn stream(&self, question: &Question, claims: &Claims) -> Result<RowLines, QueryError> {
        let plan = self.plan_of(&question.query, claims.role()).await?;
        RowLines::open(&self.0.pool, question, claims, &plan, self.0.timeout).await
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// The catalog moved, nobody knows where.
    pub fn forget_plans(&self) {
        let mut plans = self.plans();
        plans.forgotten += 1;
        plans.kept.clear();
    }

    /// The table was redefined: its columns, privileges or policies may be others.
    pub fn forget_plans_of(&self, table: &TableName) {
        let mut plans = self.plans();
        plans.forgotten += 1;
        plans.kept.retain(|_, plan| !plan.tables.contains(table));
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        // A poisoned lock still holds whole plans.
        self.0.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn by_name(queries: Vec<NamedQuery>) -> BTreeMap<String, Arc<NamedQuery>> {
    queries.into_iter().map(|query| (query.name.clone(), Arc::new(query))).collect()
}
