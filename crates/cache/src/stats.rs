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

/// The one list of what has no reasons: a line here is a field and reaches whoever exports them all.
macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: Counter,)+
            misses: [Counter; MissReason::ALL.len()],
            refusals: [Counter; Refusal::ALL.len()],
            l2_cleaned_rows: [Counter; Reason::ALL.len()],
            l2_cleaned_bytes: [Counter; Reason::ALL.len()],
        }

        impl Stats {
            fn without_reasons(&self) -> impl Iterator<Item = (&'static str, &Counter)> {
                [$((stringify!($name), &self.$name),)+].into_iter()
            }
        }
    };
}

stats! {
    hits_l1,
    hits_l2,
    /// Answers marked stale, whatever the reason.
    stale,
    stores,
    /// Computations that others could join.
    flights,
    /// Readers that waited for somebody else's computation.
    joins,
    /// Leaders that went before they landed.
    leaders_lost,
    /// Computations for one reader only.
    alone,
    compute_errors,
    /// Answers that say "there is nothing".
    negatives,
    /// Reads that asked for a new computation whatever the tiers hold.
    forced,
    /// Readers who were answered stale because the computation took longer than they would wait.
    soft_timeouts,
    /// Computations begun in the background, of entries that are old or about to be.
    refreshes,
    /// Of those: failed, out of time or panicked.
    refresh_errors,
    /// Background computations that were not begun because too many run.
    refreshes_full,
    /// Values that were to be stored while their callers went on, and were not.
    puts_failed,
    /// Computations that waited for another process to compute the same key.
    lease_waits,
    l2_errors,
    /// Reads and writes that the open breaker spared, or that found no connection free.
    l2_skipped,
    /// Writes that found the queue full, or their row in the hands of somebody's open transaction.
    l2_dropped,
    l2_written,
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
        let mut all: Vec<_> = self.without_reasons().map(|(name, counter)| (name, None, counter.get())).collect();
        all.extend(MissReason::ALL.iter().map(|reason| ("misses", Some(reason.as_str()), self.misses(*reason).get())));
        all.extend(Refusal::ALL.iter().map(|reason| ("refusals", Some(reason.as_str()), self.refusals(*reason).get())));
        for reason in Reason::ALL {
            all.push(("l2_cleaned_rows", Some(reason.as_str()), self.l2_cleaned_rows(reason).get()));
            all.push(("l2_cleaned_bytes", Some(reason.as_str()), self.l2_cleaned_bytes(reason).get()));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told_each_by_its_own_name() {
        let stats = Stats::default();
        let all = stats.all();
        let shown = format!("{stats:#?}");
        let fields: Vec<&str> =
            shown.lines().filter_map(|line| line.strip_prefix("    ")?.split_once(':')).map(|(name, _)| name).collect();
        for field in fields.into_iter().filter(|field| !field.starts_with(' ')) {
            assert!(all.iter().any(|(name, ..)| *name == field), "{field} reaches nobody");
        }
        stats.soft_timeouts.add(3);
        stats.negatives.add(4);
        let told = |wanted: &str| stats.all().iter().find(|(name, ..)| *name == wanted).map(|(.., value)| *value);
        assert_eq!((told("soft_timeouts"), told("negatives"), told("joins")), (Some(3), Some(4), Some(0)));
    }
}
