//! One reader who waits: he leads or joins the flight for his key, and in the end computes for himself.
//!
//! Called by `compute`, and by `refresh` for a computation without a reader. Never shares a value that lacks a commit its
//! reader may have heard of, and never stores one that lacks a commit on its tags.

use std::{
    any::Any,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};
use walcast_model::{CacheKey, Lsn};

use crate::{
    Answer, Arrival, AtLeast, Cache, CacheConfig, ComputeError, ComputeOptions, Computed, Entry, Lookup, NewValue, Precondition,
    Refusal, Source, Stored,
    flight::{Boarding, Departure, Landing},
    lease::Turn,
    put::content_type_is_valid,
};

/// After so many landings that a reader could not share he computes for himself.
const SHARED_ROUNDS: usize = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Who reads, and what he may have heard of when he came.
pub(crate) struct Reader {
    pub(crate) cache: Cache,
    pub(crate) key: CacheKey,
    pub(crate) options: ComputeOptions,
    pub(crate) came: Instant,
    pub(crate) deadline: Instant,
    /// He leads or is alone: when he goes, a computation goes with him.
    pub(crate) computes: Arc<AtomicBool>,
    /// A tier's entry is of use only if it was stored later than this.
    pub(crate) newer_than: u64,
    first_departure: Departure,
    heard: Lsn,
}

impl Reader {
    /// A reader came a little earlier than this is called: then he is only taken to have heard of more than he did.
    pub(crate) fn new(cache: Cache, key: CacheKey, options: ComputeOptions) -> Reader {
        let came = Instant::now();
        Reader {
            deadline: came + options.timeout,
            came,
            computes: Arc::default(),
            newer_than: 0,
            first_departure: cache.0.flights.next_departure(),
            heard: cache.0.judge.raised_to(),
            cache,
            key,
            options,
        }
    }

    /// The whole of it, and its error counted.
    pub(crate) async fn in_time<F, Fut, E>(&self, compute: &F) -> Result<Answer, ComputeError<E>>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
        E: Clone + Send + Sync + 'static,
    {
        let after_ms = self.options.timeout.as_millis() as u64;
        let outcome = timeout_at(self.deadline, self.fly(compute)).await.unwrap_or(Err(ComputeError::TimedOut { after_ms }));
        if outcome.is_err() {
            self.cache.0.stats.compute_errors.add(1);
        }
        outcome
    }

    async fn fly<F, Fut, E>(&self, compute: &F) -> Result<Answer, ComputeError<E>>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
        E: Clone + Send + Sync + 'static,
    {
        self.reach().await?;
        let stats = &self.cache.0.stats;
        let mut rounds = 0;
        while rounds < SHARED_ROUNDS {
            match self.cache.0.flights.board(&self.key) {
                Boarding::Lead(lead) => {
                    rounds += 1;
                    stats.flights.add(1);
                    self.computes.store(true, Ordering::Release);
                    let answer = match self.lead(compute).await {
                        Ok(answer) => answer,
                        Err(error) => {
                            lead.land(Landing::Error(Arc::new(error.clone())));
                            return Err(ComputeError::Failed(error));
                        }
                    };
                    let began = lead.began;
                    lead.land(Landing::Value(answer.entry.clone()));
                    self.computes.store(false, Ordering::Release);
                    if self.may_share(&answer.entry, began) {
                        return Ok(answer);
                    }
                }
                Boarding::Join(join) => {
                    stats.joins.add(1);
                    let began = join.began;
                    match join.landed().await {
                        // Begun before he asked for a new one: he waits for his turn, and the deadline bounds it.
                        Some(_) if self.options.force && began < self.first_departure => {}
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
        self.computes.store(true, Ordering::Release);
        self.alone(compute).await
    }

    /// What this reader would share with those who wait: from a tier, else from another process, else computed.
    pub(crate) async fn lead<F, Fut, E>(&self, compute: &F) -> Result<Answer, E>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
    {
        if self.options.force {
            return self.computed(compute).await;
        }
        // Who led before us may have landed between our look and our boarding.
        if let Some(answer) = self.usable(self.cache.look_l1(&self.key, self.options.at_least).ok()) {
            return Ok(answer);
        }
        if let Some(answer) = self.ask_l2().await {
            return Ok(answer);
        }
        // Let go after the value is in the writer's queue, or the next holder would look for it too early.
        let _lease = match self.turn().await {
            Turn::Ours(lease) => lease,
            Turn::Answered(answer) => return Ok(*answer),
        };
        self.computed(compute).await
    }

    async fn computed<F, Fut, E>(&self, compute: &F) -> Result<Answer, E>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
    {
        // Of what is put meanwhile from elsewhere, this reads what was before.
        let arrival = self.cache.is_external(&self.key).then(|| self.cache.arrive(&self.key));
        Ok(self.keep(compute().await?, arrival).await)
    }

    pub(crate) async fn ask_l2(&self) -> Option<Answer> {
        if self.cache.0.judge.is_lost() {
            return None;
        }
        let answer = self.usable(self.cache.look_l2_one(&self.key, self.options.at_least).await)?;
        self.cache.0.stats.hits_l2.add(1);
        Some(answer)
    }

    fn usable(&self, look: Option<Lookup>) -> Option<Answer> {
        match look {
            Some(Lookup::Hit { entry, tier, stale: None }) if entry.stored_at > self.newer_than => {
                Some(Answer::of(entry, Source::Tier(tier)))
            }
            _ => None,
        }
    }

    /// For one reader only: his computation began after he came, so it has what he was told of, whatever its fence
    /// can prove. Only a freshness that he asked for must be proven, and is waited for.
    async fn alone<F, Fut, E>(&self, compute: &F) -> Result<Answer, ComputeError<E>>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Computed, E>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            self.cache.0.stats.alone.add(1);
            let answer = self.computed(compute).await.map_err(ComputeError::Failed)?;
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

    fn may_share(&self, entry: &Entry, began: Departure) -> bool {
        let judge = &self.cache.0.judge;
        // Without the stream the clock does not know what was committed since: share only what began after we came.
        let in_time = began >= self.first_departure || !judge.is_lost();
        in_time && judge.covers(entry, self.heard) && judge.contains(entry, self.options.at_least)
    }

    /// Makes the entry, and stores it if it may be stored. Whatever is wrong with it, its reader gets it.
    async fn keep(&self, computed: Computed, arrival: Option<Arrival>) -> Answer {
        let config = self.cache.config();
        let named = self.cache.namespace(self.key.namespace());
        let namespace = named.unwrap_or(&config.unnamed);
        let Computed { value, content_type, tags, fence, ttl, negative } = computed;
        let ttl = config.ttl(namespace, self.options.ttl.or(ttl), negative);
        let unfit = if named.is_none() {
            Some(Refusal::UnknownNamespace)
        } else if value.len() > config.max_value_bytes {
            Some(Refusal::TooLarge)
        } else if tags.len() > config.max_tags {
            Some(Refusal::TooManyTags)
        } else if !content_type_is_valid(&content_type) {
            Some(Refusal::ContentType)
        } else {
            match ttl {
                None => Some(Refusal::Negative),
                // Rounded up, it would be answered when it is too old.
                Some(ttl) if ttl < CacheConfig::MIN_TTL => Some(Refusal::TtlTooShort),
                Some(_) => None,
            }
        };
        let ttl = ttl.unwrap_or(Duration::ZERO).min(CacheConfig::MAX_TTL);
        let value = NewValue { value, content_type, tags, ttl: Some(ttl), negative };
        let entry = self.cache.entry(&self.key, namespace, value, ttl, fence);
        let stored = match (unfit, arrival) {
            (Some(refusal), _) => self.cache.refused(refusal),
            (None, None) => self.cache.store(&self.key, entry.clone()),
            (None, Some(arrival)) => self.cache.store_external(&arrival, entry.clone(), &Precondition::None).await,
        };
        let refusal = match stored {
            Stored::Yes { .. } => None,
            Stored::No(refusal) => Some(refusal),
        };
        Answer { entry, source: Source::Computed, stale: None, refusal }
    }
}

/// None if the flight was led by a caller with another error type.
fn own_error<E: Clone + 'static>(error: &(dyn Any + Send + Sync)) -> Option<E> {
    error.downcast_ref::<E>().cloned()
}
