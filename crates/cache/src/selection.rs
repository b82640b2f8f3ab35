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
///
/// Kept as a set of states, one bit each: "so many characters of the pattern are matched". One step for all of them at once
/// for each character of a key, so no pattern makes a key expensive: it is tested for every read while it stands.
#[derive(Debug, Clone)]
pub struct Glob {
    text: String,
    /// States behind which a `*` stands: any character leaves them as they are.
    stays: Box<[u64]>,
    /// The state in which all is matched.
    whole: usize,
    /// Characters of the pattern, in order; each has a row of `enters`.
    alphabet: Box<[char]>,
    /// The states that a character leads into. The last row is for those that the pattern does not name.
    enters: Box<[u64]>,
}

const WORD: usize = u64::BITS as usize;
const MOST_WORDS: usize = CacheKey::MAX_CHARS / WORD + 1;

fn set(bits: &mut [u64], at: usize) {
    bits[at / WORD] |= 1 << (at % WORD);
}

fn has(bits: &[u64], at: usize) -> bool {
    bits[at / WORD] & 1 << (at % WORD) != 0
}

impl PartialEq for Glob {
    fn eq(&self, other: &Glob) -> bool {
        self.text == other.text
    }
}

impl Eq for Glob {}

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
        let whole = text.chars().filter(|c| *c != '*').count();
        let words = whole / WORD + 1;
        let mut alphabet: Vec<char> = text.chars().filter(|c| !matches!(c, '*' | '?')).collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let (mut stays, mut enters) = (vec![0; words], vec![0; words * (alphabet.len() + 1)]);
        let mut state = 0;
        for c in text.chars() {
            match c {
                '*' => set(&mut stays, state),
                '?' => {
                    state += 1;
                    enters.chunks_exact_mut(words).for_each(|row| set(row, state));
                }
                c => {
                    state += 1;
                    let row = alphabet.partition_point(|known| *known < c);
                    set(&mut enters[row * words..][..words], state);
                }
            }
        }
        Ok(Glob { text: text.to_owned(), stays: stays.into(), whole, alphabet: alphabet.into(), enters: enters.into() })
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Glob {
    pub fn matches(&self, text: &str) -> bool {
        let words = self.stays.len();
        let mut room = [0; MOST_WORDS];
        let states = &mut room[..words];
        set(states, 0);
        for c in text.chars() {
            if has(states, self.whole) && has(&self.stays, self.whole) {
                return true;
            }
            let row = self.alphabet.binary_search(&c).unwrap_or(self.alphabet.len());
            let enters = &self.enters[row * words..][..words];
            let (mut carried, mut left) = (0, 0);
            for ((state, enter), stay) in states.iter_mut().zip(enters).zip(&self.stays) {
                let before = *state;
                *state = (((before << 1) | carried) & enter) | (before & stay);
                carried = before >> (WORD - 1);
                left |= *state;
            }
            if left == 0 {
                return false;
            }
        }
        has(states, self.whole)
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
        let pattern = self
            .pattern
            .as_ref()
            .map_or(0, |glob| glob.text.len() + glob.alphabet.len() * 4 + (glob.enters.len() + glob.stays.len()) * 8);
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
    fn p7_no_pattern_makes_a_key_expensive() {
        // What makes a matcher that tries each place anew walk the pattern for each character.
        let (text, part) = ("a".repeat(CacheKey::MAX_CHARS), "a".repeat(255));
        let began = std::time::Instant::now();
        for (pattern, fits) in [(format!("*{part}b"), false), (format!("*{part}b*"), false), (format!("*?{part}*"), true)] {
            let glob: Glob = pattern.parse().unwrap();
            assert!((0..20_000).all(|_| glob.matches(&text) == fits), "{pattern}");
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(30), "took {:?}", began.elapsed());
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
