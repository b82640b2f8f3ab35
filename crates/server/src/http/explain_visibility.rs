//! `GET` and `POST /admin/v1/explain-visibility`: do these claims get this row, and why. For `service_role` alone.
//!
//! Read by an operator or by `walcast explain-visibility`. The row is read as `service_role`; nothing is changed.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, Uri},
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};
use walcast_engine::{
    ExplainVisibilityError, RowAsked,
    model::{Claims, TableName},
};

use crate::http::{
    App,
    identity::{Caller, query_pairs},
    object,
    refusal::Refusal,
};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    table: String,
    /// Whose claims: a token as the client sends it, or the claims themselves.
    token: Option<String>,
    claims: Option<Map<String, Value>>,
    /// One of the table's rows, or one that need not be there.
    key: Option<Map<String, Value>>,
    row: Option<Map<String, Value>>,
}

const EXAMPLE: &str = "send {\"table\": \"public.orders\", \"claims\": {\"role\": \"authenticated\", \"sub\": \"…\"}, \"key\": {\"id\": 7}}; \
                       `token` instead of `claims` takes a client's own, `row` instead of `key` a row that need not be there";

pub async fn post(State(app): State<App>, Caller(claims): Caller, body: Bytes) -> Result<Json<Value>, Refusal> {
    let asked = object::read(&body).map_err(|error| wrong(format!("the body cannot be read: {error}")))?;
    explain(&app, &claims, asked).await
}

/// `?table=orders&role=authenticated&sub=…&claim=tenant=7&key=id=7`, or `&row={…}`, `&claims={…}`, `&token=…`.
pub async fn get(State(app): State<App>, Caller(claims): Caller, uri: Uri) -> Result<Json<Value>, Refusal> {
    let mut asked = Asked::default();
    let mut loose = Map::new();
    for (name, value) in query_pairs(&uri) {
        match name.as_str() {
            "table" => asked.table = value,
            "token" => asked.token = Some(value),
            "claims" => asked.claims = Some(object_of(&name, &value)?),
            "row" => asked.row = Some(object_of(&name, &value)?),
            "role" | "sub" => drop(loose.insert(name, value.into())),
            "claim" => drop(pair(&name, &value).map(|(claim, value)| loose.insert(claim, value))?),
            "key" => {
                let (column, value) = pair(&name, &value)?;
                asked.key.get_or_insert_default().insert(column, value);
            }
            "apikey" => {}
            _ => return Err(wrong(format!("`{name}` is not a parameter of this"))),
        }
    }
    if !loose.is_empty() {
        asked.claims.get_or_insert_default().extend(loose);
    }
    explain(&app, &claims, asked).await
}

fn object_of(name: &str, text: &str) -> Result<Map<String, Value>, Refusal> {
    serde_json::from_str(text).map_err(|error| wrong(format!("`{name}` is not a JSON object: {error}")))
}

/// JSON if it reads as JSON, else text.
fn pair(name: &str, text: &str) -> Result<(String, Value), Refusal> {
    let (column, value) = text.split_once('=').ok_or_else(|| wrong(format!("`{name}={text}` has no second `=`")))?;
    Ok((column.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

fn wrong(why: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bad_request", why).hint(EXAMPLE)
}

async fn explain(app: &App, caller: &Claims, asked: Asked) -> Result<Json<Value>, Refusal> {
    if caller.role() != "service_role" {
        let who = caller.role();
        let refusal = Refusal::new(StatusCode::FORBIDDEN, "role_not_allowed", format!("role `{who}` may not ask who sees what"));
        return Err(refusal.hint("use a service_role token"));
    }
    if asked.table.is_empty() {
        return Err(wrong("`table` is missing".into()));
    }
    let claims = match (&asked.token, asked.claims) {
        (Some(token), None) => app.engine.verify(token)?,
        (None, Some(claims)) => as_claims(claims)?,
        _ => return Err(wrong("name one of `token` and `claims`".into())),
    };
    let row = match (asked.key, asked.row) {
        (Some(key), None) if !key.is_empty() => RowAsked::Key(key),
        (None, Some(row)) => RowAsked::Image(row),
        _ => return Err(wrong("name one of `key` and `row`".into())),
    };
    let explained = app.engine.explain_visibility(&TableName::parse(&asked.table), &claims, &row).await;
    explained.map(Json).map_err(|error| {
        let (status, code, hint) = match &error {
            ExplainVisibilityError::NoTable(_) => {
                (StatusCode::NOT_FOUND, "unknown_table", "name it as schema.table, as the catalog spells it")
            }
            ExplainVisibilityError::NoColumn(..) => {
                (StatusCode::BAD_REQUEST, "unknown_column", "name columns as the catalog spells them")
            }
            ExplainVisibilityError::NoRow(_) => {
                (StatusCode::NOT_FOUND, "no_row", "give the row itself with `row`, or grant service_role what it needs")
            }
            ExplainVisibilityError::Row(_) => (
                StatusCode::BAD_REQUEST,
                "bad_row",
                "values are cast to the columns' types; service_role needs select on the table",
            ),
            ExplainVisibilityError::Database(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "database_away", "try again; `walcast check` looks what is wrong")
            }
        };
        Refusal::new(status, code, error.to_string()).hint(hint)
    })
}

/// As if a token had said so: `authenticated` unless it says otherwise, and good for ever.
fn as_claims(mut claims: Map<String, Value>) -> Result<Claims, Refusal> {
    claims.entry("role").or_insert_with(|| "authenticated".into());
    claims.entry("exp").or_insert_with(|| 4_000_000_000_u64.into());
    Claims::verified(claims).map_err(|error| wrong(error.to_string()))
}
