//! Runs a planned query as the caller and tells what the answer depends on, value for value.
//!
//! One statement reads rows, snapshot and the dependencies' values, so all of it is of one moment. Parameters are
//! bound as text of their declared types; nothing of the request is ever part of the SQL.

use std::{collections::HashMap, error::Error, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type, to_sql_checked};
use walcast_model::{Claims, Snapshot, Tag};
use walcast_pg::{Envelope, PgError, Pool};

use crate::{analyse::MAX_VALUES, error::QueryError, file::NamedQuery, functions::reads_clock, plan::Plan};

#[derive(Debug, Clone)]
pub struct Answer {
    /// A JSON array of objects.
    pub body: Bytes,
    /// Of the source, taken before its first read.
    pub snapshot: Snapshot,
    /// Table tags, and row tags each with its companion.
    pub tags: Vec<Tag>,
    pub rows: usize,
}

const DOING: &str = "running a query";

pub async fn run(
    pool: &Pool,
    query: &NamedQuery,
    claims: &Claims,
    params: &HashMap<String, String>,
    plan: &Plan,
    timeout: Duration,
) -> Result<Answer, QueryError> {
    if !query.allows(claims.role()) || claims.role() != plan.role {
        return Err(QueryError::RoleNotAllowed { name: query.name.clone(), role: claims.role().to_owned() });
    }
    let values = bind(query, params)?;
    let refused = |error: PgError| QueryError::from_pg(&query.name, error, timeout);
    let mut scope = Envelope::new(claims, timeout).open(pool, DOING).await.map_err(refused)?;
    let texts: Vec<TextParam> = values.iter().map(|value| TextParam(value)).collect();
    let typed: Vec<(&(dyn ToSql + Sync), Type)> =
        texts.iter().zip(&plan.param_types).map(|(text, oid)| (text as &(dyn ToSql + Sync), param_type(*oid))).collect();
    let result = scope.client().query_typed(&statement(query, plan), &typed).await;
    let rows = match result {
        Ok(rows) => rows,
        Err(error) => {
            let bad = bad_param(query, &error);
            let error = bad.unwrap_or_else(|| refused(PgError::from_driver(DOING, error)));
            // A refused statement leaves a sound connection; the refusal is what the caller needs to hear.
            if let Err(error) = scope.end(DOING).await {
                tracing::debug!(%error, "the connection of a refused query is closed");
            }
            return Err(error);
        }
    };
    scope.end(DOING).await.map_err(refused)?;
    let unexpected = |what: String| QueryError::Database(PgError::Unexpected { doing: DOING, what });
    let row = rows.first().ok_or_else(|| unexpected("no row".into()))?;
    let field = |error: tokio_postgres::Error| unexpected(error.to_string());
    let count = row.try_get::<_, i64>(1).map_err(field)? as usize;
    if count > query.max_rows {
        return Err(QueryError::TooManyRows { name: query.name.clone(), limit: query.max_rows });
    }
    let snapshot: Snapshot = row.try_get::<_, &str>(2).map_err(field)?.parse().map_err(|e| unexpected(format!("{e}")))?;
    let in_recovery: bool = row.try_get(3).map_err(field)?;
    let mut tags = Vec::new();
    for (index, dependency) in plan.dependencies.iter().enumerate() {
        match &dependency.narrow {
            None => push(&mut tags, Tag::table(&dependency.table)),
            Some((column, _)) => {
                let values: Vec<Option<String>> = row.try_get(4 + index).map_err(field)?;
                narrow(&mut tags, dependency, column, &values);
            }
        }
    }
    let body = Bytes::from(row.try_get::<_, String>(0).map_err(field)?);
    let snapshot = if in_recovery { snapshot.on_standby() } else { snapshot };
    Ok(Answer { body, snapshot, tags, rows: count })
}

fn narrow(tags: &mut Vec<Tag>, dependency: &crate::Dependency, column: &str, values: &[Option<String>]) {
    // Nothing equals null, so a null value needs no tag.
    let present = || values.iter().flatten();
    let rows: Option<Vec<Tag>> = present().map(|value| Tag::row(&dependency.table, column, value)).collect();
    match rows {
        Some(rows) if present().count() <= MAX_VALUES => {
            rows.into_iter().for_each(|tag| push(tags, tag));
            push(tags, Tag::any_row(&dependency.table, column));
        }
        // Too long or too many to narrow by.
        _ => push(tags, Tag::table(&dependency.table)),
    }
}

fn push(tags: &mut Vec<Tag>, tag: Tag) {
    if !tags.contains(&tag) {
        tags.push(tag);
    }
}

fn statement(query: &NamedQuery, plan: &Plan) -> String {
    let mut sql = format!(
        "with walcast_rows as materialized (select * from (\n{}\n) walcast_q limit {})\n\
         select coalesce((select pg_catalog.json_agg(walcast_r) from walcast_rows walcast_r), '[]')::text, \
         (select pg_catalog.count(*) from walcast_rows), pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery()",
        query.sql,
        query.max_rows + 1,
    );
    for dependency in &plan.dependencies {
        let parts: Vec<String> =
            dependency.narrow.iter().flat_map(|(_, operands)| operands).map(|operand| operand.values_sql()).collect();
        sql.push_str(",\n");
        sql.push_str(if parts.is_empty() { "null::text[]" } else { "" });
        sql.push_str(&parts.join(" || "));
    }
    sql
}

/// The values of $1, $2, …, defaults filled in.
pub(crate) fn bind(query: &NamedQuery, params: &HashMap<String, String>) -> Result<Vec<String>, QueryError> {
    let name = || query.name.clone();
    let known = |given: &&String| query.params.iter().any(|param| param.name == **given);
    let mut unknown: Vec<&String> = params.keys().filter(|given| !known(given)).collect();
    unknown.sort();
    if let Some(param) = unknown.first() {
        let known = query.params.iter().map(|param| param.name.clone()).collect();
        return Err(QueryError::UnknownParam { name: name(), param: (*param).clone(), known });
    }
    let value = |param: &crate::file::Param| {
        let missing = || QueryError::MissingParam { name: name(), param: param.name.clone(), type_name: param.type_name.clone() };
        let value = params.get(&param.name).or(param.default.as_ref()).cloned().ok_or_else(missing)?;
        let bad = |message: &str| QueryError::BadParam {
            param: param.name.clone(),
            type_name: param.type_name.clone(),
            message: message.to_owned(),
        };
        if value.contains('\0') {
            return Err(bad("it holds a zero byte"));
        }
        // `now` as a date would be another day tomorrow, under the same key.
        let moment = ["date", "time"].iter().any(|part| param.type_name.to_ascii_lowercase().contains(part));
        if moment && query.max_age.is_none() && reads_clock(&value) {
            return Err(bad("a word like `now` or `today` means another moment each time; give the moment itself"));
        }
        Ok(value)
    };
    query.params.iter().map(value).collect()
}

fn bad_param(query: &NamedQuery, error: &tokio_postgres::Error) -> Option<QueryError> {
    let refusal = error.as_db_error()?;
    // "unnamed portal parameter $1": only what PostgreSQL itself blames on a parameter is the caller's mistake.
    let blamed = refusal.where_()?.lines().find_map(|line| line.split_once("parameter $").map(|(_, rest)| rest))?;
    let number: usize = blamed.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()?;
    let param = query.params.get(number.checked_sub(1)?)?;
    Some(QueryError::BadParam {
        param: param.name.clone(),
        type_name: param.type_name.clone(),
        message: refusal.message().to_owned(),
    })
}

fn param_type(oid: u32) -> Type {
    // Only the oid is sent; the rest of a type that the driver does not know is never asked for.
    Type::from_oid(oid).unwrap_or_else(|| Type::new("unknown".into(), oid, Kind::Simple, String::new()))
}

/// Sends a value in its text form, whatever the type: PostgreSQL reads it, as it would a literal.
#[derive(Debug)]
struct TextParam<'a>(&'a str);

impl ToSql for TextParam<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}
