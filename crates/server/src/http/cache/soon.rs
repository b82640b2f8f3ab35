//! `Prefer: respond-async` (RFC 7240) on PUT and mset: the values are taken, the answer is 202, and storing goes on without
//! the caller. What is wrong in a request is told all the same.
//!
//! What waits is bounded; where it is full, the preference is not applied and the answer is the ordinary one.

use axum::{
    Json,
    http::{HeaderMap, HeaderName, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::Value;
use walcast_engine::model::Position;

use super::{POSITION, header_value};

const PREFER: &str = "prefer";
const APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const RESPOND_ASYNC: &str = "respond-async";

pub fn is_preferred(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(PREFER).into_iter().filter_map(|value| value.to_str().ok());
    let mut preferences = lines.flat_map(|line| line.split(',')).filter_map(|preference| preference.split(';').next());
    preferences.any(|preference| preference.trim().eq_ignore_ascii_case(RESPOND_ASYNC))
}

pub fn taken(position: &Position, answer: Value) -> Response {
    let headers = [(APPLIED, header_value(RESPOND_ASYNC)), (POSITION, header_value(&position.to_string()))];
    (StatusCode::ACCEPTED, headers, Json(answer)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_preference_of_many_is_found_in_whatever_case() {
        for (text, preferred) in [
            ("respond-async", true),
            ("wait=10, Respond-Async", true),
            ("respond-async; wait=5", true),
            ("respond-asynchronously", false),
            ("return=minimal", false),
        ] {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(PREFER), header_value(text))]);
            assert_eq!(is_preferred(&headers), preferred, "{text}");
        }
        assert!(!is_preferred(&HeaderMap::new()));
    }
}
