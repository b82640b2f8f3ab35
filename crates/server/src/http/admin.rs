//! `/admin/v1/*`: what an operator wants to see, as JSON, for `service_role` alone. Never changes anything.

use axum::{Json, extract::State, http::StatusCode};
use serde_json::Value;

use crate::http::{App, identity::Caller, refusal::Refusal};

/// The tiers: entries and bytes, the state of the second one, what it was cleaned of lately and by day.
pub async fn cache(State(app): State<App>, Caller(claims): Caller) -> Result<Json<Value>, Refusal> {
    if claims.role() != "service_role" {
        let who = claims.role();
        return Err(Refusal::new(StatusCode::FORBIDDEN, "role_not_allowed", format!("role `{who}` may not look into the cache"))
            .hint("use a service_role token"));
    }
    Ok(Json(app.engine.cache_report().await))
}
