//! Who asks: the verified claims of a token, or of nobody (`anon`).

use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Cheap to clone. Equal fingerprints mean: PostgreSQL would give both the same answer,
/// since all claims but the token's own times and id agree.
#[derive(Debug, Clone)]
pub struct Claims(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    role: String,
    json: String,
    map: Map<String, Value>,
    expires_at: u64,
    fingerprint: u128,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimsError {
    #[error("Fields `role` and `exp` are required in JWT")]
    Missing,
}

/// The end of the year 9999: later is never, and must not overflow a clock.
const END_OF_TIME: u64 = 253_402_300_799;

/// Differ from token to token without changing who asks.
const TOKEN_ONLY: [&str; 4] = ["exp", "iat", "nbf", "jti"];

impl Claims {
    /// Takes claims whose signature has been verified.
    pub fn verified(map: Map<String, Value>) -> Result<Claims, ClaimsError> {
        let role = map.get("role").and_then(Value::as_str).ok_or(ClaimsError::Missing)?.to_owned();
        let expires_at = map.get("exp").and_then(Value::as_f64).ok_or(ClaimsError::Missing)?.round() as u64;
        let expires_at = expires_at.min(END_OF_TIME);
        let mut parts: Vec<_> = map.iter().filter(|(name, _)| !TOKEN_ONLY.contains(&name.as_str())).collect();
        parts.sort_by_key(|(name, _)| name.as_str());
        let mut text = String::new();
        for (name, value) in parts {
            text.push_str(&Value::from(name.as_str()).to_string());
            text.push_str(&canonical(value));
        }
        // Cryptographic: part of the claims may be the user's own words, and whoever finds a second text shares answers.
        let digest = Sha256::digest(text.as_bytes());
        let fingerprint = digest[..16].iter().fold(0_u128, |all, byte| all << 8 | u128::from(*byte));
        let json = Value::Object(map.clone()).to_string();
        Ok(Claims(Arc::new(Inner { role, json, map, expires_at, fingerprint })))
    }

    pub fn role(&self) -> &str {
        &self.0.role
    }

    pub fn subject(&self) -> Option<&str> {
        self.get("sub").and_then(Value::as_str)
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.map.get(name)
    }

    /// The whole claim set as PostgreSQL's `request.jwt.claims` takes it.
    pub fn json(&self) -> &str {
        &self.0.json
    }

    /// Seconds since 1970.
    pub fn expires_at(&self) -> u64 {
        self.0.expires_at
    }

    pub fn fingerprint(&self) -> u128 {
        self.0.fingerprint
    }
}

/// Object members sorted, so that the order in which a token lists them does not matter.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut parts: Vec<_> = map.iter().map(|(k, v)| format!("{}:{}", Value::from(k.as_str()), canonical(v))).collect();
            parts.sort();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(json: &str) -> Result<Claims, ClaimsError> {
        Claims::verified(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_renewed_token_is_the_same_asker() {
        let a = claims(r#"{"role":"authenticated","sub":"u1","exp":1,"iat":0,"app":{"a":1,"b":2}}"#).unwrap();
        let b = claims(r#"{"exp":99.4,"app":{"b":2,"a":1},"sub":"u1","jti":"x","role":"authenticated"}"#).unwrap();
        assert_eq!(a.fingerprint(), b.fingerprint());
        assert_eq!(b.expires_at(), 99);
        let c = claims(r#"{"role":"authenticated","sub":"u2","exp":1,"app":{"a":1,"b":2}}"#).unwrap();
        assert_ne!(a.fingerprint(), c.fingerprint());
    }

    #[test]
    fn role_and_exp_are_required() {
        assert!(claims(r#"{"exp":1}"#).is_err());
        assert!(claims(r#"{"role":"anon"}"#).is_err());
        assert!(claims(r#"{"role":7,"exp":1}"#).is_err());
    }
}
