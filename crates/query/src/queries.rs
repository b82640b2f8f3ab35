//! All named queries of a server, with their plans for each role that asked. Cheap to clone.
//!
//! A plan is made when first needed and kept until somebody says that a table moved. Bounded: past [`MAX_PLANS`] all
//! plans are forgotten and made again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use walcast_model::{CacheKey, Claims, TableName};
use walcast_pg::Pool;

use crate::{
    error::QueryError,
    file::NamedQuery,
    key::key,
    plan::{Plan, plan},
    run::{Answer, run},
};

const MAX_PLANS: usize = 4096;

#[derive(Clone)]
pub struct Queries(Arc<Inner>);

struct Inner {
    queries: BTreeMap<String, Arc<NamedQuery>>,
    pool: Pool,
    timeout: Duration,
    plans: Mutex<Plans>,
}

#[derive(Default)]
struct Plans {
    /// By query and role.
    kept: HashMap<(String, String), Arc<Plan>>,
    /// Counts what was forgotten: a plan begun before that is not kept.
    forgotten: u64,
}

impl Queries {
    pub fn new(queries: Vec<NamedQuery>, pool: Pool, timeout: Duration) -> Queries {
        let queries = queries.into_iter().map(|query| (query.name.clone(), Arc::new(query))).collect();
        Queries(Arc::new(Inner { queries, pool, timeout, plans: Mutex::default() }))
    }

    /// In the order of their names.
    pub fn all(&self) -> impl Iterator<Item = &Arc<NamedQuery>> {
        self.0.queries.values()
    }

    pub fn get(&self, name: &str) -> Result<&Arc<NamedQuery>, QueryError> {
        self.0.queries.get(name).ok_or_else(|| QueryError::unknown(name, self.0.queries.keys().map(String::as_str)))
    }

    pub fn key(&self, name: &str, params: &HashMap<String, String>, claims: &Claims) -> Result<CacheKey, QueryError> {
        key(self.get(name)?, params, claims)
    }

    pub async fn plan(&self, name: &str, role: &str) -> Result<Arc<Plan>, QueryError> {
        let query = self.get(name)?;
        let place = (name.to_owned(), role.to_owned());
        let forgotten = {
            let plans = self.plans();
            if let Some(kept) = plans.kept.get(&place) {
                return Ok(Arc::clone(kept));
            }
            plans.forgotten
        };
        let made = Arc::new(plan(&self.0.pool, query, role, self.0.timeout).await?);
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
    pub async fn run(
        &self,
        name: &str,
        claims: &Claims,
        params: &HashMap<String, String>,
    ) -> Result<(Answer, Arc<Plan>), QueryError> {
        let plan = self.plan(name, claims.role()).await?;
        let answer = run(&self.0.pool, self.get(name)?, claims, params, &plan, self.0.timeout).await?;
        Ok((answer, plan))
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
