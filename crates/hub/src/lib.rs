//! How encoded frames reach sockets. Usable alone; knows nothing of the WAL or the cache.
//!
//! [`Outbox`]: what one connection has still to send. [`Gate`]: holds a subscription's frames back until it is live.
//! [`ReplayRing`]: the last commits, for those who come back.

mod gate;
mod outbox;
mod ring;

pub use gate::{Gate, Place};
pub use outbox::{CloseReason, Outbox, OutboxReader, outbox};
pub use ring::{Missed, ReplayRing, Replayable};
