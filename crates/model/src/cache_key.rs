//! Namespace and key of a cached value. Two keys are equal only if their full texts are.
//!
//! A key may stand in a **context** (role and claims of who asks): its full text is then what was asked for, a separator
//! that nobody can ask for, and the context. So one context's entry is never another's, in any tier, flight or ticket.

use std::{
    fmt,
    hash::{BuildHasher, Hash, Hasher, RandomState},
    sync::{Arc, LazyLock},
};

use arrayvec::ArrayString;

use crate::pg_hash;

/// One text and its hash, so that a look-up hashes nothing.
#[derive(Debug, Clone)]
pub struct CacheKey {
    /// `namespace/key`: a namespace holds no slash.
    text: Text,
    namespace_len: u8,
    /// So many bytes at the end are not what was asked for but its context.
    context_len: u8,
    hash: u64,
}

/// A usual key lies in the struct itself: making one allocates nothing, and comparing it with the one that a tier holds
/// follows no pointer, which is most of what a hit costs where memory is cold.
#[derive(Debug, Clone)]
enum Text {
    Short(ArrayString<{ CacheKey::SHORT_BYTES }>),
    Long(Arc<str>),
}

impl Text {
    fn of(parts: [&str; 3]) -> Text {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > CacheKey::SHORT_BYTES {
            return Text::Long(parts.concat().into());
        }
        let mut short = ArrayString::new();
        parts.iter().for_each(|part| short.push_str(part));
        Text::Short(short)
    }

    #[inline]
    fn as_str(&self) -> &str {
        match self {
            Text::Short(text) => text,
            Text::Long(text) => text,
        }
    }
}

/// Keyed by chance in each process: callers choose their keys, and must not be able to choose which ones collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheKeyError {
    #[error("namespace `{0}` must be 1 to 64 of the characters a-z, A-Z, 0-9, `_`, `-`, `.`")]
    Namespace(String),
    #[error("a cache key is empty")]
    Empty,
    #[error("a cache key has {0} characters; at most {max} are allowed", max = CacheKey::MAX_CHARS)]
    TooLong(usize),
    #[error("a cache key holds a character that cannot be printed; percent-encode it")]
    Control,
}

/// A control character: refused in what is asked for, so no key can be made to look like one in a context.
const SEPARATOR: char = '\u{1f}';
/// The separator and 32 hexadecimal digits.
const CONTEXT_LEN: u8 = 33;

impl CacheKey {
    pub const MAX_CHARS: usize = 512;
    /// With its length, one cache line.
    const SHORT_BYTES: usize = 60;

    pub fn new(namespace: &str, key: &str) -> Result<CacheKey, CacheKeyError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if namespace.is_empty() || namespace.len() > 64 || !namespace.bytes().all(plain) {
            return Err(CacheKeyError::Namespace(namespace.chars().take(64).collect()));
        }
        if key.is_empty() {
            return Err(CacheKeyError::Empty);
        }
        // Most keys are short and of ASCII alone: one look at each byte says all.
        if key.len() <= CacheKey::MAX_CHARS && key.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Ok(CacheKey::of(namespace, key, 0));
        }
        let chars = key.chars().count();
        if chars > CacheKey::MAX_CHARS {
            return Err(CacheKeyError::TooLong(chars));
        }
        if key.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')) {
            return Err(CacheKeyError::Control);
        }
        Ok(CacheKey::of(namespace, key, 0))
    }

    fn of(namespace: &str, key: &str, context_len: u8) -> CacheKey {
        let text = Text::of([namespace, "/", key]);
        let hash = HASHER.hash_one(text.as_str().as_bytes());
        CacheKey { text, namespace_len: namespace.len() as u8, context_len, hash }
    }

    /// The full text of [`CacheKey::key`] as a tier kept it.
    pub fn stored(namespace: &str, key: &str) -> Result<CacheKey, CacheKeyError> {
        let (asked, context) = key.split_once(SEPARATOR).map_or((key, None), |(asked, context)| (asked, Some(context)));
        let asked = CacheKey::new(namespace, asked)?;
        match context {
            None => Ok(asked),
            Some(context) => {
                let context = u128::from_str_radix(context, 16).map_err(|_| CacheKeyError::Control)?;
                Ok(asked.in_context(context))
            }
        }
    }

    /// The same question, asked by those whom `context` names: a hash of their role and claims. It is of fixed length
    /// and counts for nothing in [`CacheKey::MAX_CHARS`].
    pub fn in_context(&self, context: u128) -> CacheKey {
        CacheKey::of(self.namespace(), &format!("{}{SEPARATOR}{context:032x}", self.asked()), CONTEXT_LEN)
    }

    pub fn namespace(&self) -> &str {
        &self.text.as_str()[..usize::from(self.namespace_len)]
    }

    /// The full text, context included: what tells entries apart.
    pub fn key(&self) -> &str {
        &self.text.as_str()[usize::from(self.namespace_len) + 1..]
    }

    /// Made once, well mixed, of this process only.
    #[inline]
    pub fn hash64(&self) -> u64 {
        self.hash
    }

    /// What the caller asked for: the same in every context.
    pub fn asked(&self) -> &str {
        let key = self.key();
        &key[..key.len() - usize::from(self.context_len)]
    }

    /// 16 bytes that name the key in the L2 table; the full key is kept beside them for the check.
    /// In SQL: `walcast.cache_hash(namespace, key)`.
    pub fn digest(&self) -> [u8; 16] {
        let [high, low] = [1, 2].map(|seed| u128::from(pg_hash::hash(self.text.as_str().as_bytes(), seed)));
        (high << 64 | low).to_be_bytes()
    }
}

impl PartialEq for CacheKey {
    #[inline]
    fn eq(&self, other: &CacheKey) -> bool {
        self.hash == other.hash && self.text.as_str() == other.text.as_str()
    }
}

impl Eq for CacheKey {}

impl Hash for CacheKey {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.asked())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_at_the_door() {
        assert!(CacheKey::new("patients", "summary:7").is_ok());
        assert!(CacheKey::new("pa tients", "x").is_err());
        assert!(CacheKey::new("", "x").is_err());
        assert!(CacheKey::new("p", "").is_err());
        assert!(CacheKey::new("p", "a\nb").is_err());
        assert!(CacheKey::new("p", &"é".repeat(512)).is_ok());
        assert!(CacheKey::new("p", &"é".repeat(513)).is_err());
        assert_ne!(CacheKey::new("a", "bc").unwrap().digest(), CacheKey::new("ab", "c").unwrap().digest());
    }

    #[test]
    fn a_key_keeps_both_its_parts_and_equals_only_the_same_two() {
        let key = CacheKey::new("patients", "summary/7").unwrap();
        assert_eq!((key.namespace(), key.key(), key.to_string().as_str()), ("patients", "summary/7", "patients/summary/7"));
        let same = CacheKey::new("patients", "summary/7").unwrap();
        assert_eq!((&same, same.hash64()), (&key, key.hash64()));
        let longer = "s".repeat(CacheKey::SHORT_BYTES);
        for len in [CacheKey::SHORT_BYTES - 10, CacheKey::SHORT_BYTES - 9, CacheKey::SHORT_BYTES - 8] {
            let key = CacheKey::new("patients", &longer[..len]).unwrap();
            assert_eq!((key.namespace(), key.key()), ("patients", &longer[..len]));
            assert_eq!(key, key.clone());
            assert_ne!(key, CacheKey::new("patients", &longer[1..len]).unwrap());
        }
        for (namespace, text) in [("patients", "summary/8"), ("patient", "summary/7"), ("patients", "s")] {
            assert_ne!(CacheKey::new(namespace, text).unwrap(), key);
        }
    }

    #[test]
    fn p3_a_key_in_a_context_is_nobody_elses_and_cannot_be_asked_for() {
        let asked = CacheKey::new("permission", "me").unwrap();
        let (ann, bob) = (asked.in_context(1), asked.in_context(2));
        assert!(ann != bob && ann != asked && ann.digest() != bob.digest() && ann.key() != bob.key());
        assert_eq!((ann.asked(), ann.to_string().as_str()), ("me", "permission/me"));
        assert_eq!(ann.in_context(2), bob, "a context replaces the one before");
        assert_eq!(CacheKey::stored("permission", ann.key()), Ok(ann.clone()));
        assert_eq!(CacheKey::stored("permission", "me"), Ok(asked));
        assert_eq!(CacheKey::new("permission", ann.key()), Err(CacheKeyError::Control));
        assert!(CacheKey::stored("permission", "me\u{1f}xyz").is_err());
        let long = CacheKey::new("p", &"é".repeat(512)).unwrap().in_context(u128::MAX);
        assert_eq!(CacheKey::stored("p", long.key()), Ok(long));
    }
}
