//! What the catalog says of published tables in so few words that two looks can be compared: did anybody redefine one?
//!
//! Asked by the engine at start, every second, and whenever the stream repeats a table's description. DDL writes the rows
//! that are looked at anew, so their xmin tells it, also where a GRANT and a REVOKE leave the same text behind; their xmax
//! tells one that is committed and not visible yet. VACUUM and ANALYZE write statistics in place and leave both alone
//! (tried on 15 and 18); what they did instead is counted.

use std::collections::HashMap;

use tokio_postgres::{Client, types::Type};
use walcast_model::{TableId, TableName};

use crate::PgError;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableMark {
    pub name: TableName,
    /// All of them: what an entry of this table can be narrowed by.
    pub columns: Vec<String>,
    /// Of everything that decides what the table holds, who may read it, and which of its changes are streamed.
    pub digest: i64,
    /// How often it, or a partition, was vacuumed or analysed.
    pub maintained: i64,
}

impl TableMark {
    pub fn is_of_the_same(&self, other: &TableMark) -> bool {
        self.digest == other.digest && self.name == other.name
    }
}

const DOING: &str = "comparing tables";

/// A table with its partitions and children: who reads the one reads the others. Statistics of this moment, whatever the
/// session has read before: each statement is a transaction of its own.
const MARKS: &str = "
with recursive published as materialized (
  select distinct c.oid, c.relname, n.nspname from pg_catalog.pg_publication_tables p
  join pg_catalog.pg_namespace n on n.nspname = p.schemaname
  join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
  where p.pubname = any ($1) and ($2::int8[] is null or c.oid = any ($2::int8[]::oid[]))
), tree as (
  select oid as root, oid from published
  union
  select tree.root, i.inhrelid from tree join pg_catalog.pg_inherits i on i.inhparent = tree.oid
), part as (
  select t.root, concat_ws(' ', 'table', c.oid, c.xmin, c.xmax, c.relfilenode) as said
    from tree t join pg_catalog.pg_class c on c.oid = t.oid
  union all select t.root, concat_ws(' ', 'column', a.attrelid, a.attnum, a.attname, a.xmin, a.xmax)
    from tree t join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attnum > 0
  union all select t.root, concat_ws(' ', 'child', i.inhrelid, i.inhparent, i.xmin, i.xmax)
    from tree t join pg_catalog.pg_inherits i on i.inhparent = t.oid
  union all select t.root, concat_ws(' ', 'policy', p.oid, p.xmin, p.xmax)
    from tree t join pg_catalog.pg_policy p on p.polrelid = t.oid
  union all select t.root, concat_ws(' ', 'index', i.indexrelid, i.xmin, i.xmax)
    from tree t join pg_catalog.pg_index i on i.indrelid = t.oid
  union all select t.root, concat_ws(' ', 'constraint', c.oid, c.xmin, c.xmax)
    from tree t join pg_catalog.pg_constraint c on c.conrelid = t.oid
  union all select t.root, concat_ws(' ', 'published', r.oid, r.xmin, r.xmax)
    from tree t join pg_catalog.pg_publication_rel r on r.prrelid = t.oid
  union all select t.oid, concat_ws(' ', 'publication', p.oid, p.xmin, p.xmax, s.oid, s.xmin, s.xmax)
    from published t cross join pg_catalog.pg_publication p left join pg_catalog.pg_publication_namespace s on s.pnpubid = p.oid
    where p.pubname = any ($1)
)
select t.oid::int8, t.nspname::text, t.relname::text, said.digest::int8, columns.names, kept.times::int8
from published t
join (select root, sum(hashtextextended(said, 0)) % 4611686018427387904 as digest from part group by root) said on said.root = t.oid
join (select p.oid, array_agg(a.attname::text order by a.attnum) filter (where a.attnum > 0 and not a.attisdropped) as names
      from published p join pg_catalog.pg_attribute a on a.attrelid = p.oid group by p.oid) columns on columns.oid = t.oid
join (select root, sum(pg_stat_get_vacuum_count(oid) + pg_stat_get_autovacuum_count(oid)
                       + pg_stat_get_analyze_count(oid) + pg_stat_get_autoanalyze_count(oid)) as times
      from tree group by root) kept on kept.root = t.oid";

/// Of all tables of the publications, or of those among them that are asked for.
pub async fn table_marks(
    client: &Client,
    publications: &[&str],
    tables: Option<&[TableId]>,
) -> Result<HashMap<TableId, TableMark>, PgError> {
    let oids: Option<Vec<i64>> = tables.map(|tables| tables.iter().map(|id| i64::from(id.0)).collect());
    let rows = client
        .query_typed(MARKS, &[(&publications, Type::TEXT_ARRAY), (&oids, Type::INT8_ARRAY)])
        .await
        .map_err(PgError::when(DOING))?;
    let mark = |row: &tokio_postgres::Row| {
        let mark = TableMark {
            name: TableName::new(row.get(1), row.get(2)),
            columns: row.get::<_, Option<_>>(4).unwrap_or_default(),
            digest: row.get(3),
            maintained: row.get(5),
        };
        (TableId(row.get::<_, i64>(0) as u32), mark)
    };
    Ok(rows.iter().map(mark).collect())
}
