//! When each tag was last touched: the judge of every cached entry.
//!
//! A fixed array, indexed by hash. Raising a tag is one short lock and one store; judging an entry
//! compares a few numbers and takes no lock where nothing happened. Collisions and overflow only
//! invalidate too much. Nothing is scanned when a tag is raised, and nothing leaks.
//!
//! The rule: a value read at fence (S, W) holds while every commit on its tags is at or below W or visible in S.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use crate::{Fence, Floor, Lsn, Snapshot, TagHash, Xid};

/// A commit that touched a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub lsn: Lsn,
    pub xid: Xid,
}

impl Stamp {
    /// Touches whoever read before `lsn` was settled, whatever their snapshot saw.
    pub fn unseen(lsn: Lsn) -> Stamp {
        Stamp { lsn, xid: Xid::NEVER }
    }
}

/// One slot as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotImage {
    pub index: u32,
    pub dropped: Lsn,
    pub stamps: Vec<Stamp>,
}

const REMEMBERED: usize = 4;

#[derive(Debug, Default)]
struct Recent {
    stamps: [Option<Stamp>; REMEMBERED],
    /// Largest LSN that no longer has a stamp of its own.
    dropped: Lsn,
}

impl Recent {
    fn raise(&mut self, stamp: Stamp) {
        if self.stamps.contains(&Some(stamp)) {
            return;
        }
        if let Some(free) = self.stamps.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(stamp);
            return;
        }
        // Full: the oldest loses its own stamp. From now on only W can clear it.
        let mut oldest = stamp;
        for slot in self.stamps.iter_mut().flatten() {
            if slot.lsn < oldest.lsn {
                std::mem::swap(slot, &mut oldest);
            }
        }
        self.dropped = self.dropped.max(oldest.lsn);
    }
}

/// A slot is a place in two arrays. What nearly every judgement is content with stands by itself, 8 bytes a slot: 1 MiB
/// stays in the processor's caches where all of it would not.
#[derive(Debug)]
pub struct TagClock {
    /// Largest LSN ever raised here: at or below W means nothing to compare. Written with the slot's lock held, after it.
    newest: Box<[AtomicU64]>,
    recent: Box<[Mutex<Recent>]>,
    floor: AtomicU64,
    sequence: Sequence,
    /// What the newest checkpoint covers, or the one that is being written.
    covered: AtomicU64,
    late: Mutex<Late>,
}

/// Slots that were raised with stamps which a checkpoint covers already: it would not look for them again.
#[derive(Debug, Default)]
struct Late {
    raised: BTreeSet<usize>,
    /// In the checkpoint that is being written.
    taken: BTreeSet<usize>,
}

/// On a cache line of its own: every raise writes it, every read of the cache looks at it.
#[derive(Debug)]
#[repr(align(128))]
struct Sequence(AtomicU64);

impl TagClock {
    /// About 120 bytes a slot: 15 MiB.
    pub const DEFAULT_SLOTS: usize = 1 << 17;

    pub fn new(slots: usize, floor: Floor) -> TagClock {
        TagClock {
            newest: (0..slots.max(1)).map(|_| AtomicU64::new(0)).collect(),
            recent: (0..slots.max(1)).map(|_| Mutex::default()).collect(),
            floor: AtomicU64::new(floor.0),
            sequence: Sequence(AtomicU64::new(1)),
            covered: AtomicU64::new(0),
            late: Mutex::default(),
        }
    }

    /// Changes with everything that can turn a verdict of [`TagClock::admits`] from yes to no. It counts the finished
    /// changes and begins at 1, so 0 is "never judged".
    ///
    /// Whoever read the number n **before** judging, and judged yes, may repeat that verdict as long as the number is
    /// still n, without looking at a slot. Why: a change writes its slot (or the floor) first and counts itself after
    /// that, by a read-modify-write with release. So the load that gave n synchronises with every change counted in
    /// it, and the judgement that followed saw them all. A change that is over before a read begins is counted in
    /// whatever that read loads (both are on one atomic): if that is n, the judgement knew of it. A change still under
    /// way may be missed, as it may be by a look at the slots; nobody was told of its commit yet.
    pub fn sequence(&self) -> u64 {
        self.sequence.0.load(Ordering::Acquire)
    }

    /// Makes every remembered verdict be judged anew. For whoever refuses entries by more than tags: call it after the
    /// refusal can be seen.
    pub fn touch(&self) {
        self.sequence.0.fetch_add(1, Ordering::Release);
    }

    pub fn slot_count(&self) -> usize {
        self.newest.len()
    }

    pub fn floor(&self) -> Floor {
        Floor(self.floor.load(Ordering::Acquire))
    }

    /// Every entry with an older floor is unreachable from here on.
    pub fn move_floor(&self, floor: Floor) {
        self.floor.fetch_max(floor.0, Ordering::AcqRel);
        self.touch();
    }

    pub fn raise(&self, tag: TagHash, stamp: Stamp) {
        let slot = self.slot(tag);
        let mut recent = self.lock(slot);
        recent.raise(stamp);
        self.newest[slot].fetch_max(stamp.lsn.0, Ordering::AcqRel);
        drop(recent);
        self.note_if_late(slot, stamp.lsn);
        self.touch();
    }

    /// Raises by hand, of tables in doubt and of rules bear the place where the stream stood: a checkpoint may be past it.
    fn note_if_late(&self, slot: usize, lsn: Lsn) {
        // The slot is written first. So either the checkpoint that covers `lsn` reads it, or this reads what it covers.
        fence(Ordering::SeqCst);
        if lsn.0 <= self.covered.load(Ordering::SeqCst) {
            self.late().raised.insert(slot);
        }
    }

    /// Commits up to `lsn` raised it that nobody tells apart any more, so everybody counts as having heard of them.
    pub fn drop_up_to(&self, tag: TagHash, lsn: Lsn) {
        let slot = self.slot(tag);
        let mut recent = self.lock(slot);
        recent.dropped = recent.dropped.max(lsn);
        self.newest[slot].fetch_max(lsn.0, Ordering::AcqRel);
        drop(recent);
        self.note_if_late(slot, lsn);
        self.touch();
    }

    /// May a value with these tags, read at `fence`, be stored and answered as fresh?
    pub fn admits(&self, fence: &Fence, tags: &[TagHash]) -> bool {
        self.admits_until(fence, tags, Lsn::MAX)
    }

    /// The same, but only for commits up to `until`: may a reader who had heard of those share the value?
    pub fn admits_until(&self, fence: &Fence, tags: &[TagHash], until: Lsn) -> bool {
        fence.floor == self.floor() && tags.iter().all(|tag| self.slot_admits(self.slot(*tag), fence, until))
    }

    fn slot_admits(&self, slot: usize, fence: &Fence, until: Lsn) -> bool {
        if self.newest[slot].load(Ordering::Acquire) <= fence.settled.0 {
            return true;
        }
        let recent = self.lock(slot);
        let known = |stamp: &Stamp| stamp.lsn <= fence.settled || stamp.lsn > until || fence.snapshot.sees(stamp.xid);
        recent.dropped <= fence.settled && recent.stamps.iter().flatten().all(known)
    }

    /// Was the tag touched after `after` by a commit that `snapshot` sees? In doubt, yes.
    pub fn seen_after(&self, tag: TagHash, after: Lsn, snapshot: &Snapshot) -> bool {
        let slot = self.slot(tag);
        if self.newest[slot].load(Ordering::Acquire) <= after.0 {
            return false;
        }
        let recent = self.lock(slot);
        let touched = |stamp: &Stamp| stamp.lsn > after && (stamp.xid == Xid::NEVER || snapshot.sees(stamp.xid));
        recent.dropped > after || recent.stamps.iter().flatten().any(touched)
    }

    /// Where the commit of transaction `xid` raised the tag, while its stamp is still remembered.
    pub fn raised_by(&self, tag: TagHash, xid: Xid) -> Option<Lsn> {
        self.lock(self.slot(tag)).stamps.iter().flatten().find(|stamp| stamp.xid == xid).map(|stamp| stamp.lsn)
    }

    /// The slots raised at or above `after`, for a checkpoint: a commit may begin just where the last one covered ended.
    pub fn changed_since(&self, after: Lsn) -> Vec<SlotImage> {
        let raised = |(slot, newest): (usize, &AtomicU64)| {
            let newest = newest.load(Ordering::Acquire);
            (newest != 0 && newest >= after.0).then(|| self.image_of(slot))
        };
        self.newest.iter().enumerate().filter_map(raised).collect()
    }

    /// What a checkpoint up to `up_to` has to hold beside the one up to `after`. It is asked for again until
    /// [`TagClock::note_saved`] says that it was written.
    pub fn to_save(&self, after: Lsn, up_to: Lsn) -> Vec<SlotImage> {
        self.note_covered(up_to);
        fence(Ordering::SeqCst);
        let mut late = self.late();
        let Late { raised, taken } = &mut *late;
        taken.append(raised);
        let late = std::mem::take(&mut *taken);
        let mut images = self.changed_since(after);
        let known: BTreeSet<u32> = images.iter().map(|image| image.index).collect();
        images.extend(late.iter().filter(|slot| !known.contains(&(**slot as u32))).map(|slot| self.image_of(*slot)));
        *taken = late;
        images
    }

    /// The images of the last [`TagClock::to_save`] were written.
    pub fn note_saved(&self) {
        self.late().taken.clear();
    }

    /// A checkpoint up to here was loaded.
    pub fn note_covered(&self, up_to: Lsn) {
        self.covered.fetch_max(up_to.0, Ordering::SeqCst);
    }

    fn late(&self) -> MutexGuard<'_, Late> {
        self.late.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The tag's slot, whenever it was raised.
    pub fn image(&self, tag: TagHash) -> SlotImage {
        self.image_of(self.slot(tag))
    }

    fn image_of(&self, slot: usize) -> SlotImage {
        let recent = self.lock(slot);
        SlotImage { index: slot as u32, dropped: recent.dropped, stamps: recent.stamps.iter().flatten().copied().collect() }
    }

    /// Puts a checkpoint's slot back. Returns false if the clock has no such slot.
    pub fn load(&self, image: &SlotImage) -> bool {
        let slot = image.index as usize;
        if slot >= self.slot_count() {
            return false;
        }
        let mut recent = self.lock(slot);
        let mut newest = image.dropped;
        recent.dropped = recent.dropped.max(image.dropped);
        for stamp in &image.stamps {
            recent.raise(*stamp);
            newest = newest.max(stamp.lsn);
        }
        self.newest[slot].fetch_max(newest.0, Ordering::AcqRel);
        drop(recent);
        self.touch();
        true
    }

    fn slot(&self, tag: TagHash) -> usize {
        // The high bits choose, so that a clock of another size is not a shifted copy of this one.
        ((u128::from(tag.0) * self.newest.len() as u128) >> 64) as usize
    }

    /// A poisoned lock still holds a valid slot: every store in it is whole.
    fn lock(&self, slot: usize) -> MutexGuard<'_, Recent> {
        self.recent[slot].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TableName, Tag};

    fn hash(id: u32) -> TagHash {
        Tag::row(&TableName::new("public", "t"), "id", &id.to_string()).unwrap().hash()
    }

    fn fence(snapshot: &str, settled: u64) -> Fence {
        Fence { snapshot: snapshot.parse().unwrap(), settled: Lsn(settled), floor: Floor(1) }
    }

    fn stamp(lsn: u64, xid: u64) -> Stamp {
        Stamp { lsn: Lsn(lsn), xid: Xid(xid) }
    }

    #[test]
    fn p5_a_commit_that_the_snapshot_saw_does_not_evict_and_one_it_did_not_see_does() {
        let clock = TagClock::new(1024, Floor(1));
        clock.raise(hash(1), stamp(100, 15));
        assert!(clock.admits(&fence("10:20:", 50), &[hash(1)]));
        assert!(!clock.admits(&fence("10:20:15", 50), &[hash(1)]));
        assert!(!clock.admits(&fence("10:15:", 50), &[hash(1)]));
        assert!(clock.admits(&fence("10:15:", 100), &[hash(1)]), "at or below W");
        assert!(clock.admits(&fence("10:15:", 50), &[hash(2)]), "another tag");
    }

    #[test]
    fn overflow_invalidates_too_much_never_too_little() {
        let clock = TagClock::new(1024, Floor(1));
        for n in 0..20 {
            clock.raise(hash(1), stamp(100 + n, 50 + n));
        }
        assert!(!clock.admits(&fence("10:1000:", 50), &[hash(1)]), "sees all, but old stamps are gone");
        assert!(clock.admits(&fence("10:1000:", 116), &[hash(1)]), "W covers what was dropped");
        assert!(!clock.admits(&fence("10:1000:69", 116), &[hash(1)]), "the newest is still compared");
    }

    #[test]
    fn a_moved_floor_ends_every_older_entry() {
        let clock = TagClock::new(16, Floor(1));
        assert!(clock.admits(&fence("10:20:", 50), &[]));
        clock.move_floor(Floor(2));
        assert!(!clock.admits(&fence("10:20:", 50), &[]));
    }

    #[test]
    fn a_reader_shares_what_covers_all_it_had_heard_of() {
        let clock = TagClock::new(1024, Floor(1));
        clock.raise(hash(1), stamp(100, 30));
        let before = fence("10:20:", 50);
        assert!(!clock.admits_until(&before, &[hash(1)], Lsn(100)));
        assert!(clock.admits_until(&before, &[hash(1)], Lsn(99)));
    }

    #[test]
    fn a_checkpoint_brings_the_clock_back() {
        let clock = TagClock::new(1024, Floor(1));
        for n in 0..6 {
            clock.raise(hash(1), stamp(100 + n, 50 + n));
        }
        clock.raise(hash(2), stamp(300, 99));
        let restored = TagClock::new(1024, Floor(1));
        let images = clock.changed_since(Lsn(0));
        assert_eq!(images.len(), 2);
        assert!(images.iter().all(|image| restored.load(image)));
        assert_eq!(restored.changed_since(Lsn(0)), images);
        assert_eq!(clock.changed_since(Lsn(200)).len(), 1);
        assert_eq!(clock.changed_since(Lsn(300)).len(), 1, "a commit that begins where the checkpoint ended");
        assert_eq!(clock.changed_since(Lsn(301)).len(), 0);
        assert!(!restored.load(&SlotImage { index: 5000, dropped: Lsn(0), stamps: vec![] }));
    }

    #[test]
    fn p4_what_is_raised_behind_a_checkpoint_is_in_the_next_one() {
        let clock = TagClock::new(1024, Floor(1));
        clock.raise(hash(1), stamp(100, 50));
        assert_eq!(clock.to_save(Lsn(0), Lsn(200)).len(), 1);
        clock.note_saved();
        clock.raise(hash(2), Stamp::unseen(Lsn(101)));
        let control = clock.changed_since(Lsn(200));
        assert!(control.is_empty(), "by its stamp it does not look changed");
        let late = clock.to_save(Lsn(200), Lsn(300));
        assert_eq!(late, [clock.image(hash(2))]);
        // It was not written after all; and again it comes late while it is.
        clock.raise(hash(2), Stamp::unseen(Lsn(102)));
        assert_eq!(clock.to_save(Lsn(200), Lsn(300)), [clock.image(hash(2))]);
        clock.raise(hash(2), Stamp::unseen(Lsn(103)));
        clock.note_saved();
        assert_eq!(clock.to_save(Lsn(300), Lsn(300)), [clock.image(hash(2))]);
        clock.note_saved();
        assert!(clock.to_save(Lsn(300), Lsn(300)).is_empty());
        let restarted = TagClock::new(1024, Floor(1));
        restarted.note_covered(Lsn(300));
        restarted.raise(hash(3), Stamp::unseen(Lsn(250)));
        assert_eq!(restarted.to_save(Lsn(300), Lsn(400)).len(), 1);
    }

    #[test]
    fn whatever_can_refuse_an_entry_changes_the_sequence_and_nothing_else_does() {
        let clock = TagClock::new(1024, Floor(1));
        let mut last = clock.sequence();
        assert_ne!(last, 0, "0 is never judged");
        let mut moved = |what: &str| {
            let before = std::mem::replace(&mut last, clock.sequence());
            assert!(last > before, "{what}");
        };
        clock.raise(hash(1), stamp(100, 15));
        moved("a raise");
        clock.move_floor(Floor(2));
        moved("a floor");
        let image = SlotImage { index: 7, dropped: Lsn(5), stamps: vec![] };
        assert!(clock.load(&image));
        moved("a checkpoint's slot");
        clock.touch();
        moved("a touch");
        clock.admits(&fence("10:20:", 50), &[hash(1)]);
        clock.seen_after(hash(1), Lsn(1), &"1:1:".parse().unwrap());
        clock.changed_since(Lsn(0));
        assert_eq!(clock.sequence(), last, "looking changes nothing");
    }

    #[test]
    fn a_stamp_of_nobody_is_seen_by_nobody() {
        let clock = TagClock::new(1024, Floor(1));
        clock.raise(hash(1), Stamp::unseen(Lsn(100)));
        assert!(!clock.admits(&fence("10:99999999:", 99), &[hash(1)]));
        assert!(clock.admits(&fence("10:20:", 100), &[hash(1)]));
        assert!(clock.seen_after(hash(1), Lsn(99), &"1:1:".parse().unwrap()));
        assert!(!clock.seen_after(hash(1), Lsn(100), &"1:1:".parse().unwrap()));
    }
}
