//! The HTTP door: every path, and the state that the handlers share.
//!
//! [`realtime`]: WebSocket for Supabase clients. [`sse`]: event streams. [`cache`], [`query`]: reads.
//! [`health`], [`admin`]: for operators. [`tiers`]: what every answer says of a tier that is away. [`identity`]: who is asking.
//! [`limits`]: how much of it. [`drain`]: how it ends. [`uploads`]: bodies on their way in. [`header_lines`], [`etag`]: what a request's headers say. Errors are [`refusal::Refusal`]s.

pub mod admin;
pub mod cache;
pub mod drain;
pub mod etag;
pub mod explain_visibility;
pub mod header_lines;
pub mod health;
pub mod identity;
pub mod limits;
mod object;
pub mod openapi;
pub mod pages;
pub mod query;
pub mod realtime;
pub mod refusal;
pub mod sse;
pub mod tiers;
pub mod uploads;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{HeaderName, HeaderValue, header},
    response::Response,
    routing::{MethodRouter, delete, get, post},
    serve::ListenerExt,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tower_http::cors::{AllowHeaders, Any, CorsLayer};
use walcast_engine::{Engine, model::Claims};

use drain::Drain;
use limits::{ClientAddress, ConnectionPermit, Limit, LimitRefusal, Limits};
pub use pages::DemoSession;

/// Sent, but not acknowledged for so long: the connection is gone.
const UNHEARD: Duration = Duration::from_secs(60);
/// What requests that are not long have to end in, once the drain is over.
const SHORT_REQUESTS: Duration = Duration::from_secs(5);

/// What the handlers share.
#[derive(Clone)]
pub struct App {
    pub engine: Engine,
    pub limits: Limits,
    pub metrics: PrometheusHandle,
    /// The settings in force as text, without secrets: for a support file.
    pub settings: Arc<str>,
    /// A support file may name people.
    pub shows_people: bool,
    /// Only `walcast dev` serves the demo and its keys.
    pub demo: Option<Arc<DemoSession>>,
    pub sse: Arc<sse::Sse>,
    /// Long connections end themselves when it says so.
    pub drain: Drain,
}

impl App {
    /// A long connection, if limits allow it and the server is not about to end.
    pub fn admit(&self, address: ClientAddress, claims: &Claims) -> Result<ConnectionPermit, LimitRefusal> {
        if self.drain.has_begun() {
            return Err(LimitRefusal::new(Limit::Draining, 0, self.drain.hint().retry));
        }
        self.limits.admit(address, self.engine.tenant_of(claims).as_deref(), self.drain.alive())
    }
}

pub fn router(app: App) -> Router {
    let body_limit = app.limits.max_value_bytes + 1;
    let mut router = Router::new()
        .route("/", get(pages::index))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/realtime/v1/websocket", get(realtime::upgrade))
        .route("/socket/websocket", get(realtime::upgrade))
        .route("/sse/v1/changes", get(sse::changes))
        .route("/sse/v1/ticket", post(sse::ticket::post))
        .route("/admin/v1/sse", get(sse::statistics))
        .route("/query/v1", post(query::batch::post))
        .route("/admin/v1/queries/slow", get(query::slow::get))
        .route("/query/v1/{name}", get(query::get).post(query::post))
        .route("/admin/v1/cache", get(admin::cache))
        .route("/admin/v1/connections", get(admin::connections::connections))
        .route("/admin/v1/connections/{id}", delete(admin::connections::end))
        .route("/admin/v1/subscriptions", get(admin::connections::subscriptions))
        .route("/admin/v1/leaks", get(admin::connections::leaks))
        .route("/admin/v1/realtime", get(admin::realtime::get))
        .route("/admin/v1/explain-visibility", get(explain_visibility::get).post(explain_visibility::post))
        .route("/admin/v1/trace", get(admin::trace::list).post(admin::trace::begin))
        .route("/admin/v1/trace/{id}", get(admin::trace::get).delete(admin::trace::end))
        .route("/admin/v1/support", get(admin::support::get))
        .route("/cache/v1/invalidate", post(cache::invalidate::invalidate))
        .route(
            "/cache/v1/{namespace}/{key}",
            get(cache::get)
                .head(cache::presence::head)
                .post(cache::batch::post)
                .put(cache::put)
                .delete(cache::delete)
                // Browsers ask by OPTIONS, and `from_any_page` answers; of the rest the router would say that every key takes POST.
                .options(cache::batch::method_not_allowed)
                .fallback(cache::batch::method_not_allowed)
                .layer(DefaultBodyLimit::max(body_limit)),
        )
        .route("/rest/v1", elsewhere())
        .route("/rest/v1/{*rest}", elsewhere())
        .route("/auth/v1/{*rest}", elsewhere())
        .route("/storage/v1/{*rest}", elsewhere())
        // Before the layer, which answers OPTIONS also where only other methods are refused.
        .method_not_allowed_fallback(pages::method_not_allowed)
        .layer(from_any_page())
        .layer(axum::middleware::from_fn_with_state(app.clone(), sse::asker::credentials));
    if app.demo.is_some() {
        // Without a word to other origins: the page's own keys are for the page.
        router = router
            .route("/demo", get(pages::demo_index))
            .route("/demo/session.json", get(pages::demo_session))
            .route("/demo/{*file}", get(pages::demo_file));
    }
    router
        .method_not_allowed_fallback(pages::method_not_allowed)
        .fallback(pages::not_found)
        .layer(axum::middleware::from_fn_with_state(uploads::Uploads::default(), uploads::bound))
        .layer(axum::middleware::map_response_with_state(app.clone(), tiers::tell))
        .layer(axum::middleware::map_response(common_headers))
        .with_state(app)
}

/// Supabase's other services: whatever a client of theirs may send.
fn elsewhere() -> MethodRouter<App> {
    get(pages::elsewhere).post(pages::elsewhere).put(pages::elsewhere).patch(pages::elsewhere).delete(pages::elsewhere)
}

/// Tokens travel in headers, so any page may ask; it learns nothing without one. A cookie counts for event streams alone,
/// and for pages of allowed origins: [`sse::asker::credentials`].
fn from_any_page() -> CorsLayer {
    let told = [
        "cache-status",
        "walcast-position",
        "preference-applied",
        "walcast-ticket",
        "walcast-compute",
        "walcast-ttl",
        "walcast-next",
        "cache-tag",
        "etag",
        "age",
        "link",
        "retry-after",
    ];
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods(Any)
        // By name: a `*` does not stand for `Authorization`.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(told.map(HeaderName::from_static))
        .max_age(Duration::from_secs(3600))
}

async fn common_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A listener, or one clear sentence about the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("{address} is taken by another program; choose another address with --server.listen or WALCAST_LISTEN")
        }
        _ => format!("cannot listen on {address}: {error}"),
    })
}

/// Serves until the drain is over, then lets short requests end.
pub async fn serve(listener: TcpListener, app: App) -> std::io::Result<()> {
    let drain = app.drain.clone();
    let listener = listener.tap_io(|connection| {
        // Else an event that follows another at once waits until the client acknowledges the first: up to 40 ms.
        let _ = connection.set_nodelay(true);
        // A client that vanished without a word, or that reads nothing of what is sent it, is found by our own pings
        // and positions that it leaves unacknowledged. Else Linux would try for a quarter of an hour.
        let _ = socket2::SockRef::from(&*connection).set_tcp_user_timeout(Some(UNHEARD));
    });
    let over = drain.clone();
    let router = router(app).into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, router).with_graceful_shutdown(async move { over.over().await });
    tokio::select! {
        ended = served => ended,
        () = async {
            drain.over().await;
            tokio::time::sleep(SHORT_REQUESTS).await;
        } => Ok(()),
    }
}
