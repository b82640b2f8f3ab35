//! Reads through the cache and computes on a miss, once for all who ask meanwhile.
//!
//! Called by the engine for what the server itself can compute, and by any Rust program. What a single reader goes through
//! is in `reader`, what may be answered stale in `stale`, what goes on without a reader in `refresh`.

use std::{
    error::Error,
    fmt,
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::timeout_at;
use walcast_model::{CacheKey, Fence, Tag};

use crate::{
    AtLeast, Cache, Entry, Hearing, Lookup, Refusal, Stale, Tier,
    reader::Reader,
    stale::{Secured, is_over},
};

#[derive(Debug, Clone)]
pub struct ComputeOptions {
    /// None: what the computation, the namespace or the cache says, in this order.
    pub ttl: Option<Duration>,
    pub at_least: AtLeast,
    /// For all of it: waiting for others, reading L2, computing.
    pub timeout: Duration,
    /// After it an old entry that may be answered is answered, marked stale, and the computation goes on in the
    /// background. None: wait for the value.
    pub soft_timeout: Option<Duration>,
    /// Compute, whatever the tiers hold, and store. Shares only what others began after this call; never answered stale.
    pub force: bool,
    /// The value is under no row security, so one that a commit invalidated may be answered, marked stale, where the
    /// namespace says so.
    pub grace: bool,
}

impl Default for ComputeOptions {
    fn default() -> ComputeOptions {
        ComputeOptions {
            ttl: None,
            at_least: AtLeast::Any,
            timeout: Duration::from_secs(10),
            soft_timeout: None,
            force: false,
            grace: false,
        }
    }
}

impl ComputeOptions {
    pub(crate) fn secured(&self) -> Secured {
        if self.grace { Secured::No } else { Secured::Yes }
    }

    fn may_be_stale(&self) -> bool {
        self.at_least == AtLeast::Any && !self.force
    }
}

#[derive(Debug, Clone)]
pub struct Computed {
    pub value: Bytes,
    pub content_type: Arc<str>,
    pub tags: Vec<Tag>,
    /// Of the snapshot that the value was read in.
    pub fence: Fence,
    pub ttl: Option<Duration>,
    /// There is nothing: kept for the namespace's `negative_ttl`, and falls with its tags like any value.
    pub negative: bool,
}

impl Computed {
    /// `fence` was taken at or before the first read.
    pub fn new(value: impl Into<Bytes>, content_type: &str, tags: Vec<Tag>, fence: Fence) -> Computed {
        Computed { value: value.into(), content_type: content_type.into(), tags, fence, ttl: None, negative: false }
    }

    /// What was looked for does not exist. Its tags are those of what would make it exist.
    pub fn nothing(tags: Vec<Tag>, fence: Fence) -> Computed {
        Computed { negative: true, ..Computed::new(Bytes::new(), "application/octet-stream", tags, fence) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Tier(Tier),
    Computed,
    /// Somebody else computed it while we waited.
    Shared,
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub entry: Arc<Entry>,
    pub source: Source,
    pub stale: Option<Stale>,
    /// Why a computed value was not stored.
    pub refusal: Option<Refusal>,
}

impl Answer {
    pub(crate) fn of(entry: Arc<Entry>, source: Source) -> Answer {
        Answer { entry, source, stale: None, refusal: None }
    }

    /// There is nothing, and that is known.
    pub fn is_negative(&self) -> bool {
        self.entry.negative
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ComputeError<E> {
    /// The computation's own error.
    Failed(E),
    TimedOut {
        after_ms: u64,
    },
    /// Nothing computed in time was known to contain what the reader asked for.
    Behind,
}

impl<E: fmt::Display> fmt::Display for ComputeError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ComputeError::Failed(error) => write!(f, "computing the value failed: {error}"),
            ComputeError::TimedOut { after_ms } => {
                write!(f, "the value was not there after {after_ms} ms; allow more time or make it cheaper")
            }
            ComputeError::Behind => f.write_str("no value is known yet to contain what was asked for; ask again a little later"),
        }
    }
}

impl<E: Error + 'static> Error for ComputeError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ComputeError::Failed(error) => Some(error),
            _ => None,
        }
    }
}

/// What is there without waiting.
enum AtOnce {
    Fresh(Answer),
    /// To be answered stale while it is computed anew.
    Old(Answer),
    Nothing,
}

impl Cache {
    /// The value: from a tier, from somebody who computes it already, or computed. `compute` runs at most a few times,
    /// each time taking its fence at or before its first read. It owns what it needs, because it may go on in the
    /// background: past the soft timeout, while an old entry is answered, or ahead of an entry's end.
    ///
    /// Dropping the future drops a computation that is not in the background; a waiting reader then begins his own.
    pub async fn get_or_compute<F, Fut, E>(
        &self,
        key: &CacheKey,
        options: &ComputeOptions,
        compute: F,
    ) -> Result<Answer, ComputeError<E>>
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Computed, E>> + Send + 'static,
        E: Clone + Send + Sync + 'static,
    {
        match self.at_once(key, options) {
            AtOnce::Fresh(answer) => {
                if self.is_refresh_due(key, &answer.entry) {
                    self.refresh(key, options, &answer.entry, compute);
                }
                return Ok(answer);
            }
            AtOnce::Old(answer) => {
                self.refresh(key, options, &answer.entry, compute);
                return Ok(answer);
            }
            AtOnce::Nothing => {}
        }
        let reader = Reader::new(self.unowned(), key.clone(), options.clone());
        let (computes, came) = (reader.computes.clone(), reader.came);
        let mut flight = Box::pin(async move { reader.in_time(&compute).await });
        if let Some(soft) = options.soft_timeout.filter(|_| options.may_be_stale()) {
            match timeout_at(came + soft, &mut flight).await {
                Ok(outcome) => return self.or_grace(key, options, outcome),
                Err(_) => {
                    if let Some(entry) = self.old_in_grace(key, options.secured()) {
                        let answer = Ok(self.stale(entry, Stale::SoftTimeout));
                        // Who only waits for somebody else's computation may just go.
                        if !computes.load(Ordering::Acquire) {
                            return answer;
                        }
                        if let Some(room) = self.room() {
                            self.go_on(room, async move { drop(flight.await) });
                            return answer;
                        }
                        // No room for another one in the background: the reader stays, for stale is worse than slow.
                    }
                }
            }
        }
        let outcome = flight.await;
        self.or_grace(key, options, outcome)
    }

    fn at_once(&self, key: &CacheKey, options: &ComputeOptions) -> AtOnce {
        if options.force {
            self.0.stats.forced.add(1);
            return AtOnce::Nothing;
        }
        let may_be_old = options.may_be_stale();
        let reason = match self.look_l1(key, options.at_least).map(|hit| self.counted(hit)) {
            Ok(Lookup::Hit { entry, tier, stale: None }) => return AtOnce::Fresh(Answer::of(entry, Source::Tier(tier))),
            // Old by somebody's wish.
            Ok(Lookup::Hit { entry, tier, stale: Some(why) }) if may_be_old && why != Stale::StreamLost => {
                return AtOnce::Old(Answer { stale: Some(why), ..Answer::of(entry, Source::Tier(tier)) });
            }
            // Marked stale only because the stream is lost: here we can compute.
            Ok(_) => return AtOnce::Nothing,
            Err(reason) => reason,
        };
        // Without the stream nothing could be stored: better wait for a value than begin what serves nobody.
        if may_be_old
            && is_over(reason)
            && self.hearing() == Hearing::Live
            && let Some(entry) = self.old_to_revalidate(key, options.secured())
        {
            return AtOnce::Old(self.stale(entry, Stale::Revalidate));
        }
        self.counted(Lookup::Miss { reason });
        AtOnce::Nothing
    }

    fn or_grace<E>(
        &self,
        key: &CacheKey,
        options: &ComputeOptions,
        outcome: Result<Answer, ComputeError<E>>,
    ) -> Result<Answer, ComputeError<E>> {
        let error = match outcome {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let old = if options.may_be_stale() { self.old_in_grace(key, options.secured()) } else { None };
        old.map(|entry| self.stale(entry, Stale::Grace)).ok_or(error)
    }

    fn stale(&self, entry: Arc<Entry>, why: Stale) -> Answer {
        self.0.stats.stale.add(1);
        if why == Stale::SoftTimeout {
            self.0.stats.soft_timeouts.add(1);
        }
        Answer { stale: Some(why), ..Answer::of(entry, Source::Tier(Tier::L1)) }
    }
}
