//! A request's header as all its lines say it. Called by whoever acts upon one: a line that is overlooked or cannot be read
//! must not be taken for one that was not sent.

use axum::http::{HeaderMap, HeaderValue, StatusCode};

use crate::http::refusal::Refusal;

/// Of a header that is a list: its lines are one list, as RFC 9110 says.
pub fn joined(headers: &HeaderMap, name: &'static str) -> Result<Option<String>, Refusal> {
    let lines = headers.get_all(name).iter().map(|line| readable(name, line)).collect::<Result<Vec<_>, _>>()?;
    Ok(if lines.is_empty() { None } else { Some(lines.join(",")) })
}

/// Of a header that is said once.
pub fn only<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Refusal> {
    let mut lines = headers.get_all(name).iter();
    let Some(line) = lines.next() else { return Ok(None) };
    if lines.next().is_some() {
        return Err(bad(format!("header `{name}` is sent more than once")).hint("send it once"));
    }
    readable(name, line).map(Some)
}

fn readable<'a>(name: &str, line: &'a HeaderValue) -> Result<&'a str, Refusal> {
    let why = || bad(format!("header `{name}` holds something other than visible ASCII"));
    line.to_str().map(str::trim).map_err(|_| why().hint("percent-encode what is not ASCII"))
}

fn bad(why: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bad_header", why)
}
