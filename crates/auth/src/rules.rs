//! What a role may read of a table: columns by privilege, rows by policy, and what the policy itself reads.
//!
//! Loaded as the role, kept by the engine until the table is redefined or the catalog moves. Everything that cannot be
//! looked into makes the rule stricter, never wider.

mod reads;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_postgres::{Row, types::Type};
use walcast_model::{Claims, Collation, Family, Snapshot, TableId, TableName, Xid};
use walcast_pg::{Envelope, PgError, Pool, quote_ident};

use crate::policy::{Hangs, Policy, SetForm, hangs, parse};
use reads::{Reads, policies_of, reads};

#[derive(Debug, Clone)]
pub struct Rules {
    /// No other rules of this process have it.
    pub number: u64,
    pub table: TableId,
    pub name: TableName,
    /// Columns of the table now, in order.
    pub columns: Vec<ColumnRule>,
    pub rows: RowRule,
    /// May the role read anything of it at all?
    pub readable: bool,
    /// The root whose changes its own are heard as, if it is a partition.
    pub partition_of: Option<String>,
    /// The publication's own choice of operations: insert, update, delete. None: not published to clients.
    pub published: Option<[bool; 3]>,
    /// The newest transaction that changed what is said here. Older commits may have had other rules.
    pub changed_by: Xid,
}

#[derive(Debug, Clone)]
pub struct ColumnRule {
    pub name: String,
    /// The role may read it, and it is published to clients.
    pub visible: bool,
    /// Part of the primary key.
    pub primary: bool,
    pub type_oid: u32,
    /// As SQL spells it.
    pub sql_type: String,
    /// The type's name in `pg_catalog`, or that of the domain's base; empty for any other.
    pub base_type: String,
    pub is_domain: bool,
    /// How its values compare.
    pub family: Family,
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
    /// The same, to be decided without asking, where that is proven to come to the same.
    pub policy: Option<Arc<Policy>>,
    /// The same, for one statement that serves many callers.
    pub set: Option<Arc<SetForm>>,
    /// Nothing but the caller, the image's `needs` and the tables that it `reads` decide: an answer holds until one of them moves.
    pub rememberable: bool,
    /// What it was put together from.
    pub policies: Vec<PolicyText>,
    /// The publication's own choice of rows.
    pub row_filter: Option<String>,
}

/// A policy for SELECT that counts for the role, as PostgreSQL prints it with an empty search path.
#[derive(Debug, Clone)]
pub struct PolicyText {
    pub name: String,
    /// Permissive ones are alternatives, restrictive ones must all hold.
    pub permissive: bool,
    pub using: String,
}

impl Question {
    /// Of the row's own columns alone; nothing is known of it but what PostgreSQL answers.
    pub fn of_row(expression: String, needs: Vec<String>) -> Question {
        Question {
            expression,
            needs,
            reads: Vec::new(),
            reads_anything: false,
            unheard: None,
            policy: None,
            set: None,
            rememberable: false,
            policies: Vec::new(),
            row_filter: None,
        }
    }
}

const DOING: &str = "reading the rules of a table";
static NUMBERS: AtomicU64 = AtomicU64::new(0);

const TABLE: &str = "
select n.nspname::text, c.relname::text, coalesce(row_security_active(c.oid), true), coalesce(has_schema_privilege(n.oid, 'usage'), false),
       pg_current_snapshot()::text, c.xmin::text, age(c.xmin) = 2147483647,
       p.oid is not null, p.pubinsert, p.pubupdate, p.pubdelete,
       coalesce(pt.attnames::text[], (select array_agg(a.attname::text) from pg_catalog.pg_attribute a
         where a.attrelid = c.oid and a.attnum = any (pr.prattrs::int2[]))),
       coalesce(pt.rowfilter, pg_get_expr(pr.prqual, pr.prrelid)),
       coalesce(has_schema_privilege(n.oid, 'usage') and has_any_column_privilege(c.oid, 'select'), false),
       case when c.relispartition then pg_partition_root(c.oid)::regclass::text end
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_publication_tables pt
  on pt.pubname = $2 and pt.schemaname = n.nspname and pt.tablename = c.relname
-- The root of partitions is listed by its partitions, unless the publication names roots.
left join pg_catalog.pg_publication_rel pr
  on pr.prrelid = c.oid and pr.prpubid = (select oid from pg_catalog.pg_publication where pubname = $2)
left join pg_catalog.pg_publication p on p.pubname = $2 and (pt.pubname is not null or pr.oid is not null)
where c.oid = $1::int8::oid";

/// A collation orders by bytes if it is C by name or by locale; the default one is the database's. Turkish, Azeri and
/// Lithuanian have their own small i.
const COLUMNS: &str = "
with here as (select to_jsonb(d) as j, d.datcollate::text, d.datctype::text from pg_catalog.pg_database d where d.datname = current_database())
select a.attname::text, coalesce(has_column_privilege(a.attrelid, a.attnum, 'select'), false), a.xmin::text, age(a.xmin) = 2147483647,
       a.atttypid::int8, format_type(a.atttypid, -1),
       case when base.typnamespace = 'pg_catalog'::regnamespace then base.typname::text else '' end,
       t.typtype = 'd', base.typtype = 'e', coalesce(co.collisdeterministic, a.attcollation <> 0),
       coalesce(case when co.collprovider = 'd' then coalesce(here.j ->> 'datlocprovider', 'c') in ('c', 'b')
             and coalesce(here.j ->> 'datlocale', here.datcollate) in ('C', 'POSIX', 'C.UTF-8') and (here.j ->> 'datlocprovider' = 'b' or here.datcollate in ('C', 'POSIX'))
           when co.collprovider = 'b' then true
           else co.collcollate in ('C', 'POSIX') end, false),
       coalesce(case when co.collprovider = 'd' then coalesce(here.j ->> 'daticulocale', here.j ->> 'datlocale', here.datctype)
           else coalesce(to_jsonb(co) ->> 'colliculocale', to_jsonb(co) ->> 'colllocale', co.collctype) end !~* '^(tr|az|lt)', false),
       exists (select from pg_catalog.pg_index i where i.indrelid = a.attrelid and i.indisprimary and a.attnum = any (i.indkey::int2[]))
from pg_catalog.pg_attribute a
cross join here
join pg_catalog.pg_type t on t.oid = a.atttypid
join pg_catalog.pg_type base on base.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
left join pg_catalog.pg_collation co on co.oid = a.attcollation
where a.attrelid = $1::int8::oid and a.attnum > 0 and not a.attisdropped
order by a.attnum";

const POLICIES: &str = "
select p.polpermissive, pg_get_expr(p.polqual, p.polrelid), p.xmin::text, age(p.xmin) = 2147483647,
       p.polroles = '{0}' or exists (select from unnest(p.polroles) r where r <> 0 and coalesce(pg_has_role(current_user, r, 'usage'), false)),
       p.polname::text
from pg_catalog.pg_policy p
where p.polrelid = $1::int8::oid and p.polcmd in ('*', 'r')
order by p.polname";

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

    /// As [`Rules::load`], by name. None if there is no such table.
    pub async fn find(
        pool: &Pool,
        name: &TableName,
        claims: &Claims,
        publications: Publications<'_>,
    ) -> Result<Option<Rules>, PgError> {
        const SQL: &str = "select c.oid::int8 from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                           where n.nspname = $1 and c.relname = $2";
        let envelope = Envelope::new(claims, Duration::from_secs(5)).setting("search_path", "");
        let mut scope = envelope.open(pool, DOING).await?;
        let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
            &[(&name.schema(), Type::TEXT), (&name.table(), Type::TEXT)];
        let found = scope.client().query_typed(SQL, params).await.map_err(PgError::when(DOING))?;
        let oid = found.first().and_then(|row| u32::try_from(row.get::<_, i64>(0)).ok());
        let rules = match oid {
            Some(oid) => load(scope.client(), TableId(oid), publications).await,
            None => Ok(None),
        };
        scope.end(DOING).await?;
        rules
    }

    pub fn column(&self, name: &str) -> Option<&ColumnRule> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Which columns of a streamed table this role may see; a column that the catalog does not know is not shown.
    pub fn visible(&self, table: &walcast_model::Table) -> Vec<bool> {
        let known: HashMap<&str, bool> = self.columns.iter().map(|column| (column.name.as_str(), column.visible)).collect();
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
        let oid: i64 = row.get(4);
        // None where the type has no collation, and where equality is not equality of bytes.
        let deterministic: bool = row.get(9);
        let collation = deterministic.then(|| Collation { by_bytes: row.get(10), folds_ascii: row.get(11) });
        columns.push(ColumnRule {
            visible: usage && row.get::<_, bool>(1) && published,
            primary: row.get(12),
            type_oid: u32::try_from(oid).unwrap_or_default(),
            sql_type: row.get(5),
            base_type: row.get(6),
            is_domain: row.get(7),
            family: Family::of(row.get(6), row.get(8), collation),
            name,
        });
    }

    let published = head.get::<_, bool>(7).then(|| [head.get(8), head.get(9), head.get(10)]);
    let row_filter: Option<String> = head.get(12);
    let rows = if head.get::<_, bool>(2) { Some(policies(client, by_table, &mut changed).await?) } else { None };
    let rows = match (rows, row_filter) {
        (None, None) => RowRule::All,
        (Some(None), _) => RowRule::Nobody,
        (policies, filter) => {
            let policies = policies.flatten().unwrap_or_default();
            let Reads { mut question, secured } = reads(client, by_table, publications.cache, &mut changed).await?;
            let parts: Vec<String> =
                expression(&policies).into_iter().chain(filter.clone()).map(|part| format!("({part})")).collect();
            question.expression = parts.join(" and ");
            let of = |permissive: bool| {
                policies.iter().filter(move |policy| policy.permissive == permissive).map(|policy| policy.using.clone())
            };
            let permissive: Vec<String> = of(true).collect();
            let restrictive: Vec<String> = of(false).chain(filter.clone()).collect();
            if !question.reads_anything && question.unheard.is_none() {
                if question.reads.is_empty() {
                    question.policy = Policy::compile(&permissive, &restrictive, &columns).map(Arc::new);
                }
                let plain = |text: &String| parse(text).is_some_and(|tree| hangs(&tree) == Hangs::NothingElse);
                question.rememberable = permissive.iter().chain(&restrictive).all(plain);
                // Their own row security asks who reads them, which no column of ours tells.
                if secured.is_empty() {
                    question.set = SetForm::of(&permissive, &restrictive).map(Arc::new);
                } else {
                    question.rememberable &= policies_of(client, &secured).await?.iter().all(plain);
                }
            }
            // `t.*` is printed so, and stands in no dependency: any column decides.
            let whole_row = permissive.iter().chain(&restrictive).any(|text| text.contains(".*"));
            if filter.is_some() || whole_row {
                // Its columns are not told by pg_depend for policies: any of them may be meant.
                question.needs = columns.iter().map(|column| column.name.clone()).collect();
            }
            question.policies = policies;
            question.row_filter = filter;
            RowRule::Ask(Box::new(question))
        }
    };
    Ok(Some(Rules {
        number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        table,
        name: TableName::new(head.get(0), head.get(1)),
        columns,
        rows,
        readable: head.get(13),
        partition_of: head.get(14),
        published,
        changed_by: changed.newest,
    }))
}

fn expression(policies: &[PolicyText]) -> Option<String> {
    let holds = |policy: &PolicyText| format!("coalesce(({}), false)", policy.using);
    let any: Vec<String> = policies.iter().filter(|policy| policy.permissive).map(holds).collect();
    let mut all = if any.is_empty() { Vec::new() } else { vec![format!("({})", any.join(" or "))] };
    all.extend(policies.iter().filter(|policy| !policy.permissive).map(holds));
    (!all.is_empty()).then(|| all.join(" and "))
}

/// None: without a permissive one nobody sees a row.
async fn policies(
    client: &tokio_postgres::Client,
    by_table: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
    changed: &mut Changed,
) -> Result<Option<Vec<PolicyText>>, PgError> {
    let mut policies = Vec::new();
    for row in client.query_typed(POLICIES, by_table).await.map_err(PgError::when(DOING))? {
        changed.note(&row, 2);
        if !row.get::<_, bool>(4) {
            continue;
        }
        // Without USING a permissive policy admits no row and a restrictive one forbids none.
        let Some(using) = row.get::<_, Option<String>>(1) else { continue };
        policies.push(PolicyText { name: row.get(5), permissive: row.get(0), using });
    }
    Ok(policies.iter().any(|policy| policy.permissive).then_some(policies))
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
