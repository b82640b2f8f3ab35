//! The rules of each table for each role, kept until the table is redefined or the catalog moves.
//!
//! Read by joins and by the judge of changes; retired by the announcer at the place in the stream where a table is described
//! again, and by the keeper. What was remembered under rules goes with them.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use walcast_auth::{Publications, RowRule, Rules};
use walcast_model::{Claims, TableId, TableName};
use walcast_pg::PgError;

use super::remembered::Answers;
use crate::Core;

type ByTableAndRole = (TableId, String);

/// Rules by table and role; retired as the tables are redefined.
#[derive(Default)]
pub struct RuleBook {
    rules: Mutex<HashMap<ByTableAndRole, Arc<Rules>>>,
    /// What PostgreSQL answered under them.
    pub(super) answers: Answers,
    by_name: Mutex<HashMap<TableName, TableId>>,
    generation: AtomicU64,
    turns: [Turn; 16],
    hasher: RandomState,
}

/// One reads for all who come at once: a herd of clients costs one look at the catalog, not one each.
#[derive(Default)]
struct Turn {
    lock: tokio::sync::Mutex<()>,
    failures: AtomicU64,
}

impl RuleBook {
    pub fn retire(&self, table: TableId) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.rules.lock().retain(|(id, _), _| *id != table);
        // Its own policies may decide what another table's find in it.
        self.answers.forget();
        self.by_name.lock().retain(|_, id| *id != table);
    }

    pub fn retire_all(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.rules.lock().clear();
        self.answers.forget();
        self.by_name.lock().clear();
    }

    /// By name, for a client that subscribes.
    pub async fn find(&self, core: &Core, table: &TableName, claims: &Claims) -> Result<Option<Arc<Rules>>, PgError> {
        let known = self.by_name.lock().get(table).copied();
        if let Some(id) = known {
            return self.get(core, id, claims).await;
        }
        let known = || {
            let id = self.by_name.lock().get(table).copied()?;
            self.rules.lock().get(&(id, claims.role().to_owned())).cloned()
        };
        self.read(claims, (table, claims.role()), known, || Rules::find(&core.pool, table, claims, core.publications_of_rules()))
            .await
    }

    pub fn forget(&self, table: &TableName) {
        let known = self.by_name.lock().remove(table);
        if let Some(id) = known {
            self.retire(id);
        }
    }

    pub async fn get(&self, core: &Core, table: TableId, claims: &Claims) -> Result<Option<Arc<Rules>>, PgError> {
        let key = (table, claims.role().to_owned());
        let known = || self.rules.lock().get(&key).cloned();
        if let Some(rules) = known() {
            return Ok(Some(rules));
        }
        self.read(claims, &key, known, || Rules::load(&core.pool, table, claims, core.publications_of_rules())).await
    }

    /// Whoever waited for another's look takes what that one found. Where it failed, all ask for themselves: side by side,
    /// or those who wait would fail one after the other.
    async fn read<R: Future<Output = Result<Option<Rules>, PgError>>>(
        &self,
        claims: &Claims,
        whose: impl Hash,
        known: impl Fn() -> Option<Arc<Rules>>,
        ask: impl FnOnce() -> R,
    ) -> Result<Option<Arc<Rules>>, PgError> {
        let turn = &self.turns[(self.hasher.hash_one(whose) % self.turns.len() as u64) as usize];
        let failures = turn.failures.load(Ordering::Acquire);
        let mut held = Some(turn.lock.lock().await);
        if let Some(rules) = known() {
            return Ok(Some(rules));
        }
        if turn.failures.load(Ordering::Acquire) != failures {
            held = None;
        }
        let generation = self.generation.load(Ordering::Acquire);
        let rules = ask().await.inspect_err(|_| {
            turn.failures.fetch_add(1, Ordering::AcqRel);
        })?;
        let rules = rules.map(|rules| self.keep(generation, claims, rules));
        drop(held);
        Ok(rules)
    }

    fn keep(&self, generation: u64, claims: &Claims, rules: Rules) -> Arc<Rules> {
        if let RowRule::Ask(question) = &rules.rows
            && let Some(unheard) = &question.unheard
        {
            tracing::warn!(
                table = %rules.name, %unheard,
                "a policy reads a table that is not in the cache's publication: subscribers are told to resync instead of hearing \
                 changes; add it with `walcast migrate`"
            );
        }
        let rules = Arc::new(rules);
        let mut book = self.rules.lock();
        // Retired while we read: what we read serves this batch, which the newer rules judge, but is not kept.
        if self.generation.load(Ordering::Acquire) == generation {
            book.insert((rules.table, claims.role().to_owned()), rules.clone());
            self.by_name.lock().insert(rules.name.clone(), rules.table);
        }
        rules
    }
}

impl Core {
    fn publications_of_rules(&self) -> Publications<'_> {
        Publications { realtime: &self.config.publication_realtime, cache: &self.config.publication_cache }
    }
}
