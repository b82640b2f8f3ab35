//! `/admin/v1/trace`: an operator taps one topic, one connection or one table for a bounded time, and reads what happened.

use axum::{
    Json,
    extract::{Path, State, rejection::JsonRejection},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};
use walcast_engine::{Tapped, model::TableName};

use super::Operator;
use crate::http::{App, refusal::Refusal};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    topic: Option<String>,
    connection: Option<u64>,
    table: Option<String>,
    seconds: u64,
    #[serde(default)]
    payloads: bool,
}

pub async fn begin(
    _: Operator,
    State(app): State<App>,
    asked: Result<Json<Value>, JsonRejection>,
) -> Result<(StatusCode, Json<Value>), Refusal> {
    let bad = |title: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_trace", title)
            .hint("for example {\"topic\": \"realtime:ward\", \"seconds\": 60}; topic, connection or table, at most 600 seconds")
    };
    let Json(asked) = asked.map_err(|rejection| bad(rejection.body_text()))?;
    if let Some((name, _)) = asked.as_object().and_then(|asked| asked.iter().find(|(_, value)| value.is_null())) {
        return Err(bad(format!("`{name}` is null: leave it out")));
    }
    let asked: Asked = serde_json::from_value(asked).map_err(|error| bad(error.to_string()))?;
    let what = match (asked.topic, asked.connection, asked.table) {
        (Some(topic), None, None) => Tapped::Topic(topic),
        (None, Some(id), None) => Tapped::Connection(id),
        (None, None, Some(table)) => Tapped::Table(TableName::parse(&table)),
        _ => return Err(bad("a trace taps one thing: a topic, a connection or a table".into())),
    };
    let id = app.engine.traces().tap(what, asked.seconds, asked.payloads).map_err(|error| match error {
        walcast_engine::TraceError::TooMany => Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too_many_traces", error.to_string())
            .hint("DELETE /admin/v1/trace/{id} ends one"),
        walcast_engine::TraceError::Time => bad(error.to_string()),
    })?;
    Ok((StatusCode::CREATED, Json(json!({ "id": id }))))
}

pub async fn list(_: Operator, State(app): State<App>) -> Json<Value> {
    Json(json!({ "traces": app.engine.traces().reports(false) }))
}

pub async fn get(_: Operator, State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Refusal> {
    id.parse().ok().and_then(|id| app.engine.traces().report(id)).map(Json).ok_or_else(none)
}

pub async fn end(_: Operator, State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Refusal> {
    let ended = id.parse().is_ok_and(|id| app.engine.traces().end(id));
    ended.then(|| Json(json!({ "ended": true }))).ok_or_else(none)
}

fn none() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "no_such_trace", "there is no such trace (any more)")
        .hint("GET /admin/v1/trace lists those there are")
}
