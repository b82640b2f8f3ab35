//! `GET /admin/v1/realtime`: the live side as a whole, of the last minute and since the start.

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::Operator;
use crate::http::App;

pub async fn get(_: Operator, State(app): State<App>) -> Json<Value> {
    let mut report = app.engine.realtime_report();
    // Those with the most connections.
    report["tenants"] = json!(app.limits.tenants());
    Json(report)
}
