//! A signed token becomes claims, or an error with the code and text that Supabase clients know.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, errors::ErrorKind};
use quick_cache::{Weighter, sync::Cache};
use serde_json::{Map, Value};
use walcast_model::{Claims, ClaimsError};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("no token was sent; use `Authorization: Bearer`, the header or the query parameter `apikey`")]
    Missing,
    #[error("The token provided is not a valid JWT")]
    Malformed,
    #[error("Failed to validate JWT signature")]
    Signature,
    #[error("Token has expired {0} seconds ago")]
    Expired(u64),
    #[error("the token is not valid yet; check the clocks of issuer and server")]
    TooEarly,
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    #[error("role `{0}` is not on the allowed list (auth.allowed_roles)")]
    Role(String),
}

impl TokenError {
    /// The code in a join error's `Code: text`.
    pub fn code(&self) -> &'static str {
        match self {
            TokenError::Missing | TokenError::Malformed => "MalformedJWT",
            TokenError::Signature => "JwtSignatureError",
            TokenError::Expired(_) | TokenError::TooEarly | TokenError::Claims(_) | TokenError::Role(_) => "InvalidJWTToken",
        }
    }
}

/// Verifies with one shared secret (HS256, HS384, HS512). Debug does not show it.
pub struct Tokens {
    key: DecodingKey,
    validation: Validation,
    allowed_roles: Vec<String>,
    /// Tokens that were found good: one comes with every request of its bearer. Only its end must be looked at again.
    good: Cache<Box<str>, Claims, ByBytes>,
}

const GOOD_BYTES: u64 = 8 << 20;
const GOOD_TOKENS: usize = 10_000;

#[derive(Clone)]
struct ByBytes;

impl Weighter<Box<str>, Claims> for ByBytes {
    fn weight(&self, token: &Box<str>, claims: &Claims) -> u64 {
        // The claims are kept as text and as a map.
        (token.len() + 4 * claims.json().len() + 512) as u64
    }
}

/// Names the process-wide providers once; both libraries panic or guess when two are compiled in and none is named.
pub fn install_crypto() {
    // Already installed is as good: an error says only that.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
}

impl Tokens {
    pub fn new(secret: &str, allowed_roles: Vec<String>) -> Tokens {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.algorithms = vec![Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];
        // Times may be decimals here: checked below.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let good = Cache::with_weighter(GOOD_TOKENS, GOOD_BYTES, ByBytes);
        Tokens { key: DecodingKey::from_secret(secret.as_bytes()), validation, allowed_roles, good }
    }

    pub fn verify(&self, token: &str) -> Result<Claims, TokenError> {
        if let Some(claims) = self.good.get(token) {
            return in_time(claims);
        }
        let claims = self.verify_anew(token)?;
        self.good.insert(token.into(), claims.clone());
        Ok(claims)
    }

    fn verify_anew(&self, token: &str) -> Result<Claims, TokenError> {
        let token: String = token.chars().filter(|c| !c.is_whitespace()).collect();
        if token.is_empty() {
            return Err(TokenError::Missing);
        }
        let verified = decode::<Map<String, Value>>(&token, &self.key, &self.validation).map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature | ErrorKind::InvalidAlgorithm => TokenError::Signature,
            _ => TokenError::Malformed,
        })?;
        let now = now();
        if verified.claims.get("nbf").and_then(Value::as_f64).is_some_and(|nbf| nbf.round() as u64 > now) {
            return Err(TokenError::TooEarly);
        }
        let claims = in_time(Claims::verified(verified.claims)?)?;
        if !self.allowed_roles.iter().any(|role| role == claims.role()) {
            return Err(TokenError::Role(claims.role().chars().take(64).collect()));
        }
        Ok(claims)
    }
}

fn in_time(claims: Claims) -> Result<Claims, TokenError> {
    let now = now();
    if claims.expires_at() <= now { Err(TokenError::Expired(now - claims.expires_at())) } else { Ok(claims) }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;

    fn tokens() -> Tokens {
        install_crypto();
        Tokens::new("a secret of at least thirty-two bytes", vec!["anon".into(), "authenticated".into()])
    }

    fn sign(claims: Value, secret: &str) -> String {
        install_crypto();
        encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
    }

    fn check(claims: Value) -> Result<Claims, TokenError> {
        tokens().verify(&sign(claims, "a secret of at least thirty-two bytes"))
    }

    #[test]
    fn a_good_token_gives_its_claims() {
        let claims = check(json!({"role": "authenticated", "sub": "u1", "exp": now() as f64 + 60.5})).unwrap();
        assert_eq!((claims.role(), claims.subject()), ("authenticated", Some("u1")));
    }

    #[tokio::test]
    async fn a_good_token_is_known_again_and_refused_all_the_same_once_it_has_expired() {
        let tokens = tokens();
        let token = sign(json!({"role": "anon", "exp": now() + 2}), "a secret of at least thirty-two bytes");
        assert_eq!(tokens.verify(&token).unwrap().role(), "anon");
        assert!(tokens.good.get(token.as_str()).is_some());
        assert!(tokens.verify(&format!("{token}x")).is_err(), "one letter more is another token");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while tokens.verify(&token).is_ok() && std::time::Instant::now() < until {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert!(matches!(tokens.verify(&token), Err(TokenError::Expired(_))));
        assert!(tokens.verify("nonsense").is_err() && tokens.good.get("nonsense").is_none());
    }

    #[test]
    fn a_bad_token_says_why() {
        let later = now() + 60;
        let code = |claims: Value| check(claims).map(|_| ()).unwrap_err();
        assert!(matches!(code(json!({"role": "anon", "exp": now() - 9})), TokenError::Expired(9 | 10)));
        assert!(matches!(code(json!({"role": "anon"})), TokenError::Claims(_)));
        assert!(matches!(code(json!({"role": "postgres", "exp": later})), TokenError::Role(_)));
        assert!(matches!(code(json!({"role": "anon", "exp": later, "nbf": later})), TokenError::TooEarly));
        let forged = sign(json!({"role": "anon", "exp": later}), "another secret, as long as the right one");
        assert_eq!(tokens().verify(&forged).map(|_| ()).unwrap_err(), TokenError::Signature);
        assert_eq!(tokens().verify("sb_publishable_x").map(|_| ()).unwrap_err(), TokenError::Malformed);
        assert_eq!(tokens().verify(" ").map(|_| ()).unwrap_err(), TokenError::Missing);
        let unsigned = "eyJhbGciOiJub25lIn0.eyJyb2xlIjoiYW5vbiIsImV4cCI6OTk5OTk5OTk5OX0.";
        assert!(tokens().verify(unsigned).is_err());
    }
}
