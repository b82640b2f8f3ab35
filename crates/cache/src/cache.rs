//! The cache itself: what all its parts share, what it is told of the stream, and tickets. Cheap to clone.
//!
//! Called by the engine, or by any Rust program that raises the tag clock itself. Reads are in `lookup`, stores in `put`.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use foldhash::fast::RandomState;
use walcast_model::{CacheKey, Epoch, Fence, Lsn, Stamp, TagClock};

use crate::{
    CacheConfig, Hearing, Keeping, L2, NamespaceConfig, RoomFigures, Selection, Stats, TicketError, Tickets, coarse_clock,
    entry::now_ms, external::Lines, flight::Flights, invalidate::Judge, l1::L1, lease::Leases, refresh::Background,
    selections::Touch, soon::Waiting, turns::Turns,
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
    /// Puts of values from elsewhere, in their order.
    pub(crate) lines: Lines,
    pub(crate) waiting: Waiting,
    /// Does any namespace refresh ahead? Spares all other hits a look.
    pub(crate) refreshes_ahead: bool,
    pub(crate) stats: Arc<Stats>,
    tickets: Tickets,
    epoch: AtomicU32,
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
            lines: Lines::default(),
            waiting: Waiting::new(config.max_soon, config.max_soon_bytes),
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
}
