//! `GET /sse/v1/changes`: row changes as server-sent events, for `EventSource` and curl.
//!
//! The id of each event is its position; `Last-Event-ID` resumes. The first event is `live`, `resumed` or `resync`.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{
    body::Body,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use walcast_engine::{
    Asked, CloseReason, OutboxReader, Shape, SubscribeError, SubscribeRequest, SubscriptionHandle, Vital, outbox,
    registry::{ConnectionHandle, Kind, Listing, NewConnection},
};
use walcast_protocol::sse;

use crate::http::{
    App, Connection,
    identity::{Caller, query_pairs, query_parameter},
    refusal::Refusal,
};

/// A quiet stream's position moves at least this often.
const QUIET: Duration = Duration::from_secs(10);

pub async fn changes(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Caller(claims): Caller,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let connection = app.admit().ok_or_else(full)?;
    let asked = parse(&uri)?;
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let last = last.or_else(|| query_pairs(&uri).into_iter().find(|(key, _)| key == "last_event_id").map(|(_, value)| value));
    let after = match last.as_deref().filter(|text| !text.is_empty()) {
        Some(text) => Some(text.parse().map_err(|error| {
            Refusal::new(StatusCode::BAD_REQUEST, "bad_position", format!("{error}"))
                .hint("send back the `id` of an event as it came, or leave Last-Event-ID out")
        })?),
        None => None,
    };
    let expires_at = claims.expires_at();
    let (sender, reader) = outbox(app.limits.outbox_bytes);
    let listed = app.engine.registry().connect(NewConnection {
        kind: Kind::Sse,
        app: query_parameter(&uri, "app").as_deref(),
        component: query_parameter(&uri, "component").as_deref(),
        claims: &claims,
        peer: peer.ip(),
        outbox: sender.clone(),
    });
    let asked = vec![asked];
    let listing = listed.list("sse:changes".into(), None, &claims, &asked);
    let request = SubscribeRequest { claims, asked, shape: Shape::Sse, outbox: sender, listed: listing.entry(), after };
    let opened = app.engine.subscribe(request).await.map_err(|error| {
        listed.error(Vital::JoinRefused);
        refused(error)
    })?;
    listed.joined(&listing.topic);
    let first = vec![Bytes::from_static(b"retry: 1000\n\n"), opened.sse_opening()];
    let handle = opened.release(first);
    let live = Live { app, reader, handle: Some(handle), expires_at, listed, _listing: listing, _connection: connection };
    let body = Body::from_stream(stream::unfold(Some(live), next));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache, no-transform"),
        // Proxies that buffer would hold events back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, body).into_response())
}

struct Live {
    app: App,
    reader: OutboxReader,
    /// Dropped with the stream: nothing of it stays.
    handle: Option<SubscriptionHandle>,
    expires_at: u64,
    listed: ConnectionHandle,
    _listing: Listing,
    _connection: Connection,
}

async fn next(live: Option<Live>) -> Option<(Result<Bytes, Infallible>, Option<Live>)> {
    let mut live = live?;
    let last_words = |name: &str, reason: &str| {
        let data = serde_json::json!({ "reason": reason }).to_string();
        Some((Ok(sse::event(name, None, data.as_bytes())), None))
    };
    // Asked for more: the socket took what it was given.
    live.listed.heard();
    loop {
        let mut frames = Vec::new();
        tokio::select! {
            taken = live.reader.take(&mut frames) => return match taken {
                // Everything that is waiting goes out as one chunk: one write.
                Ok(()) => Some((Ok(join(frames)), Some(live))),
                Err(CloseReason::Slow { .. }) => {
                    live.listed.error(Vital::ClosedSlow);
                    last_words("closed", "too slow: reconnect to resume from the last id")
                }
                Err(CloseReason::Ended(reason)) => last_words("closed", reason),
                Err(CloseReason::Gone) => None,
            },
            () = until(live.expires_at) => {
                live.handle = None;
                return last_words("expired", "the token has expired: reconnect with a new one");
            }
            () = live.app.closing.cancelled() => return last_words("closed", "the server is shutting down: reconnect to resume"),
            () = tokio::time::sleep(QUIET) => {
                if let Some(handle) = &live.handle {
                    let position = live.app.engine.announced();
                    let data = serde_json::json!({ "position": position.to_string() }).to_string();
                    handle.subscriber.gate.advance(position.place(), sse::event("position", Some(&position), data.as_bytes()));
                }
            }
        }
    }
}

fn join(mut frames: Vec<Bytes>) -> Bytes {
    if frames.len() == 1 {
        return frames.swap_remove(0);
    }
    frames.concat().into()
}

/// Sleeps until a token's `exp`.
pub async fn until(expires_at: u64) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    tokio::time::sleep(Duration::from_secs(expires_at).saturating_sub(now)).await;
}

fn parse(uri: &Uri) -> Result<Asked, Refusal> {
    let mut asked = Asked { event: "*".into(), schema: None, table: None, filter: None, select: None, client_id: 1 };
    for (name, value) in query_pairs(uri) {
        match name.as_str() {
            "table" | "schema" if value.is_empty() => return Err(no_table()),
            "table" => match value.split_once('.') {
                Some((schema, table)) => (asked.schema, asked.table) = (Some(schema.to_owned()), Some(table.to_owned())),
                None => asked.table = Some(value),
            },
            "schema" => asked.schema = Some(value),
            "event" => asked.event = event(value)?,
            "filter" => asked.filter = Some(value),
            "select" => asked.select = Some(value.split(',').map(|column| column.trim().to_owned()).collect()),
            "apikey" | "last_event_id" | "app" | "component" => {}
            other => {
                return Err(Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "unknown_parameter",
                    format!("there is no parameter `{other}`"),
                )
                .hint("use table, schema, event, filter, select"));
            }
        }
    }
    if asked.table.is_none() && asked.schema.is_none() {
        return Err(no_table());
    }
    Ok(asked)
}

fn no_table() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "no_table", "name a table to listen to")
        .hint("for example /sse/v1/changes?table=patients&filter=id=eq.7")
}

fn event(value: String) -> Result<String, Refusal> {
    match value.to_ascii_uppercase().as_str() {
        "*" | "INSERT" | "UPDATE" | "DELETE" => Ok(value),
        _ => Err(Refusal::new(StatusCode::BAD_REQUEST, "unknown_event", format!("there is no event `{value}`"))
            .hint("use INSERT, UPDATE, DELETE or *")),
    }
}

pub fn full() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_connections", "the server has as many connections as it may")
        .hint("try again later, or raise server.max_connections")
}

fn refused(error: SubscribeError) -> Refusal {
    let text = error.to_string();
    if error.is_away() {
        return Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "database_away", text)
            .hint("try again; /readyz tells when it is back");
    }
    Refusal::new(StatusCode::BAD_REQUEST, "bad_subscription", text)
        .hint("check table, column and publication; filters look like id=eq.7")
}
