//! Is a subscription possible at all: table, publication, column, privilege, and the filter's value as PostgreSQL writes it.
//!
//! Asked once when a client subscribes, as the client's role. What is wrong is said then, not by silence later.

use std::time::Duration;

use tokio_postgres::types::Type;
use walcast_model::{Claims, TableName};
use walcast_pg::{Envelope, PgError, Pool};

use crate::rules::qualified;

#[derive(Debug, thiserror::Error)]
pub enum BindingRefused {
    /// Upstream's own words: clients match on them.
    #[error(
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the given connect parameters: \
         [event: {event}, schema: {schema}, table: {table}, filters: {filters}, select: nil]; {why}"
    )]
    Unable { event: String, schema: String, table: String, filters: String, why: String },
    #[error("Error parsing `filter` params: {0}")]
    Filter(String),
    #[error(transparent)]
    Database(#[from] PgError),
}

const DOING: &str = "checking a subscription";

/// What a client wants to hear of one named table.
pub struct Wanted<'a> {
    pub event: &'a str,
    pub table: &'a TableName,
    /// (column, value as the client wrote it).
    pub filters: &'a [(String, String)],
}

/// Returns the filters' values in the text form that the stream uses.
pub async fn check(pool: &Pool, claims: &Claims, publication: &str, wanted: &Wanted<'_>) -> Result<Vec<String>, BindingRefused> {
    let mut scope = Envelope::new(claims, Duration::from_secs(5)).open(pool, DOING).await?;
    let checked = check_as_role(scope.client(), publication, wanted).await;
    scope.end(DOING).await?;
    checked
}

async fn check_as_role(
    client: &tokio_postgres::Client,
    publication: &str,
    wanted: &Wanted<'_>,
) -> Result<Vec<String>, BindingRefused> {
    let unable = |why: String| BindingRefused::Unable {
        event: wanted.event.to_owned(),
        schema: wanted.table.schema().to_owned(),
        table: wanted.table.table().to_owned(),
        filters: format!("{:?}", wanted.filters.iter().map(|(column, value)| format!("{column}=eq.{value}")).collect::<Vec<_>>()),
        why,
    };
    let (schema, table) = (wanted.table.schema(), wanted.table.table());
    // The root of partitions is listed by its partitions, unless the publication names roots.
    let sql = "select c.oid is not null, exists (select from pg_catalog.pg_publication_tables where pubname = $3 and schemaname = $1 and tablename = $2) \
               or exists (select from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid \
                 where p.pubname = $3 and r.prrelid = c.oid), \
               coalesce(has_schema_privilege(n.oid, 'usage') and has_any_column_privilege(c.oid, 'select'), false), \
               case when c.relispartition then pg_partition_root(c.oid)::regclass::text end \
               from (select) one left join pg_catalog.pg_namespace n on n.nspname = $1 \
               left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = $2";
    let rows = client
        .query_typed(sql, &[(&schema, Type::TEXT), (&table, Type::TEXT), (&publication, Type::TEXT)])
        .await
        .map_err(PgError::when(DOING))?;
    if let Some(root) = rows.first().and_then(|row| row.get::<_, Option<String>>(3)) {
        return Err(unable(format!("it is a partition, and its changes are heard as its root's: subscribe to {root}")));
    }
    let facts = rows.first().map(|row| (row.get::<_, bool>(0), row.get::<_, bool>(1), row.get::<_, bool>(2)));
    match facts {
        Some((true, true, true)) => {}
        Some((true, true, false)) => return Err(unable(format!("this role may not select from {}", wanted.table))),
        Some((true, false, _)) => {
            let mend = format!("alter publication {publication} add table {}", qualified(wanted.table));
            return Err(unable(format!("the table is not published: {mend}")));
        }
        _ => return Err(unable("there is no such table".into())),
    }
    let mut values = Vec::with_capacity(wanted.filters.len());
    for (column, value) in wanted.filters {
        values.push(canonical(client, wanted.table, column, value).await?);
    }
    Ok(values)
}

async fn canonical(
    client: &tokio_postgres::Client,
    table: &TableName,
    column: &str,
    value: &str,
) -> Result<String, BindingRefused> {
    let (schema, name) = (table.schema(), table.table());
    let sql = "select format_type(a.atttypid, -1), coalesce(has_column_privilege(a.attrelid, a.attnum, 'select'), false), \
               t.typtype = 'e' or coalesce(b.typname, t.typname) = any ('{bool,int2,int4,int8,oid,uuid,text,varchar,bpchar,name,numeric,float4,float8,date,time,timetz,timestamp,timestamptz,interval,bytea,inet,cidr,macaddr}'), \
               coalesce(co.collisdeterministic, true) \
               from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid left join pg_catalog.pg_type b on b.oid = t.typbasetype \
               join pg_catalog.pg_class c on c.oid = a.attrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               left join pg_catalog.pg_collation co on co.oid = a.attcollation \
               where n.nspname = $1 and c.relname = $2 and a.attname = $3 and a.attnum > 0 and not a.attisdropped";
    let rows = client
        .query_typed(sql, &[(&schema, Type::TEXT), (&name, Type::TEXT), (&column, Type::TEXT)])
        .await
        .map_err(PgError::when(DOING))?;
    let Some(row) = rows.first() else {
        return Err(BindingRefused::Filter(format!("{table} has no column `{column}`")));
    };
    let (type_name, readable, comparable, deterministic): (String, bool, bool, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    if !readable {
        return Err(BindingRefused::Filter(format!("this role may not read column `{column}`")));
    }
    if !comparable || !deterministic {
        return Err(BindingRefused::Filter(format!("column `{column}` of type {type_name} cannot be compared by its text")));
    }
    // The type's name comes from format_type, which quotes it.
    let sql = format!("select ($1::text)::{type_name}::text");
    match client.query_typed(&sql, &[(&value, Type::TEXT)]).await.map_err(PgError::when(DOING)) {
        Ok(rows) => Ok(rows.first().and_then(|row| row.get::<_, Option<String>>(0)).unwrap_or_default()),
        Err(PgError::Refused { message, .. }) => Err(BindingRefused::Filter(format!("column `{column}`: {message}"))),
        Err(other) => Err(other.into()),
    }
}
