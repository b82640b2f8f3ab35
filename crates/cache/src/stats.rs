//! What the cache counts. Plain atomics; the engine exports them.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crate::{MissReason, Reason, Refusal};

/// In shards, one cache line each: threads that count at every read must not wait for each other's line.
#[derive(Debug, Default)]
pub struct Counter([Shard; SHARDS]);

#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard(AtomicU64);

const SHARDS: usize = 8;

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0[own_shard()].0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.iter().map(|shard| shard.0.load(Ordering::Relaxed)).sum()
    }
}

/// Threads take turns in choosing, once.
fn own_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static OWN: Cell<usize> = const { Cell::new(usize::MAX) });
    OWN.with(|own| {
        if own.get() == usize::MAX {
            own.set(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        own.get()
    })
}

#[derive(Debug, Default)]
pub struct Stats {
    pub hits_l1: Counter,
    pub hits_l2: Counter,
    /// Answers marked stale, whatever the reason.
    pub stale: Counter,
    misses: [Counter; MissReason::ALL.len()],
    pub stores: Counter,
    refusals: [Counter; Refusal::ALL.len()],
    /// Computations that others could join.
    pub flights: Counter,
    /// Readers that waited for somebody else's computation.
    pub joins: Counter,
    /// Leaders that went before they landed.
    pub leaders_lost: Counter,
    /// Computations for one reader only.
    pub alone: Counter,
    pub compute_errors: Counter,
    /// Answers that say "there is nothing".
    pub negatives: Counter,
    /// Reads that asked for a new computation whatever the tiers hold.
    pub forced: Counter,
    /// Readers who were answered stale because the computation took longer than they would wait.
    pub soft_timeouts: Counter,
    /// Computations begun in the background, of entries that are old or about to be.
    pub refreshes: Counter,
    /// Of those: failed, out of time or panicked.
    pub refresh_errors: Counter,
    /// Background computations that were not begun because too many run.
    pub refreshes_full: Counter,
    /// Values that were to be stored while their callers went on, and were not.
    pub puts_failed: Counter,
    /// Computations that waited for another process to compute the same key.
    pub lease_waits: Counter,
    pub l2_errors: Counter,
    /// Reads and writes that the open breaker spared.
    pub l2_skipped: Counter,
    /// Writes that found the queue full, or their row in the hands of somebody's open transaction.
    pub l2_dropped: Counter,
    pub l2_written: Counter,
    l2_cleaned_rows: [Counter; Reason::ALL.len()],
    l2_cleaned_bytes: [Counter; Reason::ALL.len()],
}

impl Stats {
    pub fn misses(&self, reason: MissReason) -> &Counter {
        &self.misses[reason as usize]
    }

    pub fn refusals(&self, reason: Refusal) -> &Counter {
        &self.refusals[reason as usize]
    }

    /// Rows that upkeep took from L2.
    pub fn l2_cleaned_rows(&self, reason: Reason) -> &Counter {
        &self.l2_cleaned_rows[reason as usize]
    }

    pub fn l2_cleaned_bytes(&self, reason: Reason) -> &Counter {
        &self.l2_cleaned_bytes[reason as usize]
    }

    /// Name, reason where there is one, value: for whoever exports them all.
    pub fn all(&self) -> Vec<(&'static str, Option<&'static str>, u64)> {
        let mut all: Vec<_> = [
            ("hits_l1", &self.hits_l1),
            ("hits_l2", &self.hits_l2),
            ("stale", &self.stale),
            ("stores", &self.stores),
            ("puts_failed", &self.puts_failed),
            ("flights", &self.flights),
            ("joins", &self.joins),
            ("leaders_lost", &self.leaders_lost),
            ("alone", &self.alone),
            ("compute_errors", &self.compute_errors),
            ("l2_errors", &self.l2_errors),
            ("l2_skipped", &self.l2_skipped),
            ("l2_dropped", &self.l2_dropped),
            ("l2_written", &self.l2_written),
        ]
        .into_iter()
        .map(|(name, counter)| (name, None, counter.get()))
        .collect();
        all.extend(MissReason::ALL.iter().map(|reason| ("misses", Some(reason.as_str()), self.misses(*reason).get())));
        all.extend(Refusal::ALL.iter().map(|reason| ("refusals", Some(reason.as_str()), self.refusals(*reason).get())));
        for reason in Reason::ALL {
            all.push(("l2_cleaned_rows", Some(reason.as_str()), self.l2_cleaned_rows(reason).get()));
            all.push(("l2_cleaned_bytes", Some(reason.as_str()), self.l2_cleaned_bytes(reason).get()));
        }
        all
    }
}
