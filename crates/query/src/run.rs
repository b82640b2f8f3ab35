//! Runs a planned query as the caller and tells what the answer depends on, value for value.
//!
//! One statement reads rows, snapshot and the dependencies' values, so all of it is of one moment. Parameters are
//! bound as text of their declared types; nothing of the request is ever part of the SQL.

use std::{error::Error, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio_postgres::{
    Row,
    types::{Format, IsNull, Kind, ToSql, Type, to_sql_checked},
};
use walcast_model::{Claims, Snapshot, Tag};
use walcast_pg::{Envelope, PgError, Pool};

use crate::{
    dependency::Dependency,
    error::QueryError,
    file::NamedQuery,
    page::cursor,
    plan::Plan,
    question::Question,
    statement::{FIXED_COLUMNS, batch, single, values_alone},
};

#[derive(Debug, Clone)]
pub struct Answer {
    /// A JSON array of objects.
    pub body: Bytes,
    /// Where the next page begins, if this is a page and not the last one.
    pub next: Option<String>,
    /// Of the source, taken before its first read.
    pub snapshot: Snapshot,
    /// Table tags, and row tags each with its companion.
    pub tags: Vec<Tag>,
    pub rows: usize,
}

const DOING: &str = "running a query";
/// Leaves room for the few that the cache's owner adds, within the 64 of an entry.
const MAX_TAGS: usize = 50;

pub async fn run(
    pool: &Pool,
    question: &Question,
    claims: &Claims,
    plan: &Plan,
    timeout: Duration,
) -> Result<Answer, QueryError> {
    may(question, claims, plan)?;
    let query = &question.query;
    let (sql, further) = single(query, plan, question.page.as_ref());
    let values: Vec<TextParam> = question.values.iter().chain(&further).map(|value| TextParam(value)).collect();
    // What a cursor holds takes the type of the column that it is compared with.
    let types = plan.param_types.iter().copied().chain(std::iter::repeat(0));
    let typed: Vec<_> = values.iter().zip(types).map(|(value, oid)| (value as &(dyn ToSql + Sync), param_type(oid))).collect();
    let rows = rows(pool, query, claims, &sql, &typed, timeout).await?;
    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    let mut answer = answer(query, plan, row)?;
    if let (Some(page), Some(_)) = (&question.page, &query.page) {
        let at = FIXED_COLUMNS + plan.dependencies.len() + 1;
        if row.try_get::<_, bool>(at + 1).map_err(field)? {
            return Err(QueryError::NoTotalOrder { name: query.name.clone(), why: "two rows of a page are equal in it".into() });
        }
        if answer.rows > page.limit {
            answer.rows = page.limit;
            let last: Option<Vec<Option<String>>> = row.try_get(at).map_err(field)?;
            answer.next = last.map(|last| cursor(&query.meaning, &last));
        }
    } else if answer.rows > query.max_rows {
        return Err(QueryError::TooManyRows { name: query.name.clone(), limit: query.max_rows });
    }
    Ok(answer)
}

/// The tags that an answer would carry, without asking for its rows.
pub async fn tags(
    pool: &Pool,
    question: &Question,
    claims: &Claims,
    plan: &Plan,
    timeout: Duration,
) -> Result<Vec<Tag>, QueryError> {
    may(question, claims, plan)?;
    let sql = values_alone(&question.query, plan);
    let values: Vec<TextParam> = question.values.iter().map(|value| TextParam(value)).collect();
    // Declared although it may not be used: PostgreSQL takes more types than there are parameters.
    let typed: Vec<_> =
        values.iter().zip(&plan.param_types).map(|(value, oid)| (value as &(dyn ToSql + Sync), param_type(*oid))).collect();
    let rows = rows(pool, &question.query, claims, &sql, &typed, timeout).await?;
    Ok(answer(&question.query, plan, rows.first().ok_or_else(|| unexpected("no row"))?)?.tags)
}

/// Many questions to one query in one statement, in one snapshot, each with an answer of its own. Not for pages.
/// One that fails fails all: the caller asks again, one by one.
pub async fn run_many(
    pool: &Pool,
    questions: &[Question],
    claims: &Claims,
    plan: &Plan,
    timeout: Duration,
) -> Result<Vec<Result<Answer, QueryError>>, QueryError> {
    let Some(first) = questions.first() else { return Ok(Vec::new()) };
    may(first, claims, plan)?;
    let query = &first.query;
    let columns: Vec<Vec<&str>> =
        (0..query.params.len()).map(|place| questions.iter().map(|question| question.values[place].as_str()).collect()).collect();
    let typed: Vec<_> = columns.iter().map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY)).collect();
    let rows = rows(pool, query, claims, &batch(query, plan), &typed, timeout).await?;
    if rows.len() != questions.len() {
        return Err(unexpected("another number of answers than of questions"));
    }
    let one = |row: &Row| {
        let answer = answer(query, plan, row)?;
        match answer.rows > query.max_rows {
            true => Err(QueryError::TooManyRows { name: query.name.clone(), limit: query.max_rows }),
            false => Ok(answer),
        }
    };
    Ok(rows.iter().map(one).collect())
}

pub(crate) fn may(question: &Question, claims: &Claims, plan: &Plan) -> Result<(), QueryError> {
    let query = &question.query;
    if query.allows(claims.role()) && claims.role() == plan.role {
        return Ok(());
    }
    Err(QueryError::RoleNotAllowed { name: query.name.clone(), role: claims.role().to_owned() })
}

/// One statement as the caller.
async fn rows(
    pool: &Pool,
    query: &NamedQuery,
    claims: &Claims,
    sql: &str,
    typed: &[(&(dyn ToSql + Sync), Type)],
    timeout: Duration,
) -> Result<Vec<Row>, QueryError> {
    let refused = |error: PgError| QueryError::from_pg(&query.name, error, timeout);
    let mut scope = Envelope::new(claims, timeout).open(pool, DOING).await.map_err(refused)?;
    let result = scope.client().query_typed(sql, typed).await;
    // A refused statement leaves a sound connection; the refusal is what the caller needs to hear.
    let ended = scope.end(DOING).await;
    let rows = result.map_err(|error| run_error(query, error, timeout))?;
    ended.map_err(refused)?;
    Ok(rows)
}

pub(crate) fn run_error(query: &NamedQuery, error: tokio_postgres::Error, timeout: Duration) -> QueryError {
    bad_param(query, &error).unwrap_or_else(|| QueryError::from_pg(&query.name, PgError::from_driver(DOING, error), timeout))
}

fn unexpected(what: impl Into<String>) -> QueryError {
    QueryError::Database(PgError::Unexpected { doing: DOING, what: what.into() })
}

fn field(error: tokio_postgres::Error) -> QueryError {
    unexpected(error.to_string())
}

fn answer(query: &NamedQuery, plan: &Plan, row: &Row) -> Result<Answer, QueryError> {
    let rows = row.try_get::<_, i64>(1).map_err(field)? as usize;
    let snapshot: Snapshot = row.try_get::<_, &str>(2).map_err(field)?.parse().map_err(|error| unexpected(format!("{error}")))?;
    let in_recovery: bool = row.try_get(3).map_err(field)?;
    let mut groups = Vec::new();
    for (index, dependency) in plan.dependencies.iter().enumerate() {
        let values: Vec<Option<String>> = match &dependency.narrow {
            None => Vec::new(),
            Some(_) => row.try_get(FIXED_COLUMNS + index).map_err(field)?,
        };
        groups.push((&dependency.table, narrow(dependency, &values)));
    }
    // An entry has few tags: what has most of them counts whole.
    while groups.iter().map(|(_, tags)| tags.len()).sum::<usize>() > MAX_TAGS {
        let Some((table, tags)) = groups.iter_mut().max_by_key(|(_, tags)| tags.len()).filter(|(_, tags)| tags.len() > 1) else {
            break;
        };
        *tags = vec![Tag::table(table)];
    }
    let mut tags = Vec::new();
    groups.into_iter().flat_map(|(_, tags)| tags).for_each(|tag| push(&mut tags, tag));
    let params: Vec<Option<String>> = row.try_get(FIXED_COLUMNS + plan.dependencies.len()).map_err(field)?;
    for template in &query.tags {
        let tag = template.fill(|place| params.get(place)?.as_deref()).map_err(|error| {
            let place = template.params().next().unwrap_or_default();
            let (param, type_name) = query.params.get(place).map_or(("", ""), |p| (p.name.as_str(), p.type_name.as_str()));
            QueryError::BadParam {
                param: param.to_owned(),
                type_name: type_name.to_owned(),
                message: format!("no tag can be made of it: {error}"),
            }
        })?;
        push(&mut tags, tag);
    }
    let body = Bytes::from(row.try_get::<_, Option<String>>(0).map_err(field)?.unwrap_or_default());
    let snapshot = if in_recovery { snapshot.on_standby() } else { snapshot };
    Ok(Answer { body, next: None, snapshot, tags, rows })
}

fn narrow(dependency: &Dependency, values: &[Option<String>]) -> Vec<Tag> {
    let whole = || vec![Tag::table(&dependency.table)];
    let Some((column, _)) = &dependency.narrow else { return whole() };
    // Nothing equals null, so a null value needs no tag.
    let rows: Option<Vec<Tag>> = values.iter().flatten().map(|value| Tag::row(&dependency.table, column, value)).collect();
    match rows {
        Some(mut rows) => {
            rows.sort();
            rows.dedup();
            rows.push(Tag::any_row(&dependency.table, column));
            rows
        }
        // Too long to narrow by.
        None => whole(),
    }
}

fn push(tags: &mut Vec<Tag>, tag: Tag) {
    if !tags.contains(&tag) {
        tags.push(tag);
    }
}

fn bad_param(query: &NamedQuery, error: &tokio_postgres::Error) -> Option<QueryError> {
    let refusal = error.as_db_error()?;
    // "unnamed portal parameter $1": only what PostgreSQL itself blames on a parameter is the caller's mistake.
    let blamed = refusal.where_()?.lines().find_map(|line| line.split_once("parameter $").map(|(_, rest)| rest))?;
    let number: usize = blamed.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()?;
    let Some(param) = query.params.get(number.checked_sub(1)?) else {
        // Beyond the query's own stand the values of a cursor.
        return Some(QueryError::BadCursor { name: query.name.clone() });
    };
    Some(QueryError::BadParam {
        param: param.name.clone(),
        type_name: param.type_name.clone(),
        message: refusal.message().to_owned(),
    })
}

pub(crate) fn param_type(oid: u32) -> Type {
    // Only the oid is sent; the rest of a type that the driver does not know is never asked for.
    Type::from_oid(oid).unwrap_or_else(|| Type::new("unknown".into(), oid, Kind::Simple, String::new()))
}

/// Sends a value in its text form, whatever the type: PostgreSQL reads it, as it would a literal.
#[derive(Debug)]
pub(crate) struct TextParam<'a>(pub &'a str);

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
