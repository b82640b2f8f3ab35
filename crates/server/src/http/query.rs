//! `GET` or `POST /query/v1/{name}`: named queries as JSON rows, cached until a row behind them changes.

use std::collections::HashMap;

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde_json::Value;
use walcast_engine::{How, QueryFailure};

use crate::http::{
    App,
    cache::{freshness, header_value},
    identity::{Caller, query_pairs},
    refusal::Refusal,
};

pub async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
    Caller(claims): Caller,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let params = query_pairs(&uri).into_iter().filter(|(key, _)| key != "apikey").collect();
    answer(&app, &name, &claims, params, &headers).await
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
    let mut params = HashMap::new();
    for (key, value) in map {
        let text = match value {
            Value::String(text) => text,
            Value::Null => continue,
            Value::Object(_) | Value::Array(_) => value.to_string(),
            other => other.to_string(),
        };
        params.insert(key, text);
    }
    answer(&app, &name, &claims, params, &headers).await
}

async fn answer(
    app: &App,
    name: &str,
    claims: &walcast_engine::model::Claims,
    params: HashMap<String, String>,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let freshness = freshness(headers)?;
    app.engine.can_come(freshness).await?;
    let answer = app.engine.query(name, claims, &params, freshness).await.map_err(refused)?;
    let status = match &answer.how {
        How::Hit(tier) => format!("walcast; hit; ttl={}; detail={tier}", answer.ttl.as_secs()),
        How::Computed { shared, not_stored: None } => {
            let how = if *shared { "collapsed" } else { "stored" };
            format!("walcast; fwd=miss; {how}; ttl={}", answer.ttl.as_secs())
        }
        How::Computed { not_stored: Some(why), .. } => format!("walcast; fwd=miss; detail=\"{}\"", why.replace(['"', '\\'], "'")),
    };
    let fresh = headers.get(header::IF_NONE_MATCH).is_some_and(|tags| tags.as_bytes() == answer.etag.as_bytes());
    let mut response = if fresh { StatusCode::NOT_MODIFIED.into_response() } else { answer.body.into_response() };
    let out = response.headers_mut();
    if !fresh {
        out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    out.insert(header::ETAG, header_value(&answer.etag));
    // Private and revalidated: whoever keeps it asks again, and the question is cheap.
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    out.insert(header::VARY, HeaderValue::from_static("authorization, apikey"));
    out.insert(header::AGE, header_value(&answer.age.as_secs().to_string()));
    out.insert(HeaderName::from_static("cache-status"), header_value(&status));
    out.insert(HeaderName::from_static("walcast-position"), header_value(&answer.position.to_string()));
    Ok(response)
}

fn refused(failure: QueryFailure) -> Refusal {
    let status = StatusCode::from_u16(failure.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Refusal::new(status, failure.code, failure.message).hint(failure.hint)
}
