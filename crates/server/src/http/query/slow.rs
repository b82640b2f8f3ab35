//! `GET /admin/v1/queries/slow`: the latest slow queries with their plans, for `service_role`. No values are in it.

use axum::{Json, extract::State, http::StatusCode};
use serde_json::Value;

use crate::http::{App, identity::Caller, refusal::Refusal};

pub async fn get(State(app): State<App>, Caller(claims): Caller) -> Result<Json<Value>, Refusal> {
    if claims.role() != "service_role" {
        let refusal = Refusal::new(StatusCode::FORBIDDEN, "role_not_allowed", "this is for the operator");
        return Err(refusal.hint("use a service_role token"));
    }
    Ok(Json(app.engine.slow_queries()))
}
