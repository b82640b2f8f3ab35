//! `POST /cache/v1/{namespace}/mget` and `mset`: many keys of one namespace in one request.
//!
//! Answers in the order asked, with one statement for what memory has not. One entry's failure is told beside the others
//! and never fails them. JSON values stand in the answer as they were stored; all else is base64.

use std::time::Duration;

use axum::{
    Json,
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::future::join_all;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{json, value::RawValue};
use walcast_engine::{
    Entry, Lookup, NewValue, Precondition, Put, PutFailure, Right, Stale, Stored, Written,
    model::{CacheKey, Claims, Tag},
};

use super::{POSITION, freshness, header_value, now_ms, put_refused, soon, whole};
use crate::{
    http::{App, identity::Caller, object, pages, refusal::Refusal},
    settings::parse_ttl,
};

/// Keys of one request.
const MOST_KEYS: usize = 256;
/// Bytes of one request or answer, unless one value may have more.
const MOST_BYTES: usize = 16 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mget {
    keys: Vec<String>,
}

#[derive(Serialize)]
struct Found<'a> {
    key: &'a str,
    status: &'static str,
    /// Known not to exist: there is no value, and no ticket is needed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    negative: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    age_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<Vec<&'a str>>,
    /// Of a miss, and of what is to be made anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    ticket: Option<String>,
}

/// Where a key stands in the path: keys may be called `mget` too, and are read and put under that name.
pub async fn post(
    State(app): State<App>,
    path: Result<Path<(String, String)>, PathRejection>,
    Caller(claims): Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let unreadable = |error| Refusal::new(StatusCode::BAD_REQUEST, "bad_key", format!("the path cannot be read: {error}"));
    let Path((namespace, what)) = path.map_err(unreadable)?;
    if !matches!(what.as_str(), "mget" | "mset") {
        let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "a key takes GET, HEAD, PUT and DELETE")
            .hint("POST is for /cache/v1/{namespace}/mget and mset");
        return Ok(([(header::ALLOW, OF_KEYS)], refusal).into_response());
    }
    let right = if what == "mget" { Right::Read } else { Right::Write };
    app.engine.may_use_namespace(&claims, right, &namespace)?;
    freshness(&headers)?;
    let body = read(&app, body).await?;
    let keys = Keys { app: &app, claims: &claims, right, namespace: &namespace };
    if right == Right::Read { mget(&keys, &headers, &body).await } else { mset(&keys, &headers, &body).await }
}

/// What a key takes, though the router sends POST here for each.
const OF_KEYS: &str = "GET, HEAD, PUT, DELETE";

/// Any other method: the router alone would say that every key takes POST.
pub async fn method_not_allowed(method: Method, uri: Uri) -> Response {
    let is_batch = ["/mget", "/mset"].iter().any(|end| uri.path().ends_with(end));
    let allow = if is_batch { "GET, HEAD, POST, PUT, DELETE" } else { OF_KEYS };
    ([(header::ALLOW, allow)], pages::method_not_allowed(method, uri).await).into_response()
}

/// Makes the caller's keys.
struct Keys<'a> {
    app: &'a App,
    claims: &'a Claims,
    right: Right,
    namespace: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> Result<CacheKey, Refusal> {
        Ok(self.app.engine.cache_key(self.claims, self.right, self.namespace, key)?)
    }
}

async fn mget(of: &Keys<'_>, headers: &HeaderMap, body: &[u8]) -> Result<Response, Refusal> {
    let app = of.app;
    let asked: Mget = object::read(body).map_err(|error| bad_body(&error, "{\"keys\": [\"a\", \"b\"]}"))?;
    few(asked.keys.len())?;
    let keys: Vec<CacheKey> = asked.keys.iter().map(|key| of.key(key)).collect::<Result<_, _>>()?;
    let position = app.engine.position();
    let looks = app.engine.cache_get_many(&keys, freshness(headers)?).await;
    let bytes: usize = looks.iter().map(|look| if let Lookup::Hit { entry, .. } = look { entry.value.len() } else { 0 }).sum();
    if bytes > most_bytes(app) {
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "answer_too_large", format!("the values have {bytes} bytes"))
            .hint("ask for fewer keys at a time"));
    }
    // Without the stream nothing could be stored.
    let needs = |look: &Lookup| match look {
        Lookup::Miss { .. } => true,
        Lookup::Hit { stale, .. } => stale.is_some_and(|stale| stale != Stale::StreamLost),
    };
    let unfilled: Vec<&CacheKey> = keys.iter().zip(&looks).filter(|(_, look)| needs(look)).map(|(key, _)| key).collect();
    let mut tickets = app.engine.cache_tickets(&unfilled).await.into_iter();
    let now = now_ms();
    let entries: Vec<Found<'_>> = asked
        .keys
        .iter()
        .zip(&looks)
        .map(|(key, look)| {
            let ticket = if needs(look) { tickets.next().flatten() } else { None };
            match look {
                Lookup::Hit { entry, stale, .. } => found(key, if stale.is_some() { "stale" } else { "hit" }, entry, now, ticket),
                Lookup::Miss { .. } => Found {
                    key,
                    status: "miss",
                    negative: false,
                    value: None,
                    value_base64: None,
                    content_type: None,
                    age_ms: None,
                    ttl_ms: None,
                    tags: None,
                    ticket,
                },
            }
        })
        .collect();
    #[derive(Serialize)]
    struct Answer<'a> {
        entries: Vec<Found<'a>>,
    }
    Ok(([(POSITION, header_value(&position.to_string()))], Json(Answer { entries })).into_response())
}

fn found<'a>(key: &'a str, status: &'static str, entry: &'a Entry, now: u64, ticket: Option<String>) -> Found<'a> {
    // What calls itself JSON and is none is somebody's bytes like any other.
    let value = if is_json(&entry.content_type) { serde_json::from_slice(&entry.value).ok() } else { None };
    Found {
        key,
        status,
        negative: entry.negative,
        value,
        value_base64: (value.is_none() && !entry.negative).then(|| BASE64_STANDARD.encode(&entry.value)),
        content_type: (!entry.negative).then_some(&entry.content_type),
        age_ms: Some(entry.age(now).as_millis() as u64),
        ttl_ms: Some(entry.ttl(now).as_millis() as u64),
        tags: Some(entry.tags.iter().map(Tag::as_str).collect()),
        ticket,
    }
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mset<'a> {
    #[serde(borrow)]
    entries: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct New<'a> {
    key: String,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    value_base64: Option<String>,
    content_type: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    ttl_ms: Option<u64>,
    ttl: Option<Ttl>,
    ticket: Option<String>,
    written: Option<u64>,
    /// There is nothing, and that is kept.
    #[serde(default)]
    negative: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ttl {
    Seconds(u64),
    /// `long`, `90m`.
    Said(String),
}

/// `null` is a value too.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(json: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(json).map(Some)
}

/// The key alone, of an entry of which the rest cannot be read.
#[derive(Deserialize)]
struct Keyed {
    key: String,
}

#[derive(Serialize)]
struct Outcome {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<bool>,
    /// In place of `stored`, where storing goes on without the caller.
    #[serde(skip_serializing_if = "Option::is_none")]
    accepted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What is wrong with the entry, where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Outcome {
    fn stored(key: String) -> Outcome {
        Outcome { key: Some(key), stored: Some(true), accepted: None, reason: None, detail: None }
    }

    fn not_stored(key: String, reason: &str) -> Outcome {
        Outcome { key: Some(key), stored: Some(false), accepted: None, reason: Some(reason.to_owned()), detail: None }
    }

    fn refused(key: Option<String>, refusal: &Refusal) -> Outcome {
        let (reason, detail) = (refusal.0.code.clone(), refusal.0.title.clone());
        Outcome { key, stored: Some(false), accepted: None, reason: Some(reason), detail: Some(detail) }
    }

    fn of(key: String, outcome: Result<Stored, PutFailure>) -> Outcome {
        match outcome {
            Ok(Stored::Yes { .. }) => Outcome::stored(key),
            Ok(Stored::No(refusal)) => Outcome::not_stored(key, refusal.as_str()),
            Err(PutFailure::Ticket(error)) => Outcome::not_stored(key, error.code()),
            Err(PutFailure::UnknownTransaction(_)) => Outcome::not_stored(key, "unknown_transaction"),
            Err(error) => Outcome::refused(Some(key), &put_refused(error)),
        }
    }

    /// Taken, if nothing is known against it.
    fn soon(self) -> Outcome {
        Outcome { accepted: self.stored, stored: None, ..self }
    }
}

async fn mset(of: &Keys<'_>, headers: &HeaderMap, body: &[u8]) -> Result<Response, Refusal> {
    let example = "{\"entries\": [{\"key\": \"a\", \"value\": {}, \"ticket\": \"…\"}]}";
    let asked: Mset<'_> = object::read(body).map_err(|error| bad_body(&error, example))?;
    few(asked.entries.len())?;
    let engine = &of.app.engine;
    let position = engine.position();
    let (mut results, mut names, mut puts) = (Vec::new(), Vec::new(), Vec::new());
    for raw in &asked.entries {
        match begin(of, raw) {
            Ok((name, put)) => {
                names.push(name.clone());
                puts.push(put);
                results.push(Outcome::stored(name));
            }
            Err(outcome) => results.push(outcome),
        }
    }
    if soon::is_preferred(headers) && !puts.is_empty() {
        match engine.cache_put_soon(puts) {
            Ok(()) => {
                let results: Vec<Outcome> = results.into_iter().map(Outcome::soon).collect();
                return Ok(soon::taken(&position, json!({ "results": results })));
            }
            Err(back) => puts = back,
        }
    }
    let outcomes = join_all(puts.into_iter().map(|put| engine.cache_put(put, &Precondition::None))).await;
    let mut outcomes = names.into_iter().zip(outcomes);
    for result in results.iter_mut().filter(|result| result.stored == Some(true)) {
        if let Some((name, outcome)) = outcomes.next() {
            *result = Outcome::of(name, outcome);
        }
    }
    Ok(([(POSITION, header_value(&position.to_string()))], Json(json!({ "results": results }))).into_response())
}

/// One entry, or what is wrong with it.
fn begin(of: &Keys<'_>, raw: &RawValue) -> Result<(String, Put), Outcome> {
    let new: New<'_> = object::read(raw.get().as_bytes()).map_err(|error| {
        let key = object::read(raw.get().as_bytes()).ok().map(|keyed: Keyed| keyed.key);
        Outcome::refused(key, &bad_entry(format!("the entry cannot be read: {error}")))
    })?;
    let name = new.key.clone();
    let (key, value, written) = parts(of, new).map_err(|refusal| Outcome::refused(Some(name.clone()), &refusal))?;
    match of.app.engine.cache_begin_put(&key, value, written) {
        Ok(put) => Ok((name, put)),
        Err(failure) => Err(Outcome::of(name, Err(failure))),
    }
}

fn parts(of: &Keys<'_>, new: New<'_>) -> Result<(CacheKey, NewValue, Written), Refusal> {
    let key = of.key(&new.key)?;
    let (value, content_type): (Bytes, String) = match (new.value, new.value_base64) {
        (Some(value), None) => {
            let content_type = new.content_type.unwrap_or_else(|| "application/json".to_owned());
            if !is_json(&content_type) {
                return Err(bad_entry(format!("`value` is JSON, and {content_type} is not: send value_base64")));
            }
            (value.get().to_owned().into(), content_type)
        }
        (None, Some(text)) => {
            let bytes = BASE64_STANDARD.decode(text).map_err(|error| bad_entry(format!("value_base64: {error}")))?;
            (bytes.into(), new.content_type.unwrap_or_else(|| "application/octet-stream".to_owned()))
        }
        (None, None) if new.negative => (Bytes::new(), "application/octet-stream".to_owned()),
        _ => return Err(bad_entry("an entry has either `value` or `value_base64`, or says `negative`".to_owned())),
    };
    if new.negative && !value.is_empty() {
        return Err(bad_entry("the value is said not to exist, and is there".to_owned()));
    }
    let tags = new.tags.iter().map(|tag| Tag::parse(tag)).collect::<Result<Vec<_>, _>>();
    let tags = tags.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "bad_tag", error.to_string()))?;
    let ttl = match (new.ttl_ms, new.ttl) {
        (Some(_), Some(_)) => return Err(bad_entry("an entry has either `ttl_ms` or `ttl`".to_owned())),
        (Some(ms), None) => Some(Duration::from_millis(ms)),
        (None, Some(Ttl::Seconds(seconds))) => Some(Duration::from_secs(seconds)),
        (None, Some(Ttl::Said(text))) => Some(parse_ttl(&text).ok_or_else(|| {
            bad_entry(format!(
                "`ttl` is {text:?}, and neither seconds, a duration such as 90m, nor short, medium, long or very_long"
            ))
        })?),
        (None, None) => None,
    };
    let written = match (new.ticket, new.written) {
        (Some(_), Some(_)) => return Err(bad_entry("an entry has either `ticket` or `written`".to_owned())),
        (Some(ticket), None) => Written::Ticket(ticket),
        (None, Some(xid)) => Written::By(xid),
        (None, None) => Written::Unsaid,
    };
    Ok((key, NewValue { value, content_type: content_type.into(), tags, ttl, negative: new.negative }, written))
}

async fn read(app: &App, body: Body) -> Result<Bytes, Refusal> {
    let most = most_bytes(app);
    whole(body, most).await.ok_or_else(|| {
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "batch_too_large", format!("a batch has at most {most} bytes"))
            .hint("send fewer entries at a time")
    })
}

/// Room for at least one value of the largest size, in base64.
fn most_bytes(app: &App) -> usize {
    MOST_BYTES.max(app.limits.max_value_bytes.saturating_mul(2))
}

fn few(count: usize) -> Result<(), Refusal> {
    match count {
        0 => Err(Refusal::new(StatusCode::BAD_REQUEST, "nothing_named", "the batch is empty").hint("name at least one key")),
        1..=MOST_KEYS => Ok(()),
        _ => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "too_many_keys",
            format!("the batch has {count} keys; at most {MOST_KEYS} are taken"),
        )
        .hint("split the request")),
    }
}

fn bad_body(error: &serde_json::Error, example: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bad_body", format!("the body cannot be read: {error}")).hint(format!("send {example}"))
}

fn bad_entry(why: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bad_entry", why)
}
