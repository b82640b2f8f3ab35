//! Is a subscription possible at all: table, publication, columns, privileges, and the filters' values as PostgreSQL
//! writes them.
//!
//! Asked when a client subscribes, of the rules that are remembered for its role, so that a herd of equal subscriptions
//! costs the database nothing. What is wrong is said then, not by silence later.

use std::time::Duration;

use tokio_postgres::types::Type;
use walcast_model::{Claims, TableName};
use walcast_pg::{Envelope, PgError, Pool};

use crate::rules::{ColumnRule, Rules, qualified};

#[derive(Debug, thiserror::Error)]
pub enum BindingRefused {
    /// Upstream's own words: clients match on them.
    #[error(
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the given connect parameters: \
         [{given}]; {why}"
    )]
    Unable { given: String, why: String },
    #[error("Error parsing `filter` params: {0}")]
    Filter(String),
    #[error("Error parsing `select` params: {0}")]
    Select(String),
    #[error(transparent)]
    Database(#[from] PgError),
}

/// What a client wants to hear of one named table.
pub struct Wanted<'a> {
    pub event: &'a str,
    pub table: &'a TableName,
    /// Each condition's column, and the condition as the client would write it.
    pub filters: &'a [(&'a str, String)],
    pub select: Option<&'a [String]>,
}

/// Returns what is known of each filter's column, in order. `rules`: what this role may read of the table; none if there
/// is no such table.
pub fn check<'r>(
    rules: Option<&'r Rules>,
    publication: &str,
    wanted: &Wanted<'_>,
) -> Result<Vec<&'r ColumnRule>, BindingRefused> {
    let unable = |why: String| {
        let (event, schema, table) = (wanted.event, wanted.table.schema(), wanted.table.table());
        let filters: Vec<_> = wanted.filters.iter().map(|(_, shown)| shown).collect();
        let select = wanted.select.map_or("nil".to_owned(), |columns| format!("{columns:?}"));
        let given = format!("event: {event}, schema: {schema}, table: {table}, filters: {filters:?}, select: {select}");
        BindingRefused::Unable { given, why }
    };
    let Some(rules) = rules else { return Err(unable("there is no such table".into())) };
    if let Some(root) = &rules.partition_of {
        return Err(unable(format!("it is a partition, and its changes are heard as its root's: subscribe to {root}")));
    }
    if rules.published.is_none() {
        let mend = format!("alter publication {publication} add table {}", qualified(wanted.table));
        return Err(unable(format!("the table is not published: {mend}")));
    }
    if !rules.readable {
        return Err(unable(format!("this role may not select from {}", wanted.table)));
    }
    let readable = |name: &str| match rules.column(name) {
        None => Err(format!("{} has no column `{name}`", wanted.table.table())),
        Some(column) if !column.visible => Err(format!("this role may not read column `{name}`")),
        Some(column) => Ok(column),
    };
    for column in wanted.select.unwrap_or_default() {
        readable(column).map_err(BindingRefused::Select)?;
    }
    wanted.filters.iter().map(|(column, _)| readable(column).map_err(BindingRefused::Filter)).collect()
}

const DOING: &str = "checking a subscription";

/// The values in the text form that the stream uses for the column's type. PostgreSQL is asked only for types whose form
/// is not plain.
pub async fn cast(pool: &Pool, claims: &Claims, column: &ColumnRule, values: &[String]) -> Result<Vec<String>, BindingRefused> {
    if let Some(plain) = values.iter().map(|value| cast_plain(column, value)).collect() {
        return Ok(plain);
    }
    // The type's name comes from format_type, which quotes it. concat uses the type's own output, as the stream does.
    let sql = format!("select concat(v::{}) from unnest($1::text[]) with ordinality as x(v, n) order by n", column.sql_type);
    let refused = |message: String| BindingRefused::Filter(format!("column `{}`: {message}", column.name));
    let rows = as_role(pool, claims, &sql, values, refused).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Evaluates a condition once, without a row, so that an operator or a pattern that PostgreSQL does not know is refused
/// now. `expression` reads `$1::text[]`.
pub async fn probe(
    pool: &Pool,
    claims: &Claims,
    column: &str,
    expression: &str,
    values: &[String],
) -> Result<(), BindingRefused> {
    let refused = |message: String| BindingRefused::Filter(format!("column `{column}`: {message}"));
    as_role(pool, claims, &format!("select {expression}"), values, refused).await.map(drop)
}

async fn as_role(
    pool: &Pool,
    claims: &Claims,
    sql: &str,
    values: &[String],
    refused: impl Fn(String) -> BindingRefused,
) -> Result<Vec<tokio_postgres::Row>, BindingRefused> {
    // With the search path of the questions that are asked for each change.
    let envelope = Envelope::new(claims, Duration::from_secs(5));
    let mut scope = envelope.open(pool, DOING).await?;
    let answer = scope.client().query_typed(sql, &[(&values, Type::TEXT_ARRAY)]).await.map_err(PgError::when(DOING));
    match answer {
        Err(PgError::Refused { message, .. }) => {
            scope.end(DOING).await?;
            Err(refused(message))
        }
        answer => {
            scope.end(DOING).await?;
            Ok(answer?)
        }
    }
}

/// None: PostgreSQL knows. What it would refuse is also left to it, for its own words.
fn cast_plain(column: &ColumnRule, value: &str) -> Option<String> {
    if column.is_domain {
        return None;
    }
    match column.base_type.as_str() {
        "int2" => value.parse::<i16>().ok().map(|number| number.to_string()),
        "int4" => value.parse::<i32>().ok().map(|number| number.to_string()),
        "int8" => value.parse::<i64>().ok().map(|number| number.to_string()),
        "bool" => match value {
            "t" | "true" => Some("t".into()),
            "f" | "false" => Some("f".into()),
            _ => None,
        },
        "text" | "varchar" => (!value.contains('\0')).then(|| value.to_owned()),
        "uuid" => {
            let plain = value.len() == 36
                && value
                    .bytes()
                    .enumerate()
                    .all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() });
            plain.then(|| value.to_ascii_lowercase())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use walcast_model::Family;

    use super::*;

    fn cast_of(base_type: &str, value: &str) -> Option<String> {
        let column = ColumnRule {
            name: "c".into(),
            visible: true,
            primary: false,
            type_oid: 1,
            sql_type: base_type.into(),
            base_type: base_type.into(),
            is_domain: false,
            family: Family::Opaque,
        };
        cast_plain(&column, value)
    }

    #[test]
    fn plain_values_need_no_database() {
        for (base_type, value, expected) in [
            ("int4", "007", Some("7")),
            ("int2", "40000", None),
            ("int8", "1e3", None),
            ("bool", "true", Some("t")),
            ("bool", "yes", None),
            ("uuid", "00000000-0000-4000-8000-00000000000A", Some("00000000-0000-4000-8000-00000000000a")),
            ("uuid", "{00000000-0000-4000-8000-00000000000a}", None),
            ("text", " x ", Some(" x ")),
            ("timestamptz", "now", None),
        ] {
            assert_eq!(cast_of(base_type, value).as_deref(), expected, "{base_type} {value}");
        }
    }
}
