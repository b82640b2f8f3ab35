//! The invalidations by hand that still stand beside the tag clock: a bounded list of [`Selection`]s with their commits.
//!
//! Asked by the judge for every entry that is older than the newest of them; filled by the cache as they are heard.
//! Never finds entries: an entry is tested when it is judged, so fills in flight, tickets and rows of L2 are tested too.
//! When the list is full, its oldest member becomes its namespace's tag in the clock: more falls, never less.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;
use walcast_model::{Fence, Lsn, Stamp, TagClock, Xid};

use crate::{Entry, Selection};

/// What a hand did to an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touch {
    Not,
    /// It counts as expired since then, in unix milliseconds.
    Soft {
        since_ms: u64,
    },
    Hard,
}

const MOST: usize = 256;
const MOST_BYTES: usize = 1 << 20;
/// Commits that one selection remembers apart, as a slot of the clock does.
const REMEMBERED: usize = 4;

/// A selection as a checkpoint keeps it: one for each commit that made it.
#[derive(Debug, Clone)]
pub struct Kept {
    pub selection: Arc<Selection>,
    pub stamp: Stamp,
    pub since_ms: u64,
}

/// All that a checkpoint must hold so that a restart judges as before.
#[derive(Debug)]
pub struct Keeping {
    pub kept: Vec<Kept>,
    version: u64,
}

#[derive(Default)]
pub(crate) struct Selections {
    /// Largest LSN of the list: an entry that covers it is touched by none.
    newest: AtomicU64,
    list: RwLock<List>,
}

#[derive(Default)]
struct List {
    /// The longest unheard of first.
    members: VecDeque<Member>,
    weight: usize,
    version: u64,
    saved: Option<u64>,
}

struct Member {
    selection: Arc<Selection>,
    /// In LSN order.
    stamps: Vec<Stamp>,
    /// Largest LSN that no longer has a stamp of its own: older ones went with it, so it counts as heard by everybody.
    dropped: Lsn,
    since_ms: u64,
}

impl Member {
    fn remember(&mut self, stamp: Stamp) {
        if self.stamps.contains(&stamp) {
            return;
        }
        // As a checkpoint keeps what was dropped.
        if stamp.xid == Xid::NEVER {
            self.dropped = self.dropped.max(stamp.lsn);
            return;
        }
        let at = self.stamps.partition_point(|known| known.lsn <= stamp.lsn);
        self.stamps.insert(at, stamp);
        if self.stamps.len() > REMEMBERED {
            // From now on only W clears it.
            self.dropped = self.dropped.max(self.stamps.remove(0).lsn);
        }
    }

    /// One for each commit, and one that no snapshot sees for those that lost theirs.
    fn all_stamps(&self) -> impl Iterator<Item = Stamp> {
        let dropped = (self.dropped > Lsn::ZERO).then(|| Stamp::unseen(self.dropped));
        dropped.into_iter().chain(self.stamps.iter().copied())
    }

    fn is_covered(&self, fence: &Fence, until: Lsn) -> bool {
        let known = |stamp: &Stamp| stamp.lsn <= fence.settled || stamp.lsn > until || fence.snapshot.sees(stamp.xid);
        self.dropped <= fence.settled && self.stamps.iter().rev().all(known)
    }
}

impl Selections {
    /// From when this returns on, every judgement of a selected entry that the commit's readers could not see says so.
    pub(crate) fn add(&self, selection: Selection, stamp: Stamp, since_ms: u64, clock: &TagClock) {
        let mut list = self.list.write();
        list.version += 1;
        if selection.weight() > MOST_BYTES / 8 {
            // Would push out many others for one that names much anyway.
            list.widen(&selection, [stamp], clock);
        } else {
            list.push(selection, stamp, since_ms);
            while list.members.len() > MOST || list.weight > MOST_BYTES {
                let Some(oldest) = list.members.pop_front() else { break };
                list.weight -= oldest.selection.weight();
                // Still under the write lock: nobody judges between its leaving here and its raising there.
                list.widen(&oldest.selection, oldest.all_stamps(), clock);
            }
        }
        self.newest.fetch_max(stamp.lsn.0, Ordering::AcqRel);
    }

    pub(crate) fn touch(&self, entry: &Entry) -> Touch {
        self.touch_until(entry, Lsn::MAX)
    }

    /// The same, by what was heard up to `until`.
    pub(crate) fn touch_until(&self, entry: &Entry, until: Lsn) -> Touch {
        if self.newest.load(Ordering::Acquire) <= entry.fence.settled.0 {
            return Touch::Not;
        }
        let mut touch = Touch::Not;
        for member in &self.list.read().members {
            if member.is_covered(&entry.fence, until) || !member.selection.selects(entry) {
                continue;
            }
            if !member.selection.is_soft() {
                return Touch::Hard;
            }
            if touch == Touch::Not {
                touch = Touch::Soft { since_ms: member.since_ms };
            }
        }
        touch
    }

    pub(crate) fn len(&self) -> usize {
        self.list.read().members.len()
    }

    /// None if nothing changed since the last one that was saved.
    pub(crate) fn keeping(&self) -> Option<Keeping> {
        let list = self.list.read();
        if list.saved == Some(list.version) {
            return None;
        }
        let kept = list.members.iter().flat_map(|member| {
            let one = |stamp| Kept { selection: member.selection.clone(), stamp, since_ms: member.since_ms };
            member.all_stamps().map(one)
        });
        Some(Keeping { kept: kept.collect(), version: list.version })
    }

    pub(crate) fn saved(&self, keeping: &Keeping) {
        let mut list = self.list.write();
        list.saved = Some(keeping.version);
    }

    pub(crate) fn unsaved(&self) {
        self.list.write().saved = None;
    }
}

impl List {
    fn push(&mut self, selection: Selection, stamp: Stamp, since_ms: u64) {
        // The same again takes no second place, however often it comes.
        let same = self.members.iter().position(|member| member.selection.is_as(&selection));
        let mut member = match same.and_then(|at| self.members.remove(at)) {
            Some(member) => member,
            None => {
                self.weight += selection.weight();
                Member { selection: Arc::new(selection), stamps: Vec::with_capacity(1), dropped: Lsn::ZERO, since_ms }
            }
        };
        member.remember(stamp);
        self.members.push_back(member);
    }

    fn widen(&mut self, selection: &Selection, stamps: impl IntoIterator<Item = Stamp>, clock: &TagClock) {
        let tag = selection.widest_tag();
        tracing::debug!(%tag, "an invalidation by hand is widened: too many stand");
        for stamp in stamps {
            match stamp.xid {
                Xid::NEVER => clock.drop_up_to(tag.hash(), stamp.lsn),
                _ => clock.raise(tag.hash(), stamp),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use walcast_model::{CacheKey, Floor, Tag};

    use super::*;
    use crate::{NewValue, entry::Life};

    fn clock() -> TagClock {
        TagClock::new(1 << 12, Floor(1))
    }

    fn entry(namespace: &str, key: &str, tags: &[&str], snapshot: &str, settled: u64) -> Entry {
        let tags = tags.iter().map(|tag| Tag::parse(tag).unwrap()).collect();
        let value = NewValue { value: "x".into(), content_type: "text/plain".into(), tags, ttl: None, negative: false };
        let fence = Fence { snapshot: snapshot.parse().unwrap(), settled: Lsn(settled), floor: Floor(1) };
        let life = Life { fresh: Duration::from_secs(60), stale: Duration::ZERO };
        Entry::new(&CacheKey::new(namespace, key).unwrap(), value, life, fence, 0)
    }

    fn stamp(lsn: u64, xid: u64) -> Stamp {
        Stamp { lsn: Lsn(lsn), xid: Xid(xid) }
    }

    fn like(pattern: &str) -> Selection {
        Selection::default().with_keys_like(Some(pattern.parse().unwrap()))
    }

    fn tags(texts: &[&str]) -> Vec<Tag> {
        texts.iter().map(|text| Tag::parse(text).unwrap()).collect()
    }

    #[test]
    fn p5_a_selection_touches_what_could_not_see_its_commit_and_nothing_else() {
        let selections = Selections::default();
        selections.add(like("a*"), stamp(100, 15), 0, &clock());
        let touch = |snapshot: &str, settled| selections.touch(&entry("n", "abc", &[], snapshot, settled));
        assert_eq!(touch("10:20:15", 50), Touch::Hard, "its snapshot does not see the commit");
        assert_eq!(touch("10:15:", 99), Touch::Hard);
        assert_eq!(touch("10:20:", 50), Touch::Not, "its snapshot sees it");
        assert_eq!(touch("10:15:", 100), Touch::Not, "at or below W");
        assert_eq!(selections.touch(&entry("n", "bcd", &[], "10:15:", 50)), Touch::Not, "another key");
        let other = entry("n", "abc", &[], "10:15:", 50);
        assert_eq!(selections.touch_until(&other, Lsn(99)), Touch::Not, "not heard of yet");
        assert_eq!(selections.touch_until(&other, Lsn(100)), Touch::Hard);
    }

    #[test]
    fn all_that_is_named_must_hold() {
        let selections = Selections::default();
        let both = Selection::default().in_namespace(Some("n")).with_all_of(tags(&["a", "b"]));
        selections.add(both, stamp(100, 50), 0, &clock());
        let touch = |namespace: &str, tags: &[&str]| selections.touch(&entry(namespace, "k", tags, "1:2:", 1));
        assert_eq!(touch("n", &["a", "b", "c"]), Touch::Hard);
        for (namespace, tags) in [("n", &["a"][..]), ("n", &["b", "c"]), ("m", &["a", "b"])] {
            assert_eq!(touch(namespace, tags), Touch::Not, "{namespace} {tags:?}");
        }
        let any = Selection::default().with_any_of(tags(&["x", "t:id=*"])).softly(true);
        selections.add(any, stamp(110, 51), 7_000, &clock());
        assert_eq!(touch("m", &["x"]), Touch::Soft { since_ms: 7_000 });
        assert_eq!(touch("m", &["t:id=3"]), Touch::Soft { since_ms: 7_000 }, "by its companion");
        assert_eq!(touch("n", &["x", "a", "b"]), Touch::Hard, "hard beats soft");
    }

    #[test]
    fn p7_a_full_list_widens_its_oldest_to_the_namespace_and_forgets_nothing() {
        let (selections, clock) = (Selections::default(), clock());
        for n in 0..300 {
            let namespace = if n < 10 { "first" } else { "later" };
            selections.add(like(&format!("k{n}")).in_namespace(Some(namespace)), stamp(1_000 + n, 100 + n), 0, &clock);
        }
        assert_eq!(selections.len(), MOST);
        let touched = |namespace: &str, key: &str, settled| {
            let entry = entry(namespace, key, &[], "1:2:", settled);
            selections.touch(&entry) == Touch::Hard || !clock.admits(&entry.fence, &entry.tag_hashes)
        };
        assert!(touched("first", "k3", 900) && touched("later", "k40", 900) && touched("later", "k299", 900));
        assert!(touched("first", "other", 900), "widened");
        assert!(!touched("first", "other", 1_009), "with its own stamp: younger entries of the namespace stay");
        assert!(!touched("later", "other", 1_043), "neither do those that are still told apart take others with them");
        assert!(!touched("never", "other", 900));
    }

    #[test]
    fn the_same_again_takes_no_second_place_and_every_commit_of_it_still_counts() {
        let (selections, clock) = (Selections::default(), clock());
        for n in 0..20 {
            selections.add(like("a*"), stamp(100 + n, 50 + n), n, &clock);
        }
        assert_eq!(selections.len(), 1);
        let touch = |snapshot: &str, settled| selections.touch(&entry("n", "abc", &[], snapshot, settled));
        assert_eq!(touch("10:1000:69", 118), Touch::Hard, "the last one is compared by itself");
        assert_eq!(touch("10:1000:", 118), Touch::Not);
        assert_eq!(touch("10:1000:", 90), Touch::Hard, "sees all, but the old ones are only known by their place");
    }

    #[test]
    fn p4_a_reader_shares_nothing_from_before_an_invalidation_that_he_heard_of_however_many_follow() {
        let (selections, clock_before) = (Selections::default(), clock());
        let landed = entry("n", "abc", &[], "1:2:", 50);
        let heard_of_100 = |selections: &Selections, clock: &TagClock| {
            selections.touch_until(&landed, Lsn(100)) == Touch::Hard
                || !clock.admits_until(&landed.fence, &landed.tag_hashes, Lsn(100))
        };
        for n in 0..=4 {
            selections.add(like("a*"), stamp(100 + n, 50 + n), n, &clock_before);
            assert!(heard_of_100(&selections, &clock_before), "{n} followed");
        }
        let (restored, clock) = (Selections::default(), clock());
        for kept in selections.keeping().unwrap().kept {
            restored.add((*kept.selection).clone(), kept.stamp, kept.since_ms, &clock);
        }
        assert!(heard_of_100(&restored, &clock), "a checkpoint brings that back");
        for n in 0..MOST as u64 {
            restored.add(like(&format!("k{n}")), stamp(200 + n, 100 + n), n, &clock);
        }
        assert!(restored.list.read().members.iter().all(|member| !member.selection.is_as(&like("a*"))));
        assert!(heard_of_100(&restored, &clock), "widened");
        assert!(selections.touch_until(&landed, Lsn(99)) == Touch::Hard, "in doubt: only the place of the oldest is known");
    }

    #[test]
    fn a_checkpoint_brings_the_list_back() {
        let (selections, clock_before) = (Selections::default(), clock());
        for n in 0..6 {
            selections.add(like("a*").softly(true), stamp(100 + n, 50 + n), 5, &clock_before);
        }
        selections.add(like("b*"), stamp(200, 60), 6, &clock_before);
        let keeping = selections.keeping().unwrap();
        let (restored, clock) = (Selections::default(), clock());
        for kept in &keeping.kept {
            restored.add((*kept.selection).clone(), kept.stamp, kept.since_ms, &clock);
        }
        for (key, snapshot, settled) in [("abc", "1:2:", 50), ("abc", "10:99:", 104), ("abc", "10:99:", 50), ("b", "10:60:", 199)]
        {
            let entry = entry("n", key, &[], snapshot, settled);
            assert_eq!(restored.touch(&entry), selections.touch(&entry), "{key} {snapshot} {settled}");
        }
        selections.saved(&keeping);
        assert!(selections.keeping().is_none(), "nothing new");
        selections.add(like("c*"), stamp(300, 70), 7, &clock);
        assert_eq!(selections.keeping().unwrap().kept.len(), keeping.kept.len() + 1);
    }
}
