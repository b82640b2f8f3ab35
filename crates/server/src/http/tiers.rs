//! Says on every answer that has a `Cache-Status` when the second tier is away: `detail="l1; l2=away"`.
//!
//! One place for all paths. Never decides anything: the answer is as good as it was.

use axum::{extract::State, http::HeaderName, response::Response};

use crate::http::{App, cache::header_value};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

pub async fn tell(State(app): State<App>, mut response: Response) -> Response {
    if let Some(status) = response.headers_mut().get_mut(CACHE_STATUS)
        && app.engine.l2_is_away()
    {
        *status = header_value(&with_l2_away(status.to_str().unwrap_or("walcast")));
    }
    response
}

/// `detail` is the last parameter that we write; RFC 9211 lets it be a token or a string.
fn with_l2_away(status: &str) -> String {
    match status.split_once("; detail=") {
        Some((before, detail)) => format!("{before}; detail=\"{}; l2=away\"", detail.trim_matches('"')),
        None => format!("{status}; detail=\"l2=away\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detail_stays_and_gets_one_more_word() {
        for (status, told) in [
            ("walcast; hit; ttl=3; detail=l1", "walcast; hit; ttl=3; detail=\"l1; l2=away\""),
            ("walcast; fwd=miss; detail=\"not kept: touched\"", "walcast; fwd=miss; detail=\"not kept: touched; l2=away\""),
            ("walcast; fwd=bypass", "walcast; fwd=bypass; detail=\"l2=away\""),
        ] {
            assert_eq!(with_l2_away(status), told);
        }
    }
}
