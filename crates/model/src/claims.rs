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
    exact: u128,
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
        let fingerprint = short_digest(&text);
        let json = Value::Object(map.clone()).to_string();
        let exact = short_digest(&json);
        Ok(Claims(Arc::new(Inner { role, json, map, expires_at, fingerprint, exact })))
    }

    /// Equal for equal claims, the token's own times and id among them: what a policy reads is not known beforehand.
    pub fn exact(&self) -> u128 {
        self.0.exact
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

    /// A claim by its name or by the way to it, as in `app_metadata.tenant`. A name that holds dots itself comes first.
    pub fn at(&self, path: &str) -> Option<&Value> {
        at(&self.0.map, path)
    }

    /// Equal for all who have this role and agree in these claims; `at` finds each.
    pub fn context(&self, paths: &[String]) -> u128 {
        let mut text = Value::from(self.role()).to_string();
        for path in paths {
            text.push_str(&Value::from(path.as_str()).to_string());
            // No JSON begins so: a claim that is not there is neither null nor the path that comes next.
            text.push_str(&self.at(path).map_or_else(|| "-".to_owned(), canonical));
            text.push(',');
        }
        short_digest(&text)
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

fn at<'a>(map: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    if let Some(found) = map.get(path) {
        return Some(found);
    }
    let (first, rest) = path.split_once('.')?;
    at(map.get(first)?.as_object()?, rest)
}

/// Cryptographic: part of the claims may be the user's own words, and whoever finds a second text shares answers.
fn short_digest(text: &str) -> u128 {
    let digest = Sha256::digest(text.as_bytes());
    digest[..16].iter().fold(0_u128, |all, byte| all << 8 | u128::from(*byte))
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
    fn claims_are_found_by_their_way_and_a_dotted_name_by_itself() {
        let one = claims(r#"{"role":"r","exp":1,"app":{"tenant":7,"a.b":1},"https://x.org/level":"high"}"#).unwrap();
        assert_eq!(one.at("app.tenant"), Some(&Value::from(7)));
        assert_eq!(one.at("app.a.b"), Some(&Value::from(1)));
        assert_eq!(one.at("https://x.org/level"), Some(&Value::from("high")));
        assert_eq!((one.at("app.nothing"), one.at("role.x"), one.at("")), (None, None, None));
    }

    #[test]
    fn p3_a_context_is_the_role_and_the_claims_that_matter() {
        let of = |json: &str| claims(json).unwrap().context(&["app.tenant".into(), "level".into()]);
        let base = of(r#"{"role":"r","exp":1,"sub":"a","app":{"tenant":"7"}}"#);
        assert_eq!(base, of(r#"{"role":"r","exp":2,"sub":"b","app":{"tenant":"7","other":1}}"#));
        for other in [
            r#"{"role":"s","exp":1,"app":{"tenant":"7"}}"#,
            r#"{"role":"r","exp":1,"app":{"tenant":7}}"#,
            r#"{"role":"r","exp":1,"app":{"tenant":"7"},"level":null}"#,
            r#"{"role":"r","exp":1,"app":{"tenant":"7"},"level":"\"level\""}"#,
            r#"{"role":"r","exp":1}"#,
        ] {
            assert_ne!(base, of(other), "{other}");
        }
    }

    #[test]
    fn role_and_exp_are_required() {
        assert!(claims(r#"{"exp":1}"#).is_err());
        assert!(claims(r#"{"role":"anon"}"#).is_err());
        assert!(claims(r#"{"role":7,"exp":1}"#).is_err());
    }

    #[test]
    fn p3_a_claim_that_is_missing_is_no_other_claim() {
        let paths = ["user_metadata.team".to_owned(), "tenant".to_owned()];
        let one = claims(r#"{"role":"r","exp":1,"tenant":"tenant"}"#).unwrap();
        let other = claims(r#"{"role":"r","exp":1,"user_metadata":{"team":"tenant"}}"#).unwrap();
        assert_ne!(one.context(&paths), other.context(&paths));
        let null = claims(r#"{"role":"r","exp":1,"user_metadata":{"team":null}}"#).unwrap();
        let none = claims(r#"{"role":"r","exp":1}"#).unwrap();
        assert_ne!(null.context(&paths), none.context(&paths), "nor is it null");
    }
}
