//! What must be there for a value to be stored: replacing exactly what was read, or only what is absent.
//!
//! Tested under the lock of the key's stripe of L1, so that on one node of two who replace the same entry one wins.
//! Across nodes that share an L2 it says what this node knew: there the newer fence wins, as with every store.

use std::sync::Arc;

use crate::Entry;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub enum Precondition {
    #[default]
    None,
    Absent,
    Present,
    /// The entry has one of these ETags.
    Matches(Vec<Arc<str>>),
}

impl Precondition {
    pub(crate) fn is_met(&self, there: Option<&Entry>) -> bool {
        match self {
            Precondition::None => true,
            Precondition::Absent => there.is_none(),
            Precondition::Present => there.is_some(),
            Precondition::Matches(etags) => there.is_some_and(|entry| etags.contains(&entry.etag)),
        }
    }
}
