//! `/admin/v1/*`: what an operator wants to see, as JSON, for `service_role` alone.
//!
//! [`connections`]: who is connected and subscribed, what leaks, and how to end a connection. [`realtime`]: the health of the
//! live side as a whole. [`trace`]: what happens on one topic, connection or table. [`support`]: all of it in one file.

pub mod connections;
pub mod realtime;
pub mod support;
pub mod trace;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
};
use serde_json::Value;

use crate::http::{App, identity::Caller, refusal::Refusal};

/// The caller may look behind the scenes.
pub struct Operator;

impl FromRequestParts<App> for Operator {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Operator, Refusal> {
        let Caller(claims) = Caller::from_request_parts(parts, app).await?;
        let role = claims.role();
        if role == "service_role" {
            return Ok(Operator);
        }
        Err(Refusal::new(StatusCode::FORBIDDEN, "role_not_allowed", format!("role `{role}` may not look behind the scenes"))
            .hint("use a service_role token"))
    }
}

/// The tiers: entries and bytes, the state of the second one, what it was cleaned of lately and by day.
pub async fn cache(_: Operator, State(app): State<App>) -> Json<Value> {
    Json(app.engine.cache_report().await)
}
