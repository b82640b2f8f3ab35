//! How fresh a read asks to be, and whether that can come at all.
//!
//! Asked before a query waits: a position of another epoch never comes, and a transaction that has not begun is a mistake
//! of the caller, not an outage of ours. A read of the cache needs no answer: to it, either is a miss.

use std::time::Duration;

use walcast_model::{Position, Xid};

use crate::{Core, Engine};

/// How fresh a read asks to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    Any,
    AtLeast(Position),
    /// Must contain this transaction.
    Contains(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FreshnessError {
    #[error("the position is from another epoch: the database was replaced, recovered or promoted since")]
    OtherEpoch,
    #[error("no transaction has the id {0} yet")]
    UnknownTransaction(u64),
}

impl FreshnessError {
    pub fn code(self) -> &'static str {
        match self {
            FreshnessError::OtherEpoch => "other_epoch",
            FreshnessError::UnknownTransaction(_) => "unknown_transaction",
        }
    }

    pub fn hint(self) -> &'static str {
        match self {
            FreshnessError::OtherEpoch => "read again without it, and go on from the Walcast-Position of that answer",
            FreshnessError::UnknownTransaction(_) => "send the result of pg_current_xact_id() of a transaction of this database",
        }
    }
}

/// Transactions that run have ids above a snapshot's xmax, and so have their savepoints: so far, and no further.
const RUNNING_AT_MOST: u64 = 1 << 20;
/// To look is worth no more: the read itself waits, and says what it waited for.
const LOOK: Duration = Duration::from_secs(1);

impl Engine {
    /// While the database is away nobody knows, and the read itself will say so.
    pub async fn can_come(&self, freshness: Freshness) -> Result<(), FreshnessError> {
        self.core.can_come(freshness).await
    }
}

impl Core {
    async fn can_come(&self, freshness: Freshness) -> Result<(), FreshnessError> {
        match freshness {
            Freshness::Any => Ok(()),
            Freshness::AtLeast(position) if position.epoch != self.progress.epoch() => Err(FreshnessError::OtherEpoch),
            Freshness::AtLeast(_) => Ok(()),
            Freshness::Contains(xid) => match tokio::time::timeout(LOOK, self.fence()).await {
                Ok(Ok(fence)) if Xid(xid) > Xid(fence.snapshot.xmax.0.saturating_add(RUNNING_AT_MOST)) => {
                    Err(FreshnessError::UnknownTransaction(xid))
                }
                _ => Ok(()),
            },
        }
    }
}
