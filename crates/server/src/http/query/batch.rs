//! `POST /query/v1`: many queries in one request, answered in their order, for a client that collects what it needs.

use axum::{
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use walcast_engine::{BatchItem, QueryAnswer, QueryFailure};
use walcast_protocol::problem::Problem;

use crate::http::{
    App,
    cache::freshness,
    etag,
    identity::Caller,
    object::{self, Object},
    query::{cache_status, refused, texts},
    refusal::Refusal,
};

const MOST_QUERIES: usize = 1_000;
/// Of all answers together: past it the rest is refused, one by one.
const MOST_BYTES: usize = 32 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    queries: Vec<Object<AskedOne>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedOne {
    name: String,
    #[serde(default)]
    params: Map<String, Value>,
    /// As the header of that name: where it matches, the answer is 304 and has no body.
    #[serde(default)]
    if_none_match: Option<String>,
}

#[derive(Serialize)]
struct Answers<'a> {
    results: Vec<One<'a>>,
}

#[derive(Serialize)]
struct One<'a> {
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Problem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: Option<&'a str>,
    /// As the header `Cache-Status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<&'a str>,
}

pub async fn post(State(app): State<App>, Caller(claims): Caller, headers: HeaderMap, body: Bytes) -> Result<Response, Refusal> {
    let wrong = |why: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_body", why)
            .hint("send {\"queries\": [{\"name\": \"patient_dashboard\", \"params\": {\"patient_id\": 7}}]}")
    };
    let asked: Asked = object::read(&body).map_err(|error| wrong(format!("the body cannot be read: {error}")))?;
    if asked.queries.len() > MOST_QUERIES {
        return Err(wrong(format!("the request has {} queries; at most {MOST_QUERIES} are answered", asked.queries.len())));
    }
    let freshness = freshness(&headers)?;
    app.engine.can_come(freshness).await?;
    let (items, known): (Vec<BatchItem>, Vec<Option<String>>) = asked
        .queries
        .into_iter()
        .map(|Object(one)| (BatchItem { name: one.name, params: texts(one.params) }, one.if_none_match))
        .unzip();
    let answers = app.engine.query_batch(&items, &claims, freshness).await;
    let mut bytes = 0;
    let results = answers.iter().zip(&known).map(|(answer, known)| match answer {
        Err(failure) => error(failure.clone()),
        Ok(answer) => {
            let same = known.as_ref().is_some_and(|list| etag::matches(list.as_bytes(), &answer.etag));
            bytes += if same { 0 } else { answer.body.len() };
            if bytes > MOST_BYTES { too_much() } else { one(answer, same) }
        }
    });
    let answers = Answers { results: results.collect() };
    let text = serde_json::to_vec(&answers).map_err(|error| {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "bad_answer", error.to_string()).hint("please report this")
    })?;
    let mut response = text.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    Ok(response)
}

fn one(answer: &QueryAnswer, same: bool) -> One<'_> {
    let body = std::str::from_utf8(&answer.body).ok().and_then(|text| serde_json::from_str::<&RawValue>(text).ok());
    One {
        status: if same { 304 } else { 200 },
        body: body.filter(|_| !same),
        error: None,
        etag: Some(&answer.etag),
        cache: Some(cache_status(answer)),
        position: Some(answer.position.to_string()),
        next: answer.next.as_deref(),
    }
}

fn error<'a>(failure: QueryFailure) -> One<'a> {
    let Refusal(problem) = refused(failure);
    One { status: problem.status, body: None, error: Some(problem), etag: None, cache: None, position: None, next: None }
}

fn too_much<'a>() -> One<'a> {
    error(QueryFailure {
        status: 413,
        code: "batch_too_large",
        message: format!("the answers of one request have at most {MOST_BYTES} bytes together"),
        hint: "ask for it in another request".into(),
    })
}
