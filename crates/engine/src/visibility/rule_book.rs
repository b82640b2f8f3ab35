//! The rules of each table for each role, kept until the table is redefined or the catalog moves.
//!
//! Read by joins and by the judge of changes; retired by the announcer at the place in the stream where a table is described
//! again, and by the keeper. What was remembered under rules goes with them.

use std::{
    collections::HashMap,
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
        let generation = self.generation.load(Ordering::Acquire);
        let Some(rules) = Rules::find(&core.pool, table, claims, core.publications_of_rules()).await? else { return Ok(None) };
        Ok(Some(self.keep(generation, claims, rules)))
    }

    pub fn forget(&self, table: &TableName) {
        let known = self.by_name.lock().remove(table);
        if let Some(id) = known {
            self.retire(id);
        }
    }

    pub async fn get(&self, core: &Core, table: TableId, claims: &Claims) -> Result<Option<Arc<Rules>>, PgError> {
        let key = (table, claims.role().to_owned());
        if let Some(rules) = self.rules.lock().get(&key) {
            return Ok(Some(rules.clone()));
        }
        let generation = self.generation.load(Ordering::Acquire);
        let Some(rules) = Rules::load(&core.pool, table, claims, core.publications_of_rules()).await? else { return Ok(None) };
        Ok(Some(self.keep(generation, claims, rules)))
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
