//! What a table's policies depend on beside the row: other tables, their policies, functions. In doubt, anything.
//!
//! Called as the rules of a table are loaded, in their transaction.

use tokio_postgres::types::Type;
use walcast_model::TableName;
use walcast_pg::PgError;

use super::{Changed, DOING, POLICIES, Question};
use crate::claims_functions;

/// What the table's policies depend on, and the policies of the tables that they read, and so on.
const READS: &str = "
with recursive reach as (
  select p.oid, p.polrelid from pg_catalog.pg_policy p where p.polrelid = $1::int8::oid and p.polcmd in ('*', 'r')
  union
  select q.oid, q.polrelid from reach r
  join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::regclass and d.objid = r.oid
    and d.refclassid = 'pg_catalog.pg_class'::regclass and d.refobjid <> r.polrelid
  join pg_catalog.pg_policy q on q.polrelid = d.refobjid and q.polcmd in ('*', 'r')
)
select distinct r.polrelid = $1::int8::oid as own, d.refclassid = 'pg_catalog.pg_class'::regclass as relation,
       d.refobjid = r.polrelid as itself, d.refobjsubid, d.deptype::text,
       coalesce(n.nspname, fn.nspname, '')::text, coalesce(c.relname, f.proname, '')::text,
       coalesce(c.relkind::text, ''), coalesce(f.provolatile::text, ''), a.attname::text,
       coalesce(q.xmin, c.xmin)::text, coalesce(age(coalesce(q.xmin, c.xmin)) = 2147483647, true),
       coalesce(f.prosqlbody is null and f.proconfig is null and f.prolang in (select oid from pg_catalog.pg_language where lanname in ('sql', 'plpgsql')), false),
       coalesce(f.prosrc, ''),
       (select pt.schemaname || chr(10) || pt.tablename from pg_catalog.pg_publication_tables pt
        join pg_catalog.pg_namespace rn on rn.nspname = pt.schemaname
        join pg_catalog.pg_class rc on rc.relnamespace = rn.oid and rc.relname = pt.tablename
        where pt.pubname = $2 and rc.oid = coalesce(pg_partition_root(c.oid)::oid, c.oid)
          -- Rows of tables that inherit from it are read, too, and raise other tags.
          and not exists (select from pg_catalog.pg_inherits i join pg_catalog.pg_class k on k.oid = i.inhrelid
                          where i.inhparent = c.oid and not k.relispartition)),
       coalesce(c.relkind in ('r', 'p') and row_security_active(c.oid), false)
from reach r
join pg_catalog.pg_policy q on q.oid = r.oid
join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::regclass and d.objid = r.oid
left join pg_catalog.pg_class c on d.refclassid = 'pg_catalog.pg_class'::regclass and c.oid = d.refobjid
left join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid and d.refobjsubid > 0
left join pg_catalog.pg_proc f on d.refclassid = 'pg_catalog.pg_proc'::regclass and f.oid = d.refobjid
left join pg_catalog.pg_namespace fn on fn.oid = f.pronamespace
-- Operators and domains of users hide functions. What is PostgreSQL's own stands in no dependency.
where d.refclassid in ('pg_catalog.pg_class'::regclass, 'pg_catalog.pg_proc'::regclass, 'pg_catalog.pg_operator'::regclass)
   or (d.refclassid = 'pg_catalog.pg_type'::regclass and exists (select from pg_catalog.pg_type t where t.oid = d.refobjid and t.typtype = 'd'))";

/// The policies of these tables, which decide what a policy that reads them finds.
const POLICIES_OF_READ: &str = "
select pg_get_expr(p.polqual, p.polrelid) from pg_catalog.pg_policy p
join pg_catalog.pg_class c on c.oid = p.polrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where p.polcmd in ('*', 'r') and p.polqual is not null
  and exists (select from unnest($1::text[], $2::text[]) read(s, t) where read.s = n.nspname and read.t = c.relname)";

pub struct Reads {
    pub question: Question,
    /// Those whose own row security holds for the role.
    pub secured: Vec<TableName>,
}

pub async fn reads(
    client: &tokio_postgres::Client,
    by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
    heard_through: &str,
    changed: &mut Changed,
) -> Result<Reads, PgError> {
    let mut question = Question::of_row(String::new(), Vec::new());
    let mut secured = Vec::new();
    let mut whole_row = false;
    let params = [by_table, &[(&heard_through, Type::TEXT)]].concat();
    for row in client.query_typed(READS, &params).await.map_err(PgError::when(DOING))? {
        changed.note(&row, 10);
        let (own, relation, itself): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
        let (schema, name): (&str, &str) = (row.get(5), row.get(6));
        if !relation {
            let readable = row.get::<_, bool>(12) && claims_functions::reads_only_claims(row.get(13));
            let known = (claims_functions::KNOWN.contains(&(schema, name)) && readable) || row.get::<_, &str>(8) == "i";
            question.reads_anything |= !known;
        } else if itself {
            match row.get::<_, Option<String>>(9) {
                Some(column) if own => question.needs.push(column),
                Some(_) => {}
                // The policy's own tie to its table is automatic; a normal one means the whole row.
                None => whole_row |= own && row.get::<_, &str>(4) == "n",
            }
        } else {
            match row.get::<_, &str>(7) {
                "r" | "p" => {
                    if row.get(15) {
                        secured.push(TableName::new(schema, name));
                    }
                    // Commits raise the root's tag for its partitions.
                    let heard: Option<String> = row.get(14);
                    match heard.as_deref().and_then(|heard| heard.split_once('\n')) {
                        Some((schema, name)) => question.reads.push(TableName::new(schema, name)),
                        None => question.unheard = Some(TableName::new(schema, name)),
                    }
                }
                _ => question.reads_anything = true,
            }
        }
    }
    question.reads.sort();
    question.reads.dedup();
    question.needs.sort();
    question.needs.dedup();
    // A sub-select over the table itself looks in pg_depend like the row's own columns.
    for row in client.query_typed(POLICIES, by_table).await.map_err(PgError::when(DOING))? {
        question.reads_anything |=
            whole_row || mentions_itself(row.get::<_, Option<&str>>(1).unwrap_or_default(), client, by_table).await?;
    }
    Ok(Reads { question, secured })
}

async fn mentions_itself(
    expression: &str,
    client: &tokio_postgres::Client,
    by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
) -> Result<bool, PgError> {
    if !expression.contains("SELECT") {
        return Ok(false);
    }
    let sql = "select $1::int8::oid::regclass::text";
    let rows = client.query_typed(sql, by_table).await.map_err(PgError::when(DOING))?;
    let name: &str = rows.first().map(|row| row.get(0)).unwrap_or_default();
    // Not where the name only begins so: `public.t` is not in `public.teams`.
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '$'));
    let stands = |before: &str| {
        let wanted = format!("{before}{name}");
        expression.match_indices(&wanted).any(|(at, _)| ends(&expression[at + wanted.len()..]))
    };
    Ok(["FROM ", "JOIN ", "FROM (", ", "].into_iter().any(stands))
}

pub async fn policies_of(client: &tokio_postgres::Client, tables: &[TableName]) -> Result<Vec<String>, PgError> {
    let schemas: Vec<&str> = tables.iter().map(TableName::schema).collect();
    let names: Vec<&str> = tables.iter().map(TableName::table).collect();
    let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
        &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)];
    let rows = client.query_typed(POLICIES_OF_READ, params).await.map_err(PgError::when(DOING))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
