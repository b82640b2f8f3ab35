//! What a hand invalidates that no single tag can say: a glob over keys, entries that carry all of several tags, and
//! everything soft. A predicate over entries; it never lists them.
//!
//! A pattern is over what was asked for, so it reaches an entry in every context.
//!
//! Made by whoever hears the invalidation, tested by [`crate::selections`].

use std::{fmt, str::FromStr};

use walcast_model::{CacheKey, Tag, TagHash};

use crate::Entry;

/// `*` is any text, `?` any one character, all else is itself. Means what [`Glob::like`] means to PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob {
    text: String,
    parts: Box<[Part]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Any,
    One,
    Same(char),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    #[error("a pattern is empty")]
    Empty,
    #[error("a pattern has {0} characters; at most {max} are allowed", max = CacheKey::MAX_CHARS)]
    TooLong(usize),
    #[error("a pattern holds a control character, which no key has")]
    Control,
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(text: &str) -> Result<Glob, GlobError> {
        let chars = text.chars().count();
        match chars {
            0 => return Err(GlobError::Empty),
            _ if chars > CacheKey::MAX_CHARS => return Err(GlobError::TooLong(chars)),
            _ if text.chars().any(char::is_control) => return Err(GlobError::Control),
            _ => {}
        }
        let mut parts: Vec<Part> = text
            .chars()
            .map(|c| match c {
                '*' => Part::Any,
                '?' => Part::One,
                c => Part::Same(c),
            })
            .collect();
        parts.dedup_by(|a, b| (*a, *b) == (Part::Any, Part::Any));
        Ok(Glob { text: text.to_owned(), parts: parts.into() })
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Glob {
    pub fn matches(&self, text: &str) -> bool {
        let (mut at, mut rest) = (0, text.chars());
        // Behind the last star, and where the text that it leaves begins: only the last one ever needs to give more.
        let mut star: Option<(usize, std::str::Chars<'_>)> = None;
        loop {
            let part = self.parts.get(at);
            if part == Some(&Part::Any) {
                at += 1;
                star = Some((at, rest.clone()));
                continue;
            }
            let mut ahead = rest.clone();
            let fits = match (part, ahead.next()) {
                (None, None) => return true,
                (Some(Part::One), Some(_)) => true,
                (Some(Part::Same(wanted)), Some(c)) => *wanted == c,
                _ => false,
            };
            if fits {
                at += 1;
                rest = ahead;
                continue;
            }
            let Some((behind, from)) = &mut star else { return false };
            if from.next().is_none() {
                return false;
            }
            (at, rest) = (*behind, from.clone());
        }
    }

    /// The same as a LIKE pattern with `\` as its escape.
    pub fn like(&self) -> String {
        let mut like = String::with_capacity(self.text.len() + 8);
        for c in self.text.chars() {
            match c {
                '*' => like.push('%'),
                '?' => like.push('_'),
                '%' | '_' | '\\' => like.extend(['\\', c]),
                c => like.push(c),
            }
        }
        like
    }
}

/// Entries that fulfil all of it. With nothing named: every entry.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    namespace: Option<String>,
    pattern: Option<Glob>,
    all_of: Vec<Tag>,
    any_of: Vec<Tag>,
    soft: bool,
    /// Of namespace and `all_of`.
    all_hashes: Vec<TagHash>,
    any_hashes: Vec<TagHash>,
}

impl Selection {
    pub fn in_namespace(mut self, namespace: Option<&str>) -> Selection {
        self.all_hashes.extend(namespace.map(|namespace| Tag::namespace(namespace).hash()));
        self.namespace = namespace.map(str::to_owned);
        self
    }

    pub fn with_keys_like(mut self, pattern: Option<Glob>) -> Selection {
        self.pattern = pattern;
        self
    }

    /// Each of them is carried: an entry's own tags, their companions, and its key's, namespace's and everything's.
    pub fn with_all_of(mut self, tags: impl IntoIterator<Item = Tag>) -> Selection {
        self.all_of.extend(tags);
        let namespace = self.namespace.iter().map(|namespace| Tag::namespace(namespace).hash());
        self.all_hashes = namespace.chain(self.all_of.iter().map(Tag::hash)).collect();
        self
    }

    /// At least one of them is carried, unless there are none.
    pub fn with_any_of(mut self, tags: impl IntoIterator<Item = Tag>) -> Selection {
        self.any_of.extend(tags);
        self.any_hashes = self.any_of.iter().map(Tag::hash).collect();
        self
    }

    /// Marks old instead of ending.
    pub fn softly(mut self, soft: bool) -> Selection {
        self.soft = soft;
        self
    }

    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    pub fn pattern(&self) -> Option<&Glob> {
        self.pattern.as_ref()
    }

    pub fn all_of(&self) -> &[Tag] {
        &self.all_of
    }

    pub fn any_of(&self) -> &[Tag] {
        &self.any_of
    }

    pub fn is_soft(&self) -> bool {
        self.soft
    }

    /// The tag that every selected entry carries, whatever else it does.
    pub fn widest_tag(&self) -> Tag {
        self.namespace.as_deref().map_or_else(Tag::everything, Tag::namespace)
    }

    /// What it holds in memory, about.
    pub(crate) fn weight(&self) -> usize {
        let tags = self.all_of.iter().chain(&self.any_of).map(|tag| tag.as_str().len() + 40).sum::<usize>();
        let pattern = self.pattern.as_ref().map_or(0, |glob| glob.text.len() + glob.parts.len() * 8);
        256 + tags + pattern + self.namespace.as_ref().map_or(0, String::len)
    }

    pub(crate) fn selects(&self, entry: &Entry) -> bool {
        let carries = |tag: &TagHash| entry.tag_hashes.contains(tag);
        self.all_hashes.iter().all(carries)
            && (self.any_hashes.is_empty() || self.any_hashes.iter().any(carries))
            && self.pattern.as_ref().is_none_or(|pattern| pattern.matches(entry.key.asked()))
    }

    /// Do both select the same entries, in the same way?
    pub(crate) fn is_as(&self, other: &Selection) -> bool {
        (&self.namespace, &self.pattern, &self.all_of, &self.any_of, self.soft)
            == (&other.namespace, &other.pattern, &other.all_of, &other.any_of, other.soft)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        let glob: Glob = pattern.parse().unwrap();
        matching.iter().for_each(|text| assert!(glob.matches(text), "{pattern} and {text}"));
        others.iter().for_each(|text| assert!(!glob.matches(text), "{pattern} and {text}"));
    }

    #[test]
    fn a_star_is_any_text_a_question_mark_one_character_and_all_else_is_itself() {
        check("user:7:*", &["user:7:", "user:7:x", "user:7:*"], &["user:7", "user:77:x", "xuser:7:x"]);
        check("*:list", &["a:list", ":list", "a:list:list"], &["list", "a:list:"]);
        check("a*b*c", &["abc", "aXbYc", "abbcc", "abcbc"], &["ab", "acb", "abcd"]);
        check("?é?", &["xéy", "éé7"], &["é", "xé", "xyz"]);
        check("100%_\\", &["100%_\\"], &["1000_\\", "100%x\\"]);
        check("**", &["", "x"], &[]);
        check(&"a*".repeat(200), &[&"a".repeat(500)], &[&"b".repeat(500)]);
    }

    #[test]
    fn a_like_pattern_escapes_what_like_would_read() {
        let glob: Glob = r"a*b?c%d_e\f".parse().unwrap();
        assert_eq!(glob.like(), r"a%b_c\%d\_e\\f");
    }

    #[test]
    fn patterns_that_no_key_could_match_are_refused() {
        assert_eq!("".parse::<Glob>(), Err(GlobError::Empty));
        assert_eq!("a\n*".parse::<Glob>(), Err(GlobError::Control));
        assert_eq!("x".repeat(513).parse::<Glob>(), Err(GlobError::TooLong(513)));
    }
}
