//! One committed transaction, as the stream delivered it.

use std::sync::Arc;

use bytes::Bytes;

use crate::{Lsn, Table};

/// Null is a value; unchanged (TOAST not sent) and absent (not part of this image) are not, and
/// whoever needs such a value must not guess it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cell {
    Null,
    /// PostgreSQL's text form, UTF-8.
    Value(Bytes),
    Unchanged,
    Absent,
}

impl Cell {
    pub fn text(&self) -> Option<&str> {
        match self {
            Cell::Value(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// True if the image tells what the value is, null included.
    pub fn is_known(&self) -> bool {
        matches!(self, Cell::Null | Cell::Value(_))
    }
}

/// One cell for each column of the table, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(pub Vec<Cell>);

impl Row {
    pub fn cell(&self, index: usize) -> &Cell {
        self.0.get(index).unwrap_or(&Cell::Absent)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    Insert,
    Update,
    Delete,
    Truncate,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Operation::Insert => "INSERT",
            Operation::Update => "UPDATE",
            Operation::Delete => "DELETE",
            Operation::Truncate => "TRUNCATE",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Change {
    pub table: Arc<Table>,
    pub operation: Operation,
    /// INSERT, UPDATE. Values not sent (TOAST) are filled from the old image where that has them.
    pub new: Option<Row>,
    /// UPDATE, DELETE: the replica identity, or the whole row with REPLICA IDENTITY FULL; the rest is absent.
    /// An UPDATE always has the key: PostgreSQL leaves it out when unchanged, the decoder puts it back.
    pub old: Option<Row>,
}

#[derive(Debug, Clone)]
pub enum Item {
    Change(Change),
    /// `pg_logical_emit_message(true, prefix, content)`.
    Message {
        prefix: Arc<str>,
        content: Bytes,
    },
    /// The stream described a table again: its policies, privileges or columns may have changed. Takes no index.
    Redefined(Arc<Table>),
}

#[derive(Debug, Clone)]
pub enum Scope {
    /// Each item with its index in the transaction.
    Whole(Vec<(u32, Item)>),
    /// More than fits the limit: only what it touched is known.
    TooLarge { tables: Vec<Arc<Table>>, items: u32 },
}

#[derive(Debug, Clone)]
pub struct Commit {
    /// Where the commit record begins: the commit's place in the order.
    pub lsn: Lsn,
    /// Where the record ends: what may be acknowledged.
    pub end_lsn: Lsn,
    /// The top-level transaction's id, low 32 bits.
    pub xid: u32,
    /// Microseconds since 1970.
    pub committed_at_us: i64,
    pub scope: Scope,
    /// What it occupies in memory, for every bounded queue it passes.
    pub size_bytes: usize,
}

impl Commit {
    /// One past the last index: the index of the position "after this commit".
    pub fn end_index(&self) -> u32 {
        match &self.scope {
            Scope::Whole(items) => {
                items.iter().rev().find(|(_, item)| !matches!(item, Item::Redefined(_))).map_or(0, |(index, _)| index + 1)
            }
            Scope::TooLarge { items, .. } => *items,
        }
    }
}
