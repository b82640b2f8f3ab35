//! `GET /sse/v1/changes`: row changes as server-sent events, for `EventSource` and curl.
//!
//! The id of each event is its position; `Last-Event-ID` resumes. The first event is `live`, `resumed` or `resync`.
//! [`resource`]: what is listened to. [`asker`]: by whom. [`ticket`]: for those who can set no header. [`streams`]: how
//! many there are, and `GET /admin/v1/sse`. [`stream`]: one stream's life.

pub mod asker;
mod resource;
mod stream;
mod streams;
pub mod ticket;

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde_json::Value;
use walcast_engine::{
    Shape, SubscribeError, SubscribeRequest, Vital,
    model::Claims,
    registry::{Kind, NewConnection},
};

use crate::{
    http::{App, admin::Operator, limits::ClientAddress, refusal::Refusal},
    settings::Settings,
};
use asker::Asker;
use resource::Resource;
use stream::Live;
use streams::Streams;
use ticket::Tickets;

/// What all streams share.
#[derive(Debug)]
pub struct Sse {
    tickets: Tickets,
    streams: Arc<Streams>,
    cookie: Option<String>,
    allowed_origins: Vec<String>,
}

impl Sse {
    /// `secret` seals tickets.
    pub fn new(settings: &Settings, secret: &str) -> Sse {
        Sse {
            tickets: Tickets::new(secret),
            streams: Arc::new(Streams::new(settings.sse.max_streams_per_resource)),
            cookie: settings.sse.cookie.clone(),
            allowed_origins: settings.server.allowed_origins.clone(),
        }
    }
}

pub async fn changes(State(app): State<App>, address: ClientAddress, uri: Uri, headers: HeaderMap) -> Result<Response, Response> {
    let refused = |refusal: Refusal| refusal.into_response();
    let resource = Resource::parse(&uri);
    let Asker { claims, expires_at } = Asker::of(&app, resource.as_ref().ok(), &headers, &uri).map_err(refused)?;
    let resource = resource.map_err(refused)?;
    let after = cursor(&resource, &headers).map_err(refused)?;
    let permit = app.admit(address, &claims).map_err(IntoResponse::into_response)?;
    let watched = resource.watched();
    let tenant = app.engine.tenant_of(&claims);
    let topic = permit.join(&watched, tenant.as_deref()).map_err(IntoResponse::into_response)?;
    let open = app.sse.streams.open(&watched, &user(&claims, address)).map_err(IntoResponse::into_response)?;

    let (sender, reader) = app.engine.outbox();
    let listed = app.engine.registry().connect(NewConnection {
        kind: Kind::Sse,
        app: resource.app.as_deref(),
        component: resource.component.as_deref(),
        claims: &claims,
        peer: address.ip(),
        outbox: sender.clone(),
    });
    let asked = vec![resource.asked];
    let listing = listed.list("sse:changes".into(), None, &claims, &asked);
    let request = SubscribeRequest { claims, asked, shape: Shape::Sse, outbox: sender, listed: listing.entry(), after };
    let opened = app.engine.subscribe(request).await.map_err(|error| {
        listed.error(Vital::JoinRefused);
        refused(not_subscribed(&error))
    })?;
    listed.joined(&listing.topic);
    let first = vec![stream::retry(), opened.sse_opening()];
    let handle = opened.release(first);
    let body = stream::body(Live { app, reader, handle, open, permit, _topic: topic, expires_at, listed, _listing: listing });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        // Proxies that store, compress or buffer would hold events back.
        (header::CACHE_CONTROL, "no-cache, no-transform"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, body).into_response())
}

/// `GET /admin/v1/sse`: the streams by what they listen to.
pub async fn statistics(_: Operator, State(app): State<App>) -> Json<Value> {
    Json(app.sse.streams.report())
}

/// Who listens: a token without a subject may be everybody's, as Supabase's `anon` key is, so there an address is a user.
fn user(claims: &Claims, address: ClientAddress) -> String {
    match claims.subject() {
        Some(subject) => format!("sub {subject}"),
        None => format!("{} {}", claims.role(), address.counted()),
    }
}

fn cursor(resource: &Resource, headers: &HeaderMap) -> Result<Option<walcast_engine::model::Position>, Refusal> {
    let header = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let Some(last) = header.or(resource.last_event_id.as_deref()).filter(|text| !text.is_empty()) else { return Ok(None) };
    last.parse().map(Some).map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_position", format!("{error}"))
            .hint("send back the `id` of an event as it came, or leave Last-Event-ID out")
    })
}

fn not_subscribed(error: &SubscribeError) -> Refusal {
    let text = error.to_string();
    if error.is_away() {
        return Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "database_away", text)
            .hint("try again; /readyz tells when it is back");
    }
    Refusal::new(StatusCode::BAD_REQUEST, "bad_subscription", text)
        .hint("check table, column and publication; filters look like id=eq.7")
}
