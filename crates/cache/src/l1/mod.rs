//! The first tier: entries in memory, bounded by bytes and, where asked for, by number.
//!
//! Called by the cache. Never judges: whoever reads from it asks `invalidate` whether the entry may be answered.

mod plan;
mod room;

use std::{collections::HashMap, sync::Arc};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use walcast_model::CacheKey;

use self::{plan::Plan, room::Room};
use crate::{CacheConfig, Entry, Policy};

pub(crate) struct L1 {
    /// The first is everybody's who has no other.
    rooms: Box<[Room]>,
    /// Empty where one room is all there is.
    room_of: HashMap<Box<str>, usize, RandomState>,
    /// Makes "look at what is there, then change it" one step per key.
    stripes: Box<[Mutex<()>]>,
}

/// What a room of L1 holds: a namespace's own, or the one that namespaces of a policy share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomFigures {
    /// The namespace's name, else the policy's.
    pub name: String,
    pub policy: Policy,
    pub bytes: u64,
    pub capacity_bytes: u64,
    pub entries: usize,
}

const STRIPES: usize = 64;

impl L1 {
    pub(crate) fn new(config: &CacheConfig) -> L1 {
        let Plan { rooms, of } = Plan::of(config);
        let rooms: Box<[Room]> = rooms.into_iter().map(|plan| Room::new(plan, config.max_value_bytes)).collect();
        let elsewhere = of.into_iter().filter(|(_, room)| *room != 0).map(|(name, room)| (name.into(), room));
        L1 { room_of: elsewhere.collect(), rooms, stripes: (0..STRIPES).map(|_| Mutex::new(())).collect() }
    }

    pub(crate) fn get(&self, key: &CacheKey) -> Option<Arc<Entry>> {
        self.room(key).get(key)
    }

    /// Asked by upkeep: no use of the entry.
    pub(crate) fn holds(&self, key: &CacheKey) -> bool {
        self.room(key).peek(key).is_some()
    }

    /// Stores if what is there, or that nothing is, suits.
    pub(crate) fn put_where(&self, key: &CacheKey, entry: Arc<Entry>, suits: impl FnOnce(Option<&Entry>) -> bool) -> bool {
        let room = self.room(key);
        let _one_at_a_time = self.stripe(key).lock();
        if !suits(room.peek(key).as_deref()) {
            return false;
        }
        room.insert(key, entry);
        true
    }

    /// Removes exactly this entry: one that replaced it meanwhile stays.
    pub(crate) fn remove(&self, key: &CacheKey, entry: &Arc<Entry>) {
        let room = self.room(key);
        let _one_at_a_time = self.stripe(key).lock();
        if room.peek(key).is_some_and(|there| Arc::ptr_eq(&there, entry)) {
            room.delete(key);
        }
    }

    pub(crate) fn delete(&self, key: &CacheKey) -> bool {
        let _one_at_a_time = self.stripe(key).lock();
        self.room(key).delete(key)
    }

    /// Until `visit` answers false, in no order. Answers whether it met every entry: not every engine can list its own.
    pub(crate) fn each(&self, mut visit: impl FnMut(&CacheKey, &Entry) -> bool) -> bool {
        // Each of them, also past one that cannot be listed.
        self.rooms.iter().filter(|room| !room.each(&mut visit)).count() == 0
    }

    pub(crate) fn clear(&self) {
        self.rooms.iter().for_each(Room::clear);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.rooms.iter().map(Room::bytes).sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.rooms.iter().map(Room::len).sum()
    }

    pub(crate) fn figures(&self) -> Vec<RoomFigures> {
        let figures = |room: &Room| RoomFigures {
            name: room.plan().name.clone(),
            policy: room.plan().policy,
            bytes: room.bytes(),
            capacity_bytes: room.plan().bytes,
            entries: room.len(),
        };
        self.rooms.iter().map(figures).collect()
    }

    fn room(&self, key: &CacheKey) -> &Room {
        if self.room_of.is_empty() {
            return &self.rooms[0];
        }
        &self.rooms[self.room_of.get(key.namespace()).copied().unwrap_or(0)]
    }

    fn stripe(&self, key: &CacheKey) -> &Mutex<()> {
        &self.stripes[(key.hash64() >> 40) as usize % STRIPES]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        time::Duration,
    };

    use bytes::Bytes;
    use walcast_model::{Fence, Floor, Lsn, Snapshot};

    use super::*;
    use crate::{NamespaceConfig, NewValue, entry::Life};

    impl L1 {
        /// Stores unless `keep` says that the entry which is there already must stay.
        fn put_unless(&self, key: &CacheKey, entry: Arc<Entry>, keep: impl FnOnce(&Entry) -> bool) -> bool {
            self.put_where(key, entry, |there| !there.is_some_and(keep))
        }
    }

    fn entry(key: &CacheKey, bytes: usize) -> Arc<Entry> {
        let value =
            NewValue { value: vec![7; bytes].into(), content_type: "x/y".into(), tags: vec![], ttl: None, negative: false };
        let fence = Fence { snapshot: Snapshot::blind(), settled: Lsn(1), floor: Floor(1) };
        Arc::new(Entry::new(key, value, Life { fresh: Duration::from_secs(60), stale: Duration::ZERO }, fence, 0))
    }

    fn key(n: usize) -> CacheKey {
        CacheKey::new("n", &n.to_string()).unwrap()
    }

    /// All namespaces under one policy.
    fn l1(policy: Policy, l1_bytes: u64, max_value_bytes: usize, l1_entries: Option<usize>) -> L1 {
        let unnamed = NamespaceConfig { policy, ..NamespaceConfig::default() };
        L1::new(&CacheConfig { l1_bytes, max_value_bytes, l1_entries, unnamed, ..CacheConfig::default() })
    }

    fn each_policy(check: impl Fn(Policy)) {
        Policy::ALL.into_iter().for_each(check);
    }

    #[test]
    fn p7_memory_stays_within_its_bytes_and_the_largest_value_still_fits() {
        each_policy(|policy| {
            let l1 = l1(policy, 8 << 20, 1 << 20, None);
            for n in 0..5_000 {
                l1.put_unless(&key(n), entry(&key(n), 10_000), |_| false);
                assert!(l1.bytes() <= 8 << 20, "{policy:?} {}", l1.bytes());
            }
            assert!(l1.len() > 500, "{policy:?} {}", l1.len());
            l1.put_unless(&key(1), entry(&key(1), 1 << 20), |_| false);
            assert!(l1.get(&key(1)).is_some(), "{policy:?}");
            assert!(l1.bytes() <= 8 << 20, "{policy:?} {}", l1.bytes());
        });
    }

    #[test]
    fn p7_the_number_of_entries_is_bounded_where_asked_for() {
        each_policy(|policy| {
            for most in [1, 10, 1_000] {
                let l1 = l1(policy, 8 << 20, 1 << 10, Some(most));
                for n in 0..5_000 {
                    l1.put_unless(&key(n), entry(&key(n), 10), |_| false);
                }
                assert!(l1.len() <= most && l1.len() >= most * 9 / 10, "{policy:?} {most} {}", l1.len());
                assert!(l1.bytes() <= 8 << 20);
            }
        });
    }

    #[test]
    fn a_value_too_large_for_its_room_is_not_kept_and_the_one_before_it_goes() {
        each_policy(|policy| {
            let l1 = l1(policy, 100_000, 1 << 10, None);
            l1.put_unless(&key(1), entry(&key(1), 10), |_| false);
            l1.put_unless(&key(2), entry(&key(2), 10), |_| false);
            l1.put_unless(&key(1), entry(&key(1), 200_000), |_| false);
            assert!(l1.get(&key(1)).is_none(), "{policy:?}: neither");
            assert!(l1.get(&key(2)).is_some(), "{policy:?}: nobody made room for what is not kept");
        });
    }

    #[test]
    fn removing_an_old_entry_leaves_the_one_that_replaced_it() {
        each_policy(|policy| {
            let l1 = l1(policy, 1 << 20, 1 << 10, None);
            let (old, new) = (entry(&key(1), 10), entry(&key(1), 20));
            assert!(l1.put_unless(&key(1), old.clone(), |_| panic!("nobody is there")));
            assert!(l1.put_unless(&key(1), new.clone(), |there| there.value.len() != 10));
            l1.remove(&key(1), &old);
            assert_eq!(l1.get(&key(1)).unwrap().value, Bytes::from(vec![7; 20]), "{policy:?}");
            assert!(!l1.put_unless(&key(1), old, |_| true), "{policy:?}");
            l1.remove(&key(1), &new);
            assert!(l1.get(&key(1)).is_none(), "{policy:?}");
            l1.put_unless(&key(1), new, |_| true);
            assert!(l1.delete(&key(1)) && !l1.delete(&key(1)), "{policy:?}");
        });
    }

    #[test]
    fn clearing_leaves_nothing_and_gives_the_bytes_back() {
        each_policy(|policy| {
            let l1 = l1(policy, 1 << 20, 1 << 10, None);
            let fill = || {
                for n in 0..2_000 {
                    l1.put_unless(&key(n), entry(&key(n), 1_000), |_| false);
                }
                l1.len()
            };
            let full = fill();
            l1.clear();
            assert_eq!((l1.len(), l1.bytes()), (0, 0), "{policy:?}");
            assert!((0..2_000).all(|n| l1.get(&key(n)).is_none()), "{policy:?}");
            assert!(fill() >= full * 9 / 10, "{policy:?}: {} after, {full} before", l1.len());
        });
    }

    /// What a fence relies on: whoever clears after a put is over does not leave it, and a newer entry is never replaced
    /// by an older one, however many write and read meanwhile.
    #[test]
    fn p5_writers_of_one_key_never_put_an_older_entry_over_a_newer_one() {
        each_policy(|policy| {
            let l1 = l1(policy, 1 << 20, 1 << 10, None);
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writers: Vec<_> = (0..4)
                    .map(|first| {
                        let l1 = &l1;
                        scope.spawn(move || {
                            for size in (first..400).step_by(4) {
                                l1.put_unless(&key(1), entry(&key(1), size), |there| there.value.len() > size);
                            }
                        })
                    })
                    .collect();
                let reader = scope.spawn(|| {
                    let mut last = 0;
                    while !done.load(Ordering::Acquire) {
                        if let Some(there) = l1.get(&key(1)) {
                            assert!(there.value.len() >= last, "{policy:?}: {} after {last}", there.value.len());
                            last = there.value.len();
                        }
                    }
                });
                writers.into_iter().for_each(|writer| writer.join().unwrap());
                done.store(true, Ordering::Release);
                reader.join().unwrap();
            });
            assert_eq!(l1.get(&key(1)).unwrap().value.len(), 399, "{policy:?}");
            l1.clear();
            assert!(l1.get(&key(1)).is_none(), "{policy:?}");
        });
    }

    #[test]
    fn a_namespace_with_bytes_of_its_own_is_not_pushed_out_by_another() {
        let own = |policy, l1_bytes| NamespaceConfig { policy, l1_bytes: Some(l1_bytes), ..NamespaceConfig::default() };
        let namespaces = [("mine".to_owned(), own(Policy::Lru, 1 << 20)), ("small".to_owned(), own(Policy::Fifo, 10 << 10))];
        let config = CacheConfig { l1_bytes: 2 << 20, namespaces: namespaces.into(), ..CacheConfig::default() };
        let l1 = L1::new(&config);
        let mine = CacheKey::new("mine", "1").unwrap();
        let small = |n: usize| CacheKey::new("small", &n.to_string()).unwrap();
        l1.put_unless(&mine, entry(&mine, 100), |_| false);
        for n in 0..5_000 {
            l1.put_unless(&key(n), entry(&key(n), 1_000), |_| false);
            l1.put_unless(&small(n), entry(&small(n), 1_000), |_| false);
        }
        assert!(l1.get(&mine).is_some());
        let figures = l1.figures();
        let names: Vec<_> = figures.iter().map(|room| (room.name.as_str(), room.policy, room.capacity_bytes)).collect();
        let shared = (2 << 20) - (1 << 20) - (10 << 10);
        assert_eq!(
            names,
            [("adaptive", Policy::Adaptive, shared), ("mine", Policy::Lru, 1 << 20), ("small", Policy::Fifo, 10 << 10)]
        );
        assert!(figures.iter().all(|room| room.entries > 0 && room.bytes <= room.capacity_bytes), "{figures:?}");
        assert_eq!(l1.len(), figures.iter().map(|room| room.entries).sum::<usize>());
    }

    #[test]
    fn each_policy_lets_go_what_its_name_says() {
        // Room for ten; 1 is read often and early, 0 is read last.
        let survivors = |policy| {
            let l1 = l1(policy, 8 << 20, 1 << 10, Some(10));
            for n in 0..10 {
                l1.put_unless(&key(n), entry(&key(n), 10), |_| false);
            }
            for _ in 0..50 {
                l1.get(&key(1));
            }
            l1.get(&key(0));
            for n in 10..18 {
                l1.put_unless(&key(n), entry(&key(n), 10), |_| false);
            }
            [0, 1].map(|n| l1.get(&key(n)).is_some())
        };
        assert_eq!(survivors(Policy::Fifo), [false, false], "reading does not help");
        assert_eq!(survivors(Policy::Lru), [true, true], "both were read after all others");
        assert!(survivors(Policy::Lfu)[1], "the one read often stays");
        assert!(survivors(Policy::Adaptive)[1], "the one read often stays");
    }
}
