//! What a role may read of a table: columns by privilege, rows by policy, and what the policy itself reads.
//!
//! Loaded as the role, kept by the engine until the table is redefined or the catalog moves. Everything that cannot be
//! looked into makes the rule stricter, never wider.

use std::{collections::HashMap, time::Duration};

use tokio_postgres::{Row, types::Type};
use walcast_model::{Claims, Snapshot, TableId, TableName, Xid};
use walcast_pg::{Envelope, PgError, Pool, quote_ident};

#[derive(Debug, Clone)]
pub struct Rules {
    pub table: TableId,
    pub name: TableName,
    /// Columns of the table now, in order, with: may the role read it, and is it published to clients?
    pub columns: Vec<(String, bool)>,
    pub rows: RowRule,
    /// The publication's own choice of operations: insert, update, delete. None: not published to clients.
    pub published: Option<[bool; 3]>,
    /// The newest transaction that changed what is said here. Older commits may have had other rules.
    pub changed_by: Xid,
}

#[derive(Debug, Clone)]
pub enum RowRule {
    /// No row security for this role: whoever may read the columns may read the rows.
    All,
    Nobody,
    Ask(Box<Question>),
}

/// An expression over a row image, to be evaluated as the role.
#[derive(Debug, Clone)]
pub struct Question {
    pub expression: String,
    /// Columns of the image that the expression may read; an image without one of them is withheld.
    pub needs: Vec<String>,
    /// Tables beside the row itself whose rows decide.
    pub reads: Vec<TableName>,
    /// Some function or view cannot be looked into: any table may decide.
    pub reads_anything: bool,
    /// A table that decides and whose changes are not streamed: nobody can tell whether it moved since a commit.
    pub unheard: Option<TableName>,
}

const DOING: &str = "reading the rules of a table";

const TABLE: &str = "
select n.nspname::text, c.relname::text, coalesce(row_security_active(c.oid), true), coalesce(has_schema_privilege(n.oid, 'usage'), false),
       pg_current_snapshot()::text, c.xmin::text, age(c.xmin) = 2147483647,
       p.oid is not null, p.pubinsert, p.pubupdate, p.pubdelete,
       coalesce(pt.attnames::text[], (select array_agg(a.attname::text) from pg_catalog.pg_attribute a
         where a.attrelid = c.oid and a.attnum = any (pr.prattrs::int2[]))),
       coalesce(pt.rowfilter, pg_get_expr(pr.prqual, pr.prrelid))
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_publication_tables pt
  on pt.pubname = $2 and pt.schemaname = n.nspname and pt.tablename = c.relname
-- The root of partitions is listed by its partitions, unless the publication names roots.
left join pg_catalog.pg_publication_rel pr
  on pr.prrelid = c.oid and pr.prpubid = (select oid from pg_catalog.pg_publication where pubname = $2)
left join pg_catalog.pg_publication p on p.pubname = $2 and (pt.pubname is not null or pr.oid is not null)
where c.oid = $1::int8::oid";

const COLUMNS: &str = "
select a.attname::text, coalesce(has_column_privilege(a.attrelid, a.attnum, 'select'), false), a.xmin::text, age(a.xmin) = 2147483647
from pg_catalog.pg_attribute a
where a.attrelid = $1::int8::oid and a.attnum > 0 and not a.attisdropped
order by a.attnum";

const POLICIES: &str = "
select p.polpermissive, pg_get_expr(p.polqual, p.polrelid), p.xmin::text, age(p.xmin) = 2147483647,
       p.polroles = '{0}' or exists (select from unnest(p.polroles) r where r <> 0 and coalesce(pg_has_role(current_user, r, 'usage'), false))
from pg_catalog.pg_policy p
where p.polrelid = $1::int8::oid and p.polcmd in ('*', 'r')
order by p.polname";

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
       (select pt.schemaname || chr(10) || pt.tablename from pg_catalog.pg_publication_tables pt
        join pg_catalog.pg_namespace rn on rn.nspname = pt.schemaname
        join pg_catalog.pg_class rc on rc.relnamespace = rn.oid and rc.relname = pt.tablename
        where pt.pubname = $2 and rc.oid = coalesce(pg_partition_root(c.oid)::oid, c.oid))
from reach r
join pg_catalog.pg_policy q on q.oid = r.oid
join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::regclass and d.objid = r.oid
left join pg_catalog.pg_class c on d.refclassid = 'pg_catalog.pg_class'::regclass and c.oid = d.refobjid
left join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid and d.refobjsubid > 0
left join pg_catalog.pg_proc f on d.refclassid = 'pg_catalog.pg_proc'::regclass and f.oid = d.refobjid
left join pg_catalog.pg_namespace fn on fn.oid = f.pronamespace
where d.refclassid in ('pg_catalog.pg_class'::regclass, 'pg_catalog.pg_proc'::regclass)";

/// Functions that read nothing but the claims, which every question carries.
const KNOWN_FUNCTIONS: [(&str, &str); 5] =
    [("auth", "uid"), ("auth", "jwt"), ("auth", "role"), ("auth", "email"), ("realtime", "topic")];

/// What clients may subscribe to, and what feeds the tag clock.
#[derive(Debug, Clone, Copy)]
pub struct Publications<'a> {
    pub realtime: &'a str,
    pub cache: &'a str,
}

impl Rules {
    /// None if the table is gone.
    pub async fn load(
        pool: &Pool,
        table: TableId,
        claims: &Claims,
        publications: Publications<'_>,
    ) -> Result<Option<Rules>, PgError> {
        // An empty search path makes PostgreSQL print every name in full.
        let envelope = Envelope::new(claims, Duration::from_secs(5)).setting("search_path", "");
        let mut scope = envelope.open(pool, DOING).await?;
        let rules = load(scope.client(), table, publications).await;
        scope.end(DOING).await?;
        rules
    }

    /// Which columns of a streamed table this role may see; a column that the catalog does not know is not shown.
    pub fn visible(&self, table: &walcast_model::Table) -> Vec<bool> {
        let known: HashMap<&str, bool> = self.columns.iter().map(|(name, visible)| (name.as_str(), *visible)).collect();
        table.columns.iter().map(|column| known.get(&*column.name).copied().unwrap_or(false)).collect()
    }
}

async fn load(client: &tokio_postgres::Client, table: TableId, publications: Publications<'_>) -> Result<Option<Rules>, PgError> {
    let oid = i64::from(table.0);
    let by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[(&oid, Type::INT8)];
    let head = client
        .query_typed(TABLE, &[(&oid, Type::INT8), (&publications.realtime, Type::TEXT)])
        .await
        .map_err(PgError::when(DOING))?;
    let Some(head) = head.first() else { return Ok(None) };
    let snapshot: Snapshot =
        head.get::<_, &str>(4).parse().map_err(|e| PgError::Unexpected { doing: DOING, what: format!("{e}") })?;
    let mut changed = Changed { xmax: snapshot.xmax, newest: Xid(0) };
    changed.note(head, 5);

    let published_columns: Option<Vec<String>> = head.get(11);
    let usage: bool = head.get(3);
    let mut columns = Vec::new();
    for row in client.query_typed(COLUMNS, by_table).await.map_err(PgError::when(DOING))? {
        changed.note(&row, 2);
        let name: String = row.get(0);
        let published = published_columns.as_ref().is_none_or(|list| list.contains(&name));
        columns.push((name, usage && row.get::<_, bool>(1) && published));
    }

    let published = head.get::<_, bool>(7).then(|| [head.get(8), head.get(9), head.get(10)]);
    let row_filter: Option<String> = head.get(12);
    let rows = if head.get::<_, bool>(2) { Some(policies(client, by_table, &mut changed).await?) } else { None };
    let rows = match (rows, row_filter) {
        (None, None) => RowRule::All,
        (Some(None), _) => RowRule::Nobody,
        (policy, filter) => {
            let parts: Vec<String> = policy.flatten().into_iter().chain(filter.clone()).map(|part| format!("({part})")).collect();
            let mut question = reads(client, by_table, publications.cache, &mut changed).await?;
            question.expression = parts.join(" and ");
            if filter.is_some() {
                // Its columns are not told by pg_depend for policies: any of them may be meant.
                question.needs = columns.iter().map(|(name, _)| name.clone()).collect();
            }
            RowRule::Ask(Box::new(question))
        }
    };
    Ok(Some(Rules {
        table,
        name: TableName::new(head.get(0), head.get(1)),
        columns,
        rows,
        published,
        changed_by: changed.newest,
    }))
}

/// Permissive policies are alternatives, restrictive ones must all hold; without a permissive one nobody sees a row.
async fn policies(
    client: &tokio_postgres::Client,
    by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
    changed: &mut Changed,
) -> Result<Option<String>, PgError> {
    let (mut permissive, mut restrictive) = (Vec::new(), Vec::new());
    for row in client.query_typed(POLICIES, by_table).await.map_err(PgError::when(DOING))? {
        changed.note(&row, 2);
        if !row.get::<_, bool>(4) {
            continue;
        }
        // Without USING a permissive policy admits no row and a restrictive one forbids none.
        let Some(expression) = row.get::<_, Option<&str>>(1) else { continue };
        let expression = format!("coalesce(({expression}), false)");
        if row.get(0) { permissive.push(expression) } else { restrictive.push(expression) }
    }
    if permissive.is_empty() {
        return Ok(None);
    }
    let mut all = vec![format!("({})", permissive.join(" or "))];
    all.extend(restrictive);
    Ok(Some(all.join(" and ")))
}

async fn reads(
    client: &tokio_postgres::Client,
    by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
    heard_through: &str,
    changed: &mut Changed,
) -> Result<Question, PgError> {
    let mut question =
        Question { expression: String::new(), needs: Vec::new(), reads: Vec::new(), reads_anything: false, unheard: None };
    let mut whole_row = false;
    let params = [by_table, &[(&heard_through, Type::TEXT)]].concat();
    for row in client.query_typed(READS, &params).await.map_err(PgError::when(DOING))? {
        changed.note(&row, 10);
        let (own, relation, itself): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
        let (schema, name): (&str, &str) = (row.get(5), row.get(6));
        if !relation {
            let known = KNOWN_FUNCTIONS.contains(&(schema, name)) || row.get::<_, &str>(8) == "i";
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
                    // Commits raise the root's tag for its partitions.
                    let heard: Option<String> = row.get(12);
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
    Ok(question)
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
    Ok(["FROM ", "JOIN ", "FROM (", ", "].iter().any(|before| expression.contains(&format!("{before}{name}"))))
}

/// The newest change among the catalog rows that were read.
struct Changed {
    xmax: Xid,
    newest: Xid,
}

impl Changed {
    /// `row[at]` is an xmin, `row[at + 1]` tells that it is frozen, that is, older than anything that is compared.
    fn note(&mut self, row: &Row, at: usize) {
        if row.get::<_, bool>(at + 1) {
            return;
        }
        if let Some(low) = row.get::<_, Option<&str>>(at).and_then(|text| text.parse().ok()) {
            self.newest = self.newest.max(Xid::widen(low, self.xmax));
        }
    }
}

/// Changes whenever a policy, privilege, role membership, function, view, key, index, column or publication changed anywhere:
/// asked every second, for what the stream does not tell.
pub async fn rules_fingerprint(client: &tokio_postgres::Client) -> Result<String, PgError> {
    // Temporary tables come and go with sessions and are nobody's to cache.
    // A policy that was made and dropped between two looks leaves no row behind, and an answer of that moment would stay:
    // the counters of writes to such catalogs tell it. Sessions report them as they commit, or within seconds.
    const SQL: &str = "with mine as materialized (
          select oid, relacl, relrowsecurity, relforcerowsecurity, relowner from pg_catalog.pg_class
          where relkind in ('r', 'p', 'v') and oid >= 16384 and relpersistence <> 't')
        select md5(concat_ws('|',
        (select string_agg(oid::text || xmin::text, ',' order by oid) from pg_catalog.pg_policy),
        (select string_agg((pg_stat_get_tuples_inserted(t) + pg_stat_get_tuples_updated(t) + pg_stat_get_tuples_deleted(t))::text, ',' order by t)
           from unnest(array['pg_catalog.pg_policy', 'pg_catalog.pg_auth_members', 'pg_catalog.pg_proc', 'pg_catalog.pg_rewrite']::regclass[]::oid[]) t),
        (select string_agg(oid::text || coalesce(relacl::text, '') || relrowsecurity || relforcerowsecurity || relowner, ',' order by oid) from mine),
        (select string_agg(attrelid::text || attnum || attacl::text, ',' order by attrelid, attnum) from pg_catalog.pg_attribute where attacl is not null and attrelid >= 16384),
        (select string_agg(oid::text || coalesce(nspacl::text, ''), ',' order by oid) from pg_catalog.pg_namespace where nspname !~ '^pg_(temp|toast)'),
        (select string_agg(roleid::text || '>' || member || xmin::text, ',' order by roleid, member) from pg_catalog.pg_auth_members),
        (select string_agg(rolname || rolsuper || rolbypassrls || rolinherit, ',' order by rolname) from pg_catalog.pg_roles),
        (select string_agg(oid::text || xmin::text, ',' order by oid) from pg_catalog.pg_proc where oid >= 16384),
        (select string_agg(oid::text || xmin::text, ',' order by oid) from pg_catalog.pg_publication),
        (select string_agg(oid::text || xmin::text, ',' order by oid) from pg_catalog.pg_publication_rel),
        (select string_agg(indexrelid::text || indkey::text, ',' order by indexrelid) from pg_catalog.pg_index join mine on oid = indrelid),
        (select string_agg(c.oid::text || conkey::text, ',' order by c.oid) from pg_catalog.pg_constraint c join mine on mine.oid = conrelid where contype = 'f'),
        (select string_agg(r.oid::text || r.xmin::text, ',' order by r.oid) from pg_catalog.pg_rewrite r join mine on mine.oid = ev_class),
        (select bit_xor(hashtextextended(concat_ws(' ', attrelid, attnum, attname, atttypid, attcollation, attisdropped), 0))
           from pg_catalog.pg_attribute join mine on oid = attrelid where attnum > 0)))";
    let rows = client.query_typed(SQL, &[]).await.map_err(PgError::when("comparing rules"))?;
    Ok(rows.first().map(|row| row.get(0)).unwrap_or_default())
}

/// `"schema"."table"`, for the questions that are asked of it.
pub(crate) fn qualified(name: &TableName) -> String {
    format!("{}.{}", quote_ident(name.schema()), quote_ident(name.table()))
}
