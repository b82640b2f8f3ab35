//! Nouns that cross a border between rooms. Pure: no Tokio, no SQL, no HTTP.
//!
//! Positions and visibility: [`Lsn`], [`Position`], [`Epoch`], [`Xid`], [`Snapshot`], [`Fence`], [`TagClock`].
//! What a commit carries: [`Commit`], [`Change`], [`Row`], [`Cell`], [`Table`].
//! What it touches and who asks: [`Tag`], [`CacheKey`], [`Claims`].

mod cache_key;
mod claims;
mod commit;
mod family;
mod fence;
mod lsn;
mod pg_hash;
mod position;
mod snapshot;
mod table;
mod tag;
mod tag_clock;
mod ttl;
mod xid;

pub use cache_key::{CacheKey, CacheKeyError};
pub use claims::{Claims, ClaimsError};
pub use commit::{Cell, Change, Commit, Item, Operation, Row, Scope};
pub use family::{Collation, Family};
pub use fence::{Fence, Floor};
pub use lsn::{Lsn, LsnError};
pub use position::{Epoch, Position, PositionError};
pub use snapshot::{Snapshot, SnapshotError};
pub use table::{Column, ReplicaIdentity, Table, TableId, TableName, ValueKind};
pub use tag::{Tag, TagError, TagHash, TagPiece};
pub use tag_clock::{SlotImage, Stamp, TagClock};
pub use ttl::{NAMED_TTLS, named_ttl};
pub use xid::Xid;
