//! Under which key an answer is kept: query, parameters, and everything about who asks.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use walcast_model::{CacheKey, Claims};

use crate::{error::QueryError, question::Question};

/// Cache namespaces that begin so hold answers of queries: `query.` alone, and `query.NAME` for those that follow the
/// policy of namespace NAME. Nobody reads or writes them by key.
pub const NAMESPACE_PREFIX: &str = "query.";

/// Where answers are kept that follow the policy of this namespace.
pub fn namespace(followed: Option<&str>) -> String {
    format!("{NAMESPACE_PREFIX}{}", followed.unwrap_or_default())
}

/// Equal keys mean: PostgreSQL was asked the same question, in the same words of the same file, by the same asker.
pub fn key(question: &Question, claims: &Claims) -> Result<CacheKey, QueryError> {
    let query = &question.query;
    let mut asked = String::new();
    for (param, value) in query.params.iter().zip(&question.values) {
        if !asked.is_empty() {
            asked.push('&');
        }
        escape(&mut asked, &param.name);
        asked.push('=');
        escape(&mut asked, value);
    }
    if let Some(page) = &question.page {
        // `!` and `/` are escaped in every other place.
        let _ = write!(asked, "!{}", page.limit);
        for value in page.after.iter().flatten() {
            asked.push('/');
            match value {
                Some(value) => escape(&mut asked, value),
                None => asked.push('!'),
            }
        }
    }
    let file = format!("{}@{}?", query.name, query.meaning);
    let mut asker = String::from(";");
    escape(&mut asker, claims.role());
    let _ = write!(asker, ";{:032x}", claims.fingerprint());
    if file.len() + asked.len() + asker.len() > CacheKey::MAX_CHARS {
        // `#` is escaped in every other form. A cryptographic hash: a caller must not find a second preimage.
        let hash = digest(&SHA256, asked.as_bytes());
        asked = String::from("#");
        for byte in hash.as_ref() {
            let _ = write!(asked, "{byte:02x}");
        }
    }
    let why = |error: walcast_model::CacheKeyError| QueryError::Key { name: query.name.clone(), why: error.to_string() };
    CacheKey::new(&namespace(query.namespace.as_deref()), &(file + &asked + &asker)).map_err(why)
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
    use std::{collections::HashMap, sync::Arc};

    use super::*;
    use crate::file::NamedQuery;

    fn claims(sub: &str) -> Claims {
        Claims::verified(serde_json::from_str(&format!(r#"{{"role":"nurse","exp":1,"sub":"{sub}"}}"#)).unwrap()).unwrap()
    }

    fn ask(file: &str, list: &[(&str, &str)]) -> Result<Question, QueryError> {
        let params: HashMap<_, _> = list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Question::new(Arc::new(NamedQuery::parse("q.sql", file).unwrap()), &params)
    }

    #[test]
    fn one_question_of_one_asker_has_one_key() {
        let text = "-- name: q\n-- param: a text\n-- param: b int = 7\nselect $1, $2";
        let of = |list: &[(&str, &str)], sub: &str| key(&ask(text, list).unwrap(), &claims(sub)).unwrap();
        assert_eq!(of(&[("a", "x")], "u"), of(&[("b", "7"), ("a", "x")], "u"));
        assert_ne!(of(&[("a", "x")], "u"), of(&[("a", "x")], "v"));
        assert_ne!(of(&[("a", "x&b=8")], "u"), of(&[("a", "x"), ("b", "8")], "u"));
        assert_eq!(of(&[("a", "x y")], "u").namespace(), "query.");
        assert!(of(&[("a", "x y")], "u").key().contains("?a=x%20y&b=7;nurse;"));
        let long = "é".repeat(400);
        let (one, other) = (of(&[("a", &long)], "u"), of(&[("a", &format!("{long}!"))], "u"));
        assert!(one.key().contains("?#") && one != other);
        assert_eq!(ask(text, &[]).unwrap_err().code(), "missing_parameter");
        let unknown = ask(text, &[("a", ""), ("aa", "")]).unwrap_err();
        assert_eq!((unknown.code(), unknown.hint().as_str()), ("unknown_parameter", "did you mean `a`?"));
    }

    #[test]
    fn another_text_another_ttl_and_another_namespace_are_other_keys_and_a_comment_is_not() {
        let of = |file: &str| key(&ask(file, &[]).unwrap(), &claims("u")).unwrap();
        let before = of("-- name: q\n-- ttl: 5m\nselect 1");
        assert_eq!(before, of("-- name: q\n-- describe: what it is\n-- ttl: 300s\n-- a comment\n\nselect 1;\n"));
        for other in [
            "-- name: q\n-- ttl: 5m\nselect 2",
            "-- name: q\n-- ttl: 6m\nselect 1",
            "-- name: q\n-- ttl: 5m\n-- tags: t\nselect 1",
        ] {
            assert_ne!(before, of(other), "{other}");
        }
        assert_eq!(of("-- name: q\n-- namespace: patients\nselect 1").namespace(), "query.patients");
    }

    #[test]
    fn each_page_is_an_answer_of_its_own() {
        let text = "-- name: q\n-- page: 2 by a\nselect 1 as a";
        let of = |list: &[(&str, &str)]| key(&ask(text, list).unwrap(), &claims("u")).unwrap();
        let meaning = &ask(text, &[]).unwrap().query.meaning;
        let after = |value: Option<&str>| crate::page::cursor(meaning, &[value.map(str::to_owned)]);
        let (null, one) = (after(None), after(Some("!")));
        let keys = [of(&[]), of(&[("limit", "3")]), of(&[("after", &null)]), of(&[("after", &one)])];
        assert!(keys.iter().enumerate().all(|(i, key)| keys[i + 1..].iter().all(|other| key != other)), "{keys:?}");
        assert_eq!(ask(text, &[("limit", "1001")]).unwrap_err().code(), "bad_parameter");
        assert_eq!(ask(text, &[("after", "x")]).unwrap_err().code(), "bad_cursor");
        assert_eq!(ask("-- name: q\nselect 1", &[("limit", "1")]).unwrap_err().code(), "unknown_parameter");
    }

    #[test]
    fn a_word_for_a_moment_is_not_a_moment() {
        let text = "-- name: q\n-- param: day date\nselect $1";
        assert!(ask(text, &[("day", "2026-01-02")]).is_ok());
        assert_eq!(ask(text, &[("day", "today")]).unwrap_err().code(), "bad_parameter");
    }
}
