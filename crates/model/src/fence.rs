//! What a cached value was read from: the snapshot of its source, taken at or before its first read.

use crate::{Lsn, Snapshot};

/// Counts the events after which no older entry may be answered: a new slot, a promoted or rewound database,
/// crash recovery, a start without a matching checkpoint. An entry of an older floor is unreachable.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Floor(pub u64);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    pub snapshot: Snapshot,
    /// All commits up to here were settled when the snapshot was taken, so one long writer does not
    /// turn the cache cold. Read **before** the snapshot is taken.
    pub settled: Lsn,
    pub floor: Floor,
}

impl Fence {
    /// Orders fences of one floor for "an upsert only from a newer fence".
    pub fn age_rank(&self) -> (Floor, Lsn, u64) {
        (self.floor, self.settled, self.snapshot.xmax.0)
    }
}
