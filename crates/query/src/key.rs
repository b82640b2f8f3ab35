//! Under which key an answer is kept: query, parameters, and everything about who asks.

use std::{collections::HashMap, fmt::Write};

use aws_lc_rs::digest::{SHA256, digest};
use walcast_model::{CacheKey, Claims};

use crate::{error::QueryError, file::NamedQuery, run::bind};

/// The namespace of a query's answers.
pub fn namespace(query: &str) -> String {
    format!("{NAMESPACE_PREFIX}{query}")
}

/// Cache namespaces that begin so belong to queries.
pub const NAMESPACE_PREFIX: &str = "query.";

/// Equal keys mean: PostgreSQL was asked the same question by the same asker.
pub fn key(query: &NamedQuery, params: &HashMap<String, String>, claims: &Claims) -> Result<CacheKey, QueryError> {
    let values = bind(query, params)?;
    let mut asked = String::new();
    for (param, value) in query.params.iter().zip(&values) {
        if !asked.is_empty() {
            asked.push('&');
        }
        escape(&mut asked, &param.name);
        asked.push('=');
        escape(&mut asked, value);
    }
    let mut asker = String::from(";");
    escape(&mut asker, claims.role());
    let _ = write!(asker, ";{:032x}", claims.fingerprint());
    if asked.len() + asker.len() > CacheKey::MAX_CHARS {
        // `#` is escaped in every other form. A cryptographic hash: a caller must not find a second preimage.
        let hash = digest(&SHA256, asked.as_bytes());
        asked = String::from("#");
        for byte in hash.as_ref() {
            let _ = write!(asked, "{byte:02x}");
        }
    }
    let why = |error: walcast_model::CacheKeyError| QueryError::Key { name: query.name.clone(), why: error.to_string() };
    CacheKey::new(&namespace(&query.name), &(asked + &asker)).map_err(why)
}

fn escape(text: &mut String, part: &str) {
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(sub: &str) -> Claims {
        Claims::verified(serde_json::from_str(&format!(r#"{{"role":"nurse","exp":1,"sub":"{sub}"}}"#)).unwrap()).unwrap()
    }

    fn params(list: &[(&str, &str)]) -> HashMap<String, String> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn one_question_of_one_asker_has_one_key() {
        let text = "-- name: q\n-- param: a text\n-- param: b int = 7\nselect $1, $2";
        let q = NamedQuery::parse("q.sql", text).unwrap();
        let of = |list: &[(&str, &str)], sub: &str| key(&q, &params(list), &claims(sub)).unwrap();
        assert_eq!(of(&[("a", "x")], "u"), of(&[("b", "7"), ("a", "x")], "u"));
        assert_ne!(of(&[("a", "x")], "u"), of(&[("a", "x")], "v"));
        assert_ne!(of(&[("a", "x&b=8")], "u"), of(&[("a", "x"), ("b", "8")], "u"));
        assert_eq!(of(&[("a", "x y")], "u").namespace(), "query.q");
        assert!(of(&[("a", "x y")], "u").key().starts_with("a=x%20y&b=7;nurse;"));
        let long = "é".repeat(400);
        let (one, other) = (of(&[("a", &long)], "u"), of(&[("a", &format!("{long}!"))], "u"));
        assert!(one.key().starts_with('#') && one != other);
        assert_eq!(key(&q, &params(&[]), &claims("u")).unwrap_err().code(), "missing_parameter");
        let unknown = key(&q, &params(&[("a", ""), ("aa", "")]), &claims("u")).unwrap_err();
        assert_eq!((unknown.code(), unknown.hint().as_str()), ("unknown_parameter", "did you mean `a`?"));
    }

    #[test]
    fn a_word_for_a_moment_is_not_a_moment() {
        let q = NamedQuery::parse("q.sql", "-- name: q\n-- param: day date\nselect $1").unwrap();
        assert!(bind(&q, &params(&[("day", "2026-01-02")])).is_ok());
        assert_eq!(bind(&q, &params(&[("day", "today")])).unwrap_err().code(), "bad_parameter");
    }
}
