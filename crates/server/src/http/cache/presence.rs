//! What is there: HEAD, and the preconditions of a PUT (`If-Match`, `If-None-Match: *`).
//!
//! HEAD tells presence and time to live, and gives no ticket: whoever wants to fill asks with GET. A precondition is
//! tested on this node, in one step with storing: of two who replace the same entry one is answered 412.

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use walcast_engine::{Lookup, Precondition, Right};

use super::{CACHE_STATUS, POSITION, TICKET, freshness, header_value, hit, key, now_ms, told_hit};
use crate::http::{App, identity::Caller, refusal::Refusal};

pub const TTL: HeaderName = HeaderName::from_static("walcast-ttl");

pub async fn head(
    State(app): State<App>,
    path: Result<Path<(String, String)>, PathRejection>,
    Caller(claims): Caller,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let key = key(&app, path, &claims, Right::Read)?;
    let position = app.engine.position();
    let mut response = match app.engine.cache_get(&key, freshness(&headers)?).await {
        Lookup::Hit { entry, tier, stale } => {
            let now = now_ms();
            let mut response = hit(&key, &entry, &headers, &told_hit(&entry, tier, stale, now), entry.age(now));
            response.headers_mut().insert(TTL, header_value(&entry.ttl(now).as_secs().to_string()));
            response
        }
        Lookup::Miss { reason } => {
            let mut response = StatusCode::NOT_FOUND.into_response();
            let status = format!("walcast; fwd=miss; detail={}", reason.as_str());
            response.headers_mut().insert(CACHE_STATUS, header_value(&status));
            response
        }
    };
    let out = response.headers_mut();
    out.remove(TICKET);
    out.insert(POSITION, header_value(&position.to_string()));
    Ok(response)
}

pub fn precondition(headers: &HeaderMap) -> Result<Precondition, Refusal> {
    let wrong = |why: &str| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_precondition", why)
            .hint("send If-Match with the ETag of a GET, or If-None-Match: * to store only what is absent")
    };
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or_default().trim());
    let absent = match text(header::IF_NONE_MATCH) {
        None => false,
        Some("*") => true,
        Some(_) => return Err(wrong("If-None-Match of a PUT is `*`")),
    };
    let Some(matches) = text(header::IF_MATCH) else {
        return Ok(if absent { Precondition::Absent } else { Precondition::None });
    };
    let etags: Vec<_> = matches.split(',').map(str::trim).collect();
    // A weak one never matches, says RFC 9110, and a list of nothing but those would only puzzle.
    if matches != "*" && !etags.iter().all(|etag| is_strong(etag)) {
        return Err(wrong("If-Match takes quoted ETags"));
    }
    match matches {
        // Both are asked, says RFC 9110, and never are both so.
        _ if absent => Err(failed()),
        "*" => Ok(Precondition::Present),
        _ => Ok(Precondition::Matches(etags.into_iter().map(Into::into).collect())),
    }
}

fn is_strong(etag: &str) -> bool {
    let within = etag.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    within.is_some_and(|text| text.bytes().all(|b| b.is_ascii_graphic() && b != b'"'))
}

pub fn failed() -> Refusal {
    Refusal::new(
        StatusCode::PRECONDITION_FAILED,
        "precondition_failed",
        "what is in the cache is not what the request said must be",
    )
    .hint("GET the entry, and PUT with its ETag")
}
