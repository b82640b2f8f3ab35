//! What the catalog knows about a table and the stream does not say: type names, how values become JSON,
//! and which columns are worth a row tag.

use std::collections::HashMap;

use tokio_postgres::types::Type;
use walcast_model::{TableId, TableName, ValueKind};

use crate::{Lease, PgError, Pool};

#[derive(Debug, Clone)]
pub struct TableFacts {
    pub id: TableId,
    pub name: TableName,
    /// In column order, dropped columns left out.
    pub columns: Vec<ColumnFacts>,
}

#[derive(Debug, Clone)]
pub struct ColumnFacts {
    pub name: String,
    pub type_oid: u32,
    pub type_name: String,
    pub kind: ValueKind,
    /// In a key, an index or a foreign key, and of a type whose text is its value.
    pub tagged: bool,
    /// A unique index holds this column alone: its value means one row.
    pub unique: bool,
    /// Never streamed by pgoutput up to PostgreSQL 17.
    pub generated: bool,
}

/// Under which names and types a table's row tags are raised.
#[derive(Debug, Clone)]
pub struct TaggedColumns {
    pub name: TableName,
    pub columns: Vec<(String, u32)>,
}

#[derive(Clone)]
pub struct Catalog {
    pool: Pool,
}

const DOING: &str = "reading the catalog";

const COLUMNS: &str = "
select a.attname::text, a.atttypid::int8, t.typname::text, a.attgenerated <> '' as generated,
       coalesce(co.collisdeterministic, true) as deterministic,
       exists (select from pg_catalog.pg_index i where i.indrelid = a.attrelid and a.attnum = any (i.indkey::int2[]))
       or exists (select from pg_catalog.pg_constraint c where c.conrelid = a.attrelid and c.contype = 'f' and a.attnum = any (c.conkey))
         as indexed,
       a.attrelid::int8,
       exists (select from pg_catalog.pg_index i where i.indrelid = a.attrelid and i.indisunique and i.indnkeyatts = 1
         and i.indpred is null and i.indkey[0] = a.attnum) as alone
from pg_catalog.pg_attribute a
join pg_catalog.pg_type t on t.oid = a.atttypid
left join pg_catalog.pg_collation co on co.oid = a.attcollation
where a.attrelid = any ($1::int8[]::oid[]) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum";

const PUBLISHED: &str = "
select c.oid::int8, n.nspname::text, c.relname::text
from pg_catalog.pg_publication_tables p
join pg_catalog.pg_namespace n on n.nspname = p.schemaname
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
where p.pubname = $1";

const TYPES: &str = "
with recursive need as (
  select unnest($1::int8[])::oid as oid
  union
  select x.oid from need n join pg_catalog.pg_type t on t.oid = n.oid,
    lateral (values (t.typbasetype), (case when t.typcategory = 'A' and t.typsubscript::text = 'array_subscript_handler' then t.typelem end)) x(oid)
  where x.oid is not null and x.oid <> 0
)
select t.oid::int8, t.typname::text, t.typtype::text,
       case when t.typcategory = 'A' and t.typsubscript::text = 'array_subscript_handler' then t.typelem::int8 else 0 end,
       t.typbasetype::int8,
       coalesce((select e.typdelim::text from pg_catalog.pg_type e where e.oid = t.typelem), ','),
       t.oid >= 16384 and exists (select from pg_catalog.pg_cast c where c.castsource = t.oid
         and c.casttarget in ('json'::regtype, 'jsonb'::regtype) and c.castmethod = 'f')
from need join pg_catalog.pg_type t using (oid)";

struct TypeFacts {
    name: String,
    kind: String,
    element: u32,
    base: u32,
    delimiter: char,
    casts_to_json: bool,
}

impl Catalog {
    pub fn new(pool: Pool) -> Catalog {
        Catalog { pool }
    }

    /// None if the table is gone meanwhile.
    pub async fn table(&self, id: TableId) -> Result<Option<TableFacts>, PgError> {
        let lease = self.pool.lease(DOING).await?;
        table(&lease, id).await
    }

    /// The columns that carry row tags at present, for every table of a publication.
    pub async fn tagged_columns(&self, publication: &str) -> Result<HashMap<TableId, TaggedColumns>, PgError> {
        let lease = self.pool.lease(DOING).await?;
        let rows = lease.query_typed(PUBLISHED, &[(&publication, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
        let table = |row: &tokio_postgres::Row| {
            let name = TableName::new(row.get(1), row.get(2));
            (TableId(row.get::<_, i64>(0) as u32), TaggedColumns { name, columns: Vec::new() })
        };
        let mut tables: HashMap<TableId, TaggedColumns> = rows.iter().map(table).collect();
        let oids: Vec<i64> = tables.keys().map(|id| i64::from(id.0)).collect();
        for row in lease.query_typed(COLUMNS, &[(&oids, Type::INT8_ARRAY)]).await.map_err(PgError::when(DOING))? {
            let is_streamed = !row.get::<_, bool>(3);
            if let Some(table) = tables.get_mut(&TableId(row.get::<_, i64>(6) as u32))
                && is_streamed
                && tagged(&row)
            {
                table.columns.push((row.get(0), row.get::<_, i64>(1) as u32));
            }
        }
        Ok(tables)
    }

    /// The relation that a name means, exactly as the catalog spells it.
    pub async fn table_id(&self, name: &TableName) -> Result<Option<TableId>, PgError> {
        let lease = self.pool.lease(DOING).await?;
        let sql = "select c.oid::int8 from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                   where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')";
        let (schema, table) = (name.schema(), name.table());
        let rows = lease.query_typed(sql, &[(&schema, Type::TEXT), (&table, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
        Ok(rows.first().map(|row| TableId(row.get::<_, i64>(0) as u32)))
    }

    /// Type names and kinds for columns whose table the catalog no longer has.
    pub async fn kinds(&self, types: &[u32]) -> Result<HashMap<u32, (String, ValueKind)>, PgError> {
        let lease = self.pool.lease(DOING).await?;
        let facts = read_types(&lease, types).await?;
        Ok(types
            .iter()
            .map(|oid| (*oid, (facts.get(oid).map_or_else(|| "unknown".into(), |t| t.name.clone()), kind(*oid, &facts))))
            .collect())
    }
}

async fn table(lease: &Lease, id: TableId) -> Result<Option<TableFacts>, PgError> {
    let oid = i64::from(id.0);
    let name_sql = "select n.nspname::text, c.relname::text from pg_catalog.pg_class c \
                    join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1::int8::oid";
    let one = [oid];
    let by_oid: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[(&oid, Type::INT8)];
    let by_oids: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[(&&one[..], Type::INT8_ARRAY)];
    let (names, rows) = futures_util::try_join!(lease.query_typed(name_sql, by_oid), lease.query_typed(COLUMNS, by_oids))
        .map_err(PgError::when(DOING))?;
    let Some(name) = names.first() else { return Ok(None) };
    let oids: Vec<u32> = rows.iter().map(|row| row.get::<_, i64>(1) as u32).collect();
    let types = read_types(lease, &oids).await?;
    let columns = rows
        .iter()
        .zip(&oids)
        .map(|(row, oid)| {
            let type_name: String = row.get(2);
            ColumnFacts {
                name: row.get(0),
                type_oid: *oid,
                kind: kind(*oid, &types),
                tagged: tagged(row),
                generated: row.get(3),
                unique: row.get(7),
                type_name,
            }
        })
        .collect();
    Ok(Some(TableFacts { id, name: TableName::new(name.get(0), name.get(1)), columns }))
}

/// Text forms that are equal exactly when the values are, of columns that somebody may look up by.
fn tagged(row: &tokio_postgres::Row) -> bool {
    let narrow = matches!(row.get(2), "bool" | "int2" | "int4" | "int8" | "uuid" | "text" | "varchar");
    narrow && row.get::<_, bool>(4) && row.get::<_, bool>(5)
}

async fn read_types(lease: &Lease, oids: &[u32]) -> Result<HashMap<u32, TypeFacts>, PgError> {
    let oids: Vec<i64> = oids.iter().map(|oid| i64::from(*oid)).collect();
    let rows = lease.query_typed(TYPES, &[(&oids, Type::INT8_ARRAY)]).await.map_err(PgError::when(DOING))?;
    Ok(rows
        .iter()
        .map(|row| {
            let facts = TypeFacts {
                name: row.get(1),
                kind: row.get(2),
                element: row.get::<_, i64>(3) as u32,
                base: row.get::<_, i64>(4) as u32,
                delimiter: row.get::<_, String>(5).chars().next().unwrap_or(','),
                casts_to_json: row.get(6),
            };
            (row.get::<_, i64>(0) as u32, facts)
        })
        .collect())
}

/// The rule of `to_jsonb`: a domain is its base type, an array its elements, a composite an object,
/// a cast to json is followed; everything else is its text.
fn kind(oid: u32, types: &HashMap<u32, TypeFacts>) -> ValueKind {
    let Some(facts) = types.get(&oid) else { return ValueKind::ReadBack };
    if facts.casts_to_json {
        return ValueKind::ReadBack;
    }
    match facts.kind.as_str() {
        "d" => return kind(facts.base, types),
        "c" | "p" => return ValueKind::ReadBack,
        _ => {}
    }
    if facts.element != 0 {
        return match kind(facts.element, types) {
            ValueKind::ReadBack => ValueKind::ReadBack,
            element => ValueKind::Array { element: Box::new(element), delimiter: facts.delimiter },
        };
    }
    if oid >= 16384 {
        return ValueKind::Text;
    }
    match facts.name.as_str() {
        "bool" => ValueKind::Bool,
        "int2" | "int4" | "int8" | "float4" | "float8" | "numeric" => ValueKind::Number,
        "json" | "jsonb" => ValueKind::Json,
        "date" => ValueKind::Date,
        "timestamp" => ValueKind::Timestamp,
        "timestamptz" => ValueKind::Timestamptz,
        "bytea" => ValueKind::Bytea,
        _ => ValueKind::Text,
    }
}
