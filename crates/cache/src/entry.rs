//! A cached value with all that is needed to judge it: its fence, the hashes of its tags, its age.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use bytes::Bytes;
use walcast_model::{CacheKey, Fence, Tag, TagHash};

/// A value as somebody hands it in.
#[derive(Debug, Clone)]
pub struct NewValue {
    pub value: Bytes,
    pub content_type: Arc<str>,
    pub tags: Vec<Tag>,
    /// None: what the namespace or the cache says.
    pub ttl: Option<Duration>,
    /// "There is nothing": kept for a time of its own, so that asking for what does not exist is cheap too.
    pub negative: bool,
}

/// How long an entry is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    pub fresh: Duration,
    /// After that, marked stale.
    pub stale: Duration,
}

/// Never changed once made, but for a note of the judge: tiers, flights and readers share it. Of one cache only.
/// What every read looks at stands first, and stays there: beside the counts of the `Arc`, mostly on one cache line.
#[derive(Debug)]
#[repr(C)]
pub struct Entry {
    verdict: Verdict,
    pub expires_at: u64,
    pub negative: bool,
    pub key: CacheKey,
    pub value: Bytes,
    pub content_type: Arc<str>,
    pub tags: Arc<[Tag]>,
    /// First "everything", namespace and key, then the tags and their companions.
    pub tag_hashes: Box<[TagHash]>,
    pub fence: Fence,
    /// Unix milliseconds, as is `expires_at`.
    pub stored_at: u64,
    /// Until then it may be answered as stale. Never before `expires_at`.
    pub stale_until: u64,
    /// Strong and quoted, from content and content type.
    pub etag: Arc<str>,
}

/// The clock's sequence read before the entry was last found admitted; 0: never.
#[derive(Default)]
struct Verdict(AtomicU64);

/// No part of what the entry is: the same entry read elsewhere has another.
impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("_")
    }
}

/// "Everything", namespace and key.
const OWN_TAGS: usize = 3;
/// A snapshot with more running transactions is kept in its stricter short form.
const MAX_RUNNING: usize = 256;
/// What an entry costs beside its bytes: the structs, two tables' slots, allocator overhead.
const FIXED_WEIGHT: usize = 512;

impl Entry {
    pub(crate) fn new(key: &CacheKey, value: NewValue, life: Life, fence: Fence, now: u64) -> Entry {
        let etag = etag(&value.value, &value.content_type);
        let expires_at = now.saturating_add(life.fresh.as_millis() as u64);
        let stale_until = expires_at.saturating_add(life.stale.as_millis() as u64);
        Entry::stored(key, value, fence, [now, expires_at, stale_until], etag)
    }

    /// As a tier kept it.
    pub(crate) fn stored(
        key: &CacheKey,
        value: NewValue,
        fence: Fence,
        [stored_at, expires_at, stale_until]: [u64; 3],
        etag: Arc<str>,
    ) -> Entry {
        let tag_hashes = tag_hashes(key, &value.tags);
        let fence = Fence { snapshot: fence.snapshot.bounded(MAX_RUNNING), ..fence };
        Entry {
            key: key.clone(),
            value: value.value,
            content_type: value.content_type,
            tags: value.tags.into(),
            tag_hashes,
            fence,
            stored_at,
            expires_at,
            stale_until: stale_until.max(expires_at),
            negative: value.negative,
            etag,
            verdict: Verdict::default(),
        }
    }

    pub(crate) fn was_admitted_at(&self, sequence: u64) -> bool {
        self.verdict.0.load(Ordering::Relaxed) == sequence
    }

    /// Relaxed: the number alone says what the judgement had seen (see [`walcast_model::TagClock::sequence`]).
    pub(crate) fn note_admitted_at(&self, sequence: u64) {
        self.verdict.0.store(sequence, Ordering::Relaxed);
    }

    pub fn age(&self, now: u64) -> Duration {
        Duration::from_millis(now.saturating_sub(self.stored_at))
    }

    pub fn ttl(&self, now: u64) -> Duration {
        Duration::from_millis(self.expires_at.saturating_sub(now))
    }

    /// Hashes of what is only ever invalidated by hand.
    pub(crate) fn own_hashes(&self) -> &[TagHash] {
        &self.tag_hashes[..OWN_TAGS]
    }

    pub(crate) fn weight(&self, key: &CacheKey) -> usize {
        let tags: usize = self.tags.iter().map(|tag| tag.as_str().len() + 32).sum();
        FIXED_WEIGHT
            + self.value.len()
            + self.content_type.len()
            + key.namespace().len()
            + key.key().len()
            + tags
            + self.tag_hashes.len() * 8
            + self.fence.snapshot.running().len() * 8
    }
}

fn tag_hashes(key: &CacheKey, tags: &[Tag]) -> Box<[TagHash]> {
    let mut hashes = Vec::with_capacity(OWN_TAGS + tags.len() * 2);
    hashes.extend(TagHash::own(key));
    let mut add = |hash: TagHash| {
        if !hashes.contains(&hash) {
            hashes.push(hash);
        }
    };
    for tag in tags {
        add(tag.hash());
        TagHash::companion(tag).into_iter().for_each(&mut add);
    }
    hashes.into()
}

/// Cryptographic, because a client that is answered 304 keeps what it has: two contents must never share one.
pub fn etag(value: &[u8], content_type: &str) -> Arc<str> {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(content_type.as_bytes());
    context.update(&[0]);
    context.update(value);
    let mut text = String::with_capacity(34);
    text.push('"');
    let digit = |half: u8| char::from_digit(u32::from(half), 16).unwrap_or('0');
    for byte in &context.finish().as_ref()[..16] {
        text.extend([digit(byte >> 4), digit(byte & 15)]);
    }
    text.push('"');
    text.into()
}

/// Unix milliseconds.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_and_type_make_the_etag() {
        let json = etag(b"{}", "application/json");
        assert_eq!(json.len(), 34);
        assert!(json.starts_with('"') && json.ends_with('"'));
        assert_eq!(json, etag(b"{}", "application/json"));
        assert_ne!(json, etag(b"{}", "text/plain"));
        assert_ne!(json, etag(b"[]", "application/json"));
    }

    #[test]
    fn an_entry_falls_with_its_key_its_namespace_everything_its_tags_and_their_unknown_rows() {
        let key = CacheKey::new("clinic", "7").unwrap();
        let tags = vec![Tag::parse("patients:id=7").unwrap(), Tag::parse("patients:id=8").unwrap()];
        let hashes = tag_hashes(&key, &tags);
        for text in ["patients:id=7", "patients:id=8", "patients:id=*"] {
            assert!(hashes.contains(&Tag::parse(text).unwrap().hash()), "{text}");
        }
        assert!(hashes.contains(&Tag::key(&key).hash()));
        assert!(hashes.contains(&Tag::namespace("clinic").hash()));
        assert!(hashes.contains(&Tag::everything().hash()));
        assert_eq!(hashes.len(), 6, "a companion shared by two tags is there once");
    }
}
