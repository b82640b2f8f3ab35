//! Puts Walcast's SQL into a database: the files that the rooms own, the published tables, the serve role's rights.
//! Called by `walcast migrate` and by `walcast dev`. Creates what is missing and touches nothing that exists.
//!
//! Every file runs once, in a transaction of its own, under an advisory lock. What is printed is what runs.

mod cache_rights;
mod error;
mod persistence;
mod serve_role;
pub(crate) mod tables;

use std::fmt::Write;

use tokio_postgres::{Client, types::Type};
use walcast_pg::{ConnectConfig, PgError, quote_ident, quote_literal};

pub(crate) use cache_rights::own_tables;
pub use cache_rights::{CacheRights, NamespaceRights, RoleGrant};
pub use error::MigrateError;
use tables::{Choice, TablePlan};

#[derive(Debug, Clone)]
pub struct MigrateOptions {
    /// `table` or `schema.table`; only these are published. Empty: every table of the chosen schemas.
    pub tables: Vec<String>,
    /// Empty: every schema of the application.
    pub schemas: Vec<String>,
    /// The login role that `walcast serve` uses.
    pub serve_role: String,
    pub publication_cache: String,
    pub publication_realtime: String,
    /// What SQL obeys of the cache's settings.
    pub cache: CacheRights,
    /// The cache table is logged: its values cost WAL and outlive a crash's recovery.
    pub l2_logged: bool,
}

impl Default for MigrateOptions {
    fn default() -> MigrateOptions {
        MigrateOptions {
            tables: Vec::new(),
            schemas: Vec::new(),
            serve_role: "walcast".into(),
            publication_cache: CACHE.into(),
            publication_realtime: REALTIME.into(),
            cache: CacheRights::default(),
            l2_logged: false,
        }
    }
}

/// What a run did, and what is left for a person to do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct MigrateReport {
    /// Migration files that ran now.
    pub applied: Vec<String>,
    /// Tables that were added to the cache's publication now.
    pub published: Vec<String>,
    /// Why the cache table was made logged or unlogged now.
    pub relogged: Option<String>,
    pub advice: Vec<Advice>,
}

/// One sentence and, where there is one, the SQL that does it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    pub sentence: String,
    pub sql: Option<String>,
}

/// The names that the migration files themselves use.
const CACHE: &str = "walcast";
const REALTIME: &str = "supabase_realtime";
/// "walcast" in ASCII, cut to 63 bits: one migration at a time per database.
const LOCK: i64 = 0x0077_616c_6361_7374;
const OLDEST: i32 = 150_000;

const BOOKKEEPING: &str = "\
create schema if not exists walcast;
create table if not exists walcast.migrations (
  name text primary key,
  applied_at timestamptz not null default now()
);
revoke all on walcast.migrations from public;
";

struct Step {
    /// What is being done, for errors and for the comment in the printed SQL.
    title: String,
    sql: String,
    /// Recorded in `walcast.migrations`, and skipped if it is there.
    file: Option<String>,
}

struct Plan {
    steps: Vec<Step>,
    published: Vec<String>,
    relogged: Option<String>,
    advice: Vec<Advice>,
}

/// Migration files in the order in which they run, named `room/NNNN_name`.
pub(crate) fn files() -> impl Iterator<Item = (&'static str, &'static str)> {
    [walcast_wal::MIGRATIONS, walcast_auth::MIGRATIONS, walcast_cache::MIGRATIONS, crate::MIGRATIONS]
        .into_iter()
        .flatten()
        .copied()
}

/// Connects, runs what is missing and says what it did.
pub async fn migrate(database_url: &str, options: &MigrateOptions) -> Result<MigrateReport, MigrateError> {
    let mut client = ConnectConfig::parse(database_url)?.connect().await?;
    let plan = plan(&client, options).await?;
    let mut applied = Vec::new();
    for step in plan.steps {
        if run(&mut client, &step).await? {
            applied.extend(step.file);
        }
    }
    Ok(MigrateReport { applied, published: plan.published, relogged: plan.relogged, advice: plan.advice })
}

/// The SQL that [`migrate`] would run, for psql. Without a URL: everything that needs no look at the database.
pub async fn print(database_url: Option<&str>, options: &MigrateOptions) -> Result<String, MigrateError> {
    let plan = match database_url {
        Some(url) => plan(&ConnectConfig::parse(url)?.connect().await?, options).await?,
        None => static_plan(options),
    };
    let mut text = String::from(
        "-- What `walcast migrate` runs, in order. For psql, as a role that may create roles and publications.\n\\set ON_ERROR_STOP on\n",
    );
    for step in &plan.steps {
        let _ = write!(text, "\n-- {}\nbegin;\n{}{}", step.title, opening(), step.sql.trim_end());
        if let Some(file) = &step.file {
            let _ = write!(text, "\n{} on conflict do nothing;", record(file));
        }
        text.push_str("\ncommit;\n");
    }
    for advice in &plan.advice {
        let _ = write!(text, "\n-- {}\n", advice.sentence);
        for line in advice.sql.iter().flat_map(|sql| sql.lines()) {
            let _ = writeln!(text, "--   {line}");
        }
    }
    Ok(text)
}

async fn plan(client: &Client, options: &MigrateOptions) -> Result<Plan, MigrateError> {
    const DOING: &str = "looking at the database before migrating";
    let sql = "select current_setting('server_version_num')::int4, current_setting('server_version'), pg_is_in_recovery(), \
               exists (select from pg_catalog.pg_class where relname = 'migrations' and relnamespace = to_regnamespace('walcast')), \
               exists (select from pg_catalog.pg_publication where pubname = $1), \
               exists (select from pg_catalog.pg_roles where rolname = $2)";
    let (realtime, role) = (&options.publication_realtime, &options.serve_role);
    let rows = client.query_typed(sql, &[(realtime, Type::TEXT), (role, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
    let row = rows.first().ok_or(PgError::Unexpected { doing: DOING, what: "no row".into() })?;
    if row.get::<_, i32>(0) < OLDEST {
        return Err(MigrateError::TooOld(row.get(1)));
    }
    if row.get(2) {
        return Err(MigrateError::Standby);
    }
    let done: Vec<String> = match row.get(3) {
        false => Vec::new(),
        true => {
            let rows = client.query_typed("select name from walcast.migrations", &[]).await.map_err(PgError::when(DOING))?;
            rows.iter().map(|row| row.get(0)).collect()
        }
    };
    let (realtime_exists, role_exists): (bool, bool) = (row.get(4), row.get(5));

    let choice = Choice { tables: &options.tables, schemas: &options.schemas, publication: &options.publication_cache };
    let TablePlan { add, mut advice } = tables::plan(client, &choice).await?;
    let mut steps = static_steps(options);
    steps.retain(|step| step.file.as_ref().is_none_or(|file| !done.contains(file)));
    if row.get(3) {
        steps.retain(|step| step.sql != BOOKKEEPING);
    }
    let published: Vec<String> = add.iter().map(|table| table.name()).collect();
    if !add.is_empty() {
        let publication = quote_ident(&options.publication_cache);
        let lines = add.iter().map(|table| format!("alter publication {publication} add table only {};\n", table.quoted()));
        steps.push(Step { title: "tables: what the cache hears of".into(), sql: lines.collect(), file: None });
    }
    let persistence = persistence::plan(client, options.l2_logged).await?;
    let relogged = persistence.step.as_ref().map(|step| step.title.clone());
    // Behind the files, which make the table.
    steps.extend(persistence.step);
    advice.extend(persistence.advice);
    if !realtime_exists {
        advice.push(realtime_advice(options));
    }
    if !role_exists {
        advice.push(password_advice(options));
    }
    Ok(Plan { steps, published, relogged, advice })
}

fn static_plan(options: &MigrateOptions) -> Plan {
    let left_out = Advice {
        sentence: "Left out, since no database URL was given: the tables that join the publication. With a URL they are listed; by hand, for each table that has a primary key:".into(),
        sql: Some(format!("alter publication {} add table only public.orders;", quote_ident(&options.publication_cache))),
    };
    let advice = vec![left_out, realtime_advice(options), password_advice(options)];
    let mut steps = static_steps(options);
    steps.extend(persistence::from_scratch(options.l2_logged));
    Plan { steps, published: Vec::new(), relogged: None, advice }
}

/// Everything that is the same for every database.
fn static_steps(options: &MigrateOptions) -> Vec<Step> {
    let mut steps = vec![Step { title: "bookkeeping".into(), sql: BOOKKEEPING.into(), file: None }];
    steps.extend(files().map(|(name, sql)| Step { title: name.into(), sql: closed(sql), file: Some(name.into()) }));
    let named = [
        (&options.publication_cache, CACHE, " with (publish_via_partition_root = true)"),
        (&options.publication_realtime, REALTIME, ""),
    ];
    for (name, usual, with) in named.into_iter().filter(|(name, usual, _)| name != usual) {
        steps.push(Step {
            title: format!("publication {name}, which the settings name in place of {usual}"),
            sql: format!(
                "do $walcast$ begin\n  if not exists (select from pg_catalog.pg_publication where pubname = {}) then\n    \
                 create publication {}{with};\n  end if;\nend $walcast$;\n",
                quote_literal(name),
                quote_ident(name)
            ),
            file: None,
        });
    }
    steps.push(Step {
        title: format!("rights of the role {} that `walcast serve` logs in as", options.serve_role),
        sql: serve_role::grants(&options.serve_role),
        file: None,
    });
    steps.push(Step {
        title: "the cache from SQL: limits, namespaces and who may use them, from the config".into(),
        sql: cache_rights::sql(&options.cache, &options.publication_cache),
        file: None,
    });
    steps
}

/// A new function is everybody's to execute. Ours are granted by name or not at all, from the moment they can be seen.
fn closed(sql: &str) -> String {
    const REVOKE: &str = "do $walcast$
declare
  made regprocedure;
begin
  for made in
    select p.oid::regprocedure from pg_catalog.pg_proc p
    where p.pronamespace = 'walcast'::regnamespace and (p.proacl is null or p.proacl::text ~ '[{,]=')
  loop
    execute format('revoke all on function %s from public', made);
  end loop;
end
$walcast$;
";
    if sql.contains("function walcast.") { format!("{}\n\n{REVOKE}", sql.trim_end()) } else { sql.to_owned() }
}

fn realtime_advice(options: &MigrateOptions) -> Advice {
    let name = &options.publication_realtime;
    Advice {
        sentence: format!("Publication {name} is new and empty: clients may subscribe to the tables that you add to it"),
        sql: Some(format!("alter publication {} add table public.orders;", quote_ident(name))),
    }
}

fn password_advice(options: &MigrateOptions) -> Advice {
    let name = &options.serve_role;
    Advice {
        sentence: format!("Role {name} is new and has no password: set one, then give its URL to `walcast serve`"),
        sql: Some(format!("alter role {} password 'a long random password';", quote_ident(name))),
    }
}

fn opening() -> String {
    // The wait for another migration is unbounded; the wait for the application's locks is not.
    format!("do $walcast$ begin perform pg_advisory_xact_lock({LOCK}); end $walcast$;\nset local lock_timeout = '15s';\n")
}

fn record(file: &str) -> String {
    format!("insert into walcast.migrations (name) values ({})", quote_literal(file))
}

/// False if another run did it meanwhile.
async fn run(client: &mut Client, step: &Step) -> Result<bool, MigrateError> {
    let refused = |error| MigrateError::from_step(&step.title, error);
    let transaction = client.transaction().await.map_err(refused)?;
    transaction.batch_execute(&opening()).await.map_err(refused)?;
    if let Some(file) = &step.file {
        let sql = "select from walcast.migrations where name = $1";
        if !transaction.query_typed(sql, &[(file, Type::TEXT)]).await.map_err(refused)?.is_empty() {
            return Ok(false);
        }
    }
    transaction.batch_execute(&step.sql).await.map_err(refused)?;
    if let Some(file) = &step.file {
        transaction.batch_execute(&record(file)).await.map_err(refused)?;
    }
    transaction.commit().await.map_err(refused)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rooms_files_run_in_the_order_of_their_numbers() {
        let parts = |name: &'static str| name.split_once('/').and_then(|(room, rest)| Some((room, rest.split_once('_')?.0)));
        let names: Vec<(&str, &str)> = files().filter_map(|(name, _)| parts(name)).collect();
        assert_eq!(names.len(), files().count());
        for (before, after) in names.iter().zip(&names[1..]).filter(|(before, after)| before.0 == after.0) {
            assert!(before.1 < after.1, "{before:?} runs before {after:?}");
        }
    }
}
