//! Rows of any number, as lines of JSON, in constant memory.
//!
//! A cursor in the caller's own read-only transaction: PostgreSQL keeps the place, and a slow reader holds up nothing
//! but his own connection. Called by whoever writes to a client. Never cached. Dropping it cancels what runs.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio_postgres::{
    SimpleQueryMessage,
    types::{ToSql, Type},
};
use walcast_model::Claims;
use walcast_pg::{Envelope, EnvelopeScope, PgError, Pool};

use crate::{
    error::QueryError,
    plan::Plan,
    question::Question,
    run::{TextParam, may, param_type, run_error},
};

const DOING: &str = "streaming a query";
/// What one fetch should bring.
const CHUNK_BYTES: usize = 256 << 10;
/// Before the size of a row is known.
const FIRST_ROWS: usize = 16;
const MOST_ROWS: usize = 10_000;

pub struct RowLines {
    scope: EnvelopeScope,
    question: Question,
    timeout: Duration,
    rows: usize,
}

impl RowLines {
    /// `timeout` holds for each fetch.
    pub(crate) async fn open(
        pool: &Pool,
        question: &Question,
        claims: &Claims,
        plan: &Plan,
        timeout: Duration,
    ) -> Result<RowLines, QueryError> {
        may(question, claims, plan)?;
        let query = &question.query;
        let refused = |error: PgError| QueryError::from_pg(&query.name, error, timeout);
        // All rows will be read, so the cheapest whole is wanted and not the earliest first row.
        let envelope = Envelope::new(claims, timeout).setting("cursor_tuple_fraction", "1");
        let mut scope = envelope.open(pool, DOING).await.map_err(refused)?;
        let order = query.page.as_ref().map(|page| format!(" order by {}", page.order_sql())).unwrap_or_default();
        let sql = format!(
            "declare walcast_c no scroll cursor for select pg_catalog.row_to_json(walcast_q)::text from (\n{}\n) walcast_q{order}",
            query.sql
        );
        let values: Vec<TextParam> = question.values.iter().map(|value| TextParam(value)).collect();
        let typed: Vec<(&(dyn ToSql + Sync), Type)> =
            values.iter().zip(&plan.param_types).map(|(value, oid)| (value as &(dyn ToSql + Sync), param_type(*oid))).collect();
        if let Err(error) = scope.client().query_typed(&sql, &typed).await {
            let error = run_error(query, error, timeout);
            if let Err(error) = scope.end(DOING).await {
                tracing::debug!(%error, "the connection of a refused stream is closed");
            }
            return Err(error);
        }
        Ok(RowLines { scope, question: question.clone(), timeout, rows: FIRST_ROWS })
    }

    /// Some whole lines; None at the end. After an error there is nothing more.
    pub async fn next(&mut self) -> Result<Option<Bytes>, QueryError> {
        let fetch = format!("fetch {} from walcast_c", self.rows);
        let fetched = self.scope.client().simple_query(&fetch).await;
        let messages = fetched.map_err(|error| run_error(&self.question.query, error, self.timeout))?;
        let (mut chunk, mut rows) = (BytesMut::new(), 0_usize);
        for message in messages {
            let SimpleQueryMessage::Row(row) = message else { continue };
            // A line is one row: PostgreSQL escapes line feeds within JSON strings, and a json column may hold bare ones.
            for byte in row.get(0).unwrap_or("null").bytes() {
                chunk.put_u8(if matches!(byte, b'\n' | b'\r') { b' ' } else { byte });
            }
            chunk.put_u8(b'\n');
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        self.rows = (CHUNK_BYTES * rows / chunk.len()).clamp(1, MOST_ROWS);
        Ok(Some(chunk.freeze()))
    }

    /// Gives the connection back. Dropping closes it.
    pub async fn end(self) -> Result<(), QueryError> {
        let refused = |error: PgError| QueryError::from_pg(&self.question.query.name, error, self.timeout);
        self.scope.end(DOING).await.map_err(refused)
    }
}
