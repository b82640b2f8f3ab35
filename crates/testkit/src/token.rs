//! Tokens for tests, signed with HS256 as Supabase's keys are.

use std::sync::Once;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Map, Value, json};

static PROVIDER: Once = Once::new();

/// `expires_in_s` may be negative: the token is then already expired. `extra` is an object whose
/// claims win over ours, or null; a claim set to null is left out.
pub fn jwt(secret: &str, role: &str, sub: Option<&str>, expires_in_s: i64, extra: Value) -> String {
    // Refused if the program under test was first; then there is one, which is all we need.
    PROVIDER.call_once(|| {
        let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs() as i64);
    let mut claims = Map::new();
    claims.insert("role".to_owned(), json!(role));
    claims.insert("iat".to_owned(), json!(now.min(now + expires_in_s)));
    claims.insert("exp".to_owned(), json!(now + expires_in_s));
    if let Some(sub) = sub {
        claims.insert("sub".to_owned(), json!(sub));
    }
    if let Value::Object(extra) = extra {
        claims.extend(extra);
    }
    claims.retain(|_, value| !value.is_null());
    encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret.as_bytes()))
        .expect("HS256 signs any JSON object")
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{DecodingKey, Validation, decode};

    const SECRET: &str = "a-secret-of-at-least-32-characters!";

    fn read(token: &str, secret: &str) -> Result<Value, jsonwebtoken::errors::Error> {
        let key = DecodingKey::from_secret(secret.as_bytes());
        decode::<Value>(token, &key, &Validation::new(Algorithm::HS256)).map(|data| data.claims)
    }

    #[test]
    fn a_token_holds_its_claims_and_only_its_own_secret_opens_it() {
        let token = jwt(SECRET, "authenticated", Some("ada"), 3600, json!({"tenant": 7}));
        let claims = read(&token, SECRET).unwrap();
        assert_eq!((&claims["role"], &claims["sub"], &claims["tenant"]), (&json!("authenticated"), &json!("ada"), &json!(7)));
        assert!(read(&token, "another-secret-of-32-characters!!!!").is_err());
    }

    #[test]
    fn a_token_can_be_made_expired_or_without_a_claim() {
        assert!(read(&jwt(SECRET, "anon", None, -3600, Value::Null), SECRET).is_err());
        let claims = read(&jwt(SECRET, "anon", None, 60, json!({"role": null})), SECRET).unwrap();
        assert_eq!(claims.get("role"), None);
    }
}
