//! Reads through the cache and computes on a miss, once for all who ask meanwhile.
//!
//! Called by the engine for what the server itself can compute. Never lets a reader share a value that lacks a commit
//! he may have heard of, and never stores one that lacks a commit on its tags.

use std::{any::Any, error::Error, fmt, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout_at};
use walcast_model::{CacheKey, Fence, Lsn, Tag};

use crate::{
    AtLeast, Cache, CacheConfig, Entry, Lookup, NewValue, Refusal, Stale, Stored, Tier,
    cache::content_type_is_valid,
    entry::{Life, now_ms},
    flight::{Boarding, Landing},
};

#[derive(Debug, Clone)]
pub struct ComputeOptions {
    /// None: what the computation, the namespace or the cache says, in this order.
    pub ttl: Option<Duration>,
    pub at_least: AtLeast,
    /// For all of it: waiting for others, reading L2, computing.
    pub timeout: Duration,
    /// The value is under no row security, so an old one may be answered if computing fails and the namespace says so.
    pub grace: bool,
}

impl Default for ComputeOptions {
    fn default() -> ComputeOptions {
        ComputeOptions { ttl: None, at_least: AtLeast::Any, timeout: Duration::from_secs(10), grace: false }
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

/// After so many landings that a reader could not share he computes for himself.
const SHARED_ROUNDS: usize = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// One reader, and what he may have heard of when he came.
struct Reader<'a> {
    cache: &'a Cache,
    key: &'a CacheKey,
    options: &'a ComputeOptions,
    came: Instant,
    heard: Lsn,
    deadline: Instant,
}

impl Cache {
    /// `compute` runs at most a few times, each time with its fence taken at or before its first read.
    /// Dropping the future drops the computation; a waiting reader then begins his own.
    pub async fn get_or_compute<F, Fut, E>(
        &self,
        key: &CacheKey,
        options: &ComputeOptions,
        compute: F,
    ) -> Result<Answer, ComputeError<E>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
        E: Clone + Send + Sync + 'static,
    {
        let came = Instant::now();
        let deadline = came + options.timeout;
        let reader = Reader { cache: self, key, options, came, heard: self.0.judge.raised_to(), deadline };
        match self.counted(self.look_l1(key, options.at_least).unwrap_or_else(|reason| Lookup::Miss { reason })) {
            Lookup::Hit { entry, tier, stale: None } => return Ok(Answer::of(entry, Source::Tier(tier))),
            // Marked stale only because the stream is lost: here we can compute.
            Lookup::Hit { .. } | Lookup::Miss { .. } => {}
        }
        let after_ms = options.timeout.as_millis() as u64;
        let outcome = timeout_at(deadline, reader.fly(compute)).await.unwrap_or(Err(ComputeError::TimedOut { after_ms }));
        match outcome {
            Err(error) => {
                self.0.stats.compute_errors.add(1);
                reader.grace().ok_or(error)
            }
            answer => answer,
        }
    }
}

impl Reader<'_> {
    async fn fly<F, Fut, E>(&self, mut compute: F) -> Result<Answer, ComputeError<E>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
        E: Clone + Send + Sync + 'static,
    {
        self.reach().await?;
        let stats = &self.cache.0.stats;
        let mut rounds = 0;
        while rounds < SHARED_ROUNDS {
            match self.cache.0.flights.board(self.key) {
                Boarding::Lead(lead) => {
                    rounds += 1;
                    stats.flights.add(1);
                    let answer = match self.lead(&mut compute).await {
                        Ok(answer) => answer,
                        Err(error) => {
                            lead.land(Landing::Error(Arc::new(error.clone())));
                            return Err(ComputeError::Failed(error));
                        }
                    };
                    let began = lead.began.into();
                    lead.land(Landing::Value(answer.entry.clone()));
                    if self.may_share(&answer.entry, began) {
                        return Ok(answer);
                    }
                }
                Boarding::Join(join) => {
                    stats.joins.add(1);
                    let began = join.began.into();
                    match join.landed().await {
                        Some(Landing::Value(entry)) => {
                            rounds += 1;
                            if self.may_share(&entry, began) {
                                return Ok(Answer::of(entry, Source::Shared));
                            }
                        }
                        Some(Landing::Error(error)) => {
                            rounds += 1;
                            if let Some(error) = own_error(&*error) {
                                return Err(ComputeError::Failed(error));
                            }
                        }
                        // The leader went: his place is free. Not a round, the deadline bounds it.
                        None => stats.leaders_lost.add(1),
                    }
                }
                Boarding::Full => break,
            }
        }
        self.alone(compute).await
    }

    /// What this reader would share with those who wait: from a tier, else computed.
    async fn lead<F, Fut, E>(&self, compute: &mut F) -> Result<Answer, E>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
    {
        // Who led before us may have landed between our look and our boarding.
        if let Ok(Lookup::Hit { entry, tier, stale: None }) = self.cache.look_l1(self.key, self.options.at_least) {
            return Ok(Answer::of(entry, Source::Tier(tier)));
        }
        if !self.cache.0.judge.is_lost()
            && let Some(Lookup::Hit { entry, tier, stale: None }) = self.cache.look_l2_one(self.key, self.options.at_least).await
        {
            self.cache.0.stats.hits_l2.add(1);
            return Ok(Answer::of(entry, Source::Tier(tier)));
        }
        Ok(self.keep(compute().await?))
    }

    /// For one reader only: his computation began after he came, so it has what he was told of, whatever its fence
    /// can prove. Only a freshness that he asked for must be proven, and is waited for.
    async fn alone<F, Fut, E>(&self, mut compute: F) -> Result<Answer, ComputeError<E>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            self.cache.0.stats.alone.add(1);
            let answer = self.keep(compute().await.map_err(ComputeError::Failed)?);
            if self.cache.0.judge.contains(&answer.entry, self.options.at_least) {
                return Ok(answer);
            }
            if Instant::now() + pause >= self.deadline {
                return Err(ComputeError::Behind);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Computing before the stream has come that far could prove nothing.
    async fn reach<E>(&self) -> Result<(), ComputeError<E>> {
        match self.options.at_least {
            AtLeast::Lsn(lsn) => timeout_at(self.deadline, self.cache.0.judge.reach(lsn)).await.map_err(|_| ComputeError::Behind),
            AtLeast::Any | AtLeast::Xid(_) => Ok(()),
        }
    }

    fn may_share(&self, entry: &Entry, began: Instant) -> bool {
        let judge = &self.cache.0.judge;
        // Without the stream the clock does not know what was committed since: share only what began after we came.
        let in_time = began >= self.came || !judge.is_lost();
        in_time && judge.covers(entry, self.heard) && judge.contains(entry, self.options.at_least)
    }

    /// Makes the entry, and stores it if it may be stored. Whatever is wrong with it, its reader gets it.
    fn keep(&self, computed: Computed) -> Answer {
        let config = self.cache.config();
        let namespace = self.cache.namespace(self.key.namespace());
        let namespace_ttl = namespace.and_then(|namespace| namespace.ttl);
        let ttl = self.options.ttl.or(computed.ttl).or(namespace_ttl).unwrap_or(config.default_ttl);
        let unfit = if namespace.is_none() {
            Some(Refusal::UnknownNamespace)
        } else if computed.value.len() > config.max_value_bytes {
            Some(Refusal::TooLarge)
        } else if computed.tags.len() > config.max_tags {
            Some(Refusal::TooManyTags)
        } else if !content_type_is_valid(&computed.content_type) {
            Some(Refusal::ContentType)
        } else if ttl < CacheConfig::MIN_TTL {
            // Rounded up, it would be answered when it is too old.
            Some(Refusal::TtlTooShort)
        } else {
            None
        };
        let Computed { value, content_type, tags, fence, .. } = computed;
        let life = Life::within(ttl.min(CacheConfig::MAX_TTL), namespace.unwrap_or(&config.unnamed));
        let value = NewValue { value, content_type, tags, ttl: Some(ttl), negative: false };
        let entry = Arc::new(Entry::new(self.key, value, life, fence, now_ms()));
        let stored = match unfit {
            Some(refusal) => self.cache.refused(refusal),
            None => self.cache.store(self.key, entry.clone()),
        };
        let refusal = match stored {
            Stored::Yes { .. } => None,
            Stored::No(refusal) => Some(refusal),
        };
        Answer { entry, source: Source::Computed, stale: None, refusal }
    }

    fn grace(&self) -> Option<Answer> {
        let may = self.options.grace && self.options.at_least == AtLeast::Any;
        self.cache.namespace(self.key.namespace()).filter(|namespace| may && namespace.serve_invalidated)?;
        let entry = self.cache.0.l1.get(self.key).filter(|entry| self.cache.0.judge.grace(entry))?;
        self.cache.0.stats.stale.add(1);
        Some(Answer { entry, source: Source::Tier(Tier::L1), stale: Some(Stale::Grace), refusal: None })
    }
}

impl Answer {
    fn of(entry: Arc<Entry>, source: Source) -> Answer {
        Answer { entry, source, stale: None, refusal: None }
    }
}

/// None if the flight was led by a caller with another error type.
fn own_error<E: Clone + 'static>(error: &(dyn Any + Send + Sync)) -> Option<E> {
    error.downcast_ref::<E>().cloned()
}
