//! The face of the cache: reads through the tiers, stores, tickets. Cheap to clone.
//!
//! Called by the engine, or by any Rust program that raises the tag clock itself. Never an error to a reader:
//! what a tier cannot answer is a miss with its reason.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use walcast_model::{CacheKey, Epoch, Fence, Lsn, Stamp, TagClock};

use crate::{
    AtLeast, CacheConfig, Entry, Hearing, Keeping, L2, MissReason, NamespaceConfig, NewValue, Precondition, PutError, Refusal,
    RoomFigures, Selection, Stats, TicketError, Tickets, coarse_clock,
    entry::{Life, now_ms},
    flight::Flights,
    invalidate::Judge,
    l1::L1,
    lease::Leases,
    refresh::Background,
    selections::Touch,
    stale::is_over,
    turns::Turns,
};

/// The work in the background ends with the last handle that owns it; that work itself holds handles that own nothing.
#[derive(Clone)]
pub struct Cache(pub(crate) Arc<Inner>, pub(crate) Option<Arc<Background>>);

pub(crate) struct Inner {
    pub(crate) config: CacheConfig,
    /// Those of the config, where finding one costs a few nanoseconds: every read does.
    namespaces: HashMap<Box<str>, NamespaceConfig, RandomState>,
    pub(crate) judge: Judge,
    pub(crate) l1: L1,
    pub(crate) l2: Option<L2>,
    pub(crate) flights: Arc<Flights>,
    /// Who computes what is old.
    pub(crate) turns: Turns,
    /// Who computes what is missing, as far as callers put it themselves.
    pub(crate) first_turns: Turns,
    pub(crate) leases: Leases,
    /// Does any namespace refresh ahead? Spares all other hits a look.
    pub(crate) refreshes_ahead: bool,
    pub(crate) stats: Arc<Stats>,
    tickets: Tickets,
    epoch: AtomicU32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    L1,
    L2,
}

impl Tier {
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::L1 => "l1",
            Tier::L2 => "l2",
        }
    }
}

/// Why an answer is marked stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    /// Valid as far as we heard, but we do not hear at present.
    StreamLost,
    /// Old, answered because computing failed.
    Grace,
    /// Old, answered while somebody computes it anew.
    Revalidate,
    /// Old, answered because computing takes longer than the reader would wait.
    SoftTimeout,
    /// Somebody's hand asked for it to be made anew, and the namespace answers it until that is done.
    Softened,
}

impl Stale {
    pub fn as_str(self) -> &'static str {
        match self {
            Stale::StreamLost => "stream_lost",
            Stale::Grace => "grace",
            Stale::Revalidate => "revalidate",
            Stale::SoftTimeout => "soft_timeout",
            Stale::Softened => "softened",
        }
    }
}

#[derive(Debug, Clone)]
pub enum Lookup {
    Hit { entry: Arc<Entry>, tier: Tier, stale: Option<Stale> },
    Miss { reason: MissReason },
}

#[derive(Debug, Clone)]
pub enum Stored {
    Yes { entry: Arc<Entry> },
    No(Refusal),
}

impl Cache {
    /// Begins without hearing: call [`Cache::set_hearing`] once commits raise the clock.
    pub fn new(config: CacheConfig, clock: Arc<TagClock>, l2: Option<L2>) -> Cache {
        coarse_clock::start();
        let stats = l2.as_ref().map_or_else(Arc::default, |l2| l2.stats().clone());
        let background = Arc::new(Background::new(config.max_background));
        let ahead = |namespace: &NamespaceConfig| namespace.refresh_ahead.is_some();
        let refreshes_ahead = ahead(&config.unnamed) || config.namespaces.values().any(ahead);
        let inner = Inner {
            judge: Judge::new(clock, now_ms()),
            l1: L1::new(&config),
            flights: Arc::new(Flights::new(config.max_flights, config.max_joiners)),
            turns: Turns::new(config.max_flights),
            first_turns: Turns::new(config.max_flights),
            leases: Leases::new(config.lease),
            refreshes_ahead,
            tickets: Tickets::new(&config.ticket_secret, config.ticket_life),
            epoch: AtomicU32::new(0),
            namespaces: config.namespaces.iter().map(|(name, namespace)| (name.as_str().into(), namespace.clone())).collect(),
            config,
            l2,
            stats,
        };
        Cache(Arc::new(inner), Some(background))
    }

    /// For work in the background: does not keep it alive.
    pub(crate) fn unowned(&self) -> Cache {
        Cache(self.0.clone(), None)
    }

    pub fn config(&self) -> &CacheConfig {
        &self.0.config
    }

    pub fn clock(&self) -> &TagClock {
        self.0.judge.clock()
    }

    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    pub fn l2(&self) -> Option<&L2> {
        self.0.l2.as_ref()
    }

    pub fn l1_bytes(&self) -> u64 {
        self.0.l1.bytes()
    }

    pub fn l1_entries(&self) -> usize {
        self.0.l1.len()
    }

    /// Room by room: each namespace with bytes of its own, and each policy that others share.
    pub fn l1_rooms(&self) -> Vec<RoomFigures> {
        self.0.l1.figures()
    }

    pub fn flights_aloft(&self) -> usize {
        self.0.flights.len()
    }

    /// None if the config is strict and does not name it.
    pub fn namespace(&self, name: &str) -> Option<&NamespaceConfig> {
        match self.0.namespaces.get(name) {
            None if self.0.config.strict => None,
            found => Some(found.unwrap_or(&self.0.config.unnamed)),
        }
    }

    pub fn set_hearing(&self, hearing: Hearing) {
        self.0.judge.set_hearing(hearing);
    }

    pub fn hearing(&self) -> Hearing {
        self.0.judge.hearing()
    }

    /// Rows of another epoch are never read back, tickets of another epoch never taken. Drops L1 if it changes.
    pub fn set_epoch(&self, epoch: Epoch) {
        if self.0.epoch.swap(epoch.0, Ordering::AcqRel) != epoch.0 {
            self.0.l1.clear();
        }
        if let Some(l2) = &self.0.l2 {
            l2.set_epoch(epoch);
        }
    }

    pub fn epoch(&self) -> Epoch {
        Epoch(self.0.epoch.load(Ordering::Acquire))
    }

    /// Heard of an invalidation by hand that is more than a tag: call it where tags are raised. `since_ms` is when it was
    /// first heard, unix milliseconds; none for now.
    pub fn select(&self, selection: Selection, stamp: Stamp, since_ms: Option<u64>) {
        self.0.judge.select(selection, stamp, since_ms.unwrap_or_else(now_ms));
    }

    /// Selections that stand beside the clock.
    pub fn selections(&self) -> usize {
        self.0.judge.selections().len()
    }

    /// What a checkpoint of the clock needs beside it. None if nothing changed since [`Cache::kept`].
    pub fn keeping(&self) -> Option<Keeping> {
        self.0.judge.selections().keeping()
    }

    /// The checkpoint that holds it is written.
    pub fn kept(&self, keeping: &Keeping) {
        self.0.judge.selections().saved(keeping);
    }

    /// No checkpoint holds any of it any more.
    pub fn forget_kept(&self) {
        self.0.judge.selections().unsaved();
    }

    /// Every commit up to here has raised its tags. Call it after raising, before anyone is told of the commit.
    pub fn note_invalidated(&self, lsn: Lsn) {
        self.0.judge.note_invalidated(lsn);
    }

    /// The commit has raised the tags of its rows and has others still to raise: nobody is promised its invalidation, but
    /// whoever comes from here on shares no flight that lacks it. [`Cache::note_invalidated`] follows.
    pub fn note_raised(&self, lsn: Lsn) {
        self.0.judge.note_raised(lsn);
    }

    pub fn invalidated_to(&self) -> Lsn {
        self.0.judge.invalidated_to()
    }

    /// What L1 alone has, at once: for whoever cannot wait, or keeps the value elsewhere.
    pub fn get_l1(&self, key: &CacheKey, at_least: AtLeast) -> Lookup {
        self.counted(self.look_l1(key, at_least).unwrap_or_else(|reason| Lookup::Miss { reason }))
    }

    /// L1, then L2. A hit of L2 moves up. Within the namespace's `stale_while_revalidate` an old entry is answered, marked
    /// stale: [`Cache::take_turn`] says to one caller that it is for him to put it anew.
    pub async fn get(&self, key: &CacheKey, at_least: AtLeast) -> Lookup {
        let reason = match self.look_l1(key, at_least) {
            Ok(hit) => return self.counted(hit),
            Err(reason) => reason,
        };
        if let Some(stale) = self.stale_at_once(key, at_least) {
            return self.counted(stale);
        }
        let mut looks = self.look_l2(&[key], at_least).await;
        let look = looks.pop().flatten().unwrap_or(Lookup::Miss { reason });
        self.counted(self.or_stale(key, at_least, look))
    }

    /// In the order of the keys, with one statement for what L1 has not.
    pub async fn get_many(&self, keys: &[CacheKey], at_least: AtLeast) -> Vec<Lookup> {
        let look = |key: &CacheKey| {
            let looked = self.look_l1(key, at_least);
            looked.unwrap_or_else(|reason| self.stale_at_once(key, at_least).unwrap_or(Lookup::Miss { reason }))
        };
        let mut answers: Vec<_> = keys.iter().map(look).collect();
        let open: Vec<usize> = (0..keys.len()).filter(|i| matches!(answers[*i], Lookup::Miss { .. })).collect();
        let open_keys: Vec<&CacheKey> = open.iter().map(|i| &keys[*i]).collect();
        for (i, look) in open.into_iter().zip(self.look_l2(&open_keys, at_least).await) {
            if let Some(look) = look {
                answers[i] = look;
            }
        }
        keys.iter().zip(answers).map(|(key, answer)| self.counted(self.or_stale(key, at_least, answer))).collect()
    }

    /// The value was read at `fence`: from its ticket, or from [`Cache::external_fence`].
    pub fn put(&self, key: &CacheKey, value: NewValue, fence: Fence) -> Result<Stored, PutError> {
        Ok(self.store(key, self.made(key, value, fence)?))
    }

    /// Replaces only what the caller says must be there. One node is one judge of that: see [`Precondition`].
    pub async fn put_if(
        &self,
        key: &CacheKey,
        value: NewValue,
        fence: Fence,
        precondition: &Precondition,
    ) -> Result<Stored, PutError> {
        let entry = self.made(key, value, fence)?;
        // What only L2 has is there too. It moves up, and is held here in case L1 has no room for it.
        let in_l2 = match precondition {
            Precondition::None => None,
            _ if self.look_l1(key, AtLeast::Any).is_ok() => None,
            _ => match self.look_l2_one(key, AtLeast::Any).await {
                Some(Lookup::Hit { entry, .. }) => Some(entry),
                _ => None,
            },
        };
        Ok(self.store_if(key, entry, |there| precondition.is_met(there.or(in_l2.as_deref()))))
    }

    /// What the value alone tells. For whoever looks its tags up before it is put: first count them.
    pub fn check_bounds(&self, value: &NewValue) -> Result<(), PutError> {
        let config = &self.0.config;
        if value.value.len() > config.max_value_bytes {
            return Err(PutError::TooLarge { bytes: value.value.len(), limit: config.max_value_bytes });
        }
        if value.tags.len() > config.max_tags {
            return Err(PutError::TooManyTags { count: value.tags.len(), limit: config.max_tags });
        }
        if !content_type_is_valid(&value.content_type) {
            return Err(PutError::ContentType);
        }
        Ok(())
    }

    fn made(&self, key: &CacheKey, value: NewValue, fence: Fence) -> Result<Arc<Entry>, PutError> {
        let unknown = || PutError::UnknownNamespace(key.namespace().to_owned());
        let namespace = self.namespace(key.namespace()).ok_or_else(unknown)?;
        self.check_bounds(&value)?;
        // Stored or refused, his turn is over.
        self.give_turn_back(key);
        let ttl = self.0.config.ttl(namespace, value.ttl, value.negative);
        let ttl = ttl.ok_or_else(|| PutError::Negative(key.namespace().to_owned()))?;
        if !(CacheConfig::MIN_TTL..=CacheConfig::MAX_TTL).contains(&ttl) {
            return Err(PutError::Ttl(ttl));
        }
        Ok(self.entry(key, namespace, value, ttl, fence))
    }

    /// What every entry of the namespace has is added here.
    pub(crate) fn entry(
        &self,
        key: &CacheKey,
        namespace: &NamespaceConfig,
        mut value: NewValue,
        ttl: Duration,
        fence: Fence,
    ) -> Arc<Entry> {
        for tag in &namespace.tags {
            if !value.tags.contains(tag) {
                value.tags.push(tag.clone());
            }
        }
        let mut life = Life::within(ttl, namespace);
        // "There is nothing" is never answered stale: it is cheap to find out again.
        if value.negative {
            life.stale = Duration::ZERO;
        }
        Arc::new(Entry::new(key, value, life, fence, now_ms()))
    }

    pub(crate) fn store(&self, key: &CacheKey, entry: Arc<Entry>) -> Stored {
        self.store_if(key, entry, |_| true)
    }

    fn store_if(&self, key: &CacheKey, entry: Arc<Entry>, is_met: impl FnOnce(Option<&Entry>) -> bool) -> Stored {
        if let Some(refusal) = self.0.judge.refuses(&entry) {
            return self.refused(refusal);
        }
        let rank = entry.fence.age_rank();
        let mut refusal = None;
        let suits = |there: Option<&Entry>| {
            if !is_met(there.filter(|there| self.is_answered(there))) {
                refusal = Some(Refusal::Precondition);
            } else if there.is_some_and(|there| there.fence.age_rank() > rank && self.is_valid(there)) {
                refusal = Some(Refusal::Older);
            } else if let Some(l2) = self.l2_of(key) {
                // While nobody else may put this key: of two with equal fences the table would keep the one queued last.
                l2.write(key, &entry);
            }
            refusal.is_none()
        };
        if !self.0.l1.put_where(key, entry.clone(), suits) {
            return self.refused(refusal.unwrap_or(Refusal::Older));
        }
        // A commit that comes in between the test above and here finds the entry stored and invalid: harmless,
        // because each read judges what it has in hand.
        self.give_turn_back(key);
        self.0.stats.stores.add(1);
        Stored::Yes { entry }
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> Stored {
        self.0.stats.refusals(refusal).add(1);
        Stored::No(refusal)
    }

    /// From L1 of this node only. What removes it everywhere is a commit that raises its key's tag.
    pub fn delete_local(&self, key: &CacheKey) -> bool {
        self.0.l1.delete(key)
    }

    /// The same, unless it was made anew meanwhile.
    pub fn delete_local_if_over(&self, key: &CacheKey) {
        if let Some(over) = self.0.l1.get(key).filter(|entry| self.0.judge.touch(entry) == Touch::Hard) {
            self.0.l1.remove(key, &over);
        }
    }

    pub fn clear_local(&self) {
        self.0.l1.clear();
    }

    /// For a value that does not come from the database: only invalidation by hand and time end it.
    pub fn external_fence(&self) -> Fence {
        self.0.judge.external_fence()
    }

    pub fn issue_ticket(&self, fence: &Fence, key: &CacheKey) -> String {
        self.0.tickets.issue(fence, self.epoch(), key, now_ms())
    }

    pub fn check_ticket(&self, ticket: &str, key: &CacheKey) -> Result<Fence, TicketError> {
        self.0.tickets.verify(ticket, key, self.epoch(), now_ms())
    }

    /// Judged, not counted. What is over leaves L1, unless the namespace may answer it stale.
    pub(crate) fn look_l1(&self, key: &CacheKey, at_least: AtLeast) -> Result<Lookup, MissReason> {
        let namespace = self.namespace(key.namespace()).ok_or(MissReason::UnknownNamespace)?;
        let entry = self.0.l1.get(key).ok_or(MissReason::Absent)?;
        let reason = match self.judged(&entry, at_least) {
            Ok(stale) => return Ok(Lookup::Hit { entry, tier: Tier::L1, stale }),
            Err(reason) => reason,
        };
        if is_over(reason) && !self.is_worth_keeping(namespace, &entry) {
            self.0.l1.remove(key, &entry);
        }
        Err(reason)
    }

    /// Judged, not counted, in the order of the keys. None: L2 has nothing to say.
    async fn look_l2(&self, keys: &[&CacheKey], at_least: AtLeast) -> Vec<Option<Lookup>> {
        let Some(l2) = &self.0.l2 else { return vec![None; keys.len()] };
        let asked: Vec<&CacheKey> = keys.iter().copied().filter(|key| self.l2_of(key).is_some()).collect();
        let mut read = l2.read(&asked).await.into_iter();
        let mut look = |key: &CacheKey| {
            self.l2_of(key)?;
            let entry = Arc::new(read.next()??);
            // The clock is asked now, after the row arrived: whatever the row missed meanwhile, or while L2 was
            // away or we were not running, the clock knows by the row's fence.
            let rank = entry.fence.age_rank();
            match self.judged(&entry, at_least) {
                Ok(stale) => {
                    l2.note_hit(key);
                    self.0.l1.put_unless(key, entry.clone(), |there| there.fence.age_rank() >= rank && self.is_valid(there));
                    Some(Lookup::Hit { entry, tier: Tier::L2, stale })
                }
                Err(reason) => {
                    if is_over(reason) && self.is_worth_keeping(self.namespace(key.namespace())?, &entry) {
                        self.0.l1.put_unless(key, entry, |there| there.fence.age_rank() >= rank || self.is_valid(there));
                    }
                    Some(Lookup::Miss { reason })
                }
            }
        };
        keys.iter().map(|key| look(key)).collect()
    }

    pub(crate) async fn look_l2_one(&self, key: &CacheKey, at_least: AtLeast) -> Option<Lookup> {
        self.look_l2(&[key], at_least).await.pop().flatten()
    }

    /// External values stay in L1: no commit speaks of them, so a write that L2 dropped would let the value before
    /// it come back as fresh.
    pub(crate) fn l2_of(&self, key: &CacheKey) -> Option<&L2> {
        self.namespace(key.namespace()).filter(|namespace| !namespace.external).and(self.0.l2.as_ref())
    }

    /// Why it is to be marked stale, if it may be answered.
    fn judged(&self, entry: &Entry, at_least: AtLeast) -> Result<Option<Stale>, MissReason> {
        self.0.judge.judge(entry, at_least, coarse_clock::now_towards(entry.expires_at))?;
        // Asked last: what was judged before the loss is marked all the same.
        match self.hearing() {
            Hearing::Live => Ok(None),
            // After a crash transaction ids are used again, and we may not have heard of it: nobody can vouch.
            Hearing::Lost { .. } if at_least != AtLeast::Any => Err(MissReason::NotHearing),
            Hearing::Lost { .. } => Ok(Some(Stale::StreamLost)),
        }
    }

    /// Would a reader be answered it, fresh or stale?
    fn is_answered(&self, entry: &Entry) -> bool {
        self.is_valid(entry) || self.is_revalidated(entry)
    }

    fn is_valid(&self, entry: &Entry) -> bool {
        self.0.judge.judge(entry, AtLeast::Any, coarse_clock::now_towards(entry.expires_at)).is_ok()
    }

    pub(crate) fn counted(&self, lookup: Lookup) -> Lookup {
        let stats = &self.0.stats;
        match &lookup {
            Lookup::Hit { tier, stale, entry } => {
                match tier {
                    Tier::L1 => stats.hits_l1.add(1),
                    Tier::L2 => stats.hits_l2.add(1),
                }
                if stale.is_some() {
                    stats.stale.add(1);
                }
                if entry.negative {
                    stats.negatives.add(1);
                }
            }
            Lookup::Miss { reason } => stats.misses(*reason).add(1),
        }
        lookup
    }
}

pub(crate) fn content_type_is_valid(text: &str) -> bool {
    (1..=255).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b))
}
