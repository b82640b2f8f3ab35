//! Decoded messages become commits.
//!
//! Called by the stream, one message at a time, for one connection: PostgreSQL describes a relation once a
//! connection and again when it may have changed, so a new connection takes a new [`Assembler`]. Keeps the
//! relations, counts items, and completes rows as far as the stream tells. Never guesses a value, never asks
//! anybody: when a relation is described it hands it out ([`Step::NeedsTable`]) and waits for [`Assembler::define`].
//!
//! Bound: the items of the open transaction, in bytes. Above it they are dropped and only the touched tables and
//! the count are kept (`Scope::TooLarge`), so a huge transaction costs a map entry for each table.

mod image;
#[cfg(test)]
mod tests;
mod transaction;

use std::{collections::HashMap, sync::Arc};

use walcast_model::{Change, Commit, Item, Lsn, Operation, Table};

use crate::pgoutput::{Message, Relation};
use transaction::Transaction;

#[derive(Debug)]
pub enum Step {
    More,
    /// Ask the catalog what this relation's columns are, then call [`Assembler::define`] before the next message.
    NeedsTable(Relation),
    Commit(Commit),
}

/// The stream contradicts itself: nothing but a new connection helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    #[error("a {0} came outside of a transaction; connect again")]
    Outside(&'static str),
    #[error("transaction {xid} began before transaction {open} had ended; connect again")]
    Nested { open: u32, xid: u32 },
    #[error("transaction {xid} was to end at {begun} and ended at {ended}; connect again")]
    Mismatch { xid: u32, begun: Lsn, ended: Lsn },
    #[error("relation {0} was changed before it was described; connect again")]
    Unknown(u32),
    #[error("a row of {table} has {found} columns where its description has {expected}; connect again")]
    Columns { table: String, expected: usize, found: usize },
    #[error("relation {0} was described and its table is not defined yet")]
    Undefined(u32),
    #[error("table {0} was defined, but no such relation was just described")]
    Unasked(u32),
}

#[derive(Debug)]
pub struct Assembler {
    limit_bytes: usize,
    tables: HashMap<u32, Arc<Table>>,
    open: Option<Transaction>,
    /// Handed out by `NeedsTable`: oid and number of columns.
    asked: Option<(u32, usize)>,
}

impl Assembler {
    pub fn new(limit_bytes: usize) -> Assembler {
        Assembler { limit_bytes, tables: HashMap::new(), open: None, asked: None }
    }

    pub fn push(&mut self, message: Message) -> Result<Step, AssembleError> {
        if let Some((relation, _)) = self.asked {
            return Err(AssembleError::Undefined(relation));
        }
        match message {
            Message::Begin { final_lsn, xid, .. } => self.begin(final_lsn, xid)?,
            Message::Commit { lsn, end_lsn, committed_at_us } => return self.commit(lsn, end_lsn, committed_at_us),
            Message::Relation(relation) => return self.describe(relation),
            Message::Insert { relation, new } => {
                let table = self.table(relation)?;
                let new = image::whole(&table, new)?;
                self.change(Change { table, operation: Operation::Insert, new: Some(new), old: None })?;
            }
            Message::Update { relation, old, new } => {
                let table = self.table(relation)?;
                let (old, new) = image::update(&table, old, new)?;
                self.change(Change { table, operation: Operation::Update, new: Some(new), old: Some(old) })?;
            }
            Message::Delete { relation, old } => {
                let table = self.table(relation)?;
                let old = image::old(&table, old)?;
                self.change(Change { table, operation: Operation::Delete, new: None, old: Some(old) })?;
            }
            Message::Truncate { relations, .. } => {
                for relation in relations {
                    let table = self.table(relation)?;
                    self.change(Change { table, operation: Operation::Truncate, new: None, old: None })?;
                }
            }
            Message::Message { transactional: true, prefix, content, .. } => {
                self.transaction("message")?.add(Item::Message { prefix, content });
            }
            // A message that no commit stands for has no place in the order of commits.
            Message::Message { transactional: false, .. } | Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(Step::More)
    }

    /// The table of the relation that the last step handed out. What is streamed from here on is read by it.
    pub fn define(&mut self, table: Table) -> Result<(), AssembleError> {
        let id = table.id.0;
        match self.asked {
            Some((asked, expected)) if asked == id => {
                let found = table.columns.len();
                if found != expected {
                    return Err(AssembleError::Columns { table: table.name.to_string(), expected, found });
                }
            }
            _ => return Err(AssembleError::Unasked(id)),
        }
        let table = Arc::new(table);
        self.transaction("relation")?.add(Item::Redefined(table.clone()));
        self.tables.insert(id, table);
        self.asked = None;
        Ok(())
    }

    fn begin(&mut self, final_lsn: Lsn, xid: u32) -> Result<(), AssembleError> {
        if let Some(open) = &self.open {
            return Err(AssembleError::Nested { open: open.xid, xid });
        }
        self.open = Some(Transaction::new(final_lsn, xid, self.limit_bytes));
        Ok(())
    }

    fn commit(&mut self, lsn: Lsn, end_lsn: Lsn, committed_at_us: i64) -> Result<Step, AssembleError> {
        let open = self.open.take().ok_or(AssembleError::Outside("commit"))?;
        if open.final_lsn != lsn {
            return Err(AssembleError::Mismatch { xid: open.xid, begun: open.final_lsn, ended: lsn });
        }
        Ok(Step::Commit(open.commit(end_lsn, committed_at_us)))
    }

    fn describe(&mut self, relation: Relation) -> Result<Step, AssembleError> {
        self.transaction("relation")?;
        self.asked = Some((relation.id, relation.columns.len()));
        Ok(Step::NeedsTable(relation))
    }

    fn change(&mut self, change: Change) -> Result<(), AssembleError> {
        self.transaction("change")?.add(Item::Change(change));
        Ok(())
    }

    fn transaction(&mut self, what: &'static str) -> Result<&mut Transaction, AssembleError> {
        self.open.as_mut().ok_or(AssembleError::Outside(what))
    }

    fn table(&self, relation: u32) -> Result<Arc<Table>, AssembleError> {
        self.tables.get(&relation).cloned().ok_or(AssembleError::Unknown(relation))
    }
}
