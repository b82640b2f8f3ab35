//! A lookup written for one key, as one statement for many. Called by whoever cascades; runs nothing.

use walcast_pg::quote_ident;

use crate::lex::replace_params;

/// `sql` takes `$1`, `$2`, … of these types. The statement takes one `text[]` for each and gives rows of the key's number
/// (from 1, `bigint`), then the columns as PostgreSQL prints them. At most `limit` rows.
///
/// LATERAL runs the lookup for each key as it stands, so it may be any query: with its own LIMIT, CTEs, aggregates.
pub fn lookup_of_many(sql: &str, types: &[String], columns: &[String], limit: usize) -> String {
    // Names that no lookup has, so that none of its own can be taken for ours.
    const KEYS: &str = "\"walcast keys\"";
    const FOUND: &str = "\"walcast found\"";
    let of_key = |number: usize| {
        let type_name = number.checked_sub(1).and_then(|index| types.get(index));
        // A number that the lookup cannot have is left for PostgreSQL to refuse.
        type_name.map_or_else(|| format!("${number}"), |type_name| format!("({KEYS}.p{number}::{type_name})"))
    };
    let lookup = replace_params(sql, of_key);
    // Not a cast: casts print booleans in another way than the stream does.
    let printed = columns.iter().map(|column| {
        let column = format!("{FOUND}.{}", quote_ident(column));
        format!(", case when pg_catalog.num_nonnulls({column}) = 1 then pg_catalog.concat({column}) end")
    });
    let arrays: Vec<String> = (1..=types.len()).map(|number| format!("${number}::text[]")).collect();
    let names: Vec<String> = (1..=types.len()).map(|number| format!("p{number}")).collect();
    format!(
        "select {KEYS}.n{} from unnest({}) with ordinality as {KEYS}({}, n) cross join lateral (\n{lookup}\n) as {FOUND} limit {limit}",
        printed.collect::<String>(),
        arrays.join(", "),
        names.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_become_columns_of_the_keys_and_literals_stay() {
        let sql = lookup_of_many("select a from t where b = $1 and c <> '$1' -- $2", &["bigint".into()], &["a".into()], 5);
        assert!(sql.contains("where b = (\"walcast keys\".p1::bigint) and c <> '$1' -- $2\n) as"), "{sql}");
        assert!(sql.starts_with("select \"walcast keys\".n, case when"), "{sql}");
        assert!(sql.contains("unnest($1::text[]) with ordinality"), "{sql}");
    }
}
