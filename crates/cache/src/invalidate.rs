//! Judges entries: may this be answered, now, to this reader? The only place that asks the tag clock.
//!
//! Called by every read and every store. Never removes anything itself.
//!
//! What makes the cache safe is that **each read is judged**, after the entry is in hand. Whatever a store, a slow L2
//! or a restart put into a tier, an entry whose fence does not cover a commit on its tags is not answered.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Notify;
use walcast_model::{CacheKey, Fence, Lsn, Stamp, Tag, TagClock, Xid};

use crate::{
    Entry, Refusal, Selection,
    selections::{Selections, Touch},
};

/// How fresh an answer must be at least.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum AtLeast {
    #[default]
    Any,
    /// It contains what this transaction wrote.
    Xid(Xid),
    /// It contains every commit on its tags up to here. The caller has compared epochs.
    Lsn(Lsn),
}

/// Do we hear of commits? Set by whoever reads the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hearing {
    Live,
    /// Nothing is answered as fresh, and nothing stored. Unix milliseconds.
    Lost {
        since_ms: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissReason {
    Absent,
    Expired,
    /// A commit, or somebody's hand, touched its tags; or the floor moved.
    Invalidated,
    /// Somebody's hand asked for it to be made anew. Counts as expired from then on.
    Softened,
    /// Not known to contain what the reader asked for.
    Behind,
    /// A reader asked for a freshness that nobody can vouch for while the stream is lost.
    NotHearing,
    /// The config is strict and does not name the namespace.
    UnknownNamespace,
}

impl MissReason {
    pub const ALL: [MissReason; 7] = [
        MissReason::Absent,
        MissReason::Expired,
        MissReason::Invalidated,
        MissReason::Softened,
        MissReason::Behind,
        MissReason::NotHearing,
        MissReason::UnknownNamespace,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            MissReason::Absent => "absent",
            MissReason::Expired => "expired",
            MissReason::Invalidated => "invalidated",
            MissReason::Softened => "softened",
            MissReason::Behind => "behind",
            MissReason::NotHearing => "not_hearing",
            MissReason::UnknownNamespace => "unknown_namespace",
        }
    }
}

impl fmt::Display for MissReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

pub(crate) struct Judge {
    clock: Arc<TagClock>,
    selections: Selections,
    /// Every commit up to here has raised all its tags: what a reader can be promised.
    invalidated_to: AtomicU64,
    /// Every commit up to here has raised the tags that its rows say by themselves; some may have more to raise.
    raised_to: AtomicU64,
    /// Largest LSN that no commit has and that retired a key.
    retired_to: AtomicU64,
    moved: Notify,
    /// 0 while live.
    lost_since_ms: AtomicU64,
}

impl Judge {
    /// Begins lost: until somebody says that commits are heard, nothing is fresh.
    pub(crate) fn new(clock: Arc<TagClock>, now: u64) -> Judge {
        Judge {
            clock,
            selections: Selections::default(),
            invalidated_to: AtomicU64::new(0),
            raised_to: AtomicU64::new(0),
            retired_to: AtomicU64::new(0),
            moved: Notify::new(),
            lost_since_ms: AtomicU64::new(now.max(1)),
        }
    }

    pub(crate) fn clock(&self) -> &TagClock {
        &self.clock
    }

    /// Called as tags are raised: before the commit is noted as invalidated.
    pub(crate) fn select(&self, selection: Selection, stamp: Stamp, since_ms: u64) {
        self.selections.add(selection, stamp, since_ms, &self.clock);
        // What was remembered as good is looked at again.
        self.clock.touch();
    }

    pub(crate) fn selections(&self) -> &Selections {
        &self.selections
    }

    pub(crate) fn set_hearing(&self, hearing: Hearing) {
        let since = match hearing {
            Hearing::Live => 0,
            Hearing::Lost { since_ms } => since_ms.max(1),
        };
        self.lost_since_ms.store(since, Ordering::Release);
    }

    pub(crate) fn hearing(&self) -> Hearing {
        match self.lost_since_ms.load(Ordering::Acquire) {
            0 => Hearing::Live,
            since_ms => Hearing::Lost { since_ms },
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.hearing() != Hearing::Live
    }

    /// Called after the tags of the commit were raised.
    pub(crate) fn note_invalidated(&self, lsn: Lsn) {
        self.note_raised(lsn);
        self.invalidated_to.fetch_max(lsn.0, Ordering::AcqRel);
        self.moved.notify_waiters();
    }

    pub(crate) fn invalidated_to(&self) -> Lsn {
        Lsn(self.invalidated_to.load(Ordering::Acquire))
    }

    /// The commit has raised its rows' tags, and has others still to raise.
    pub(crate) fn note_raised(&self, lsn: Lsn) {
        self.raised_to.fetch_max(lsn.0, Ordering::AcqRel);
    }

    pub(crate) fn raised_to(&self) -> Lsn {
        Lsn(self.raised_to.load(Ordering::Acquire))
    }

    /// Waits until every commit up to `lsn` was invalidated.
    pub(crate) async fn reach(&self, lsn: Lsn) {
        loop {
            let mut moved = std::pin::pin!(self.moved.notified());
            // Enlist before looking, or a commit in between is missed.
            moved.as_mut().enable();
            if self.invalidated_to() >= lsn {
                return;
            }
            moved.await;
        }
    }

    /// May this entry be answered as fresh (given that commits are heard)?
    pub(crate) fn judge(&self, entry: &Entry, at_least: AtLeast, now: u64) -> Result<(), MissReason> {
        if entry.expires_at <= now {
            return Err(MissReason::Expired);
        }
        // Contains first, admits after: what `contains` found to be invalidated up to an LSN is then raised already.
        let contains = self.contains(entry, at_least);
        match self.touch(entry) {
            Touch::Hard => Err(MissReason::Invalidated),
            Touch::Soft { .. } => Err(MissReason::Softened),
            Touch::Not if contains => Ok(()),
            Touch::Not => Err(MissReason::Behind),
        }
    }

    /// What commits and hands did to it: nothing, or it counts as expired since then, or it is over. Its age is not asked.
    /// Where nothing was invalidated since it was last asked, two numbers say so.
    pub(crate) fn touch(&self, entry: &Entry) -> Touch {
        // Read before anything that is judged, or what comes in between would be remembered as judged.
        let sequence = self.clock.sequence();
        if entry.was_admitted_at(sequence) {
            return Touch::Not;
        }
        // The clock last: a selection that is widened into it meanwhile is met in one of the two.
        let touch = match self.selections.touch(entry) {
            touch if self.clock.admits(&entry.fence, &entry.tag_hashes) => touch,
            _ => Touch::Hard,
        };
        if touch == Touch::Not {
            entry.note_admitted_at(sequence);
        }
        touch
    }

    pub(crate) fn contains(&self, entry: &Entry, at_least: AtLeast) -> bool {
        match at_least {
            AtLeast::Any => true,
            // Put after the application's own write, an entry has no snapshot: its W says which of the commits on its
            // tags it contains.
            AtLeast::Xid(xid) => {
                let within = |tag| self.clock.raised_by(tag, xid).is_some_and(|lsn| lsn <= entry.fence.settled);
                entry.fence.snapshot.sees(xid) || entry.tag_hashes.iter().any(|tag| within(*tag))
            }
            AtLeast::Lsn(lsn) => entry.fence.settled >= lsn || (self.invalidated_to() >= lsn && self.covers(entry, lsn)),
        }
    }

    /// Does the value contain every commit on its tags that was invalidated before a reader came who noted `heard`?
    pub(crate) fn covers(&self, entry: &Entry, heard: Lsn) -> bool {
        self.selections.touch_until(entry, heard) == Touch::Not && self.clock.admits_until(&entry.fence, &entry.tag_hashes, heard)
    }

    /// May a value read at this fence be stored? This spares the tiers; safe is only the judgement at each read,
    /// for a commit may come in the moment after.
    pub(crate) fn refuses(&self, entry: &Entry) -> Option<Refusal> {
        if self.is_lost() {
            return Some(Refusal::NotHearing);
        }
        if entry.fence.floor != self.clock.floor() {
            return Some(Refusal::FloorMoved);
        }
        (self.touch(entry) != Touch::Not).then_some(Refusal::Touched)
    }

    /// May it at least be answered as stale? Not from before the floor, and not what was invalidated by hand:
    /// whoever did that wanted it gone.
    pub(crate) fn grace(&self, entry: &Entry) -> bool {
        self.selections.touch(entry) != Touch::Hard && self.clock.admits(&entry.fence, entry.own_hashes())
    }

    /// Ends every entry of the key whose fence was taken before this call, wherever it is and whenever it gets there. Commits
    /// are longer than a byte, so none has this LSN; a checkpoint takes it along like any other.
    pub(crate) fn retire(&self, key: &CacheKey) {
        let stamp = Stamp::unseen(Lsn(self.raised_to().0 + 1));
        self.retired_to.fetch_max(stamp.lsn.0, Ordering::AcqRel);
        self.clock.raise(Tag::key(key).hash(), stamp);
    }

    pub(crate) fn retired_to(&self) -> Lsn {
        Lsn(self.retired_to.load(Ordering::Acquire))
    }

    /// The fence of a value that does not come from the database.
    pub(crate) fn external_fence(&self) -> Fence {
        // Floor first: if it moves in between, the value is refused rather than believed.
        let floor = self.clock.floor();
        Fence { snapshot: walcast_model::Snapshot::blind(), settled: self.raised_to(), floor }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use walcast_model::{Floor, Snapshot};

    use super::*;
    use crate::{NewValue, entry::Life};

    fn judge_and_entry() -> (Judge, Entry) {
        let judge = Judge::new(Arc::new(TagClock::new(1024, Floor(1))), 0);
        let tags = vec![Tag::parse("patients").unwrap()];
        let value = NewValue { value: "x".into(), content_type: "text/plain".into(), tags, ttl: None, negative: false };
        let fence = Fence { snapshot: Snapshot::blind(), settled: Lsn(50), floor: Floor(1) };
        let key = CacheKey::new("n", "k").unwrap();
        (judge, Entry::new(&key, value, Life { fresh: Duration::from_secs(60), stale: Duration::ZERO }, fence, 1_000))
    }

    #[test]
    fn an_entry_ends_with_its_time() {
        let (judge, entry) = judge_and_entry();
        assert_eq!(judge.judge(&entry, AtLeast::Any, 60_999), Ok(()));
        assert_eq!(judge.judge(&entry, AtLeast::Any, 61_000), Err(MissReason::Expired));
    }

    #[test]
    fn p4_a_remembered_verdict_ends_with_the_next_raise_of_its_tag_and_with_a_new_floor() {
        let stamp = |lsn| Stamp { lsn: Lsn(lsn), xid: Xid(9) };
        let asked = |judge: &Judge, entry: &Entry| judge.judge(entry, AtLeast::Any, 2_000);
        let (judge, entry) = judge_and_entry();
        assert_eq!((asked(&judge, &entry), asked(&judge, &entry)), (Ok(()), Ok(())));
        assert!(entry.was_admitted_at(judge.clock().sequence()));
        judge.clock().raise(Tag::parse("billing").unwrap().hash(), stamp(100));
        assert!(!entry.was_admitted_at(judge.clock().sequence()), "any raise asks for a new look");
        assert_eq!(asked(&judge, &entry), Ok(()), "which finds it as it was");
        judge.clock().raise(Tag::parse("patients").unwrap().hash(), stamp(101));
        assert_eq!((asked(&judge, &entry), asked(&judge, &entry)), (Err(MissReason::Invalidated), Err(MissReason::Invalidated)));
        let (judge, entry) = judge_and_entry();
        assert_eq!(asked(&judge, &entry), Ok(()));
        judge.clock().move_floor(Floor(2));
        assert_eq!(asked(&judge, &entry), Err(MissReason::Invalidated));
    }

    /// Writers raise and then tell; readers that were told must not be answered by a verdict from before. The sequence
    /// is what could go wrong, so other tags are raised all the while.
    #[test]
    fn p4_whoever_heard_of_a_raise_is_never_answered_by_a_verdict_from_before_it() {
        for round in 0..200 {
            let (judge, entry) = judge_and_entry();
            let told = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        loop {
                            let heard = told.load(Ordering::Acquire);
                            let verdict = judge.judge(&entry, AtLeast::Any, 2_000);
                            assert!(!heard || verdict == Err(MissReason::Invalidated), "round {round}");
                            if heard {
                                break;
                            }
                        }
                    });
                }
                let other = |n: u64| Tag::parse(&format!("other:id={n}")).unwrap().hash();
                (0..50).for_each(|n| judge.clock().raise(other(n), Stamp { lsn: Lsn(90 + n), xid: Xid(8) }));
                judge.clock().raise(Tag::parse("patients").unwrap().hash(), Stamp { lsn: Lsn(200), xid: Xid(9) });
                told.store(true, Ordering::Release);
            });
        }
    }

    #[test]
    fn grace_covers_age_and_commits_but_no_hand_and_no_floor() {
        let (judge, entry) = judge_and_entry();
        let stamp = |lsn| Stamp { lsn: Lsn(lsn), xid: Xid(9) };
        judge.clock().raise(Tag::parse("patients").unwrap().hash(), stamp(100));
        assert!(judge.judge(&entry, AtLeast::Any, 2_000).is_err() && judge.grace(&entry));
        judge.clock().raise(Tag::namespace("n").hash(), stamp(101));
        assert!(!judge.grace(&entry));
        let (judge, entry) = judge_and_entry();
        judge.clock().move_floor(Floor(2));
        assert!(!judge.grace(&entry));
    }
}
