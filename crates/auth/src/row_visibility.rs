//! May these claims see these row images? PostgreSQL evaluates the policy on the images themselves, as the role.
//!
//! Called by the pipeline for a batch: [`ask`] for one caller, [`ask_each`] for several in one round trip, [`ask_set`] for many
//! in one statement, where the policy has that form. Every answer echoes its caller's nonce. Any doubt or error withholds.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio_postgres::{Row as PgRow, types::ToSql, types::Type};
use walcast_model::{Cell, Claims, Lsn, Row, Snapshot, Table};
use walcast_pg::{Envelope, EnvelopeScope, PgError, Pool, quote_ident};

use crate::{
    policy::{CALLER, SetForm, Values, column},
    rules::{Question, Rules, qualified},
};

/// What PostgreSQL said, and as of when.
#[derive(Debug, Clone)]
pub struct Verdicts {
    /// One for each image, in order.
    pub allowed: Vec<bool>,
    /// False for an image that lacks a value which the question may read: nobody could be asked.
    pub told: Vec<bool>,
    pub snapshot: Snapshot,
    /// Every commit that the snapshot sees lies before this.
    pub wal_insert: Lsn,
}

/// A row as the stream brought it, with the table as it was described then.
pub type Image<'a> = (&'a Table, &'a Row);

/// One caller and his images.
pub struct Asking<'a> {
    pub claims: &'a Claims,
    pub images: Vec<Image<'a>>,
    pub nonce: u64,
}

/// Many callers of one role, and which of the images each wants to see.
pub struct AskingSet<'a> {
    pub role_of: &'a Claims,
    pub callers: Vec<(Arc<Values>, u64)>,
    pub images: Vec<Image<'a>>,
    /// Caller and image; there is a verdict for each.
    pub pairs: Vec<(usize, usize)>,
}

const DOING: &str = "asking for row visibility";
/// Statements that are under way on the connection.
const UNDER_WAY: usize = 64;

fn unexpected(what: &str) -> PgError {
    PgError::Unexpected { doing: DOING, what: what.to_owned() }
}

/// Evaluates `question` for one caller.
pub async fn ask(
    pool: &Pool,
    rules: &Rules,
    question: &Question,
    asking: &Asking<'_>,
    timeout: Duration,
) -> Result<Verdicts, PgError> {
    let mut answers = ask_each(pool, rules, question, std::slice::from_ref(asking), timeout).await?;
    answers.pop().ok_or_else(|| unexpected("no answer"))
}

/// Evaluates `question` for each caller by himself, in one transaction and so as of one snapshot. All are of one role.
/// What fails for one, fails for all.
pub async fn ask_each(
    pool: &Pool,
    rules: &Rules,
    question: &Question,
    asking: &[Asking<'_>],
    timeout: Duration,
) -> Result<Vec<Verdicts>, PgError> {
    let Some(first) = asking.first() else { return Ok(Vec::new()) };
    if asking.iter().any(|one| one.claims.role() != first.claims.role()) {
        return Err(unexpected("callers of several roles in one transaction"));
    }
    let sql = statement(rules, question);
    let mut scope = Envelope::new(first.claims, timeout).open(pool, DOING).await?;
    // Sent one behind the other, and answered so: a statement meets the claims that were set just before it, which it echoes.
    let answers = {
        let (client, sql) = (&*scope.client(), &sql);
        let mut each = Vec::with_capacity(asking.len());
        for one in asking {
            each.push(answer_one(client, sql, rules, question, one));
        }
        stream::iter(each).buffered(UNDER_WAY).try_collect().await
    };
    finish(scope, answers).await
}

async fn finish<T>(scope: EnvelopeScope, answers: Result<T, PgError>) -> Result<T, PgError> {
    // An error ends the transaction by itself; what else is under way on the connection ends with it.
    if answers.is_ok() {
        scope.end(DOING).await?;
    }
    answers
}

async fn answer_one(
    client: &tokio_postgres::Client,
    sql: &str,
    rules: &Rules,
    question: &Question,
    one: &Asking<'_>,
) -> Result<Verdicts, PgError> {
    const SET: &str = "select set_config('request.jwt.claims', $1, true), set_config('request.jwt.claim.sub', $2, true), \
                       set_config('walcast.nonce', $3, true)";
    let texts: Vec<Option<String>> = one.images.iter().map(|(table, row)| composite(rules, question, table, row)).collect();
    let asked: Vec<&str> = texts.iter().flatten().map(String::as_str).collect();
    let (json, subject) = (one.claims.json(), one.claims.subject().unwrap_or_default());
    let nonce = one.nonce.to_string();
    let claims: [(&(dyn ToSql + Sync), Type); 3] = [(&json, Type::TEXT), (&subject, Type::TEXT), (&nonce, Type::TEXT)];
    let params: [(&(dyn ToSql + Sync), Type); 1] = [(&asked, Type::TEXT_ARRAY)];
    let (set, rows) = futures_util::join!(client.query_typed(SET, &claims), client.query_typed(sql, &params));
    set.map_err(PgError::when(DOING))?;
    let rows = rows.map_err(PgError::when(DOING))?;
    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    let answers: Vec<bool> = row.get(5);
    let echoed = row.get::<_, Option<&str>>(3) == Some(&*nonce) && row.get::<_, Option<&str>>(4) == Some(json);
    if !echoed || row.get::<_, &str>(0) != one.claims.role() || answers.len() != asked.len() {
        return Err(unexpected("the answer belongs to another question"));
    }
    let mut answers = answers.into_iter();
    Ok(Verdicts {
        told: texts.iter().map(Option::is_some).collect(),
        allowed: texts.iter().map(|text| text.is_some() && answers.next().unwrap_or(false)).collect(),
        snapshot: snapshot(row)?,
        wal_insert: wal_insert(row)?,
    })
}

fn snapshot(row: &PgRow) -> Result<Snapshot, PgError> {
    row.get::<_, &str>(1).parse().map_err(|e| unexpected(&format!("{e}")))
}

fn wal_insert(row: &PgRow) -> Result<Lsn, PgError> {
    row.get::<_, &str>(2).parse().map_err(|e| unexpected(&format!("{e}")))
}

/// The images take the table's place under its own name, so that the policy's text reads them as its row.
fn statement(rules: &Rules, question: &Question) -> String {
    format!(
        "select current_user::text, pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, \
         current_setting('walcast.nonce', true), current_setting('request.jwt.claims', true), \
         coalesce((select array_agg(coalesce({expression}, false) order by walcast_at) from {images}), '{{}}'::bool[])",
        expression = question.expression,
        images = images(rules, 1),
    )
}

fn images(rules: &Rules, parameter: usize) -> String {
    let columns: Vec<String> = rules.columns.iter().map(|column| quote_ident(&column.name)).collect();
    format!(
        "unnest(${parameter}::text[]::{table}[]) with ordinality as {alias}({columns}, walcast_at)",
        table = qualified(&rules.name),
        alias = quote_ident(rules.name.table()),
        columns = columns.join(", "),
    )
}

/// Evaluates a policy's set form: one statement without any claims set, for whatever number of callers.
pub async fn ask_set(
    pool: &Pool,
    rules: &Rules,
    question: &Question,
    form: &SetForm,
    asking: &AskingSet<'_>,
    timeout: Duration,
) -> Result<Verdicts, PgError> {
    let texts: Vec<Option<String>> = asking.images.iter().map(|(table, row)| composite(rules, question, table, row)).collect();
    let told: Vec<bool> = asking.pairs.iter().map(|(_, image)| texts.get(*image).is_some_and(Option::is_some)).collect();
    // Places count from 1, as ordinality does; an image that lacks a value keeps its place and is in no pair.
    let known = asking.pairs.iter().zip(&told).enumerate().filter(|(_, (_, told))| **told);
    let pairs: Vec<(usize, usize, usize)> = known.map(|(at, ((caller, image), _))| (at, *caller, *image)).collect();
    let one_based = |at: usize| i32::try_from(at + 1).unwrap_or(i32::MAX);
    let of_callers: Vec<i32> = pairs.iter().map(|(_, caller, _)| one_based(*caller)).collect();
    let of_images: Vec<i32> = pairs.iter().map(|(.., image)| one_based(*image)).collect();
    let nonces: Vec<i64> = asking.callers.iter().map(|(_, nonce)| nonce.cast_signed()).collect();
    let (types, values) = by_column(asking)?;

    let sql = set_statement(rules, form, &types);
    let mut params: Vec<(&(dyn ToSql + Sync), Type)> = vec![
        (&texts, Type::TEXT_ARRAY),
        (&of_callers, Type::INT4_ARRAY),
        (&of_images, Type::INT4_ARRAY),
        (&nonces, Type::INT8_ARRAY),
    ];
    params.extend(values.iter().map(|values| (values as &(dyn ToSql + Sync), Type::TEXT_ARRAY)));
    // Nobody's claims: whatever still read them would find none.
    let envelope = Envelope::new(asking.role_of, timeout).setting("request.jwt.claims", "").setting("request.jwt.claim.sub", "");
    let mut scope = envelope.open(pool, DOING).await?;
    let rows = scope.client().query_typed(&sql, &params).await.map_err(PgError::when(DOING));
    let rows = finish(scope, rows).await?;

    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    if row.get::<_, &str>(0) != asking.role_of.role() {
        return Err(unexpected("the answer belongs to another question"));
    }
    let (shown, echoed): (Vec<i64>, Vec<i64>) = (row.get(3), row.get(4));
    let mut allowed = vec![false; asking.pairs.len()];
    for (place, nonce) in shown.iter().zip(&echoed) {
        let pair = usize::try_from(*place - 1).ok().and_then(|at| pairs.get(at));
        let (at, caller, _) = pair.ok_or_else(|| unexpected("an answer for nobody"))?;
        if nonces.get(*caller) != Some(nonce) {
            return Err(unexpected("the answer belongs to another caller"));
        }
        allowed[*at] = true;
    }
    Ok(Verdicts { allowed, told, snapshot: snapshot(row)?, wal_insert: wal_insert(row)? })
}

type Column = Vec<Option<String>>;

/// The callers' values by column, with the type of each.
fn by_column(asking: &AskingSet<'_>) -> Result<(Vec<String>, Vec<Column>), PgError> {
    let Some((first, _)) = asking.callers.first() else { return Ok((Vec::new(), Vec::new())) };
    let types: Vec<String> = first.0.iter().map(|given| given.type_name.clone()).collect();
    let mut columns: Vec<Column> = vec![Vec::with_capacity(asking.callers.len()); types.len()];
    for (values, _) in &asking.callers {
        if !values.0.iter().map(|given| &given.type_name).eq(&types) {
            return Err(unexpected("callers' values of different types"));
        }
        for (column, given) in columns.iter_mut().zip(&values.0) {
            column.push(match &given.values {
                None => None,
                Some(one) => Some(one.first().cloned().flatten().ok_or_else(|| unexpected("a value without its text"))?),
            });
        }
    }
    Ok((types, columns))
}

/// Only pairs that may be seen come back, each with its caller's nonce. As a condition, what a policy reads can be joined.
fn set_statement(rules: &Rules, form: &SetForm, types: &[String]) -> String {
    let at = 0..types.len();
    let raw: String = at.clone().map(|at| format!(", {}", column(at))).collect();
    let cast: String = at.clone().map(|at| format!(", {v}::{t} as {v}", v = column(at), t = types[at])).collect();
    let params: String = at.map(|at| format!(", ${}::text[]", at + 5)).collect();
    format!(
        "select current_user::text, pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, \
         coalesce(walcast_shown.places, '{{}}'), coalesce(walcast_shown.nonces, '{{}}') \
         from (select array_agg(walcast_pair.walcast_place) as places, array_agg({CALLER}.walcast_nonce) as nonces \
           from unnest($2::int4[], $3::int4[]) with ordinality as walcast_pair(walcast_of_caller, walcast_of_image, walcast_place) \
           join (select walcast_number, walcast_nonce{cast} from unnest($4::int8[]{params}) with ordinality \
                 as walcast_raw(walcast_nonce{raw}, walcast_number)) as {CALLER} on {CALLER}.walcast_number = walcast_of_caller \
           join {images} on walcast_at = walcast_of_image \
           where {condition}) as walcast_shown",
        images = images(rules, 1),
        condition = form.condition,
    )
}

/// The image as a literal of the table's row type; none if it lacks a column that the question may read.
fn composite(rules: &Rules, question: &Question, table: &Table, row: &Row) -> Option<String> {
    let cell = |name: &str| table.column(name).map_or(&Cell::Absent, |(index, _)| row.cell(index));
    if !question.needs.iter().all(|name| cell(name).is_known()) {
        return None;
    }
    let mut text = String::from("(");
    for (index, column) in rules.columns.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        match cell(&column.name) {
            known @ Cell::Value(_) => push_quoted(&mut text, known.text()?),
            Cell::Null | Cell::Unchanged | Cell::Absent => {}
        }
    }
    text.push(')');
    Some(text)
}

fn push_quoted(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text.push('"');
}
