//! Reads from the catalog what the analyser may know: relations, view texts, policies, as the role that will ask.
//!
//! Called by the planner inside the role's own transaction, so that names and row security mean what they mean there.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use sqlparser::{
    ast::{Expr, Query, Statement},
    dialect::PostgreSqlDialect,
    parser::Parser,
};
use tokio_postgres::{Client, Error, types::Type};
use walcast_model::{TableId, TableName};
use walcast_pg::{Catalog, PgError};

use crate::{
    known::{Family, Known, KnownColumn, KnownPolicy, KnownRelation, Nature, Reference},
    names::relations,
};

/// A relation before its columns are known.
pub(crate) struct Found {
    pub oid: u32,
    pub name: TableName,
    pub kind: char,
    root: u32,
    pub streamed: TableName,
    /// Other tables inherit from it: reading it reads them.
    pub has_children: bool,
    invoker: bool,
    pub secured: bool,
    view: Option<Arc<Query>>,
    policies: Vec<KnownPolicy>,
}

#[derive(Default)]
pub(crate) struct Gathered {
    pub found: HashMap<Reference, Found>,
    /// View definitions and policies, for those who look for functions.
    pub texts: Vec<String>,
    /// Why nothing may be narrowed.
    pub unreadable: Option<String>,
    /// Text columns whose equality is not equality of texts.
    loose: HashSet<(u32, String)>,
}

const RELATIONS: &str = "
select distinct on (x.n) x.n::int4, c.oid::int8, n.nspname::text, c.relname::text, c.relkind::text,
       coalesce(r.oid, c.oid)::int8, coalesce(rn.nspname, n.nspname)::text, coalesce(r.relname, c.relname)::text,
       exists (select from pg_catalog.pg_inherits i join pg_catalog.pg_class k on k.oid = i.inhrelid
               where i.inhparent = c.oid and not k.relispartition),
       exists (select from pg_catalog.pg_options_to_table(c.reloptions) o
               where o.option_name = 'security_invoker' and o.option_value::bool),
       c.relkind in ('r', 'p') and pg_catalog.row_security_active(c.oid)
from unnest($1::text[], $2::text[]) with ordinality as x(schema, name, n)
join pg_catalog.pg_class c on c.relname = x.name
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_class r on c.relispartition and r.oid = pg_catalog.pg_partition_root(c.oid)
left join pg_catalog.pg_namespace rn on rn.oid = r.relnamespace
where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
  and case when x.schema is null then n.nspname = any (pg_catalog.current_schemas(true)) else n.nspname = x.schema end
order by x.n, pg_catalog.array_position(pg_catalog.current_schemas(true), n.nspname)";

const POLICIES: &str = "
select p.polpermissive,
       exists (select from pg_catalog.unnest(p.polroles) as r(role)
               where case when r.role = 0 then true else pg_catalog.pg_has_role(r.role, 'USAGE') end),
       pg_catalog.pg_get_expr(p.polqual, p.polrelid)
from pg_catalog.pg_policy p where p.polrelid = $1::int8::oid and p.polcmd in ('r', '*') order by p.polname";

const LOOSE: &str = "
select a.attrelid::int8, a.attname::text from pg_catalog.pg_attribute a
join pg_catalog.pg_collation c on c.oid = a.attcollation
where a.attrelid = any ($1::int8[]::oid[]) and not c.collisdeterministic";

/// Leaves the transaction's search path empty, so that every text names its schemas.
pub(crate) async fn gather(client: &Client, mut waiting: Vec<Reference>) -> Result<Gathered, Error> {
    let mut gathered = Gathered::default();
    let mut asked: HashSet<Reference> = HashSet::new();
    let mut first = true;
    while !waiting.is_empty() {
        let names: Vec<Reference> = waiting.drain(..).filter(|name| asked.insert(name.clone())).collect();
        let found = resolve(client, &names).await?;
        if first {
            client.batch_execute("set local search_path = ''").await?;
            first = false;
        }
        for (reference, mut relation) in found {
            if relation.has_children {
                gathered.unreadable.get_or_insert(format!("other tables inherit from {}", relation.name));
            }
            waiting.extend(gathered.view(client, &mut relation).await?);
            waiting.extend(gathered.policies(client, &mut relation).await?);
            gathered.found.insert(reference, relation);
        }
    }
    let oids: Vec<i64> = gathered.found.values().flat_map(|found| [found.oid.into(), found.root.into()]).collect();
    let rows = client.query_typed(LOOSE, &[(&oids, Type::INT8_ARRAY)]).await?;
    gathered.loose = rows.iter().map(|row| (row.get::<_, i64>(0) as u32, row.get(1))).collect();
    Ok(gathered)
}

/// What the names mean right now; those that mean no relation are left out.
pub(crate) async fn resolve(client: &Client, names: &[Reference]) -> Result<Vec<(Reference, Found)>, Error> {
    let (schemas, tables): (Vec<Option<String>>, Vec<String>) = names.iter().cloned().unzip();
    let rows = client.query_typed(RELATIONS, &[(&schemas, Type::TEXT_ARRAY), (&tables, Type::TEXT_ARRAY)]).await?;
    let found = rows.iter().filter_map(|row| {
        let reference = names.get((row.get::<_, i32>(0) as usize).checked_sub(1)?)?.clone();
        let found = Found {
            oid: row.get::<_, i64>(1) as u32,
            name: TableName::new(row.get(2), row.get(3)),
            kind: row.get::<_, String>(4).chars().next()?,
            root: row.get::<_, i64>(5) as u32,
            streamed: TableName::new(row.get(6), row.get(7)),
            has_children: row.get(8),
            invoker: row.get(9),
            secured: row.get(10),
            view: None,
            policies: Vec::new(),
        };
        Some((reference, found))
    });
    Ok(found.collect())
}

impl Gathered {
    async fn view(&mut self, client: &Client, relation: &mut Found) -> Result<Vec<Reference>, Error> {
        if relation.kind != 'v' {
            return Ok(Vec::new());
        }
        let oid = i64::from(relation.oid);
        let rows = client.query_typed("select pg_catalog.pg_get_viewdef($1::int8::oid)", &[(&oid, Type::INT8)]).await?;
        let text: String = rows.first().and_then(|row| row.get(0)).unwrap_or_default();
        let parsed = parse_query(&text);
        let names = parsed.as_ref().and_then(|query| relations(&**query));
        if names.is_none() {
            self.unreadable.get_or_insert(format!("the text of view {} is not understood", relation.name));
        }
        self.texts.push(text);
        relation.view = parsed;
        Ok(names.unwrap_or_default())
    }

    async fn policies(&mut self, client: &Client, relation: &mut Found) -> Result<Vec<Reference>, Error> {
        if !matches!(relation.kind, 'r' | 'p') {
            return Ok(Vec::new());
        }
        let oid = i64::from(relation.oid);
        let mut names = Vec::new();
        for row in client.query_typed(POLICIES, &[(&oid, Type::INT8)]).await? {
            let text: Option<String> = row.get(2);
            let using = text.as_deref().and_then(parse_expr);
            let read = using.as_ref().and_then(|expr| relations(&**expr));
            if text.is_some() && read.is_none() {
                self.unreadable.get_or_insert(format!("a policy of {} is not understood", relation.name));
            }
            names.extend(read.unwrap_or_default());
            self.texts.extend(text);
            relation.policies.push(KnownPolicy { permissive: row.get(0), applies: row.get(1), using });
        }
        Ok(names)
    }

    /// Adds the columns. Asks the catalog by connections of its own, so the caller must hold none.
    pub async fn known(&self, catalog: &Catalog) -> Result<Known, PgError> {
        let mut known = Known::default();
        for (reference, found) in &self.found {
            let Some(facts) = catalog.table(TableId(found.root)).await? else { continue };
            let columns = facts.columns.iter().map(|column| {
                let loose = |oid| self.loose.contains(&(oid, column.name.clone()));
                let exact = column.type_oid < 16384 && !loose(found.oid) && !loose(found.root);
                KnownColumn {
                    name: column.name.clone(),
                    family: Family::of(&column.type_name).filter(|_| exact),
                    // Generated values are not in the stream, so nothing raises their tags.
                    tagged: column.tagged && exact && !column.generated,
                }
            });
            let nature = match (&found.view, found.kind) {
                (Some(query), _) => Nature::View { query: Arc::clone(query), invoker: found.invoker },
                (None, 'v') => continue,
                (None, _) => Nature::Table,
            };
            let relation = KnownRelation {
                name: found.name.clone(),
                streamed: found.streamed.clone(),
                nature,
                columns: columns.collect(),
                secured: found.secured,
                policies: found.policies.clone(),
            };
            known.relations.insert(reference.clone(), Arc::new(relation));
        }
        Ok(known)
    }
}

fn parse_query(text: &str) -> Option<Arc<Query>> {
    let statements = Parser::parse_sql(&PostgreSqlDialect {}, text.trim_end().trim_end_matches(';')).ok()?;
    match <[Statement; 1]>::try_from(statements) {
        Ok([Statement::Query(query)]) => Some(Arc::new(*query)),
        _ => None,
    }
}

fn parse_expr(text: &str) -> Option<Arc<Expr>> {
    // The whole text must be the expression: a parser that stops early has not understood it.
    let wrapped = parse_query(&format!("select {text}\n"))?;
    crate::constant::only_expression(&wrapped).map(|expr| Arc::new(expr.clone()))
}
