//! May these claims see this row image? PostgreSQL evaluates the policy on the image itself, as the role, with the claims.
//!
//! Called by the pipeline once per group and batch, with all images. Any doubt or error withholds; nothing is guessed.

use std::time::Duration;

use tokio_postgres::types::Type;
use walcast_model::{Cell, Claims, Lsn, Row, Snapshot, Table};
use walcast_pg::{Envelope, PgError, Pool, quote_ident};

use crate::rules::{Question, Rules, qualified};

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

const DOING: &str = "asking for row visibility";

/// Evaluates `question` on every image. `nonce` is echoed by the answer: an answer to another question is an error.
pub async fn ask(
    pool: &Pool,
    rules: &Rules,
    question: &Question,
    claims: &Claims,
    images: &[(&Table, &Row)],
    nonce: u64,
    timeout: Duration,
) -> Result<Verdicts, PgError> {
    let texts: Vec<Option<String>> = images.iter().map(|(table, row)| composite(rules, question, table, row)).collect();
    let asked: Vec<String> = texts.iter().flatten().cloned().collect();
    let nonce = nonce.to_string();
    let sql = statement(rules, question);
    let mut scope = Envelope::new(claims, timeout).open(pool, DOING).await?;
    let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[(&asked, Type::TEXT_ARRAY), (&nonce, Type::TEXT)];
    let rows = scope.client().query_typed(&sql, params).await.map_err(PgError::when(DOING))?;
    scope.end(DOING).await?;

    let unexpected = |what: &str| PgError::Unexpected { doing: DOING, what: what.to_owned() };
    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    let answers: Vec<bool> = row.get(4);
    if row.get::<_, &str>(0) != nonce || row.get::<_, &str>(1) != claims.role() || answers.len() != asked.len() {
        return Err(unexpected("the answer belongs to another question"));
    }
    let mut answers = answers.into_iter();
    Ok(Verdicts {
        told: texts.iter().map(Option::is_some).collect(),
        allowed: texts.iter().map(|text| text.is_some() && answers.next().unwrap_or(false)).collect(),
        snapshot: row.get::<_, &str>(2).parse().map_err(|e| unexpected(&format!("{e}")))?,
        wal_insert: row.get::<_, &str>(3).parse().map_err(|e| unexpected(&format!("{e}")))?,
    })
}

/// The images take the table's place under its own name, so that the policy's text reads them as its row.
fn statement(rules: &Rules, question: &Question) -> String {
    let columns: Vec<String> = rules.columns.iter().map(|column| quote_ident(&column.name)).collect();
    format!(
        "select $2::text, current_user::text, pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, \
         coalesce((select array_agg(coalesce({expression}, false) order by walcast_ordinal) \
         from unnest($1::text[]::{table}[]) with ordinality as {alias}({columns}, walcast_ordinal)), '{{}}'::bool[])",
        expression = question.expression,
        table = qualified(&rules.name),
        alias = quote_ident(rules.name.table()),
        columns = columns.join(", "),
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
