//! `Accept: application/x-ndjson`: one row a line, of any number, as fast as the client reads. Never cached.
//!
//! An error in the middle is the last line, `{"error": …}`; a client that goes away ends the query.

use std::collections::HashMap;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use serde_json::json;
use walcast_engine::{Freshness, QueryFailure, QueryLines, Segment, model::Claims};

use crate::http::{App, cache::header_value, query::refused, refusal::Refusal};

const TYPE: &str = "application/x-ndjson";

pub fn wanted(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut kinds = accepted.flat_map(|value| value.split(',')).filter_map(|part| part.split(';').next());
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case(TYPE))
}

pub async fn answer(
    app: &App,
    name: &str,
    claims: &Claims,
    params: &HashMap<String, String>,
    freshness: Freshness,
) -> Result<Response, Refusal> {
    let lines = app.engine.query_lines(name, claims, params, freshness).await.map_err(refused)?;
    let position = header_value(&lines.position.to_string());
    let body = Body::from_stream(stream::unfold(Some(lines), |lines| async move { next(lines?).await }));
    let mut response = body.into_response();
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static(TYPE));
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    out.insert(header::VARY, HeaderValue::from_static("authorization, apikey, accept, walcast-at-least"));
    out.insert("cache-status", HeaderValue::from_static("walcast; fwd=bypass; detail=stream"));
    out.insert("walcast-position", position);
    Ok(response)
}

async fn next(mut lines: QueryLines) -> Option<(Result<Bytes, std::convert::Infallible>, Option<QueryLines>)> {
    match lines.next().await {
        Some(Segment::Rows(rows)) => Some((Ok(rows), Some(lines))),
        Some(Segment::End) => None,
        Some(Segment::Failed(failure)) => Some((Ok(last_line(&failure)), None)),
        None => {
            let broken = QueryFailure {
                status: 503,
                code: "stream_ended_early",
                message: "the stream broke off before its end: it was not read, or the server is going down".into(),
                hint: "read without long pauses, or ask for less".into(),
            };
            Some((Ok(last_line(&broken)), None))
        }
    }
}

fn last_line(failure: &QueryFailure) -> Bytes {
    let error = json!({ "code": failure.code, "title": failure.message, "hint": failure.hint });
    format!("{}\n", json!({ "error": error })).into()
}
