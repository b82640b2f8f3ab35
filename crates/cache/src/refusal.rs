//! Why a value was not kept: a refusal, which its caller may shrug at, or an error in what was handed in, which he must mend.

use std::{fmt, time::Duration};

/// Why a value was not stored. Its caller has it all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A commit touched its tags that it does not contain.
    Touched,
    NotHearing,
    FloorMoved,
    /// What is stored was read later.
    Older,
    TooLarge,
    TooManyTags,
    /// It may live for less than the shortest time to live.
    TtlTooShort,
    ContentType,
    UnknownNamespace,
    /// There is nothing, and the namespace does not keep that.
    Negative,
    /// What is there is not what the caller said must be.
    Precondition,
    /// A value from elsewhere that L2 did not confirm. What was there before is gone.
    L2Away,
}

impl Refusal {
    pub const ALL: [Refusal; 12] = [
        Refusal::Touched,
        Refusal::NotHearing,
        Refusal::FloorMoved,
        Refusal::Older,
        Refusal::TooLarge,
        Refusal::TooManyTags,
        Refusal::TtlTooShort,
        Refusal::ContentType,
        Refusal::UnknownNamespace,
        Refusal::Negative,
        Refusal::Precondition,
        Refusal::L2Away,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::Touched => "touched",
            Refusal::NotHearing => "not_hearing",
            Refusal::FloorMoved => "floor_moved",
            Refusal::Older => "older",
            Refusal::TooLarge => "too_large",
            Refusal::TooManyTags => "too_many_tags",
            Refusal::TtlTooShort => "ttl_too_short",
            Refusal::ContentType => "content_type_invalid",
            Refusal::UnknownNamespace => "unknown_namespace",
            Refusal::Negative => "negative_not_kept",
            Refusal::Precondition => "precondition_failed",
            Refusal::L2Away => "l2_away",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    #[error("namespace `{0}` is not in the config, and the config is strict; add [cache.namespaces.{0}]")]
    UnknownNamespace(String),
    #[error("the value has {bytes} bytes; at most {limit} are kept: split it, or raise `cache.max_value_bytes`")]
    TooLarge { bytes: usize, limit: usize },
    #[error("the value has {count} tags, at most {limit} are allowed; use a wider tag, such as the table's")]
    TooManyTags { count: usize, limit: usize },
    #[error("a time to live of {} s is not between 1 second and 30 days", .0.as_secs_f64())]
    Ttl(Duration),
    #[error("a content type is at most 255 printable ASCII characters, such as application/json")]
    ContentType,
    #[error("namespace `{0}` does not keep that there is nothing; set negative_ttl of [cache.namespaces.{0}]")]
    Negative(String),
    #[error("a value of namespace `{0}` comes from elsewhere and waits for the cache table: put it with put_if or put_external")]
    MustWait(String),
}

impl PutError {
    pub fn code(&self) -> &'static str {
        match self {
            PutError::UnknownNamespace(_) => "unknown_namespace",
            PutError::TooLarge { .. } => "value_too_large",
            PutError::TooManyTags { .. } => "too_many_tags",
            PutError::Ttl(_) => "ttl_out_of_range",
            PutError::ContentType => "content_type_invalid",
            PutError::Negative(_) => "negative_not_kept",
            PutError::MustWait(_) => "must_wait",
        }
    }
}
