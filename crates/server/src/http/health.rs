//! `/healthz` (alive), `/readyz` (stream attached and heard), `/metrics` (Prometheus).

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde_json::json;
use walcast_engine::Readiness;

use crate::http::App;

pub async fn alive() -> &'static str {
    "ok\n"
}

pub async fn ready(State(app): State<App>) -> impl IntoResponse {
    let mut health = app.engine.health();
    if app.drain.has_begun() {
        health.readiness = Readiness::NotReady;
        health.report["ready"] = false.into();
        health.report["reasons"] = json!(["draining: the server has been told to end"]);
    }
    let status = match health.readiness {
        Readiness::Ready => StatusCode::OK,
        Readiness::NotReady => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(health.report))
}

pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    app.engine.refresh_gauges();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render() + &app.limits.tenant_metrics())
}
