//! Which tables the cache's publication should carry, and which cannot join it yet and why.
//! Read by the migration and by the doctor. Never changes anything.

use tokio_postgres::{Client, types::Type};
use walcast_model::TableName;
use walcast_pg::{PgError, quote_ident};

use super::{Advice, MigrateError};

/// What to publish, as the operator said it.
pub(super) struct Choice<'a> {
    pub tables: &'a [String],
    pub schemas: &'a [String],
    pub publication: &'a str,
}

pub(super) struct TablePlan {
    pub add: Vec<UserTable>,
    pub advice: Vec<Advice>,
}

/// An ordinary or partitioned table; a partition belongs to its root.
#[derive(Debug, Clone)]
pub(crate) struct UserTable {
    pub schema: String,
    pub table: String,
    /// Updates and deletes can be published: the table and all its partitions have a usable key, or FULL.
    pub identified: bool,
    /// A unique index over columns that are never null: it could be the identity.
    pub usable_index: Option<String>,
    /// We may act as its owner, which publishing takes.
    pub ours: bool,
    pub published: bool,
}

/// Not the application's: platforms keep their own tables there.
const PLATFORM: &[&str] = &[
    "auth",
    "storage",
    "realtime",
    "_realtime",
    "extensions",
    "graphql",
    "graphql_public",
    "vault",
    "pgsodium",
    "pgsodium_masks",
    "supabase_functions",
    "supabase_migrations",
    "net",
    "cron",
    "_analytics",
    "pgbouncer",
    "pgtle",
    "topology",
    "tiger",
    "tiger_data",
];

const TABLES: &str = "
with identity as (
  select x.oid, case x.relreplident
      when 'f' then true
      when 'n' then false
      when 'd' then exists (select from pg_catalog.pg_index i where i.indrelid = x.oid and i.indisprimary and i.indimmediate and i.indisvalid)
      else exists (select from pg_catalog.pg_index i where i.indrelid = x.oid and i.indisreplident and i.indisvalid)
    end as ok
  from pg_catalog.pg_class x where x.relkind in ('r', 'p')
)
select n.nspname::text, c.relname::text,
  own.ok and not exists (
    select from pg_catalog.pg_partition_tree(c.oid) leaf left join identity on identity.oid = leaf.relid
    where leaf.isleaf and not coalesce(identity.ok, false)),
  (select ic.relname::text from pg_catalog.pg_index i join pg_catalog.pg_class ic on ic.oid = i.indexrelid
    where c.relkind = 'r' and i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indisvalid and i.indpred is null
      and i.indexprs is null and not exists (
        select from pg_catalog.pg_attribute a
        where a.attrelid = c.oid and a.attnum = any (i.indkey::int2[]) and not a.attnotnull)
    order by i.indnatts, 1 limit 1),
  pg_has_role(c.relowner, 'usage'),
  exists (select from pg_catalog.pg_publication p where p.pubname = $1 and (p.puballtables
    or exists (select from pg_catalog.pg_publication_rel r where r.prpubid = p.oid and r.prrelid = c.oid)
    or exists (select from pg_catalog.pg_publication_namespace s where s.pnpubid = p.oid and s.pnnspid = c.relnamespace)))
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join identity own on own.oid = c.oid
where c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition
  and n.nspname not like 'pg\\_%' and n.nspname not in ('information_schema', 'walcast')
  and not exists (select from pg_catalog.pg_depend d
    where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
order by 1, 2";

impl UserTable {
    pub fn name(&self) -> String {
        format!("{}.{}", self.schema, self.table)
    }

    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.table))
    }

    pub fn of_platform(&self) -> bool {
        PLATFORM.contains(&self.schema.as_str())
    }

    /// The SQL that lets its updates and deletes be published.
    pub fn mending_sql(&self) -> String {
        let table = self.quoted();
        match &self.usable_index {
            Some(index) => format!("alter table {table} replica identity using index {};", quote_ident(index)),
            None => format!(
                "alter table {table} add primary key (…);\n-- or, if no columns identify a row:\nalter table {table} replica identity full;"
            ),
        }
    }
}

/// Every table that could be published, with its standing in `publication`.
pub(crate) async fn read(client: &Client, publication: &str) -> Result<Vec<UserTable>, PgError> {
    let rows = client.query_typed(TABLES, &[(&publication, Type::TEXT)]).await.map_err(PgError::when("listing the tables"))?;
    let table = |row: &tokio_postgres::Row| UserTable {
        schema: row.get(0),
        table: row.get(1),
        identified: row.get(2),
        usable_index: row.get(3),
        ours: row.get(4),
        published: row.get(5),
    };
    Ok(rows.iter().map(table).collect())
}

pub(super) async fn plan(client: &Client, choice: &Choice<'_>) -> Result<TablePlan, MigrateError> {
    let all = read(client, choice.publication).await?;
    let chosen = choose(client, choice, all).await?;
    let mut advice = Vec::new();
    let mut add = Vec::new();
    let publication = quote_ident(choice.publication);
    for table in chosen.into_iter().filter(|table| !table.published) {
        let name = table.name();
        let publish = format!("alter publication {publication} add table only {};", table.quoted());
        if !table.identified {
            advice.push(Advice {
                sentence: format!("{name} is not published: without a replica identity its own UPDATE and DELETE would fail. Mend it, then migrate again"),
                sql: Some(table.mending_sql()),
            });
        } else if !table.ours {
            advice.push(Advice {
                sentence: format!("{name} is not published: it belongs to another role. Its owner may run"),
                sql: Some(publish),
            });
        } else {
            add.push(table);
        }
    }
    if !add.is_empty() && !may_alter(client, choice.publication).await? {
        advice.push(Advice {
            sentence: format!(
                "Publication {} belongs to another role, so no table was added. Its owner may run",
                choice.publication
            ),
            sql: Some(add.iter().map(|t| format!("alter publication {publication} add table only {};\n", t.quoted())).collect()),
        });
        add.clear();
    }
    Ok(TablePlan { add, advice })
}

async fn choose(client: &Client, choice: &Choice<'_>, all: Vec<UserTable>) -> Result<Vec<UserTable>, MigrateError> {
    if !choice.tables.is_empty() {
        let wanted: Vec<TableName> = choice.tables.iter().map(|name| TableName::parse(name)).collect();
        let is = |table: &UserTable, name: &TableName| table.schema == name.schema() && table.table == name.table();
        if let Some(missing) = wanted.iter().find(|name| !all.iter().any(|table| is(table, name))) {
            let same_table = all.iter().find(|table| table.table == missing.table());
            return Err(MigrateError::UnknownTable { name: missing.to_string(), nearest: same_table.map(UserTable::name) });
        }
        return Ok(all.into_iter().filter(|table| wanted.iter().any(|name| is(table, name))).collect());
    }
    if !choice.schemas.is_empty() {
        for schema in choice.schemas {
            let rows = client.query_typed("select to_regnamespace(quote_ident($1)) is not null", &[(schema, Type::TEXT)]).await;
            let rows = rows.map_err(PgError::when("looking for a schema"))?;
            if !rows.first().is_some_and(|row| row.get(0)) {
                return Err(MigrateError::UnknownSchema(schema.clone()));
            }
        }
        return Ok(all.into_iter().filter(|table| choice.schemas.contains(&table.schema)).collect());
    }
    Ok(all.into_iter().filter(|table| !table.of_platform()).collect())
}

/// A publication that is still to be created will be ours.
async fn may_alter(client: &Client, publication: &str) -> Result<bool, PgError> {
    let sql = "select pg_has_role(pubowner, 'usage') from pg_catalog.pg_publication where pubname = $1";
    let rows = client.query_typed(sql, &[(&publication, Type::TEXT)]).await.map_err(PgError::when("reading the publication"))?;
    Ok(rows.first().is_none_or(|row| row.get(0)))
}
