//! What a person sees: the list of addresses at `/`, the demo of `walcast dev`, and clear words for everything else.

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{Html, IntoResponse, Response},
};
use rust_embed::RustEmbed;
use serde_json::Value;

use crate::http::{App, refusal::Refusal};

/// The keys and people that the demo page needs; only `walcast dev`, on loopback, gives them out.
#[derive(Debug)]
pub struct DemoSession(pub Value);

#[derive(RustEmbed)]
#[folder = "../../demo/page"]
struct DemoPage;

/// Nothing from elsewhere, nothing inline. The socket is named for browsers to which `'self'` means HTTP alone.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self' ws://127.0.0.1:* ws://localhost:*; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub async fn index(State(app): State<App>) -> Html<String> {
    let demo = if app.demo.is_some() { "<li><a href=\"/demo\">/demo</a>: the clinic, live</li>" } else { "" };
    Html(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Walcast</title>\
         <body style=\"font:16px/1.6 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem\">\
         <h1>Walcast is running</h1><ul>{demo}\
         <li><code>/realtime/v1</code>: point supabase-js here, with this server's address as its URL</li>\
         <li><code>/sse/v1/changes?table=…</code>: row changes as server-sent events</li>\
         <li><code>/query/v1/{{name}}</code>: named queries, cached until a row behind them changes</li>\
         <li><code>/cache/v1/{{namespace}}/{{key}}</code>: the cache</li>\
         <li><a href=\"/readyz\">/readyz</a>, <a href=\"/healthz\">/healthz</a>, <a href=\"/metrics\">/metrics</a>, \
         <a href=\"/openapi.json\">/openapi.json</a></li>\
         </ul></body></html>"
    ))
}

pub async fn demo_index() -> Response {
    file("index.html")
}

pub async fn demo_file(Path(name): Path<String>) -> Response {
    file(&name)
}

/// Keys for whoever is on this machine. A foreign name that was pointed at loopback is refused: its page could read them.
pub async fn demo_session(State(app): State<App>, headers: HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !matches!(name, "127.0.0.1" | "localhost" | "[::1]") {
        return Refusal::new(StatusCode::FORBIDDEN, "not_loopback", "the demo's keys are given out on this machine only")
            .hint("open the page as http://127.0.0.1 or http://localhost")
            .into_response();
    }
    match &app.demo {
        Some(session) => Json(session.0.clone()).into_response(),
        None => not_found(Uri::from_static("/demo/session.json")).await.into_response(),
    }
}

fn file(name: &str) -> Response {
    let Some(file) = DemoPage::get(name) else {
        let hint = if name.starts_with("vendor/") {
            "run `npm ci` in the folder demo and build again: it brings the supabase-js bundle"
        } else {
            "the demo's page is /demo"
        };
        return Refusal::new(StatusCode::NOT_FOUND, "no_such_file", format!("the demo has no file `{name}`"))
            .hint(hint)
            .into_response();
    };
    let kind = match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => "text/html; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("json") => "application/json",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    };
    let mut response = (StatusCode::OK, file.data.into_owned()).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// Supabase's other services live where they lived.
pub async fn elsewhere(uri: Uri) -> Refusal {
    let service = uri.path().trim_start_matches('/').split('/').next().unwrap_or_default().to_owned();
    Refusal::new(StatusCode::NOT_FOUND, "not_served_here", format!("Walcast does not serve /{service}/v1"))
        .hint("use Supabase's own project URL for this client, and Walcast's only for realtime")
}

pub async fn not_found(uri: Uri) -> Refusal {
    let path: String = uri.path().chars().take(80).collect();
    Refusal::new(StatusCode::NOT_FOUND, "no_such_path", format!("there is nothing at {path}")).hint("/ lists the addresses")
}

/// The header `Allow` is added by the router.
pub async fn method_not_allowed(method: Method, uri: Uri) -> Refusal {
    let path: String = uri.path().chars().take(80).collect();
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", format!("{path} does not take {method}"))
        .hint("the header Allow names the methods that it takes; /openapi.json describes them")
}
