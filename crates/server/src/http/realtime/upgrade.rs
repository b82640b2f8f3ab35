//! From an HTTP request to a socket of our own, or a refusal that clients show.
//!
//! The socket is taken over bare: the engine's writers write shared frames into it, without a library's buffer between.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header},
    response::{IntoResponse, Response},
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use tungstenite::handshake::derive_accept_key;
use walcast_protocol::phoenix::Vsn;

use crate::http::{
    App,
    identity::query_parameter,
    limits::ClientAddress,
    realtime::{Guest, run},
};

pub async fn upgrade(State(app): State<App>, address: ClientAddress, mut request: Request) -> Response {
    let (headers, uri) = (request.headers(), request.uri());
    let key = headers.get("x-api-key").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let key = key.or_else(|| query_parameter(uri, "apikey")).unwrap_or_default();
    let claims = match app.engine.verify(&key) {
        Ok(claims) => claims,
        Err(error) => return upstream_error(StatusCode::UNAUTHORIZED, &error.to_string()),
    };
    let vsn = match Vsn::parse(query_parameter(uri, "vsn").as_deref()) {
        Ok(vsn) => vsn,
        Err(error) => return upstream_error(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let accept = match accept_key(&request) {
        Ok(accept) => accept,
        Err(why) => {
            let mut response = upstream_error(StatusCode::UPGRADE_REQUIRED, why);
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            return response;
        }
    };
    let permit = match app.admit(address, &claims) {
        Ok(permit) => permit,
        Err(refusal) => return refusal.upgrade_response(),
    };
    let (its_app, component) = (query_parameter(request.uri(), "app"), query_parameter(request.uri(), "component"));
    let guest = Guest { vsn, key, claims, peer: address.ip(), app: its_app, component, permit };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = match upgraded.await {
            Ok(upgraded) => upgraded,
            Err(error) => return tracing::debug!(%error, "the client left before the upgrade"),
        };
        match hyper_util::server::conn::auto::upgrade::downcast::<TokioIo<TcpStream>>(upgraded) {
            // Boxed: this task lives as long as the connection, and should not hold room for the upgrade, too.
            Ok(parts) => Box::pin(run(app, guest, parts.io.into_inner(), parts.read_buf)).await,
            Err(_) => tracing::error!("an upgraded connection is no TCP socket: WebSockets cannot be served on this listener"),
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("Upgrade")),
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// The answer to a client's handshake (RFC 6455, 4.2.1), or what is wrong with it.
fn accept_key(request: &Request) -> Result<HeaderValue, &'static str> {
    let headers = request.headers();
    if request.method() != Method::GET || request.version() != Version::HTTP_11 {
        return Err("a WebSocket is opened by GET over HTTP/1.1");
    }
    if !has_token(headers, header::CONNECTION, "upgrade") || !has_token(headers, header::UPGRADE, "websocket") {
        return Err("Connection header did not include 'upgrade', or Upgrade not 'websocket': this address speaks WebSocket");
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err("Sec-WebSocket-Version must be 13");
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or("the header Sec-WebSocket-Key is missing")?;
    derive_accept_key(key.as_bytes()).parse().map_err(|_| "Sec-WebSocket-Key cannot be read")
}

fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    let mut values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
}

/// Upstream's shape, which clients show.
fn upstream_error(status: StatusCode, error: &str) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], json!({ "error": error }).to_string()).into_response()
}
