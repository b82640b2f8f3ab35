//! What happens when a row changes, stage by stage:
//!
//! [`intake`]: read, assemble, invalidate at once. [`settle`]: wait until the commit is visible to everybody.
//! [`suspects`]: ask whether a table that was described again was redefined, and invalidate it if so.
//! [`cascade`]: invalidate what rules look up in the database, where there are such rules.
//! [`announce`]: match, authorise, encode once, fan out. [`acknowledge`]: checkpoint, tell the slot.
//! Beside them [`heartbeat`]: write what proves that we hear.
//!
//! Data walks one way. Invalidating never waits for a later stage's decision; announcing never waits for a socket.

pub mod acknowledge;
pub mod announce;
pub mod cascade;
pub mod heartbeat;
pub mod intake;
mod own_connection;
pub mod settle;
pub mod suspects;

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use walcast_hub::Replayable;
use walcast_model::{Commit, Lsn, Xid};

/// A commit on its way from intake to announcement, with its share of the queue's bytes.
pub struct InFlight {
    pub commit: Arc<Commit>,
    pub xid: Xid,
    pub room: Option<OwnedSemaphorePermit>,
    /// What has still to be looked up and raised before anybody is told.
    pub cascades: Option<Box<cascade::Cascades>>,
    /// Tables that it describes again, until it is known what that means.
    pub suspects: Option<Box<suspects::Suspects>>,
}

/// What the settle stage hands on, in LSN order.
pub enum Announcement {
    Commits(Vec<InFlight>),
    /// Everybody must read again: what was lost or cannot be told, and from which place things go on.
    Resync {
        reason: &'static str,
        at: Lsn,
    },
    /// A new slot, a promotion: positions do not compare any more.
    NewEpoch {
        from: Lsn,
        reason: &'static str,
    },
}

/// What the intake hands to the settle stage.
pub enum Intake {
    Commit(InFlight),
    NewEpoch { from: Lsn, reason: &'static str },
}

/// A commit as the replay ring keeps it.
#[derive(Clone)]
pub struct Remembered {
    pub commit: Arc<Commit>,
    pub xid: Xid,
}

impl Replayable for Remembered {
    fn lsn(&self) -> Lsn {
        self.commit.lsn
    }

    fn end_index(&self) -> u32 {
        self.commit.end_index()
    }

    fn size_bytes(&self) -> usize {
        self.commit.size_bytes
    }
}
