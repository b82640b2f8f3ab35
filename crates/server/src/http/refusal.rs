//! Every error answer over HTTP: a problem document with status, code and hint.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use walcast_engine::{FreshnessError, NamespaceError, TokenError};
use walcast_protocol::problem::Problem;

#[derive(Debug)]
pub struct Refusal(pub Problem);

impl Refusal {
    pub fn new(status: StatusCode, code: &str, title: impl Into<String>) -> Refusal {
        Refusal(Problem::new(status.as_u16(), code, title))
    }

    pub fn hint(self, hint: impl Into<String>) -> Refusal {
        Refusal(self.0.hint(hint))
    }
}

impl From<TokenError> for Refusal {
    fn from(error: TokenError) -> Refusal {
        let hint = match &error {
            TokenError::Missing => "send `Authorization: Bearer <token>`; `walcast token` mints one",
            TokenError::Signature => "sign with the secret that the server has (auth.jwt_secret)",
            TokenError::Expired(_) => "fetch a new token and try again",
            TokenError::Role(_) => "use one of auth.allowed_roles",
            _ => "a token is a JWT with `role` and `exp`, signed with HS256",
        };
        let status = if matches!(error, TokenError::Role(_)) { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
        Refusal::new(status, error.code(), error.to_string()).hint(hint)
    }
}

impl From<NamespaceError> for Refusal {
    fn from(error: NamespaceError) -> Refusal {
        let (status, code) = match &error {
            NamespaceError::Unknown(_) => (StatusCode::NOT_FOUND, "unknown_namespace"),
            NamespaceError::NotAllowed { .. } | NamespaceError::OfQueries(_) => (StatusCode::FORBIDDEN, "role_not_allowed"),
            NamespaceError::Key(_) => (StatusCode::BAD_REQUEST, "bad_key"),
        };
        Refusal::new(status, code, error.to_string()).hint(error.hint())
    }
}

impl From<FreshnessError> for Refusal {
    fn from(error: FreshnessError) -> Refusal {
        Refusal::new(StatusCode::CONFLICT, error.code(), error.to_string()).hint(error.hint())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, self.0.body()).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(Problem::CONTENT_TYPE));
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
