//! Who is asking: `Authorization: Bearer`, else header or query parameter `apikey`. Nobody is refused here but the nameless.

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, Uri, header, request::Parts},
};
use percent_encoding::percent_decode_str;
use walcast_engine::{TokenError, model::Claims};

use crate::http::{App, refusal::Refusal};

/// Verified claims of the request.
pub struct Caller(pub Claims);

impl FromRequestParts<App> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Caller, Refusal> {
        let token = token_of(&parts.headers, &parts.uri).ok_or(TokenError::Missing)?;
        Ok(Caller(app.engine.verify(&token)?))
    }
}

pub fn token_of(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = header(header::AUTHORIZATION.as_str())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim().to_owned());
    bearer.or_else(|| header("apikey").map(str::to_owned)).or_else(|| query_parameter(uri, "apikey"))
}

/// The first value of a query parameter, percent-decoded.
pub fn query_parameter(uri: &Uri, name: &str) -> Option<String> {
    query_pairs(uri).into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

pub fn query_pairs(uri: &Uri) -> Vec<(String, String)> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let query = uri.query().unwrap_or_default();
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').map_or((decode(pair), String::new()), |(key, value)| (decode(key), decode(value))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bearer_wins_over_header_and_query() {
        let uri: Uri = "/x?apikey=q%2B1&filter=id%3Deq.1".parse().unwrap();
        let mut headers = HeaderMap::new();
        assert_eq!(token_of(&headers, &uri).as_deref(), Some("q+1"));
        assert_eq!(query_parameter(&uri, "filter").as_deref(), Some("id=eq.1"));
        headers.insert("apikey", "h".parse().unwrap());
        assert_eq!(token_of(&headers, &uri).as_deref(), Some("h"));
        headers.insert("authorization", "bearer  b".parse().unwrap());
        assert_eq!(token_of(&headers, &uri).as_deref(), Some("b"));
    }
}
