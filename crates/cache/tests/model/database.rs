//! A database as far as a cache can tell: transactions that commit, roll back and become visible late, a log that is
//! flushed in its own time and streamed only then, and crashes that lose what was not flushed and use xids again.

use rand::{Rng, rngs::StdRng};
use walcast_model::{Lsn, Snapshot, Tag, Xid};

pub const KEYS: usize = 8;
/// What every key holds before anybody wrote it.
pub const FIRST: u64 = 0;

pub struct Database {
    next_xid: u64,
    next_version: u64,
    open: Vec<Open>,
    /// In commit order.
    log: Vec<Record>,
    flushed: usize,
}

/// A transaction that has not committed yet. It holds the locks of the keys that it writes.
struct Open {
    xid: Xid,
    writes: Vec<(usize, u64)>,
    tags: Vec<Tag>,
}

#[derive(Clone)]
pub struct Record {
    pub lsn: Lsn,
    pub xid: Xid,
    pub tags: Vec<Tag>,
    writes: Vec<(usize, u64)>,
    visible: bool,
    /// With `synchronous_commit = off` it may be visible before it is flushed.
    hasty: bool,
}

pub fn tag_of(key: usize) -> Tag {
    Tag::parse(&format!("items:id={key}")).unwrap()
}

impl Database {
    pub fn new() -> Database {
        Database { next_xid: 100, next_version: 1, open: Vec::new(), log: Vec::new(), flushed: 0 }
    }

    /// A transaction that writes one or two keys that nobody else is writing.
    pub fn begin(&mut self, random: &mut StdRng) {
        let mut keys: Vec<usize> = (0..random.random_range(1..=2)).map(|_| random.random_range(0..KEYS)).collect();
        keys.dedup();
        keys.retain(|key| !self.is_locked(*key));
        if self.open.len() >= 6 || keys.is_empty() {
            return;
        }
        let mut tags = vec![Tag::parse("items").unwrap()];
        tags.extend(keys.iter().map(|key| tag_of(*key)));
        let writes = keys.into_iter().map(|key| (key, self.version())).collect();
        let xid = self.xid();
        self.open.push(Open { xid, writes, tags });
    }

    /// A transactional logical message, as an invalidation by hand is.
    pub fn message(&mut self, tags: Vec<Tag>, random: &mut StdRng) {
        let xid = self.xid();
        self.open.push(Open { xid, writes: Vec::new(), tags });
        self.commit_open(self.open.len() - 1, random);
    }

    pub fn commit(&mut self, random: &mut StdRng) {
        if !self.open.is_empty() {
            self.commit_open(random.random_range(0..self.open.len()), random);
        }
    }

    pub fn roll_back(&mut self, random: &mut StdRng) {
        if !self.open.is_empty() {
            self.open.swap_remove(random.random_range(0..self.open.len()));
        }
    }

    pub fn flush(&mut self, random: &mut StdRng) {
        self.flushed = random.random_range(self.flushed..=self.log.len());
    }

    /// Lets one commit become visible to new snapshots.
    pub fn reveal(&mut self, random: &mut StdRng) {
        let flushed = self.flushed;
        let may = |(place, record): &(usize, &mut Record)| !record.visible && (record.hasty || *place < flushed);
        let mut ready: Vec<_> = self.log.iter_mut().enumerate().filter(may).map(|(_, record)| record).collect();
        if !ready.is_empty() {
            let one = random.random_range(0..ready.len());
            ready[one].visible = true;
        }
    }

    /// Ends all that is open, flushes and reveals: nothing is under way any more.
    pub fn come_to_rest(&mut self, random: &mut StdRng) {
        while !self.open.is_empty() {
            self.commit(random);
        }
        self.flushed = self.log.len();
        self.log.iter_mut().for_each(|record| record.visible = true);
    }

    /// What was not flushed is lost, and its xids are used again.
    pub fn crash(&mut self) {
        self.open.clear();
        self.log.truncate(self.flushed);
        self.log.iter_mut().for_each(|record| record.visible = true);
        self.next_xid = self.log.iter().map(|record| record.xid.0 + 1).max().unwrap_or(100);
    }

    pub fn snapshot(&self) -> Snapshot {
        let hidden = self.log.iter().filter(|record| !record.visible).map(|record| record.xid);
        let running: Vec<Xid> = self.open.iter().map(|open| open.xid).chain(hidden).collect();
        let xmax = Xid(self.next_xid);
        Snapshot::new(running.iter().copied().min().unwrap_or(xmax), xmax, running)
    }

    /// The key's value in the newest snapshot.
    pub fn read(&self, key: usize) -> u64 {
        let visible = self.log.iter().filter(|record| record.visible);
        visible.flat_map(|record| record.writes.iter()).filter(|(k, _)| *k == key).map(|(_, v)| *v).next_back().unwrap_or(FIRST)
    }

    /// Commits that the stream may carry.
    pub fn streamable(&self) -> &[Record] {
        &self.log[..self.flushed]
    }

    pub fn flushed_lsn(&self) -> Lsn {
        self.streamable().last().map_or(Lsn::ZERO, |record| record.lsn)
    }

    pub fn written_lsn(&self) -> Lsn {
        self.log.last().map_or(Lsn::ZERO, |record| record.lsn)
    }

    /// Every value of the key that a reader may be told as fresh who was told of all commits up to `told`, oldest first.
    pub fn values_from(&self, key: usize, told: Lsn) -> Vec<u64> {
        let of_key = |record: &Record| record.writes.iter().find(|(k, _)| *k == key).map(|(_, version)| (record.lsn, *version));
        let all: Vec<(Lsn, u64)> = [(Lsn::ZERO, FIRST)].into_iter().chain(self.log.iter().filter_map(of_key)).collect();
        let first = all.iter().rposition(|(lsn, _)| *lsn <= told).unwrap_or(0);
        all[first..].iter().map(|(_, version)| *version).collect()
    }

    fn commit_open(&mut self, place: usize, random: &mut StdRng) {
        let Open { xid, writes, tags } = self.open.swap_remove(place);
        let lsn = Lsn(self.written_lsn().0 + random.random_range(8..100));
        self.log.push(Record { lsn, xid, tags, writes, visible: false, hasty: random.random_bool(0.5) });
    }

    /// A writer's lock falls when his commit is visible.
    fn is_locked(&self, key: usize) -> bool {
        let writes = |writes: &[(usize, u64)]| writes.iter().any(|(k, _)| *k == key);
        self.open.iter().any(|open| writes(&open.writes))
            || self.log.iter().any(|record| !record.visible && writes(&record.writes))
    }

    fn xid(&mut self) -> Xid {
        self.next_xid += 1;
        Xid(self.next_xid - 1)
    }

    fn version(&mut self) -> u64 {
        self.next_version += 1;
        self.next_version - 1
    }
}
