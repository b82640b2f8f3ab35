//! The demo's content: schema and people once, a steady writer, and new tables published as they appear.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rand::Rng;
use rust_embed::RustEmbed;
use tokio_postgres::types::Type;
use walcast_engine::ConnectConfig;

use super::banner::Progress;
use crate::failure::Failure;

#[derive(RustEmbed)]
#[folder = "../../demo/sql"]
struct Sql;

#[derive(RustEmbed)]
#[folder = "../../demo/queries"]
struct QueryFiles;

/// The clinic's own settings, its cache namespaces: used where no `walcast.toml` is found.
pub const SETTINGS_NAME: &str = "demo/walcast.toml";
pub const SETTINGS_TEXT: &str = include_str!("../../../../../demo/walcast.toml");

pub struct Person {
    pub user_id: String,
    pub name: String,
    pub patient_id: Option<i64>,
}

pub struct People {
    pub provider: Person,
    pub patient: Person,
}

/// Schema and people on the first start; the serve role's password on every one.
pub async fn load(admin_url: &str, serve_role: &str, password: &str, say: &Progress) -> Result<People, Failure> {
    let client = connect(admin_url).await?;
    let failed = |doing: &'static str| move |error: tokio_postgres::Error| sql_failure(doing, &error);
    // Hexadecimal, made by us: nothing to escape.
    client
        .batch_execute(&format!("alter role {serve_role} password '{password}'"))
        .await
        .map_err(failed("setting the serve role's password"))?;
    if !is_loaded(&client).await.map_err(failed("looking for the clinic"))? {
        say.step("loading the clinic");
        for name in ["0001_clinic.sql", "0002_people.sql"] {
            client.batch_execute(&text_of(name)?).await.map_err(failed("loading the clinic"))?;
        }
    }
    let person = |sql: &'static str| {
        let client = &client;
        async move {
            let rows = client.query_typed(sql, &[]).await.map_err(failed("finding the people of the demo"))?;
            let row = rows.first().ok_or_else(|| {
                Failure::new("clinic", "the clinic's tables are empty").hint("begin anew with `walcast dev --reset`".to_owned())
            })?;
            Ok::<_, Failure>(Person { user_id: row.get(0), name: row.get(1), patient_id: row.get(2) })
        }
    };
    let provider = "select user_id::text, full_name, null::bigint from public.providers order by id limit 1";
    let patient = "select user_id::text, full_name, id from public.patients order by id limit 1";
    Ok(People { provider: person(provider).await?, patient: person(patient).await? })
}

/// With its people: a start that was cut short between tables and people is taken up again, since either file may be
/// run twice. Whoever emptied the tables on purpose gets the people back.
async fn is_loaded(client: &tokio_postgres::Client) -> Result<bool, tokio_postgres::Error> {
    let yes = |rows: Vec<tokio_postgres::Row>| rows.first().is_some_and(|row| row.get(0));
    let tables = "select to_regclass('public.patients') is not null and to_regclass('public.providers') is not null";
    let people = "select exists (select from public.patients) and exists (select from public.providers)";
    Ok(yes(client.query_typed(tables, &[]).await?) && yes(client.query_typed(people, &[]).await?))
}

/// The embedded query files, laid out where the server reads them; a checkout's own folder is used as it is.
pub fn queries_dir(dir: &Path) -> Result<PathBuf, Failure> {
    let checkout = Path::new("demo/queries");
    if checkout.join("patient_dashboard.sql").is_file() {
        return Ok(checkout.to_path_buf());
    }
    let into = dir.join("queries");
    let failed = |error: std::io::Error| {
        Failure::new("files", format!("writing the demo's queries to {} failed: {error}", into.display()))
    };
    std::fs::create_dir_all(&into).map_err(failed)?;
    for name in QueryFiles::iter() {
        if let Some(file) = QueryFiles::get(&name) {
            std::fs::write(into.join(name.as_ref()), file.data).map_err(failed)?;
        }
    }
    Ok(into)
}

/// The statements of `writer.sql` in turn, `rate` a second. Runs until aborted; a database that is away is tried again.
pub async fn write_steadily(admin_url: String, rate: u32) {
    let Ok(text) = text_of("writer.sql") else { return };
    let statements = statements(&text);
    if rate == 0 || statements.is_empty() {
        return;
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.min(10_000));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut turn = 0;
    loop {
        let Ok(client) = connect(&admin_url).await else {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        };
        loop {
            ticks.tick().await;
            let chance: i64 = rand::rng().random();
            let statement = &statements[turn % statements.len()];
            turn += 1;
            if let Err(error) = client.query_typed(statement, &[(&chance, Type::INT8)]).await {
                tracing::warn!(error = %sql_failure("writing", &error).report().trim(), "the demo's writer was refused");
                if client.is_closed() {
                    break;
                }
            }
        }
    }
}

/// In `dev`, a table that has a replica identity is heard and cached without a word from its author.
pub async fn publish_new_tables(admin_url: String) {
    const SQL: &str = "do $walcast$ declare t record; begin
        for t in select n.nspname, c.relname, p.pubname
          from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
          cross join (values ('walcast'), ('supabase_realtime')) as p(pubname)
          where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p' and n.nspname = 'public'
            and (c.relreplident = 'f' or exists (select from pg_catalog.pg_index i where i.indrelid = c.oid
                 and (i.indisprimary and c.relreplident = 'd' or i.indisreplident)))
            and not exists (select from pg_catalog.pg_publication_tables x
                 where x.pubname = p.pubname and x.schemaname = n.nspname and x.tablename = c.relname)
        loop
          execute format('alter publication %I add table %I.%I', t.pubname, t.nspname, t.relname);
        end loop; end $walcast$";
    loop {
        if let Ok(client) = connect(&admin_url).await {
            while client.batch_execute(SQL).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Each part begins with a line `-- name: …` and is one statement. The file's head may speak of such lines.
fn statements(text: &str) -> Vec<String> {
    let parts = text.split("\n-- name:").skip(1);
    parts.filter_map(|part| part.split_once('\n')).map(|(_, sql)| sql.trim().trim_end_matches(';').to_owned()).collect()
}

fn text_of(name: &str) -> Result<String, Failure> {
    let file = Sql::get(name).ok_or_else(|| Failure::new("clinic", format!("this build lacks demo/sql/{name}")))?;
    String::from_utf8(file.data.into_owned()).map_err(|error| Failure::new("clinic", format!("demo/sql/{name}: {error}")))
}

async fn connect(url: &str) -> Result<tokio_postgres::Client, Failure> {
    let config = ConnectConfig::parse(url).map_err(|error| Failure::new("database", error.to_string()))?;
    config.connect().await.map_err(|error| Failure::new("database", error.to_string()))
}

fn sql_failure(doing: &str, error: &tokio_postgres::Error) -> Failure {
    let text = error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string);
    Failure::new("clinic", format!("{doing} failed: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Inputs, load as load_settings};

    #[test]
    fn the_clinic_brings_its_namespaces() {
        let nothing_here = tempfile::tempdir().unwrap();
        let instead = Some((SETTINGS_NAME, SETTINGS_TEXT));
        let loaded = load_settings(&Inputs { directory: nothing_here.path().to_owned(), instead, ..Inputs::default() });
        let namespaces = loaded.unwrap().settings.cache.namespaces;
        let lives: Vec<(&str, u64)> =
            namespaces.iter().map(|(name, set)| (name.as_str(), set.entries.ttl.unwrap_or_default().as_secs())).collect();
        let expected = [
            ("billing_codes", 24 * 3600),
            ("drug_interaction", 3600),
            ("fhir_resource", 600),
            ("patient_lookup", 300),
            ("permission", 300),
            ("queue", 30),
            ("session", 24 * 3600),
            ("tenant", 300),
            ("translation", 30 * 24 * 3600),
        ];
        assert_eq!(lives, expected);
        // An own file is the whole of it.
        std::fs::write(nothing_here.path().join("walcast.toml"), "[log]\nlevel = 'debug'\n").unwrap();
        let instead = Some((SETTINGS_NAME, SETTINGS_TEXT));
        let own = load_settings(&Inputs { directory: nothing_here.path().to_owned(), instead, ..Inputs::default() }).unwrap();
        assert!(own.settings.cache.namespaces.is_empty() && own.settings.log.level == "debug");
    }

    #[test]
    fn the_writer_has_its_three_statements() {
        let found = statements(&text_of("writer.sql").unwrap());
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|sql| sql.contains("$1") && !sql.contains(';')), "{found:?}");
    }
}
