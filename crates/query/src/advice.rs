//! What would make a query cheaper to keep or to compute: an index, a replica identity, a publication.
//!
//! Called by `walcast explain` and `walcast check --queries`. Reads the plan that was made and the catalog; changes nothing.

use serde_json::Value;
use tokio_postgres::types::Type;
use walcast_model::TableName;
use walcast_pg::{PgError, quote_ident};

use crate::{
    file::NamedQuery,
    lex::{Token, lex},
    plan::Plan,
    queries::Queries,
};

/// One thing to mend: what is, and the SQL or header that changes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Advice {
    pub what: String,
    pub mend: String,
}

/// Smaller tables are read whole by any plan.
const LARGE_ROWS: f32 = 1_000.0;
const DOING: &str = "looking for what would help a query";

pub async fn advise(queries: &Queries, query: &NamedQuery, plan: &Plan) -> Result<Vec<Advice>, PgError> {
    let mut advice = Vec::new();
    if let Err(why) = &plan.cacheable {
        advice.push(Advice { what: format!("answers are not kept: {why}"), mend: why.mend() });
    }
    if let Some(why) = &plan.not_narrowed {
        let what = format!("answers fall with any change of their tables: {why}");
        advice.push(Advice { what, mend: "write the query without it, or keep it where changes are rare".into() });
    }
    for (table, column) in &plan.untagged {
        let what = format!(
            "answers fall with any change of {table}: {column} is known beforehand, but no key, index or foreign key holds it"
        );
        advice.push(Advice { what, mend: create_index(table, std::slice::from_ref(column)) });
    }
    advice.extend(identities(queries, plan).await?);
    advice.extend(scans(queries, query, plan).await?);
    advice.sort();
    advice.dedup();
    Ok(advice)
}

/// Where the old row does not say which answers it was in.
async fn identities(queries: &Queries, plan: &Plan) -> Result<Vec<Advice>, PgError> {
    let sql = "select c.relreplident = 'f' or exists (select from pg_catalog.pg_index i \
               join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey::int2[]) \
               where i.indrelid = c.oid and a.attname = $3 \
               and ((c.relreplident = 'd' and i.indisprimary) or (c.relreplident = 'i' and i.indisreplident))) \
               from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               where n.nspname = $1 and c.relname = $2";
    let mut advice = Vec::new();
    for dependency in &plan.dependencies {
        let Some((column, _)) = &dependency.narrow else { continue };
        let (schema, name) = (dependency.table.schema(), dependency.table.table());
        let lease = queries.pool().lease(DOING).await?;
        let params: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
            [(&schema, Type::TEXT), (&name, Type::TEXT), (column, Type::NAME)];
        let rows = lease.query_typed(sql, &params).await.map_err(PgError::when(DOING))?;
        if rows.first().is_some_and(|row| !row.get::<_, bool>(0)) {
            let table = &dependency.table;
            advice.push(Advice {
                what: format!(
                    "each UPDATE and DELETE of {table} ends every answer that is narrowed by {column}: the old row does not say it"
                ),
                mend: format!("alter table {} replica identity full", quoted(table)),
            });
        }
    }
    Ok(advice)
}

/// Sequential scans of large tables that filter by a parameter.
async fn scans(queries: &Queries, query: &NamedQuery, plan: &Plan) -> Result<Vec<Advice>, PgError> {
    let mut found = Vec::new();
    sequential(&plan.explain, &mut found);
    let sql = "select c.reltuples from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               where n.nspname = $1 and c.relname = $2";
    let mut advice = Vec::new();
    for (table, columns) in found {
        let (schema, name) = (table.schema(), table.table());
        let lease = queries.pool().lease(DOING).await?;
        let rows = lease.query_typed(sql, &[(&schema, Type::TEXT), (&name, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
        let rows = rows.first().map_or(0.0, |row| row.get::<_, f32>(0));
        if rows >= LARGE_ROWS {
            let what =
                format!("query `{}` reads all {rows:.0} rows of {table} to find those of one {}", query.name, columns.join(", "));
            advice.push(Advice { what, mend: create_index(&table, &columns) });
        }
    }
    Ok(advice)
}

fn sequential(node: &Value, found: &mut Vec<(TableName, Vec<String>)>) {
    match node {
        Value::Array(nodes) => nodes.iter().for_each(|node| sequential(node, found)),
        Value::Object(map) => {
            let text = |key: &str| map.get(key).and_then(Value::as_str);
            if let (Some("Seq Scan" | "Parallel Seq Scan"), Some(table), Some(filter)) =
                (text("Node Type"), text("Relation Name"), text("Filter"))
            {
                let columns = bound_columns(filter);
                if !columns.is_empty() {
                    found.push((TableName::new(text("Schema").unwrap_or("public"), table), columns));
                }
            }
            map.values().for_each(|value| sequential(value, found));
        }
        _ => {}
    }
}

/// `(t.a = $1)`, `(b = ANY ($2))`, unless it is inside an OR or behind a cast.
fn bound_columns(filter: &str) -> Vec<String> {
    let tokens = lex(filter);
    if tokens.iter().any(|token| token.is_word("or")) {
        return Vec::new();
    }
    let mut columns: Vec<String> = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let Token::Word { text, .. } = token else { continue };
        let after: Vec<&Token> = tokens[at + 1..].iter().take(4).collect();
        let bound = match after.as_slice() {
            [Token::Symbol('='), Token::Param(_), ..] => true,
            [Token::Symbol('='), any, Token::Symbol('('), Token::Param(_)] => any.is_word("any"),
            _ => false,
        };
        if bound && !columns.contains(text) {
            columns.push(text.clone());
        }
    }
    columns
}

fn create_index(table: &TableName, columns: &[String]) -> String {
    let columns: Vec<String> = columns.iter().map(|column| quote_ident(column)).collect();
    format!("create index concurrently on {} ({})", quoted(table), columns.join(", "))
}

fn quoted(table: &TableName) -> String {
    format!("{}.{}", quote_ident(table.schema()), quote_ident(table.table()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_that_a_parameter_filters_names_its_columns() {
        for (filter, expected) in [
            ("(t.patient_id = $1)", vec!["patient_id"]),
            ("((v.a = $1) AND (v.open) AND (v.b = ANY ($2)))", vec!["a", "b"]),
            ("((v.a = $1) OR (v.b = $2))", vec![]),
            ("(lower(a) = $1)", vec![]),
            ("(a > $1)", vec![]),
        ] {
            assert_eq!(bound_columns(filter), expected, "{filter}");
        }
        let plan = serde_json::json!([{"Plan": {"Node Type": "Limit", "Plans": [
            {"Node Type": "Seq Scan", "Schema": "s", "Relation Name": "T", "Filter": "(a = $1)"},
            {"Node Type": "Index Scan", "Relation Name": "u", "Filter": "(a = $1)"}]}}]);
        let mut found = Vec::new();
        sequential(&plan, &mut found);
        assert_eq!(found, [(TableName::new("s", "T"), vec!["a".to_owned()])]);
        assert_eq!(create_index(&found[0].0, &found[0].1), "create index concurrently on \"s\".\"T\" (\"a\")");
    }
}
