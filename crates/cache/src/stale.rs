//! Stale on purpose: which entry that is no longer fresh may be answered all the same, marked so?
//!
//! Called by reads that found nothing fresh. Never after "at least this fresh", never what somebody's hand invalidated or
//! what is from before the floor.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use walcast_model::CacheKey;

use crate::{AtLeast, Cache, Entry, Hearing, Lookup, MissReason, NamespaceConfig, Stale, Tier, entry::now_ms, selections::Touch};

/// Does row security stand behind the value? Then what a commit invalidated may have been hidden by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Secured {
    Yes,
    /// So says whoever computes it; of what is kept by key, the namespace's `serve_invalidated`, which the settings refuse
    /// where each security context has an entry of its own.
    No,
}

impl Cache {
    /// Within `stale_while_revalidate`: may be answered while somebody computes it anew.
    pub(crate) fn old_to_revalidate(&self, key: &CacheKey, secured: Secured) -> Option<Arc<Entry>> {
        self.old(key, secured, |namespace| Some(namespace.stale_while_revalidate).filter(|window| !window.is_zero()))
    }

    /// Within `grace`: may be answered where computing fails or is slow.
    pub(crate) fn old_in_grace(&self, key: &CacheKey, secured: Secured) -> Option<Arc<Entry>> {
        // Without a grace, an entry that lives still may be answered where the namespace serves what was invalidated.
        self.old(key, secured, |namespace| Some(namespace.grace))
    }

    fn old(&self, key: &CacheKey, secured: Secured, window: impl Fn(&NamespaceConfig) -> Option<Duration>) -> Option<Arc<Entry>> {
        let namespace = self.namespace(key.namespace())?;
        let window = window(namespace)?;
        self.0.l1.get(key).filter(|entry| self.may_be_stale(namespace, entry, window, secured))
    }

    /// Is it of use to anybody yet?
    pub(crate) fn is_worth_keeping(&self, namespace: &NamespaceConfig, entry: &Entry) -> bool {
        self.may_be_stale(namespace, entry, namespace.stale_life(), Secured::No)
    }

    /// By key, while somebody makes it anew.
    pub(crate) fn is_revalidated(&self, entry: &Entry) -> bool {
        let namespace = self.namespace(entry.key.namespace());
        let may = |namespace: &NamespaceConfig| {
            let window = namespace.stale_while_revalidate;
            !window.is_zero() && self.may_be_stale(namespace, entry, window, Secured::No)
        };
        namespace.is_some_and(may)
    }

    fn may_be_stale(&self, namespace: &NamespaceConfig, entry: &Entry, window: Duration, secured: Secured) -> bool {
        // "There is nothing" ends with its time: it is cheap to find out again.
        let window = if entry.negative { Duration::ZERO } else { window };
        let touch = self.0.judge.touch(entry);
        // What somebody softened counts as expired since then.
        let ended = match touch {
            Touch::Soft { since_ms } => entry.expires_at.min(since_ms),
            Touch::Not | Touch::Hard => entry.expires_at,
        };
        if ended.saturating_add(window.as_millis() as u64) <= now_ms() || !self.0.judge.grace(entry) {
            return false;
        }
        let free = secured == Secured::No;
        if touch == Touch::Hard {
            return free && namespace.serve_invalidated;
        }
        // Not hearing, nobody knows whether a commit invalidated it.
        self.hearing() == Hearing::Live || (free && (namespace.serve_invalidated || !window.is_zero()))
    }

    /// Somebody computes it already, so the tiers below need not be asked before it is answered stale.
    pub(crate) fn stale_at_once(&self, key: &CacheKey, at_least: AtLeast) -> Option<Lookup> {
        if !self.0.turns.is_taken(key, Instant::now()) {
            return None;
        }
        self.stale_instead(key, at_least)
    }

    pub(crate) fn or_stale(&self, key: &CacheKey, at_least: AtLeast, look: Lookup) -> Lookup {
        match look {
            Lookup::Miss { .. } => self.stale_instead(key, at_least).unwrap_or(look),
            hit => hit,
        }
    }

    /// In place of a miss. By key nobody reads what row security stands behind.
    pub(crate) fn stale_instead(&self, key: &CacheKey, at_least: AtLeast) -> Option<Lookup> {
        if at_least != AtLeast::Any {
            return None;
        }
        let entry = self.old_to_revalidate(key, Secured::No)?;
        let stale = match (self.hearing(), self.0.judge.touch(&entry)) {
            (Hearing::Lost { .. }, _) => Stale::StreamLost,
            (Hearing::Live, Touch::Soft { .. }) => Stale::Softened,
            (Hearing::Live, Touch::Not | Touch::Hard) => Stale::Revalidate,
        };
        Some(Lookup::Hit { entry, tier: Tier::L1, stale: Some(stale) })
    }
}

/// Was there an entry that is over?
pub(crate) fn is_over(reason: MissReason) -> bool {
    matches!(reason, MissReason::Expired | MissReason::Invalidated | MissReason::Softened)
}
