//! How encoded frames reach sockets. Usable alone; knows nothing of the WAL or the cache.
//!
//! [`Outbox`]: what one connection has still to send. [`Writers`]: write it straight into sockets. [`Gate`]: holds a
//! subscription's frames back until it is live.
//! [`ReplayRing`]: the last commits, for those who come back.

mod gate;
mod outbox;
mod ring;
mod writers;

pub use gate::{Gate, Missed, Place};
pub use outbox::{CloseReason, Outbox, OutboxLimits, OutboxReader, outbox};
pub use ring::{ReplayRing, Replayable, TooOld};
pub use writers::{Attention, Goodbye, OnWritten, SocketEnd, Turn, Writers};
