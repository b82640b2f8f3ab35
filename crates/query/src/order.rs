//! Proves that no two rows of a query are equal in the columns that its pages are ordered by.
//!
//! Called by the planner. Without a total order a page could end between two equal rows and the next one skip the
//! second: whatever is not proven here is refused, unless the author vouches for it (`unique`).
//!
//! The proof: the rows are those of one table, each at most once (every other table is joined by a whole unique key),
//! and the order holds a whole unique key of that table.

use std::collections::HashMap;

use sqlparser::ast::{
    BinaryOperator, Expr, GroupByExpr, JoinConstraint, JoinOperator, Query, Select, SelectItem, SelectItemQualifiedWildcardKind,
    SetExpr, TableFactor,
};
use tokio_postgres::{Client, types::Type};

use crate::{
    constant::column_parts,
    gather::Gathered,
    known::Reference,
    names::{fold, reference},
    page::PageBy,
};

/// Keys and columns without nulls, by relation as the query names it.
pub(crate) type Keys = HashMap<Reference, TableKeys>;

#[derive(Debug, Default, Clone)]
pub(crate) struct TableKeys {
    unique: Vec<Vec<String>>,
    not_null: Vec<String>,
}

/// Of each column of the order: certainly never null.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TotalOrder {
    pub not_null: Vec<bool>,
}

const KEYS: &str = "
select c.oid::int8,
       (select pg_catalog.array_agg(a.attname::text) from pg_catalog.pg_attribute a
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attnotnull),
       (select pg_catalog.array_agg(a.attname::text order by k.n) from pg_catalog.unnest(i.indkey::int2[]) with ordinality as k(attnum, n)
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum where k.n <= i.indnkeyatts)
from pg_catalog.pg_class c
left join pg_catalog.pg_index i on i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate
  and i.indpred is null and i.indexprs is null
where c.oid = any ($1::int8[]::oid[]) and c.relkind in ('r', 'p')";

pub(crate) async fn keys(client: &Client, gathered: &Gathered) -> Result<Keys, tokio_postgres::Error> {
    let oids: Vec<i64> = gathered.found.values().map(|found| i64::from(found.oid)).collect();
    let mut by_oid: HashMap<i64, TableKeys> = HashMap::new();
    for row in client.query_typed(KEYS, &[(&oids, Type::INT8_ARRAY)]).await? {
        let table = by_oid.entry(row.get(0)).or_default();
        table.not_null = row.get::<_, Option<Vec<String>>>(1).unwrap_or_default();
        // Two rows may both have null in a unique key.
        let key = row.get::<_, Option<Vec<String>>>(2).filter(|key| key.iter().all(|column| table.not_null.contains(column)));
        table.unique.extend(key);
    }
    let known = gathered.found.iter().filter_map(|(name, found)| {
        // A parent's key says nothing of the rows of its children.
        let keys = by_oid.get(&i64::from(found.oid)).filter(|_| !found.has_children)?;
        Some((name.clone(), keys.clone()))
    });
    Ok(known.collect())
}

/// Why not, if it is not.
pub(crate) fn total(query: &Query, page: &PageBy, keys: &Keys) -> Result<TotalOrder, &'static str> {
    let SetExpr::Select(select) = &*query.body else { return Err("the query is not one plain SELECT") };
    let grouped = !matches!(&select.group_by, GroupByExpr::Expressions(by, with) if by.is_empty() && with.is_empty());
    if query.with.is_some() || select.distinct.is_some() || grouped || select.having.is_some() {
        return Err("the query has WITH, DISTINCT or GROUP BY");
    }
    let [from] = select.from.as_slice() else { return Err("the query has no single table in FROM") };
    let (base, base_keys) = table(&from.relation, keys).ok_or("its rows are not those of one table")?;
    for join in &from.joins {
        let on = match &join.join_operator {
            JoinOperator::Join(on) | JoinOperator::Inner(on) | JoinOperator::Left(on) | JoinOperator::LeftOuter(on) => on,
            _ => return Err("a join may repeat rows"),
        };
        let (alias, joined) = table(&join.relation, keys).ok_or("a join is not with a table")?;
        let JoinConstraint::On(on) = on else { return Err("a join is not by ON") };
        let mut bound = Vec::new();
        equated(on, &alias, &mut bound);
        if !joined.unique.iter().any(|key| key.iter().all(|column| bound.contains(column))) {
            return Err("a join that is not by a whole unique key may repeat rows");
        }
    }
    let source = |order: &str| source(select, order, &base, from.joins.is_empty());
    let columns: Vec<Option<String>> = page.order.iter().map(|order| source(&order.column)).collect();
    let held = |column: &String| columns.iter().flatten().any(|held| held == column);
    if !base_keys.unique.iter().any(|key| key.iter().all(held)) {
        return Err("it holds no whole unique key of its table");
    }
    let not_null = |column: &Option<String>| column.as_ref().is_some_and(|column| base_keys.not_null.contains(column));
    Ok(TotalOrder { not_null: columns.iter().map(not_null).collect() })
}

/// Alias and keys of a plain table.
fn table<'k>(factor: &TableFactor, keys: &'k Keys) -> Option<(String, &'k TableKeys)> {
    let TableFactor::Table { name, alias, args: None, version: None, sample: None, json_path: None, .. } = factor else {
        return None;
    };
    let named = reference(name)?;
    let alias = match alias {
        Some(alias) if alias.columns.is_empty() => fold(&alias.name),
        Some(_) => return None,
        None => named.1.clone(),
    };
    Some((alias, keys.get(&named)?))
}

/// Columns of `alias` that must equal something outside it.
fn equated(on: &Expr, alias: &str, bound: &mut Vec<String>) {
    match on {
        Expr::Nested(inner) => equated(inner, alias, bound),
        Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
            equated(left, alias, bound);
            equated(right, alias, bound);
        }
        Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
            let own = |expr: &Expr| match column_parts(expr)?.as_slice() {
                [of, column] if of == alias => Some(column.clone()),
                _ => None,
            };
            let outside = |expr: &Expr| match column_parts(expr) {
                Some(parts) => matches!(parts.as_slice(), [of, _] if of != alias),
                None => matches!(expr, Expr::Value(_)),
            };
            for (one, other) in [(left, right), (right, left)] {
                bound.extend(own(one).filter(|_| outside(other)));
            }
        }
        _ => {}
    }
}

/// The column of the base table that an output column is.
fn source(select: &Select, output: &str, base: &str, alone: bool) -> Option<String> {
    let of_base = |expr: &Expr| match column_parts(expr)?.as_slice() {
        [column] if alone => Some(column.clone()),
        [of, column] if of == base => Some(column.clone()),
        _ => None,
    };
    let mut found = None;
    for item in &select.projection {
        let here = match item {
            SelectItem::UnnamedExpr(expr) => of_base(expr).filter(|column| column == output),
            SelectItem::ExprWithAlias { expr, alias } if fold(alias) == output => of_base(expr),
            SelectItem::ExprWithAlias { .. } => None,
            SelectItem::Wildcard(_) if alone => Some(output.to_owned()),
            SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), _) => {
                reference(name).filter(|(schema, table)| schema.is_none() && table == base).map(|_| output.to_owned())
            }
            _ => return None,
        };
        found = found.or(here);
    }
    found
}
