//! Namespace and key of a cached value. Two keys are equal only if their full texts are.

use std::{fmt, sync::Arc};

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheKey {
    namespace: Arc<str>,
    key: Arc<str>,
}

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
        Ok(CacheKey { namespace: namespace.into(), key: key.into() })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    /// 16 bytes that name the key in the L2 table; the full key is kept beside them for the check.
    pub fn digest(&self) -> [u8; 16] {
        let mut text = Vec::with_capacity(self.namespace.len() + self.key.len() + 1);
        text.extend_from_slice(self.namespace.as_bytes());
        text.push(0);
        text.extend_from_slice(self.key.as_bytes());
        xxhash_rust::xxh3::xxh3_128(&text).to_be_bytes()
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.key)
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
}
