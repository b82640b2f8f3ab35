//! `/admin/v1/connections`, `/admin/v1/subscriptions`, `/admin/v1/leaks`: pages of the registry, and the end of a connection.

use axum::{
    Json,
    extract::{Path, State},
    http::{StatusCode, Uri},
};
use serde_json::{Value, json};
use walcast_engine::registry::{Selection, Sort, State as Fares};

use super::Operator;
use crate::http::{App, identity::query_pairs, refusal::Refusal};

pub async fn connections(_: Operator, State(app): State<App>, uri: Uri) -> Result<Json<Value>, Refusal> {
    Ok(Json(app.engine.registry().connections_report(&selection(&uri, false)?)))
}

pub async fn subscriptions(_: Operator, State(app): State<App>, uri: Uri) -> Result<Json<Value>, Refusal> {
    Ok(Json(app.engine.registry().subscriptions_report(&selection(&uri, true)?)))
}

pub async fn leaks(_: Operator, State(app): State<App>) -> Json<Value> {
    Json(app.engine.registry().leaks_report())
}

/// The client is told, and may come back: to keep it away, take its token or its role.
pub async fn end(_: Operator, State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Refusal> {
    let ended = id.parse().is_ok_and(|id| app.engine.end_connection(id));
    if ended {
        return Ok(Json(json!({ "ended": true })));
    }
    Err(Refusal::new(StatusCode::NOT_FOUND, "no_such_connection", "there is no such connection (any more)")
        .hint("GET /admin/v1/connections lists those that are open"))
}

/// No list is longer.
const FARTHEST: usize = 1_000_000_000;

fn selection(uri: &Uri, subscriptions: bool) -> Result<Selection, Refusal> {
    let mut which = Selection::default();
    for (name, value) in query_pairs(uri) {
        let wrong = |takes: &str| {
            Refusal::new(StatusCode::BAD_REQUEST, "bad_parameter", format!("`{name}` is not {value:?}"))
                .hint(format!("{name} takes {takes}"))
        };
        match name.as_str() {
            "tenant" => which.tenant = Some(value),
            "app" => which.app = Some(value),
            "component" => which.component = Some(value),
            "ip" => which.ip = Some(value.parse().map_err(|_| wrong("an IP address"))?),
            "state" => {
                let states = [Fares::Healthy, Fares::Leaking, Fares::Slow, Fares::Stale];
                let state = states.into_iter().find(|state| state.as_str() == value);
                which.state = Some(state.ok_or_else(|| wrong("healthy, leaking, slow or stale"))?);
            }
            "topic" if subscriptions => which.topic = Some(value),
            "connection" if subscriptions => which.connection = Some(value.parse().map_err(|_| wrong("the id of a connection"))?),
            "sort" => {
                which.sort = match value.as_str() {
                    "id" => Sort::Id,
                    "outbox" => Sort::Outbox,
                    "age" => Sort::Age,
                    _ => return Err(wrong("id, outbox or age")),
                }
            }
            "offset" => {
                let offset = value.parse().ok().filter(|offset| *offset <= FARTHEST);
                which.offset = offset.ok_or_else(|| wrong(&format!("a number up to {FARTHEST}")))?;
            }
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=Selection::MOST).contains(limit));
                which.limit = limit.ok_or_else(|| wrong(&format!("a number from 1 to {}", Selection::MOST)))?;
            }
            "apikey" => {}
            other => {
                let takes = if subscriptions { ", topic, connection" } else { "" };
                return Err(Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "unknown_parameter",
                    format!("there is no parameter `{other}`"),
                )
                .hint(format!("use tenant, app, component, ip, state{takes}, sort, offset, limit")));
            }
        }
    }
    Ok(which)
}
