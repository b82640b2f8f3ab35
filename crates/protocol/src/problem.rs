//! Errors over HTTP: RFC 9457 problem documents with a `code` to act on and a `hint` how to mend.

use serde::Serialize;

#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Problem {
    pub status: u16,
    pub code: String,
    pub title: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    pub const CONTENT_TYPE: &'static str = "application/problem+json";

    pub fn new(status: u16, code: &str, title: impl Into<String>) -> Problem {
        Problem { status, code: code.to_owned(), title: title.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hint = Some(hint.into());
        self
    }

    pub fn body(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_says_what_and_how_to_mend() {
        let body = Problem::new(404, "unknown_query", "There is no query `x`.").hint("Did you mean `y`?").body();
        assert_eq!(body, r#"{"status":404,"code":"unknown_query","title":"There is no query `x`.","hint":"Did you mean `y`?"}"#);
    }
}
