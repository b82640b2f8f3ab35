//! Who asks for a stream: a token in a header or `apikey` as everywhere, else a ticket, else a cookie.
//!
//! A browser sends cookies whoever wrote the page, so one counts only for a page of this origin or of an allowed one;
//! and only such a page may read the answer ([`credentials`]).

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::Next,
    response::Response,
};
use walcast_engine::{TokenError, model::Claims};

use super::resource::Resource;
use crate::http::{App, identity::token_of, refusal::Refusal};

/// Verified, and until when: seconds since 1970.
pub struct Asker {
    pub claims: Claims,
    pub expires_at: u64,
}

impl Asker {
    /// Asked anew at every connection, also of a client that was here before. Without a resource that can be read there is
    /// nothing that a ticket could be for.
    pub fn of(app: &App, resource: Option<&Resource>, headers: &HeaderMap, uri: &Uri) -> Result<Asker, Refusal> {
        if let Some(token) = token_of(headers, uri) {
            return Asker::verified(app, &token);
        }
        if let Some(resource) = resource
            && let Some(ticket) = &resource.ticket
        {
            let opened = app.sse.tickets.admit(resource, ticket)?;
            let asker = Asker::verified(app, &opened.token)?;
            return Ok(Asker { expires_at: asker.expires_at.min(opened.expires_at), ..asker });
        }
        let Some(token) = app.sse.cookie.as_deref().and_then(|name| cookie(headers, name)) else {
            return Err(TokenError::Missing.into());
        };
        if !may_use_cookies(&app.sse.allowed_origins, headers) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "origin_not_allowed",
                "a cookie counts only for pages of allowed origins",
            )
            .hint("add the page's origin to server.allowed_origins, or use a ticket: POST /sse/v1/ticket"));
        }
        Asker::verified(app, &token)
    }

    fn verified(app: &App, token: &str) -> Result<Asker, Refusal> {
        let claims = app.engine.verify(token)?;
        Ok(Asker { expires_at: claims.expires_at(), claims })
    }
}

/// The first cookie of the name, as the page's server set it.
fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(found, _)| *found == name).map(|(_, value)| value.trim_matches('"').to_owned())
}

/// A browser leaves `Origin` out where a page asks its own server; then it says so in a header that no script can set.
fn may_use_cookies(allowed: &[String], headers: &HeaderMap) -> bool {
    match headers.get(header::ORIGIN) {
        Some(origin) => is_allowed(allowed, origin),
        None => headers.get("sec-fetch-site").is_some_and(|site| site == "same-origin"),
    }
}

fn is_allowed(allowed: &[String], origin: &HeaderValue) -> bool {
    allowed.iter().any(|allowed| origin.as_bytes() == allowed.as_bytes())
}

/// Around the router: where cookies may be sent, the answer names the one origin that may read it, instead of all.
pub async fn credentials(State(app): State<App>, request: Request, next: Next) -> Response {
    let of_stream = app.sse.cookie.is_some() && request.uri().path().starts_with("/sse/");
    let origin = request.headers().get(header::ORIGIN).filter(|origin| of_stream && is_allowed(&app.sse.allowed_origins, origin));
    let origin = origin.cloned();
    let mut response = next.run(request).await;
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let headers = headers(&[("cookie", "a=1; xtoken=no; token=e.y.J=; token=second")]);
        assert_eq!(cookie(&headers, "token").as_deref(), Some("e.y.J="));
        assert_eq!(cookie(&headers, "oken"), None);
    }

    #[test]
    fn p3_a_cookie_counts_only_for_pages_of_this_origin_or_an_allowed_one() {
        let allowed = ["https://app.example.com".to_owned()];
        let may = |pairs: &[(&'static str, &str)]| may_use_cookies(&allowed, &headers(pairs));
        assert!(may(&[("origin", "https://app.example.com")]));
        assert!(may(&[("sec-fetch-site", "same-origin")]));
        for pairs in [
            &[][..],
            &[("origin", "https://evil.example")],
            &[("origin", "https://app.example.com.evil.example")],
            &[("origin", "null")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("origin", "https://evil.example"), ("sec-fetch-site", "same-origin")],
        ] {
            assert!(!may(pairs), "{pairs:?}");
        }
    }
}
