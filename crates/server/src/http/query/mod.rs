//! `/query/v1/{name}`: named queries as JSON rows, cached until a row behind them changes.
//!
//! [`batch`]: `POST /query/v1`, many at once. [`lines`]: rows of any number, as NDJSON. [`slow`]: what took long.

pub mod batch;
pub mod lines;
pub mod slow;

use std::{collections::HashMap, fmt::Write};

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use walcast_engine::{Expiry, How, QueryAnswer, QueryFailure, model::Claims};

use crate::http::{
    App,
    cache::{freshness, header_value},
    etag,
    identity::{Caller, query_pairs},
    refusal::Refusal,
};

const NEXT: HeaderName = HeaderName::from_static("walcast-next");

pub async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
    Caller(claims): Caller,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let pairs: Vec<(String, String)> = query_pairs(&uri).into_iter().filter(|(key, _)| key != "apikey").collect();
    let params = pairs.iter().cloned().collect();
    answer(&app, &name, &claims, params, &headers, Some((&uri, &pairs))).await
}

pub async fn post(
    State(app): State<App>,
    Path(name): Path<String>,
    Caller(claims): Caller,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let wrong = |why: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_body", why)
            .hint("send a JSON object of parameters, such as {\"patient_id\": 7}")
    };
    let body: Value = if body.is_empty() {
        Value::Object(serde_json::Map::new())
    } else {
        serde_json::from_slice(&body).map_err(|error| wrong(format!("the body is not JSON: {error}")))?
    };
    let Value::Object(map) = body else { return Err(wrong("the body is not a JSON object".into())) };
    answer(&app, &name, &claims, texts(map), &headers, None).await
}

/// Parameters as PostgreSQL reads them; null means: not given. A list of scalars is an array.
fn texts(map: serde_json::Map<String, Value>) -> HashMap<String, String> {
    let text = |value: Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        Value::Array(items) => Some(array(&items).unwrap_or_else(|| Value::Array(items).to_string())),
        other => Some(other.to_string()),
    };
    map.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect()
}

/// `{"a","b"}`, PostgreSQL's own form; None if an item is no scalar, and the list can only be meant as JSON.
fn array(items: &[Value]) -> Option<String> {
    let mut text = String::from("{");
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        match item {
            Value::Null => text.push_str("NULL"),
            Value::String(item) => {
                let _ = write!(text, "\"{}\"", item.replace('\\', "\\\\").replace('"', "\\\""));
            }
            Value::Bool(_) | Value::Number(_) => {
                let _ = write!(text, "{item}");
            }
            Value::Array(_) | Value::Object(_) => return None,
        }
    }
    text.push('}');
    Some(text)
}

async fn answer(
    app: &App,
    name: &str,
    claims: &Claims,
    params: HashMap<String, String>,
    headers: &HeaderMap,
    link: Option<(&Uri, &[(String, String)])>,
) -> Result<Response, Refusal> {
    let freshness = freshness(headers)?;
    app.engine.can_come(freshness).await?;
    if lines::wanted(headers) {
        return lines::answer(app, name, claims, &params, freshness).await;
    }
    let answer = app.engine.query(name, claims, &params, freshness).await.map_err(refused)?;
    let same = headers.get_all(header::IF_NONE_MATCH).iter().any(|list| etag::matches(list.as_bytes(), &answer.etag));
    let mut response = if same { StatusCode::NOT_MODIFIED.into_response() } else { answer.body.clone().into_response() };
    let out = response.headers_mut();
    if !same {
        out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    out.insert(header::ETAG, header_value(&answer.etag));
    out.insert(header::CACHE_CONTROL, header_value(&cache_control(answer.expiry)));
    out.insert(header::VARY, HeaderValue::from_static("authorization, apikey, accept, walcast-at-least"));
    out.insert(header::AGE, header_value(&answer.age.as_secs().to_string()));
    out.insert(HeaderName::from_static("cache-status"), header_value(&cache_status(&answer)));
    out.insert(HeaderName::from_static("walcast-position"), header_value(&answer.position.to_string()));
    if let Some(next) = &answer.next {
        out.insert(NEXT, header_value(next));
        if let Some((uri, pairs)) = link {
            out.insert(header::LINK, header_value(&format!("<{}>; rel=\"next\"", next_page(uri, pairs, next))));
        }
    }
    Ok(response)
}

/// The same request for the next page, without the key that an URL may have carried.
fn next_page(uri: &Uri, pairs: &[(String, String)], next: &str) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let mut link = format!("{}?", uri.path());
    for (key, value) in pairs.iter().filter(|(key, _)| key != "after") {
        let _ = write!(link, "{}={}&", encoded(key), encoded(value));
    }
    let _ = write!(link, "after={}", encoded(next));
    link
}

/// RFC 9211.
pub(super) fn cache_status(answer: &QueryAnswer) -> String {
    let ttl = answer.ttl.as_secs();
    match &answer.how {
        How::Hit(tier) => format!("walcast; hit; ttl={ttl}; detail={tier}"),
        How::Stale(why) => format!("walcast; hit; stale; detail={why}"),
        How::Computed { shared, not_stored: None } => {
            format!("walcast; fwd=miss; {}; ttl={ttl}", if *shared { "collapsed" } else { "stored" })
        }
        How::Computed { not_stored: Some(why), .. } => format!("walcast; fwd=miss; detail=\"{}\"", why.replace(['"', '\\'], "'")),
    }
}

/// No invalidation reaches a browser or a proxy, so by default they keep the answer and ask each time: 304 costs little.
/// Ages are what the query's author allowed; only an answer for everybody is public.
fn cache_control(expiry: Expiry) -> String {
    let mut text = String::from(if expiry.shared.is_some() { "public" } else { "private" });
    match expiry.client {
        Some(age) => {
            let _ = write!(text, ", max-age={}", age.as_secs());
        }
        None if expiry.shared.is_some() => text.push_str(", max-age=0"),
        None => text.push_str(", no-cache"),
    }
    if let Some(age) = expiry.shared {
        let _ = write!(text, ", s-maxage={}", age.as_secs());
    }
    if let Some(time) = expiry.while_revalidating {
        let _ = write!(text, ", stale-while-revalidate={}", time.as_secs());
    }
    text
}

pub(super) fn refused(failure: QueryFailure) -> Refusal {
    let status = StatusCode::from_u16(failure.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Refusal::new(status, failure.code, failure.message).hint(failure.hint)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_its_author_allowed_is_reused_without_asking() {
        let seconds = |n| Some(Duration::from_secs(n));
        let text = |client, shared, while_revalidating| cache_control(Expiry { client, shared, while_revalidating });
        assert_eq!(text(None, None, None), "private, no-cache");
        assert_eq!(text(seconds(5), None, None), "private, max-age=5");
        assert_eq!(text(None, seconds(60), None), "public, max-age=0, s-maxage=60");
        assert_eq!(text(seconds(5), seconds(60), seconds(30)), "public, max-age=5, s-maxage=60, stale-while-revalidate=30");
    }

    #[test]
    fn a_list_is_an_array_and_a_list_of_objects_is_json() {
        let Value::Object(map) = json!({"a": [1, null, "x\"\\,y"], "b": [{"c": 1}], "d": true, "e": null, "f": []}) else {
            unreachable!()
        };
        let texts = texts(map);
        assert_eq!(texts["a"], r#"{1,NULL,"x\"\\,y"}"#);
        assert_eq!((texts["b"].as_str(), texts["d"].as_str(), texts["f"].as_str()), (r#"[{"c":1}]"#, "true", "{}"));
        assert!(!texts.contains_key("e"));
    }

    #[test]
    fn the_link_to_the_next_page_is_the_same_request_from_there_on() {
        let uri: Uri = "/query/v1/notes?of=a%26b&after=old&limit=3".parse().unwrap();
        let pairs = query_pairs(&uri);
        assert_eq!(next_page(&uri, &pairs, "n_-"), "/query/v1/notes?of=a%26b&limit=3&after=n%5F%2D");
    }
}
