//! Named queries: answers under the caller's role and claims, cached until a row behind them changes.
//!
//! | what | file |
//! |---|---|
//! | one question through the cache | `answer` |
//! | many at once | `batch` |
//! | rows of any number, past the cache | `stream` |
//! | files: loaded, checked, loaded anew | this one |
//! | what was slow | `slow` |
//! | the same for whoever has no server running | `desk` |

mod answer;
mod batch;
mod desk;
mod slow;
mod stream;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use walcast_cache::NamespaceConfig;
use walcast_model::TableName;
use walcast_pg::{PgError, Pool};
use walcast_query::{NamedQuery, Queries, QueryError, QueryFileError, check, load_dir};

use crate::{Engine, EngineConfig};

pub use answer::{Expiry, How, QueryAnswer};
pub use batch::BatchItem;
pub use desk::{DeskError, Explanation, QueryDesk};
pub use stream::{QueryLines, Segment};

/// Every caller of `cache` names what it follows: a query's answers have namespaces of their own, with that policy.
/// They keep rows of the database, whatever the namespace keeps, and share the common room of L1.
pub fn namespaces(configured: &HashMap<String, NamespaceConfig>) -> Vec<(String, NamespaceConfig)> {
    let followed = configured.iter().map(|(name, config)| {
        let config = NamespaceConfig { external: false, l1_bytes: None, ..config.clone() };
        (walcast_query::namespace(Some(name)), config)
    });
    followed.chain([(walcast_query::namespace(None), NamespaceConfig::default())]).collect()
}

/// The loaded files and their plans.
pub struct CachedQueries {
    current: RwLock<Arc<Queries>>,
    dir: Option<PathBuf>,
    /// Roles that tokens may name.
    roles: Vec<String>,
    /// Namespaces that a query may follow.
    namespaces: Vec<String>,
    timeout: Duration,
    stream_timeout: Duration,
    /// Each stream holds a connection for as long as its reader takes.
    streams: Arc<Semaphore>,
    slow: slow::SlowQueries,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Clone, Default)]
struct Loaded {
    at_ms: u64,
    /// Why the files that are there now are not the ones that are answered from.
    refused: Option<String>,
}

/// What a reload brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reloaded {
    pub queries: usize,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct QueryFailure {
    pub status: u16,
    pub code: &'static str,
    pub message: String,
    pub hint: String,
}

impl CachedQueries {
    /// Fails with everything that is wrong, file by file.
    pub async fn load(config: &EngineConfig, pool: &Pool) -> Result<CachedQueries, String> {
        let (_, _, connections) = pool.status();
        let empty = Queries::new(Vec::new(), pool.clone(), config.statement_timeout, &config.publication_cache);
        let loaded = CachedQueries {
            current: RwLock::new(Arc::new(empty)),
            dir: config.queries_dir.clone(),
            roles: config.auth.allowed_roles.clone(),
            namespaces: config.cache.namespaces.keys().cloned().collect(),
            timeout: config.statement_timeout,
            stream_timeout: config.stream_timeout,
            streams: Arc::new(Semaphore::new((connections / 2).max(1))),
            slow: slow::SlowQueries::new(config.slow_query),
            loaded: Mutex::default(),
        };
        let reloaded = loaded.reload().await?;
        if let Some(dir) = &loaded.dir {
            tracing::info!(queries = reloaded.queries, dir = %dir.display(), "named queries are loaded");
        }
        Ok(loaded)
    }

    pub(crate) fn current(&self) -> Arc<Queries> {
        self.current.read().clone()
    }

    /// All or nothing: one broken file and the set before it stays.
    async fn reload(&self) -> Result<Reloaded, String> {
        let outcome = self.read().await;
        let mut loaded = self.loaded.lock();
        match outcome {
            Err(why) => {
                loaded.refused = Some(why.clone());
                Err(why)
            }
            Ok(next) => {
                let before = self.current();
                let same = |query: &NamedQuery| before.get(&query.name).is_ok_and(|old| old.meaning == query.meaning);
                let names = |queries: &Queries, keep: &dyn Fn(&NamedQuery) -> bool| {
                    queries.all().filter(|query| keep(query)).map(|query| query.name.clone()).collect()
                };
                let reloaded = Reloaded {
                    queries: next.all().count(),
                    changed: names(&next, &|query| !same(query)),
                    removed: names(&before, &|query| next.get(&query.name).is_err()),
                };
                *self.current.write() = Arc::new(next);
                let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
                *loaded = Loaded { at_ms, refused: None };
                Ok(reloaded)
            }
        }
    }

    async fn read(&self) -> Result<Queries, String> {
        let files = match self.dir.clone() {
            Some(dir) => read_dir(dir).await?,
            None => Vec::new(),
        };
        let mut wrong = strangers(&files, &self.namespaces);
        let queries = self.current().with(files);
        wrong.extend(check(&queries, &self.roles).await.map_err(|error: PgError| error.to_string())?);
        if wrong.is_empty() { Ok(queries) } else { Err(lines(&wrong)) }
    }

    pub fn forget_plans(&self) {
        self.current().forget_plans();
    }

    pub fn forget_plans_of(&self, table: &TableName) {
        self.current().forget_plans_of(table);
    }

    /// For `/readyz`.
    pub fn report(&self) -> Value {
        let loaded = self.loaded.lock().clone();
        json!({
            "loaded": self.current().all().count(),
            "loaded_at_ms": loaded.at_ms,
            "refused": loaded.refused,
        })
    }
}

/// Reads files, so not on a thread that others wait for.
async fn read_dir(dir: PathBuf) -> Result<Vec<NamedQuery>, String> {
    let read = tokio::task::spawn_blocking(move || load_dir(&dir)).await;
    read.map_err(|error| error.to_string())?.map_err(|errors| lines(&errors))
}

/// Queries that follow a namespace which the config does not name.
fn strangers(files: &[NamedQuery], namespaces: &[String]) -> Vec<QueryFileError> {
    let unknown = |query: &&NamedQuery| query.namespace.as_ref().is_some_and(|name| !namespaces.contains(name));
    let wrong = |query: &NamedQuery| {
        let name = query.namespace.as_deref().unwrap_or_default();
        QueryFileError {
            file: query.file.clone(),
            line: 1,
            what: format!("it follows namespace `{name}`, which the config does not name"),
            hint: format!("add [cache.namespaces.{name}] to walcast.toml, or delete the line"),
        }
    };
    files.iter().filter(unknown).map(wrong).collect()
}

fn lines(errors: &[QueryFileError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Names, times and sizes: what a change of a folder shows in.
fn stamp(dir: &Path) -> Vec<(PathBuf, Option<SystemTime>, u64)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "sql"))
        .map(|entry| {
            let facts = entry.metadata().ok();
            (entry.path(), facts.as_ref().and_then(|facts| facts.modified().ok()), facts.map_or(0, |facts| facts.len()))
        })
        .collect();
    files.sort();
    files
}

impl Engine {
    /// Names and what they say of themselves.
    pub fn query_names(&self) -> Vec<(String, Option<String>)> {
        self.core.queries.current().all().map(|query| (query.name.clone(), query.describe.clone())).collect()
    }

    /// Reads the files again. What changed has other keys from now on, so nothing old is answered for it. A broken file
    /// keeps all as it was; the error says where.
    pub async fn reload_queries(&self) -> Result<Reloaded, String> {
        let outcome = self.core.queries.reload().await;
        match &outcome {
            Ok(Reloaded { queries, changed, removed }) => {
                tracing::info!(
                    queries,
                    changed = changed.join(" "),
                    removed = removed.join(" "),
                    "named queries are loaded anew"
                );
            }
            Err(why) => tracing::error!("named queries stay as they were:\n{why}"),
        }
        outcome
    }

    /// Reloads whenever a file changes; for development. Looks once a second: a listing of one folder costs nothing, and
    /// unlike a kernel's notices it sees changes in mounted and networked folders too.
    pub async fn watch_queries(&self) {
        let Some(dir) = self.core.queries.dir.clone() else { return };
        let look = async || {
            let dir = dir.clone();
            tokio::task::spawn_blocking(move || stamp(&dir)).await.unwrap_or_default()
        };
        let mut before = look().await;
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let now = look().await;
            if now != before {
                before = now;
                let _ = self.reload_queries().await;
            }
        }
    }

    /// The latest, newest first.
    pub fn slow_queries(&self) -> Value {
        self.core.queries.slow.report()
    }
}

pub(crate) fn failure(error: &QueryError) -> QueryFailure {
    let status = match error {
        QueryError::Unknown { .. } => 404,
        QueryError::RoleNotAllowed { .. } | QueryError::Denied { .. } => 403,
        QueryError::UnknownParam { .. }
        | QueryError::MissingParam { .. }
        | QueryError::BadParam { .. }
        | QueryError::BadCursor { .. } => 400,
        QueryError::TooManyRows { .. }
        | QueryError::Refused { .. }
        | QueryError::Key { .. }
        | QueryError::NoTotalOrder { .. } => 422,
        QueryError::Timeout { .. } => 504,
        QueryError::Database(_) => 503,
    };
    QueryFailure { status, code: error.code(), message: error.to_string(), hint: error.hint() }
}
