//! Namespace and key of a cached value. Two keys are equal only if their full texts are.

use std::{
    fmt,
    hash::{BuildHasher, Hash, Hasher, RandomState},
    sync::{Arc, LazyLock},
};

use crate::pg_hash;

/// One text and its hash, so that a clone is one counter and a look-up hashes nothing.
#[derive(Debug, Clone)]
pub struct CacheKey {
    /// `namespace/key`: a namespace holds no slash.
    text: Arc<str>,
    namespace_len: u8,
    hash: u64,
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
    #[error("a cache key holds a control character; percent-encode it")]
    Control,
}

impl CacheKey {
    pub const MAX_CHARS: usize = 512;

    pub fn new(namespace: &str, key: &str) -> Result<CacheKey, CacheKeyError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if namespace.is_empty() || namespace.len() > 64 || !namespace.bytes().all(plain) {
            return Err(CacheKeyError::Namespace(namespace.chars().take(64).collect()));
        }
        if key.is_empty() {
            return Err(CacheKeyError::Empty);
        }
        let chars = key.chars().count();
        if chars > CacheKey::MAX_CHARS {
            return Err(CacheKeyError::TooLong(chars));
        }
        if key.chars().any(char::is_control) {
            return Err(CacheKeyError::Control);
        }
        let mut text = String::with_capacity(namespace.len() + 1 + key.len());
        text.push_str(namespace);
        text.push('/');
        text.push_str(key);
        let hash = HASHER.hash_one(text.as_bytes());
        Ok(CacheKey { text: text.into(), namespace_len: namespace.len() as u8, hash })
    }

    pub fn namespace(&self) -> &str {
        &self.text[..usize::from(self.namespace_len)]
    }

    pub fn key(&self) -> &str {
        &self.text[usize::from(self.namespace_len) + 1..]
    }

    /// Made once, well mixed, of this process only.
    pub fn hash64(&self) -> u64 {
        self.hash
    }

    /// 16 bytes that name the key in the L2 table; the full key is kept beside them for the check.
    /// In SQL: `walcast.cache_hash(namespace, key)`.
    pub fn digest(&self) -> [u8; 16] {
        let [high, low] = [1, 2].map(|seed| u128::from(pg_hash::hash(self.text.as_bytes(), seed)));
        (high << 64 | low).to_be_bytes()
    }
}

impl PartialEq for CacheKey {
    fn eq(&self, other: &CacheKey) -> bool {
        self.hash == other.hash && self.text == other.text
    }
}

impl Eq for CacheKey {}

impl Hash for CacheKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
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
        for (namespace, text) in [("patients", "summary/8"), ("patient", "summary/7"), ("patients", "s")] {
            assert_ne!(CacheKey::new(namespace, text).unwrap(), key);
        }
    }
}
