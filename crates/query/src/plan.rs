//! What a query's answer depends on for one role, and whether it may be kept at all.
//!
//! The union of two witnesses: the analyser, which reads the texts and narrows, and PostgreSQL's own generic plan,
//! which misses no table. A table that only the plan knows counts whole. Executes nothing.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tokio_postgres::{Client, SimpleQueryMessage, error::ErrorPosition, types::Type};
use walcast_model::{Claims, Lsn, TableName};
use walcast_pg::{Catalog, Envelope, PgError, Pool, quote_ident};

use crate::{
    analyse::analyse,
    dependency::{Dependency, condense},
    error::{QueryError, Uncacheable},
    explain::Explained,
    file::NamedQuery,
    functions::{Reached, reached},
    gather::{Found, Gathered, gather, resolve},
    known::Reference,
    names::relations,
    order::{Keys, keys, total},
};

#[derive(Debug, Clone)]
pub struct Plan {
    pub role: String,
    /// Every relation on the way, views and partitions included: if one is redefined, the plan is void.
    pub tables: Vec<TableName>,
    pub dependencies: Vec<Dependency>,
    pub cacheable: Result<(), Uncacheable>,
    /// Types of $1, $2, …, by oid and as a cast names them.
    pub param_types: Vec<u32>,
    pub(crate) param_names: Vec<String>,
    /// The answer changes without a commit, so it may be kept for at most this long.
    pub max_age: Option<Duration>,
    /// Why no table is narrowed, if none could be.
    pub not_narrowed: Option<String>,
    /// The plan read the catalog before this place of the WAL: whoever keeps an answer may trust its narrowing only
    /// if all commits up to here had settled, for an index that is being built shows before older writers end.
    pub made_at: Lsn,
    /// The answer is certainly the same for everybody who may run it as this role: no row security, no claim is read.
    pub for_anyone: bool,
    /// Columns that would narrow a table if they were in a key, an index or a foreign key.
    pub untagged: Vec<(TableName, String)>,
    /// As PostgreSQL prints it for any parameters: no value is in it.
    pub explain: Arc<Value>,
    /// Of each column that pages are ordered by: certainly never null.
    pub(crate) page_not_null: Vec<bool>,
}

const DOING: &str = "planning a query";

/// What one transaction as the role tells.
struct Seen {
    param_types: Vec<(u32, String)>,
    explain: Value,
    keys: Keys,
    gathered: Gathered,
    plan_relations: Vec<Found>,
    reached: Reached,
    published: HashSet<TableName>,
}

/// `publication` feeds the cache: what is not in it cannot be followed.
pub async fn plan(pool: &Pool, query: &NamedQuery, role: &str, timeout: Duration, publication: &str) -> Result<Plan, QueryError> {
    if !query.allows(role) {
        return Err(QueryError::RoleNotAllowed { name: query.name.clone(), role: role.to_owned() });
    }
    let refused = |error: PgError| QueryError::from_pg(&query.name, error, timeout);
    let envelope = Envelope::new(&nobody(role).map_err(refused)?, timeout).setting("plan_cache_mode", "force_generic_plan");
    let mut scope = envelope.open(pool, DOING).await.map_err(refused)?;
    let seen = match look(scope.client(), query, publication).await {
        Ok(seen) => seen,
        Err(Trouble { error, line }) => {
            if let Err(error) = scope.end(DOING).await {
                tracing::debug!(%error, "the connection of a refused plan is closed");
            }
            return Err(refused(error).at_line(line));
        }
    };
    scope.end(DOING).await.map_err(refused)?;
    let known = seen.gathered.known(&Catalog::new(pool.clone())).await.map_err(refused)?;
    let made_at = wal_place(pool).await.map_err(refused)?;

    let types: Vec<String> = query.params.iter().map(|param| param.type_name.clone()).collect();
    let narrowed = match (&query.parsed, &seen.gathered.unreadable) {
        (_, Some(why)) => Err(why.clone()),
        (_, None) if seen.reached.unfolded => Err("a function that reads tables was unfolded into the plan".to_owned()),
        (None, None) => Err("the query's syntax is not understood".to_owned()),
        (Some(parsed), None) => analyse(parsed, &types, &known).map_err(|given_up| given_up.0),
    };
    let (mut dependencies, untagged, not_narrowed) = match narrowed {
        Ok(analysis) => (analysis.dependencies, analysis.untagged, None),
        // Whole tables: all that the texts name and all that the plan reads.
        Err(why) => {
            let tables = seen.gathered.found.values().filter(|found| found.kind != 'v');
            (tables.map(|found| Dependency::whole(found.streamed.clone())).collect(), Vec::new(), Some(why))
        }
    };
    let by_parser: HashSet<TableName> = dependencies.iter().map(|dependency| dependency.table.clone()).collect();
    let by_plan = seen.plan_relations.iter().map(|found| found.streamed.clone());
    dependencies.extend(by_plan.filter(|table| !by_parser.contains(table)).map(Dependency::whole));
    dependencies.extend(query.depends.iter().cloned().map(Dependency::whole));
    let dependencies = condense(dependencies);

    let mut tables: Vec<TableName> = seen.relations().flat_map(|found| [found.name.clone(), found.streamed.clone()]).collect();
    tables.extend(query.depends.iter().cloned());
    tables.sort();
    tables.dedup();
    let max_age = seen.reached.clock.as_ref().and(query.max_age);
    let cacheable = judge(query, &seen, &dependencies, publication);
    let page_not_null = pages(query, &seen)?;
    let for_anyone = !seen.reached.asker
        && query.depends.is_empty()
        && seen.gathered.unreadable.is_none()
        && !seen.relations().any(|found| found.secured);
    let (param_types, param_names) = seen.param_types.into_iter().unzip();
    Ok(Plan {
        role: role.to_owned(),
        tables,
        dependencies,
        cacheable,
        param_types,
        param_names,
        max_age,
        not_narrowed,
        made_at,
        for_anyone,
        untagged,
        explain: Arc::new(seen.explain),
        page_not_null,
    })
}

/// Every commit that is in the WAL by now lies before it.
async fn wal_place(pool: &Pool) -> Result<Lsn, PgError> {
    let sql = "select (case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_receive_lsn() \
               else pg_catalog.pg_current_wal_insert_lsn() end)::text";
    let rows = pool.lease(DOING).await?.query_typed(sql, &[]).await.map_err(PgError::when(DOING))?;
    let place = rows.first().and_then(|row| row.get::<_, Option<&str>>(0)).and_then(|text| text.parse().ok());
    // Unknown: never settled, so nothing is narrowed.
    Ok(place.unwrap_or(Lsn::MAX))
}

impl Seen {
    fn relations(&self) -> impl Iterator<Item = &Found> {
        self.gathered.found.values().chain(&self.plan_relations)
    }
}

/// Planning asks for no row, so nobody's claims are needed.
fn nobody(role: &str) -> Result<Claims, PgError> {
    let map = serde_json::json!({ "role": role, "exp": 0 });
    let Value::Object(map) = map else { unreachable!("written as an object above") };
    Claims::verified(map).map_err(|error| PgError::Unexpected { doing: DOING, what: error.to_string() })
}

/// What PostgreSQL refused, and at which line of the file if it says so.
struct Trouble {
    error: PgError,
    line: Option<usize>,
}

impl From<PgError> for Trouble {
    fn from(error: PgError) -> Trouble {
        Trouble { error, line: None }
    }
}

/// Fails if the query has pages whose order is not total.
fn pages(query: &NamedQuery, seen: &Seen) -> Result<Vec<bool>, QueryError> {
    let Some(page) = &query.page else { return Ok(Vec::new()) };
    let repeats = seen.explain.to_string().contains("\"ProjectSet\"");
    let proven = match (&query.parsed, &seen.gathered.unreadable) {
        (Some(_), _) if repeats => Err("a function in its SELECT list repeats rows"),
        (Some(parsed), None) => total(parsed, page, &seen.keys),
        _ => Err("the query is not understood"),
    };
    match proven {
        Ok(order) => Ok(order.not_null),
        Err(_) if page.declared_unique => Ok(Vec::new()),
        Err(why) => Err(QueryError::NoTotalOrder { name: query.name.clone(), why: why.to_owned() }),
    }
}

async fn look(client: &Client, query: &NamedQuery, publication: &str) -> Result<Seen, Trouble> {
    let wrong = PgError::when(DOING);
    let plan = explain(client, query).await?;
    let explained = Explained::read(&plan);
    let param_types = param_types(client, query).await?;
    let plan_relations = resolve(client, &explained.relations).await.map_err(&wrong)?;
    let named: Vec<Reference> = query.parsed.as_ref().and_then(|parsed| relations(&**parsed)).unwrap_or_default();
    // What the plan reads is gathered too: its policies and views may call functions.
    let all = named.into_iter().chain(explained.relations.iter().cloned()).collect();
    let mut gathered = gather(client, all).await.map_err(&wrong)?;
    if query.parsed.as_ref().is_some_and(|parsed| relations(&**parsed).is_none()) {
        gathered.unreadable.get_or_insert("a relation's name is not understood".into());
    }
    let mut texts = gathered.texts.clone();
    texts.push(query.sql.clone());
    let reached = reached(client, &texts, &explained.expressions).await.map_err(&wrong)?;
    let published = published(client, publication).await.map_err(&wrong)?;
    let keys = if query.page.is_some() { keys(client, &gathered).await.map_err(&wrong)? } else { Keys::default() };
    let plan_relations = plan_relations.into_iter().map(|(_, found)| found).collect();
    Ok(Seen { param_types, explain: plan, keys, gathered, plan_relations, reached, published })
}

/// PREPARE with declared types and EXPLAIN EXECUTE under `force_generic_plan`: works alike on every version that we
/// support, and no parameter's value can prune a table away.
async fn explain(client: &Client, query: &NamedQuery) -> Result<Value, Trouble> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = quote_ident(&format!("walcast_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let types: Vec<&str> = query.params.iter().map(|param| param.type_name.as_str()).collect();
    let (types, nulls) = match types.len() {
        0 => (String::new(), String::new()),
        count => (format!(" ({})", types.join(", ")), format!(" ({})", vec!["null"; count].join(", "))),
    };
    let wrong = PgError::when(DOING);
    // With the order of its pages, so that a column that is not there is refused here.
    let order = query.page.as_ref().map(|page| format!(" order by {}", page.order_sql())).unwrap_or_default();
    let prepare = format!("prepare {name}{types} as select * from (\n{}\n) walcast_q{order}", query.sql);
    let prepared = client.batch_execute(&format!("{prepare}; savepoint walcast_s")).await;
    prepared.map_err(|error| Trouble { line: line(query, &prepare, &error), error: wrong(error) })?;
    let explained = client.simple_query(&format!("explain (verbose, format json) execute {name}{nulls}")).await;
    if explained.is_err() {
        // A rollback does not take a prepared statement away, and the connection will serve others.
        client.batch_execute(&format!("rollback to savepoint walcast_s; deallocate {name}")).await.map_err(&wrong)?;
    }
    let messages = explained.map_err(&wrong)?;
    client.batch_execute(&format!("deallocate {name}")).await.map_err(&wrong)?;
    let text: String = messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        })
        .collect();
    let unread = |error: serde_json::Error| PgError::Unexpected { doing: DOING, what: format!("EXPLAIN: {error}") };
    Ok(serde_json::from_str(&text).map_err(unread)?)
}

/// PostgreSQL counts characters of the statement that it was sent; the author counts lines of his file.
fn line(query: &NamedQuery, statement: &str, error: &tokio_postgres::Error) -> Option<usize> {
    let ErrorPosition::Original(at) = error.as_db_error()?.position()? else { return None };
    let before = statement.chars().take(*at as usize).filter(|c| *c == '\n').count();
    // The statement's first line is ours. An order that names no column stands behind the last line of the file.
    let lines = query.sql.lines().count();
    (1..=lines).contains(&before).then(|| query.first_line + before - 1)
}

async fn param_types(client: &Client, query: &NamedQuery) -> Result<Vec<(u32, String)>, PgError> {
    let names: Vec<&str> = query.params.iter().map(|param| param.type_name.as_str()).collect();
    // Without a length: a parameter has none, and a cast to one would cut.
    let sql = "select pg_catalog.to_regtype(x.name)::oid::int8, \
               pg_catalog.format_type(pg_catalog.to_regtype(x.name)::oid, -1) \
               from pg_catalog.unnest($1::text[]) with ordinality as x(name, n) order by x.n";
    let rows = client.query_typed(sql, &[(&names, Type::TEXT_ARRAY)]).await.map_err(PgError::when(DOING))?;
    let named = |row: &tokio_postgres::Row| Some((row.get::<_, Option<i64>>(0)? as u32, row.get::<_, Option<String>>(1)?));
    rows.iter()
        .map(named)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| PgError::Unexpected { doing: DOING, what: format!("one of the types {} is not known", names.join(", ")) })
}

/// Tables whose every change the publication carries.
async fn published(client: &Client, publication: &str) -> Result<HashSet<TableName>, tokio_postgres::Error> {
    let sql = "select t.schemaname::text, t.tablename::text from pg_catalog.pg_publication_tables t \
               join pg_catalog.pg_publication p on p.pubname = t.pubname \
               where t.pubname = $1 and p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate and t.rowfilter is null";
    let rows = client.query_typed(sql, &[(&publication, Type::TEXT)]).await?;
    Ok(rows.iter().map(|row| TableName::new(row.get(0), row.get(1))).collect())
}

/// The gravest reason first: what no header can mend.
fn judge(query: &NamedQuery, seen: &Seen, dependencies: &[Dependency], publication: &str) -> Result<(), Uncacheable> {
    if let Some(name) = &seen.reached.volatile {
        return Err(Uncacheable::Volatile(name.clone()));
    }
    for found in seen.relations() {
        let what = match found.kind {
            'm' => "a materialised view",
            'f' => "a foreign table",
            'S' => "a sequence",
            _ => continue,
        };
        return Err(Uncacheable::Untracked { table: found.name.clone(), what });
    }
    if let (Some(name), true) = (&seen.reached.opaque, query.depends.is_empty()) {
        return Err(Uncacheable::Opaque(name.clone()));
    }
    if let (Some(name), None) = (&seen.reached.clock, query.max_age) {
        return Err(Uncacheable::Clock(name.clone()));
    }
    match dependencies.iter().find(|dependency| !seen.published.contains(&dependency.table)) {
        Some(dependency) => Err(Uncacheable::unpublished(&dependency.table, publication)),
        None => Ok(()),
    }
}
