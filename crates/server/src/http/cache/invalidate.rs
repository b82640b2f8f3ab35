//! `POST /cache/v1/invalidate`, and what DELETE does: invalidation by hand.
//!
//! A request names one thing: keys, tags, a pattern, a table, a namespace, or everything; a namespace beside one of the
//! others narrows it. Answered when it holds on this node, with the position from which it holds everywhere.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::json;
use walcast_engine::{
    InvalidateError, Invalidation, NamespaceError, Right, What,
    model::{CacheKey, Claims, TableName, Tag},
};

use super::{POSITION, header_value};
use crate::http::{App, identity::Caller, object, refusal::Refusal};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    #[serde(default, deserialize_with = "given")]
    namespace: Option<String>,
    #[serde(default, deserialize_with = "given")]
    keys: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    tags: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given", rename = "match")]
    matching: Option<Matching>,
    #[serde(default, deserialize_with = "given")]
    pattern: Option<String>,
    #[serde(default, deserialize_with = "given")]
    table: Option<String>,
    #[serde(default)]
    everything: bool,
    #[serde(default)]
    soft: bool,
    #[serde(default)]
    dry_run: bool,
}

/// Null is not the same as absent: a namespace that somebody forgot to fill in would reach into every one.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(json: D) -> Result<Option<T>, D::Error> {
    T::deserialize(json).map(Some)
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Matching {
    Any,
    All,
}

const EXAMPLES: &str = "send {\"tags\": [\"patients:id=7\"]}, {\"namespace\": \"n\", \"keys\": [\"k\"]}, {\"namespace\": \"n\", \"pattern\": \"user:7:*\"}, \
                        {\"table\": \"patients\"}, {\"namespace\": \"n\"} or {\"everything\": true}";

pub async fn invalidate(State(app): State<App>, Caller(claims): Caller, body: Bytes) -> Result<Response, Refusal> {
    let asked: Asked = object::read(&body).map_err(|error| wrong("bad_body", format!("the body cannot be read: {error}")))?;
    let invalidation = understood(&app, &claims, &asked)?;
    if asked.dry_run { surveyed(&app, &claims, &invalidation).await } else { invalidated(&app, &invalidation).await }
}

fn wrong(code: &str, why: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, code, why).hint(EXAMPLES)
}

fn understood(app: &App, claims: &Claims, asked: &Asked) -> Result<Invalidation, Refusal> {
    let empty = |list: &Option<Vec<String>>| list.as_ref().is_some_and(Vec::is_empty);
    if empty(&asked.keys) || empty(&asked.tags) {
        return Err(wrong("nothing_named", "a list of keys or tags is empty"));
    }
    let named = [asked.keys.is_some(), asked.tags.is_some(), asked.pattern.is_some(), asked.table.is_some(), asked.everything];
    match named.iter().filter(|is_named| **is_named).count() {
        0 if asked.namespace.is_none() => return Err(wrong("nothing_named", "the request names nothing to invalidate")),
        0 | 1 => {}
        _ => return Err(wrong("one_at_a_time", "a request names one of keys, tags, pattern, table and everything")),
    }
    if asked.everything && asked.namespace.is_some() {
        return Err(wrong("one_at_a_time", "everything is more than a namespace; leave one of them out"));
    }
    if asked.matching.is_some() && asked.tags.is_none() {
        return Err(wrong("match_without_tags", "`match` says how tags are meant, and there are none"));
    }
    if asked.keys.is_some() && asked.namespace.is_none() {
        return Err(wrong("namespace_required", "keys need their namespace"));
    }
    match &asked.namespace {
        Some(namespace) => {
            app.engine.may_use_namespace(claims, Right::Invalidate, namespace).map_err(|error| match error {
                NamespaceError::Key(error) => wrong("bad_namespace", error.to_string()),
                other => other.into(),
            })?;
        }
        None if claims.role() != "service_role" => {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "role_not_allowed",
                "without a namespace it reaches into every one; this role may not do that",
            )
            .hint("use a service_role token, or name a namespace that this role may use"));
        }
        None => {}
    }
    Ok(Invalidation { namespace: asked.namespace.clone(), what: what(asked)?, soft: asked.soft })
}

fn what(asked: &Asked) -> Result<What, Refusal> {
    if let (Some(keys), Some(namespace)) = (&asked.keys, &asked.namespace) {
        let key = |key: &String| CacheKey::new(namespace, key).map_err(|error| wrong("bad_key", error.to_string()));
        return Ok(What::Keys(keys.iter().map(key).collect::<Result<_, _>>()?));
    }
    if let Some(tags) = &asked.tags {
        let tag = |tag: &String| Tag::parse(tag).map_err(|error| wrong("bad_tag", error.to_string()));
        let tags = tags.iter().map(tag).collect::<Result<_, _>>()?;
        return Ok(if asked.matching == Some(Matching::All) { What::AllOf(tags) } else { What::AnyOf(tags) });
    }
    if let Some(pattern) = &asked.pattern {
        return Ok(What::KeysLike(pattern.parse().map_err(|error| wrong("bad_pattern", format!("{error}")))?));
    }
    Ok(asked.table.as_ref().map_or(What::All, |table| What::Table(TableName::parse(table))))
}

/// Does it, and answers when it holds here.
pub async fn invalidated(app: &App, asked: &Invalidation) -> Result<Response, Refusal> {
    let done = app.engine.invalidate(asked).await.map_err(refused)?;
    let position = done.position.to_string();
    let answer = json!({ "invalidated": done.found.entries, "estimate": done.found.estimate, "position": position });
    Ok(([(POSITION, header_value(&position))], Json(answer)).into_response())
}

async fn surveyed(app: &App, claims: &Claims, asked: &Invalidation) -> Result<Response, Refusal> {
    let position = app.engine.position().to_string();
    let found = app.engine.survey_invalidation(asked).await.map_err(refused)?;
    let mut answer = json!({ "invalidated": found.entries, "estimate": found.estimate, "position": position, "dry_run": true });
    if app.engine.may_list_keys(claims, asked.namespace.as_deref()) {
        answer["sample"] = found.sample.iter().map(ToString::to_string).collect();
    }
    Ok(([(POSITION, header_value(&position))], Json(answer)).into_response())
}

fn refused(error: InvalidateError) -> Refusal {
    let text = error.to_string();
    match error {
        InvalidateError::TooMany(_) => Refusal::new(StatusCode::BAD_REQUEST, "too_many_names", text).hint("split the request"),
        InvalidateError::UnknownTable(_) => Refusal::new(StatusCode::NOT_FOUND, "unknown_table", text)
            .hint("a table that is gone took its entries with it; for tags of your own send {\"tags\": […]}"),
        InvalidateError::Unheard(_) => Refusal::new(StatusCode::GATEWAY_TIMEOUT, "not_heard_yet", text)
            .hint("it takes effect when the stream comes to it; /readyz shows the lag"),
        InvalidateError::Database(_) => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "database_away", text).hint("nothing was invalidated; try again")
        }
    }
}
