//! The platform's functions that read nothing but the caller's claims: `auth.uid()` and its kin.
//!
//! Asked by the rules of a table and by the compiler of policies. A name is not enough: users may redefine these functions, so
//! their bodies are read, and only what is known to do no more counts.

/// By schema and name.
pub const KNOWN: [(&str, &str); 5] =
    [("auth", "uid"), ("auth", "jwt"), ("auth", "role"), ("auth", "email"), ("realtime", "topic")];

/// Does a function's body read nothing but the settings of the request? Only what is known to do no more is let through.
pub fn reads_only_claims(body: &str) -> bool {
    const WORDS: [&str; 13] = [
        "select",
        "return",
        "begin",
        "end",
        "coalesce",
        "nullif",
        "current_setting",
        "true",
        "null",
        "text",
        "uuid",
        "json",
        "jsonb",
    ];
    let mut rest = body;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            'a'..='z' | 'A'..='Z' | '_' => {
                let length = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                if !WORDS.contains(&rest[..length].to_ascii_lowercase().as_str()) {
                    return false;
                }
                length
            }
            '\'' => match rest[1..].find('\'') {
                Some(end) if !rest[..end + 1].contains('\\') => end + 2,
                _ => return false,
            },
            '(' | ')' | ',' | ';' => 1,
            c if c.is_ascii_whitespace() => 1,
            _ => match ["->>", "->", "::"].into_iter().find(|operator| rest.starts_with(operator)) {
                Some(operator) => operator.len(),
                None => return false,
            },
        };
        rest = &rest[length..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::reads_only_claims;

    #[test]
    fn the_platforms_functions_read_only_claims() {
        for body in [
            "select coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''), (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'))::uuid",
            "\n  select \n    coalesce(\n        nullif(current_setting('request.jwt.claim', true), ''),\n        nullif(current_setting('request.jwt.claims', true), '')\n    )::jsonb\n",
            "begin return nullif(current_setting('request.jwt.claim.role', true), '')::text; end;",
        ] {
            assert!(reads_only_claims(body), "{body}");
        }
        assert!(walcast_functions().all(reads_only_claims));
    }

    /// The bodies of those that `migrate` makes.
    fn walcast_functions() -> impl Iterator<Item = &'static str> {
        let bodies = include_str!("../sql/0002_functions.sql").split("$$").skip(1).step_by(2);
        bodies.inspect(|body| assert!(body.contains("current_setting")))
    }

    #[test]
    fn p3_whatever_may_read_more_is_not_let_through() {
        for body in [
            "select who from members limit 1",
            "select public.pr\u{fc}f\u{e9}()",
            "select who/**/()",
            "select (null::public.members).lookup",
            "select\"who\"from\"members\"",
            "select 1 @@@ 1",
            "select 'tomorrow'::timestamptz",
            "select current_setting('x') || now()",
            "select current_user",
            "select $1",
            "select 'it''s' -- from",
        ] {
            assert!(!reads_only_claims(body), "{body}");
        }
    }
}
