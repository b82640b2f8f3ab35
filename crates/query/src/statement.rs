//! The SQL that answers: rows as JSON, the snapshot they are of, and the values that the answer hangs on, in one statement.
//!
//! Built from the file and the plan alone; nothing of a request is ever part of the text.

use crate::{dependency::Dependency, file::NamedQuery, lex::replace_params, page::PageAsk, plan::Plan};

/// Columns before those of the dependencies.
pub(crate) const FIXED_COLUMNS: usize = 4;

/// Body, rows, snapshot, recovery, then one column a dependency, the tags' parameters, and of a page: the end of it,
/// and whether two of its rows are equal in the order. With the values that come after the query's own.
pub(crate) fn single(query: &NamedQuery, plan: &Plan, page: Option<&PageAsk>) -> (String, Vec<String>) {
    let (rows, shown, further) = match (page, &query.page) {
        (Some(ask), Some(by)) => {
            let (condition, further) = match &ask.after {
                None => ("true".to_owned(), Vec::new()),
                Some(after) => by.after_sql(after, &plan.page_not_null, query.params.len() + 1),
            };
            let rows = format!(
                "select * from (\n{}\n) walcast_q where {condition} order by {} limit {}",
                query.sql,
                by.order_sql(),
                ask.limit + 1
            );
            (rows, format!("(select * from walcast_rows limit {}) walcast_r", ask.limit), further)
        }
        _ => {
            let rows = format!("select * from (\n{}\n) walcast_q limit {}", query.sql, query.max_rows + 1);
            (rows, "walcast_rows walcast_r".to_owned(), Vec::new())
        }
    };
    let mut sql = format!(
        "with walcast_rows as materialized ({rows})\n\
         select coalesce((select pg_catalog.json_agg(walcast_r) from {shown}), '[]')::text, \
         (select pg_catalog.count(*) from walcast_rows), pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery()",
    );
    sql.push_str(&values(query, plan));
    if let (Some(ask), Some(by)) = (page, &query.page) {
        let (last, columns) = (ask.limit - 1, by.columns_sql());
        sql.push_str(&format!(
            ",\n(select {} from walcast_rows walcast_e offset {last} limit 1),\n\
             exists (select from walcast_rows group by {columns} having pg_catalog.count(*) > 1)",
            by.values_sql("walcast_e")
        ));
    }
    (sql, further)
}

/// Many parameter sets at once: one array of texts a parameter, one row a set. In the same snapshot, so each answer is
/// what it would be alone.
pub(crate) fn batch(query: &NamedQuery, plan: &Plan) -> String {
    let columns: Vec<String> = (1..=query.params.len()).map(|n| format!("p{n}")).collect();
    let arrays: Vec<String> = (1..=query.params.len()).map(|n| format!("${n}::text[]")).collect();
    let each = |n: usize| match plan.param_names.get(n - 1) {
        Some(type_name) => format!("(walcast_b.p{n}::{type_name})"),
        None => format!("${n}"),
    };
    format!(
        "select walcast_a.body, walcast_a.found, pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery(){}\n\
         from pg_catalog.unnest({}) with ordinality as walcast_b({}, n)\n\
         cross join lateral (select coalesce(pg_catalog.json_agg(walcast_r), '[]')::text as body, pg_catalog.count(*) as found \
         from (select * from (\n{}\n) walcast_q limit {}) walcast_r) walcast_a\norder by walcast_b.n",
        replace_params(&values(query, plan), each),
        arrays.join(", "),
        columns.join(", "),
        replace_params(&query.sql, each),
        query.max_rows + 1,
    )
}

/// The same values without any row: for whoever asks what an answer would hang on.
pub(crate) fn values_alone(query: &NamedQuery, plan: &Plan) -> String {
    format!(
        "select null::text, 0::int8, pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery(){}",
        values(query, plan)
    )
}

/// `, array[…], …`: of each dependency the values that narrow it; last the parameters that tags are made of.
fn values(query: &NamedQuery, plan: &Plan) -> String {
    let mut sql = String::new();
    for dependency in &plan.dependencies {
        sql.push_str(",\n");
        sql.push_str(&dependency_values(dependency));
    }
    let used: Vec<usize> = query.tags.iter().flat_map(|tag| tag.params()).collect();
    let texts = (0..query.params.len()).map(|place| match used.contains(&place) {
        true => format!("(${})::text", place + 1),
        false => "null".to_owned(),
    });
    sql.push_str(&format!(",\narray[{}]::text[]", texts.collect::<Vec<_>>().join(", ")));
    sql
}

fn dependency_values(dependency: &Dependency) -> String {
    let parts: Vec<String> =
        dependency.narrow.iter().flat_map(|(_, operands)| operands).map(|operand| operand.values_sql()).collect();
    if parts.is_empty() { "null::text[]".to_owned() } else { parts.join(" || ") }
}
