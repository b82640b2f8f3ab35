//! The transaction that is being read: its items, or, once they are too many, only what it touched.

use std::{collections::BTreeMap, mem::size_of, sync::Arc};

use walcast_model::{Cell, Column, Commit, Item, Lsn, Row, Scope, Table, TableId, TableName};

#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) final_lsn: Lsn,
    pub(super) xid: u32,
    limit_bytes: usize,
    size_bytes: usize,
    /// Changes and messages so far: the next index.
    count: u32,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Items(Vec<(u32, Item)>),
    Tables(Touched),
}

/// Renamed within the transaction, a table is there under both names: its tags carry them.
#[derive(Debug, Default)]
struct Touched {
    tables: BTreeMap<(TableId, TableName), Arc<Table>>,
    /// Rows of one table come in long runs; this spares the search.
    last: Option<Arc<Table>>,
}

/// What an empty commit occupies in a queue.
const COMMIT_BYTES: usize = size_of::<Commit>();
const ITEM_BYTES: usize = size_of::<(u32, Item)>();

impl Transaction {
    pub(super) fn new(final_lsn: Lsn, xid: u32, limit_bytes: usize) -> Transaction {
        Transaction { final_lsn, xid, limit_bytes, size_bytes: COMMIT_BYTES, count: 0, kept: Kept::Items(Vec::new()) }
    }

    pub(super) fn add(&mut self, item: Item) {
        let index = self.count;
        if !matches!(item, Item::Redefined(_)) {
            self.count = self.count.saturating_add(1);
        }
        match &mut self.kept {
            Kept::Tables(touched) => touched.add(&item),
            Kept::Items(items) => {
                self.size_bytes = self.size_bytes.saturating_add(size_of_item(&item));
                items.push((index, item));
                if self.size_bytes > self.limit_bytes {
                    let mut touched = Touched::default();
                    items.iter().for_each(|(_, item)| touched.add(item));
                    self.kept = Kept::Tables(touched);
                }
            }
        }
    }

    pub(super) fn commit(self, end_lsn: Lsn, committed_at_us: i64) -> Commit {
        let (scope, size_bytes) = match self.kept {
            Kept::Items(items) => (Scope::Whole(items), self.size_bytes),
            Kept::Tables(touched) => {
                let tables: Vec<_> = touched.tables.into_values().collect();
                let size_bytes = COMMIT_BYTES + tables.len() * size_of::<Arc<Table>>();
                (Scope::TooLarge { tables, items: self.count }, size_bytes)
            }
        };
        Commit { lsn: self.final_lsn, end_lsn, xid: self.xid, committed_at_us, scope, size_bytes }
    }
}

impl Touched {
    fn add(&mut self, item: &Item) {
        let table = match item {
            Item::Change(change) => &change.table,
            Item::Redefined(table) => table,
            Item::Message { .. } => return,
        };
        if self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, table)) {
            return;
        }
        self.tables.insert((table.id, table.name.clone()), table.clone());
        self.last = Some(table.clone());
    }
}

fn size_of_item(item: &Item) -> usize {
    ITEM_BYTES
        + match item {
            Item::Change(change) => change.old.as_ref().map_or(0, size_of_row) + change.new.as_ref().map_or(0, size_of_row),
            Item::Message { prefix, content } => prefix.len() + content.len(),
            // The newest is shared with the relation map, but a transaction may describe a table again and again.
            Item::Redefined(table) => size_of::<Table>() + table.columns.len() * size_of::<Column>(),
        }
}

fn size_of_row(row: &Row) -> usize {
    let value = |cell: &Cell| match cell {
        Cell::Value(bytes) => bytes.len(),
        _ => 0,
    };
    row.0.len() * size_of::<Cell>() + row.0.iter().map(value).sum::<usize>()
}
