//! The last commits, for subscribers who come back: bounded in bytes, the oldest leave first.
//!
//! A cursor is answered only if everything after it is still here; otherwise the subscriber is told, never given a gap.

use std::collections::VecDeque;

use walcast_model::Lsn;

use crate::Place;

pub trait Replayable: Clone {
    fn lsn(&self) -> Lsn;
    /// One past the index of its last item.
    fn end_index(&self) -> u32;
    fn size_bytes(&self) -> usize;
}

#[derive(Debug)]
pub struct ReplayRing<T> {
    limit_bytes: usize,
    bytes: usize,
    commits: VecDeque<T>,
    /// Everything after this place is here.
    complete_after: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooOld;

impl<T: Replayable> ReplayRing<T> {
    pub fn new(limit_bytes: usize, complete_after: Lsn) -> ReplayRing<T> {
        ReplayRing { limit_bytes, bytes: 0, commits: VecDeque::new(), complete_after: (complete_after, 0) }
    }

    /// Forgets everything: only what comes after this place will be here.
    pub fn restart(&mut self, after: Place) {
        self.commits.clear();
        self.bytes = 0;
        self.complete_after = after;
    }

    pub fn push(&mut self, commit: T) {
        self.bytes += commit.size_bytes();
        self.commits.push_back(commit);
        while self.bytes > self.limit_bytes {
            let Some(oldest) = self.commits.pop_front() else { break };
            self.bytes -= oldest.size_bytes();
            self.complete_after = (oldest.lsn(), oldest.end_index().saturating_sub(1));
        }
    }

    /// The commits at or after a place, the one that holds it included: the caller skips what was heard of it.
    pub fn after(&self, place: Place) -> Result<Vec<T>, TooOld> {
        if place < self.complete_after {
            return Err(TooOld);
        }
        let first = self.commits.partition_point(|commit| commit.lsn() < place.0);
        Ok(self.commits.range(first..).cloned().collect())
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.commits.len()
    }

    pub fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Of(u64);

    impl Replayable for Of {
        fn lsn(&self) -> Lsn {
            Lsn(self.0)
        }

        fn end_index(&self) -> u32 {
            3
        }

        fn size_bytes(&self) -> usize {
            10
        }
    }

    #[test]
    fn p2_what_was_dropped_is_missed_and_never_skipped() {
        let mut ring = ReplayRing::new(30, Lsn(0));
        (1..=5).for_each(|n| ring.push(Of(n)));
        assert_eq!(ring.bytes(), 30);
        assert_eq!(ring.after((Lsn(3), 1)), Ok(vec![Of(3), Of(4), Of(5)]));
        assert_eq!(ring.after((Lsn(2), 2)), Ok(vec![Of(3), Of(4), Of(5)]), "the whole of 2 was heard");
        assert_eq!(ring.after((Lsn(2), 1)), Err(TooOld), "the end of 2 is gone");
        assert_eq!(ring.after((Lsn(5), 3)), Ok(vec![Of(5)]));
        assert_eq!(ring.after((Lsn(9), 0)), Ok(vec![]));
    }

    #[test]
    fn a_new_ring_knows_where_it_began() {
        let mut ring: ReplayRing<Of> = ReplayRing::new(30, Lsn(10));
        assert_eq!(ring.after((Lsn(9), 9)), Err(TooOld));
        assert_eq!(ring.after((Lsn(10), 0)), Ok(vec![]));
        ring.push(Of(12));
        ring.restart((Lsn(20), u32::MAX));
        assert_eq!(ring.after((Lsn(20), 0)), Err(TooOld), "the rest of that commit is gone");
        assert_eq!(ring.after((Lsn(12), 0)), Err(TooOld));
    }
}
