//! What the stream will carry: the two publications, their tables, and where they contradict each other.

use tokio_postgres::{Client, types::Type};
use walcast_pg::{PgError, quote_ident};

use super::{Expectations, Finding};
use crate::migrate::tables;

const DOING: &str = "reading the publications";

pub(super) async fn exist(client: &Client, expect: &Expectations) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "publications";
    let sql = "select pubname::text, puballtables, pubinsert and pubupdate and pubdelete and pubtruncate, pubviaroot \
               from pg_catalog.pg_publication where pubname = any ($1)";
    let names = [expect.publication_cache.as_str(), expect.publication_realtime.as_str()];
    let rows = client.query_typed(sql, &[(&names.as_slice(), Type::TEXT_ARRAY)]).await.map_err(PgError::when(DOING))?;
    let mut findings = Vec::new();
    for name in names {
        let quoted = quote_ident(name);
        let Some(row) = rows.iter().find(|row| row.get::<_, &str>(0) == name) else {
            let with = if name == expect.publication_cache { " with (publish_via_partition_root = true)" } else { "" };
            let fix = format!("walcast migrate\n-- or by hand: create publication {quoted}{with};");
            findings.push(Finding::fail(CHECK, format!("publication {name} does not exist"), fix));
            continue;
        };
        let (all_tables, every_operation, via_root): (bool, bool, bool) = (row.get(1), row.get(2), row.get(3));
        if name == expect.publication_cache && !every_operation {
            let fix = format!("alter publication {quoted} set (publish = 'insert, update, delete, truncate');");
            let line = format!("publication {name} leaves operations out: entries would go stale unheard");
            findings.push(Finding::fail(CHECK, line, fix));
        }
        if name == expect.publication_cache && !via_root {
            let fix = format!("alter publication {quoted} set (publish_via_partition_root = true);");
            let line = format!("publication {name} names partitions and not their root, so queries on the root are not told");
            findings.push(Finding::fail(CHECK, line, fix));
        }
        if all_tables {
            let fix = format!("drop publication {quoted};\n-- then `walcast migrate`, which lists the tables");
            let line =
                format!("publication {name} is FOR ALL TABLES: a table without a replica identity refuses UPDATE and DELETE");
            findings.push(Finding::warn(CHECK, line, fix));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("publications {} and {} exist", names[0], names[1])));
    }
    Ok(findings)
}

pub(super) async fn tables(client: &Client, expect: &Expectations) -> Result<Vec<Finding>, PgError> {
    let mut findings = Vec::new();
    for (name, cache) in [(&expect.publication_cache, true), (&expect.publication_realtime, false)] {
        let all = tables::read(client, name).await?;
        let published = all.iter().filter(|table| table.published).count();
        let check = if cache { "cached_tables" } else { "realtime_tables" };
        findings.push(match (published, cache) {
            (0, true) => {
                Finding::warn(check, format!("publication {name} has no tables, so nothing is heard"), "walcast migrate")
            }
            (0, false) => Finding::warn(
                check,
                format!("publication {name} has no tables, so clients can subscribe to no row changes"),
                format!("alter publication {} add table public.orders;", quote_ident(name)),
            ),
            _ => Finding::ok(check, format!("publication {name} has {published} tables")),
        });
        for table in all.iter().filter(|table| table.published && !table.identified) {
            let line = format!("{} is in {name} without a replica identity: its own UPDATE and DELETE fail", table.name());
            findings.push(Finding::fail("replica_identity", line, table.mending_sql()));
        }
        let unheard: Vec<String> = all.iter().filter(|t| !t.published && !t.of_platform()).map(|t| t.name()).collect();
        if cache && published > 0 && !unheard.is_empty() {
            let line = format!(
                "{} tables are not in {name}, so queries over them are not cached: {}",
                unheard.len(),
                shortened(&unheard)
            );
            findings.push(Finding::warn(
                "unpublished_tables",
                line,
                "walcast migrate, which adds those that have a replica identity",
            ));
        }
    }
    Ok(findings)
}

/// One stream reads both publications: PostgreSQL refuses two column lists for one table.
pub(super) async fn conflicts(client: &Client, expect: &Expectations) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "publication_conflicts";
    let sql = "select p.pubname::text, n.nspname::text, c.relname::text, r.prattrs is not null, r.prqual is not null \
               from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid \
               join pg_catalog.pg_class c on c.oid = r.prrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               where p.pubname = any ($1) and (r.prattrs is not null or r.prqual is not null) order by 1, 2, 3";
    let names = [expect.publication_cache.as_str(), expect.publication_realtime.as_str()];
    let rows = client.query_typed(sql, &[(&names.as_slice(), Type::TEXT_ARRAY)]).await.map_err(PgError::when(DOING))?;
    let mut findings = Vec::new();
    for row in &rows {
        let (publication, schema, table): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
        let (columns, filter): (bool, bool) = (row.get(3), row.get(4));
        let what = match (columns, filter) {
            (true, true) => "a column list and a row filter",
            (true, false) => "a column list",
            _ => "a row filter",
        };
        let (publication_sql, table_sql) = (quote_ident(publication), format!("{}.{}", quote_ident(schema), quote_ident(table)));
        let whole = format!(
            "alter publication {publication_sql} drop table {table_sql};\nalter publication {publication_sql} add table only {table_sql};"
        );
        if publication == expect.publication_cache {
            let line = format!("{schema}.{table} has {what} in {publication}: changes outside it would leave entries stale");
            findings.push(Finding::fail(CHECK, line, whole));
        } else if columns {
            let line = format!(
                "{schema}.{table} has {what} in {publication}, which the stream cannot join with {}: that one alone is streamed, and the narrowing is applied in Walcast",
                expect.publication_cache
            );
            findings.push(Finding::warn(CHECK, line, whole));
        } else {
            let line = format!("{schema}.{table} has {what} in {publication}; Walcast applies it itself");
            findings.push(Finding::ok(CHECK, line));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "no column lists or row filters stand in the stream's way"));
    }
    Ok(findings)
}

fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - more].join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}
