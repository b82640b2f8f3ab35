//! Answers of PostgreSQL about row images, for as long as nothing that decides them has moved.
//!
//! An answer holds for the same rules, the same caller and the same values of the columns that the policy reads. It was
//! given as of a snapshot; it serves a commit only if the tables that decide look the same at both, and nothing newer of them
//! was read since: see [`holds`].

use std::sync::Arc;

use bytes::Bytes;
use quick_cache::{Weighter, sync::Cache};
use walcast_auth::{Rules, policy::Values};
use walcast_model::{Cell, Fence, Lsn, Row, Table, TagClock, TagHash};

/// To a policy these are one: what it makes of the claims, or the claims themselves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    Values(Arc<Values>),
    Exact(u128),
}

/// The values of the columns that a policy reads, null as none.
pub type Cells = Arc<[Option<Bytes>]>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The rules' own number: those that replaced them have another.
    pub rules: u64,
    pub who: Who,
    pub cells: Cells,
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub allowed: bool,
    pub as_of: Arc<Fence>,
}

/// For all tables together.
const BYTES: u64 = 16 << 20;
/// Larger values are asked for each time.
const CELLS_BYTES: usize = 4 << 10;

#[derive(Debug)]
pub struct Answers(Cache<Key, Answer, Weight>);

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<Key, Answer> for Weight {
    fn weight(&self, key: &Key, _: &Answer) -> u64 {
        let who = match &key.who {
            Who::Values(values) => values.size_bytes(),
            Who::Exact(_) => 0,
        };
        // With a share of the snapshot, which the answers of one statement have together.
        240 + who + bytes_of(&key.cells) as u64
    }
}

impl Default for Answers {
    fn default() -> Answers {
        Answers(Cache::with_weighter(10_000, BYTES, Weight))
    }
}

impl Answers {
    pub fn get(&self, key: &Key) -> Option<Answer> {
        self.0.get(key)
    }

    pub fn put(&self, key: Key, answer: Answer) {
        if bytes_of(&key.cells) <= CELLS_BYTES {
            // Copied: a few bytes of the stream's would keep all that came with them.
            let copied = |cell: &Option<Bytes>| cell.as_ref().map(|bytes| Bytes::copy_from_slice(bytes));
            let cells = key.cells.iter().map(copied).collect();
            self.0.insert(Key { cells, ..key }, answer);
        }
    }

    pub fn forget(&self) {
        self.0.clear();
    }
}

fn bytes_of(cells: &Cells) -> usize {
    cells.iter().map(|cell| 24 + cell.as_ref().map_or(0, Bytes::len)).sum()
}

/// What the policy reads of an image; none if the image lacks a part of it.
pub fn cells(needs: &[String], table: &Table, row: &Row) -> Option<Cells> {
    let cell = |name: &String| match table.column(name).map(|(index, _)| row.cell(index)) {
        Some(Cell::Value(bytes)) => Some(Some(bytes.clone())),
        Some(Cell::Null) => Some(None),
        Some(Cell::Unchanged | Cell::Absent) | None => None,
    };
    needs.iter().map(cell).collect()
}

/// The types of the columns that the policy reads, as the stream described them: text forms compare within one type.
pub fn same_types(needs: &[String], rules: &Rules, table: &Table) -> bool {
    let same = |name: &String| match (rules.column(name), table.column(name)) {
        (Some(rule), Some((_, column))) => rule.type_oid == column.type_oid,
        _ => false,
    };
    needs.iter().all(same)
}

/// May an answer as of `fence` serve the commit at `lsn`? Not if a commit after it that the snapshot sees touched what decides;
/// and not if one that the snapshot does not see did, up to the commit or up to what has been read since.
pub fn holds(clock: &TagClock, decides: &[TagHash], fence: &Fence, lsn: Lsn) -> bool {
    clock.admits(fence, decides) && !decides.iter().any(|tag| clock.seen_after(*tag, lsn, &fence.snapshot))
}

#[cfg(test)]
mod tests {
    use walcast_model::{Floor, Snapshot, Stamp, TableName, Tag, Xid};

    use super::*;

    const MEMBERS: &str = "members";

    fn decides() -> Vec<TagHash> {
        vec![Tag::table(&TableName::new("public", MEMBERS)).hash()]
    }

    fn fence(snapshot: &str, settled: u64) -> Fence {
        Fence { snapshot: snapshot.parse::<Snapshot>().unwrap(), settled: Lsn(settled), floor: Floor(1) }
    }

    #[test]
    fn p3_an_answer_serves_the_commits_between_two_changes_of_what_decides_and_no_other() {
        let clock = TagClock::new(1024, Floor(1));
        let decides = decides();
        clock.raise(decides[0], Stamp { lsn: Lsn(100), xid: Xid(10) });
        let answer = fence("11:11:", 100);
        assert!(!holds(&clock, &decides, &answer, Lsn(50)), "before the membership that it saw");
        assert!(holds(&clock, &decides, &answer, Lsn(100)), "with that very commit");
        assert!(holds(&clock, &decides, &answer, Lsn(150)));
        clock.raise(decides[0], Stamp { lsn: Lsn(200), xid: Xid(12) });
        assert!(!holds(&clock, &decides, &answer, Lsn(200)), "the commit that revokes");
        assert!(!holds(&clock, &decides, &answer, Lsn(150)), "a row before it, delivered after it was read");
        let later = fence("13:13:", 100);
        assert!(holds(&clock, &decides, &later, Lsn(200)) && !holds(&clock, &decides, &later, Lsn(150)));
    }

    #[test]
    fn p3_after_a_crash_no_answer_of_before_is_given() {
        let clock = TagClock::new(1024, Floor(1));
        assert!(holds(&clock, &decides(), &fence("11:11:", 100), Lsn(150)));
        clock.move_floor(Floor(2));
        assert!(!holds(&clock, &decides(), &fence("11:11:", 100), Lsn(150)));
        assert!(!holds(&clock, &[], &fence("11:11:", 100), Lsn(150)));
    }
}
