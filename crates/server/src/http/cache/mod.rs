//! `/cache/v1/{namespace}/{key}`: GET, PUT, DELETE. [`presence`]: HEAD and preconditions. [`invalidate`]: invalidation by
//! hand. [`batch`]: many keys at once. [`soon`]: storing while the caller goes on.
//!
//! A miss answers 404 with a ticket; the value that was then read is put back with it. `Cache-Status` tells on every answer.
//! Of those who are answered an old value within `stale_while_revalidate`, one has a ticket to put it anew. That there is
//! nothing is known too: 404 without a ticket.

pub mod batch;
pub mod invalidate;
pub mod presence;
mod soon;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::{
    Json,
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde_json::json;
use walcast_engine::{
    Entry, Freshness, Invalidation, Lookup, NewValue, NotStored, Precondition, PutError, PutFailure, Right, Stale, Stored, Tier,
    What, Written,
    model::{CacheKey, Claims, Tag},
};

use crate::http::{App, etag, header_lines, identity::Caller, refusal::Refusal};

const TICKET: HeaderName = HeaderName::from_static("walcast-ticket");
/// On a miss: `lead` computes, `wait` may ask again instead, for somebody computes already.
const COMPUTE: HeaderName = HeaderName::from_static("walcast-compute");
const POSITION: HeaderName = HeaderName::from_static("walcast-position");
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

pub async fn get(
    State(app): State<App>,
    path: Result<Path<(String, String)>, PathRejection>,
    Caller(claims): Caller,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let key = key(&app, path, &claims, Right::Read)?;
    // Whoever may not put a value is not asked to, or the others would wait for him in vain.
    let may_put = app.engine.may_use_namespace(&claims, Right::Write, key.namespace()).is_ok();
    let position = app.engine.position();
    let freshness = freshness(&headers)?;
    // Computed anew, whatever is there.
    let forced = directives(&headers).any(|directive| directive.eq_ignore_ascii_case("no-cache"));
    let look = if forced { None } else { Some(app.engine.cache_get(&key, freshness).await) };
    let mut response = match look {
        Some(Lookup::Hit { entry, tier, stale }) => {
            let now = now_ms();
            // Without the stream nothing could be stored.
            let to_be_put_anew = may_put && stale.is_some_and(|stale| stale != Stale::StreamLost);
            let ticket = if to_be_put_anew { app.engine.cache_refresh_ticket(&key).await } else { None };
            let mut response = hit(&key, &entry, &headers, &told_hit(&entry, tier, stale, now), entry.age(now));
            if let Some(ticket) = ticket {
                response.headers_mut().insert(TICKET, header_value(&ticket));
            }
            response
        }
        Some(Lookup::Miss { reason }) => {
            let leads = may_put && app.engine.cache_should_compute(&key);
            miss(&app, &key, &format!("miss; detail={}", reason.as_str()), reason.as_str(), leads).await
        }
        None => miss(&app, &key, "request; detail=no_cache", "no-cache was asked for", may_put).await,
    };
    response.headers_mut().insert(POSITION, header_value(&position.to_string()));
    Ok(response)
}

fn told_hit(entry: &Entry, tier: Tier, stale: Option<Stale>, now: u64) -> String {
    match stale {
        None if entry.negative => format!("walcast; hit; ttl={}; detail=negative", entry.ttl(now).as_secs()),
        None => format!("walcast; hit; ttl={}; detail={}", entry.ttl(now).as_secs(), tier.as_str()),
        Some(stale) => format!("walcast; hit; stale; detail={}", stale.as_str()),
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

async fn miss(app: &App, key: &CacheKey, forwarded: &str, why: &str, leads: bool) -> Response {
    let refusal = Refusal::new(StatusCode::NOT_FOUND, "miss", format!("{key} is not in the cache: {why}"))
        .hint("read the value in a transaction begun after this answer, then PUT it with the Walcast-Ticket");
    let ticket = app.engine.cache_ticket(key).await;
    let mut response = refusal.into_response();
    let out = response.headers_mut();
    out.insert(CACHE_STATUS, header_value(&format!("walcast; fwd={forwarded}")));
    out.insert(COMPUTE, HeaderValue::from_static(if leads { "lead" } else { "wait" }));
    if let Some(ticket) = ticket {
        out.insert(TICKET, header_value(&ticket));
    }
    response
}

fn hit(key: &CacheKey, entry: &Entry, headers: &HeaderMap, status: &str, age: Duration) -> Response {
    let same = headers.get_all(header::IF_NONE_MATCH).iter().any(|list| etag::matches(list.as_bytes(), &entry.etag));
    let mut response = if entry.negative {
        let refusal = Refusal::new(StatusCode::NOT_FOUND, "negative", format!("{key} is known not to exist"));
        refusal.hint("nothing need be read; a commit on its tags ends this answer, or its time").into_response()
    } else if same {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, header_value(&entry.content_type))], entry.value.clone()).into_response()
    };
    let out = response.headers_mut();
    let tags: Vec<&str> = entry.tags.iter().map(Tag::as_str).collect();
    out.insert(header::ETAG, header_value(&entry.etag));
    out.insert(header::AGE, header_value(&age.as_secs().to_string()));
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    out.insert(CACHE_STATUS, header_value(status));
    out.insert(HeaderName::from_static("cache-tag"), header_value(&tags.join(", ")));
    response
}

pub async fn put(
    State(app): State<App>,
    path: Result<Path<(String, String)>, PathRejection>,
    Caller(claims): Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let key = key(&app, path, &claims, Right::Write)?;
    let limit = app.limits.max_value_bytes;
    let too_large = || {
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "value_too_large", format!("a value has at most {limit} bytes"))
            .hint("split the value, or raise cache.max_value_bytes")
    };
    let value = whole(body, limit).await.ok_or_else(too_large)?;
    let text = |name: &'static str| header_lines::only(&headers, name);
    let written = match (text("walcast-ticket")?, text("walcast-written")?.map(transaction_id).transpose()?) {
        (Some(ticket), _) => Written::Ticket(ticket.to_owned()),
        (None, Some(xid)) => Written::By(xid),
        (None, None) => Written::Unsaid,
    };
    let negative = is_negative(text("walcast-negative")?, &value)?;
    let content_type = text("content-type")?.unwrap_or("application/octet-stream").into();
    let tags = tags(header_lines::joined(&headers, "cache-tag")?.as_deref())?;
    let value = NewValue { value, content_type, tags, ttl: max_age(&headers)?, negative };
    let position = app.engine.position();
    let precondition = presence::precondition(&headers)?;
    // Whoever says what must be there wants to know whether it was.
    let goes_on = matches!(precondition, Precondition::None) && soon::is_preferred(&headers);
    let outcome = match app.engine.cache_begin_put(&key, value, written) {
        Ok(put) if goes_on => match app.engine.cache_put_soon([put]) {
            Ok(()) => return Ok(soon::taken(&position, json!({ "accepted": true }))),
            Err([put]) => app.engine.cache_put(put, &precondition).await,
        },
        Ok(put) => app.engine.cache_put(put, &precondition).await,
        Err(failure) => Err(failure),
    };
    let answer = match outcome {
        Ok(Stored::Yes { .. }) => json!({ "stored": true }),
        Ok(Stored::No(NotStored::Precondition)) => return Err(presence::failed()),
        Ok(Stored::No(refusal)) => json!({ "stored": false, "reason": refusal.as_str() }),
        // The value was good for its reader all the same.
        Err(PutFailure::Ticket(error)) => json!({ "stored": false, "reason": error.code() }),
        Err(PutFailure::UnknownTransaction(_)) => json!({ "stored": false, "reason": "unknown_transaction" }),
        Err(error) => return Err(put_refused(error)),
    };
    Ok(([(POSITION, header_value(&position.to_string()))], Json(answer)).into_response())
}

/// What comes beyond the limit and is read all the same, so that the connection can be used again.
const DRAINED_BYTES: usize = 32 << 20;

/// The body, if it is within the limit. Never holds more than that.
async fn whole(body: Body, limit: usize) -> Option<Bytes> {
    let mut chunks = body.into_data_stream();
    let (mut value, mut read) = (BytesMut::new(), 0_usize);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.ok()?;
        read += chunk.len();
        if read <= limit {
            value.extend_from_slice(&chunk);
        } else if read > limit.saturating_add(DRAINED_BYTES) {
            return None;
        } else {
            value = BytesMut::new();
        }
    }
    (read <= limit).then(|| value.freeze())
}

fn put_refused(error: PutFailure) -> Refusal {
    let text = error.to_string();
    match error {
        PutFailure::TicketRequired(_) => Refusal::new(StatusCode::PRECONDITION_REQUIRED, "ticket_required", text)
            .hint("GET the key first and send back the Walcast-Ticket of its miss"),
        PutFailure::ManyRows => Refusal::new(StatusCode::PRECONDITION_REQUIRED, "ticket_required", text).hint(
            "tag it by unique keys only, or GET the key before the transaction begins and send the Walcast-Ticket of its miss",
        ),
        PutFailure::UntrackedTag(..) => Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "untracked_tag", text)
            .hint("use the table's own tag, index the column, or publish the table"),
        PutFailure::Put(error) => {
            let status = match &error {
                PutError::UnknownNamespace(_) => StatusCode::NOT_FOUND,
                PutError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                PutError::Negative(_) => StatusCode::UNPROCESSABLE_ENTITY,
                PutError::MustWait(_) => StatusCode::CONFLICT,
                _ => StatusCode::BAD_REQUEST,
            };
            let hint = match &error {
                PutError::UnknownNamespace(_) => "name it in walcast.toml",
                PutError::TooLarge { .. } => "split the value, or raise cache.max_value_bytes",
                PutError::TooManyTags { .. } => "tag it by the table",
                PutError::Ttl(_) => "Cache-Control: max-age=300, or leave it out for the namespace's own",
                PutError::ContentType => "Content-Type: application/json",
                PutError::MustWait(_) => "put it again",
                PutError::Negative(_) => "a namespace with a negative_ttl keeps that there is nothing",
            };
            Refusal::new(status, error.code(), text).hint(hint)
        }
        PutFailure::Database(_) => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "database_away", text).hint("the value was not stored; go on without")
        }
        PutFailure::Ticket(_) | PutFailure::UnknownTransaction(_) => Refusal::new(StatusCode::CONFLICT, "not_stored", text),
    }
}

pub async fn delete(
    State(app): State<App>,
    path: Result<Path<(String, String)>, PathRejection>,
    Caller(claims): Caller,
) -> Result<Response, Refusal> {
    let key = key(&app, path, &claims, Right::Invalidate)?;
    let namespace = Some(key.namespace().to_owned());
    invalidate::invalidated(&app, &Invalidation { namespace, what: What::Keys(vec![key]), soft: false }).await
}

/// The caller's key, if he has the right.
fn key(
    app: &App,
    path: Result<Path<(String, String)>, PathRejection>,
    claims: &Claims,
    right: Right,
) -> Result<CacheKey, Refusal> {
    let Path((namespace, key)) = path.map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_key", format!("the path cannot be read: {error}"))
            .hint("a key is one percent-encoded path segment")
    })?;
    Ok(app.engine.cache_key(claims, right, &namespace, &key)?)
}

/// `Walcast-At-Least: <position or transaction id>`.
pub fn freshness(headers: &HeaderMap) -> Result<Freshness, Refusal> {
    let wrong = |why: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_position", why)
            .hint("send a Walcast-Position as it came, or the result of pg_current_xact_id()")
    };
    let text = header_lines::only(headers, "walcast-at-least").map_err(|Refusal(problem)| wrong(problem.title))?;
    let Some(text) = text else { return Ok(Freshness::Any) };
    match text.parse() {
        Ok(0) => return Err(wrong("0 is no transaction id".into())),
        Ok(xid) => return Ok(Freshness::Contains(xid)),
        Err(_) => {}
    }
    let position = text.parse().map_err(|error| wrong(format!("{error}")))?;
    Ok(Freshness::AtLeast(position))
}

fn transaction_id(text: &str) -> Result<u64, Refusal> {
    text.parse().ok().filter(|xid| *xid > 0).ok_or_else(|| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_transaction_id", format!("`{text}` is not a transaction id"))
            .hint("send the result of pg_current_xact_id() of the transaction that wrote")
    })
}

fn tags(header: Option<&str>) -> Result<Vec<Tag>, Refusal> {
    let parts = header.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            Tag::parse(part).map_err(|error| {
                Refusal::new(StatusCode::BAD_REQUEST, "bad_tag", error.to_string()).hint("Cache-Tag: patients:id=7, reports")
            })
        })
        .collect()
}

/// `Walcast-Negative: 1`: there is nothing, so nothing comes with it.
fn is_negative(header: Option<&str>, value: &Bytes) -> Result<bool, Refusal> {
    let refused = |why: &str| {
        Err(Refusal::new(StatusCode::BAD_REQUEST, "bad_negative", why)
            .hint("send Walcast-Negative: 1 and no body where there is nothing; leave it out otherwise"))
    };
    match header {
        None => Ok(false),
        Some("1") if value.is_empty() => Ok(true),
        Some("1") => refused("the value is said not to exist, and has a body"),
        Some(_) => refused("Walcast-Negative is 1 or is not sent"),
    }
}

/// Of `Cache-Control`: names in any case, those that are not ours left unread (RFC 9111).
fn directives(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(header::CACHE_CONTROL).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}

fn max_age(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    header_lines::joined(headers, "cache-control")?;
    let refused = |why: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_max_age", why)
            .hint("Cache-Control: max-age=300, or leave it out for the namespace's own")
    };
    let mut age = None;
    for directive in directives(headers) {
        let (name, value) = directive.split_once('=').map_or((directive, None), |(name, value)| (name, Some(value)));
        if !name.trim().eq_ignore_ascii_case("max-age") {
            continue;
        }
        let digits = value.unwrap_or_default().trim().trim_matches('"');
        let seconds = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
        let seconds = seconds.ok_or_else(|| refused(format!("`{directive}` does not say a number of seconds")))?;
        if let Some(before) = age.replace(seconds).filter(|before| *before != seconds) {
            return Err(refused(format!("Cache-Control says max-age={before} and max-age={seconds}")));
        }
    }
    Ok(age.map(Duration::from_secs))
}

pub fn header_value(text: &str) -> HeaderValue {
    let printable: String = text.chars().map(|c| if (' '..='~').contains(&c) { c } else { '?' }).collect();
    HeaderValue::from_str(&printable).unwrap_or(HeaderValue::from_static(""))
}
