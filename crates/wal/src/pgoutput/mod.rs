//! Reads one message of PostgreSQL's `pgoutput` plugin, protocol version 1, text format.
//!
//! A pure function over bytes, called by the stream for every message. Values are slices of the input, never
//! copies. Never panics and never allocates more than a small multiple of the input: whatever is cut short, too
//! long, unknown or contradicts itself is a [`DecodeError`] that names the byte.

mod reader;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use bytes::Bytes;
use walcast_model::{Cell, Lsn, ReplicaIdentity, Row};

use reader::Reader;
pub use reader::{DecodeError, Fault};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Begin {
        /// Where the commit record begins: the same as the `lsn` of the Commit that follows.
        final_lsn: Lsn,
        /// Microseconds since 1970.
        committed_at_us: i64,
        xid: u32,
    },
    Commit {
        lsn: Lsn,
        end_lsn: Lsn,
        committed_at_us: i64,
    },
    Origin {
        lsn: Lsn,
        name: Arc<str>,
    },
    Relation(Relation),
    Type {
        oid: u32,
        schema: Arc<str>,
        name: Arc<str>,
    },
    Insert {
        relation: u32,
        new: Row,
    },
    Update {
        relation: u32,
        old: Option<OldImage>,
        new: Row,
    },
    Delete {
        relation: u32,
        old: OldImage,
    },
    Truncate {
        relations: Vec<u32>,
        cascade: bool,
        restart_identity: bool,
    },
    Message {
        transactional: bool,
        lsn: Lsn,
        prefix: Arc<str>,
        content: Bytes,
    },
}

/// What PostgreSQL sent of the row as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OldImage {
    /// The replica identity's columns. All others are sent as null and are not: only the assembler,
    /// which knows the relation's key, can tell them apart.
    Key(Row),
    /// Every column.
    Full(Row),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    pub id: u32,
    pub schema: Arc<str>,
    pub table: Arc<str>,
    pub identity: ReplicaIdentity,
    pub columns: Vec<RelationColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    pub name: Arc<str>,
    pub type_oid: u32,
    pub type_modifier: i32,
    /// Part of the replica identity; with REPLICA IDENTITY FULL every column is.
    pub key: bool,
}

/// PostgreSQL counts time from 2000-01-01.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

pub fn decode(data: &Bytes) -> Result<Message, DecodeError> {
    let mut reader = Reader::new(data);
    let message = match reader.u8()? {
        b'B' => begin(reader.of("Begin"))?,
        b'C' => commit(reader.of("Commit"))?,
        b'O' => origin(reader.of("Origin"))?,
        b'R' => relation(reader.of("Relation"))?,
        b'Y' => data_type(reader.of("Type"))?,
        b'I' => insert(reader.of("Insert"))?,
        b'U' => update(reader.of("Update"))?,
        b'D' => delete(reader.of("Delete"))?,
        b'T' => truncate(reader.of("Truncate"))?,
        b'M' => logical_message(reader.of("Message"))?,
        tag => return Err(reader.fault_behind(Fault::MessageTag(tag))),
    };
    reader.end()?;
    Ok(message)
}

fn begin(reader: &mut Reader) -> Result<Message, DecodeError> {
    Ok(Message::Begin { final_lsn: reader.lsn()?, committed_at_us: time(reader)?, xid: reader.u32()? })
}

fn commit(reader: &mut Reader) -> Result<Message, DecodeError> {
    reader.flags(0)?;
    Ok(Message::Commit { lsn: reader.lsn()?, end_lsn: reader.lsn()?, committed_at_us: time(reader)? })
}

fn origin(reader: &mut Reader) -> Result<Message, DecodeError> {
    Ok(Message::Origin { lsn: reader.lsn()?, name: reader.name()? })
}

fn relation(reader: &mut Reader) -> Result<Message, DecodeError> {
    let id = reader.u32()?;
    let schema = schema(reader)?;
    let table = reader.name()?;
    let identity = match reader.u8()? {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        other => return Err(reader.fault_behind(Fault::Identity(other))),
    };
    // Flags, an empty name, type and modifier.
    let count = reader.count16(10)?;
    let columns = (0..count).map(|_| relation_column(reader)).collect::<Result<_, _>>()?;
    Ok(Message::Relation(Relation { id, schema, table, identity, columns }))
}

fn relation_column(reader: &mut Reader) -> Result<RelationColumn, DecodeError> {
    let key = reader.flags(1)? == 1;
    Ok(RelationColumn { key, name: reader.name()?, type_oid: reader.u32()?, type_modifier: reader.u32()?.cast_signed() })
}

fn data_type(reader: &mut Reader) -> Result<Message, DecodeError> {
    Ok(Message::Type { oid: reader.u32()?, schema: schema(reader)?, name: reader.name()? })
}

fn insert(reader: &mut Reader) -> Result<Message, DecodeError> {
    let relation = reader.u32()?;
    match reader.u8()? {
        b'N' => Ok(Message::Insert { relation, new: row(reader)? }),
        other => Err(reader.fault_behind(Fault::ImageTag(other))),
    }
}

fn update(reader: &mut Reader) -> Result<Message, DecodeError> {
    let relation = reader.u32()?;
    let mut tag = reader.u8()?;
    let old = old_image(reader, tag)?;
    if old.is_some() {
        tag = reader.u8()?;
    }
    match tag {
        b'N' => Ok(Message::Update { relation, old, new: row(reader)? }),
        other => Err(reader.fault_behind(Fault::ImageTag(other))),
    }
}

fn delete(reader: &mut Reader) -> Result<Message, DecodeError> {
    let relation = reader.u32()?;
    let tag = reader.u8()?;
    let old = old_image(reader, tag)?.ok_or_else(|| reader.fault_behind(Fault::ImageTag(tag)))?;
    Ok(Message::Delete { relation, old })
}

fn truncate(reader: &mut Reader) -> Result<Message, DecodeError> {
    // The count comes before the flags, so it is checked with one byte too many; the last oid finds out.
    let count = reader.count32(4)?;
    let flags = reader.flags(3)?;
    let relations = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
    Ok(Message::Truncate { relations, cascade: flags & 1 != 0, restart_identity: flags & 2 != 0 })
}

fn logical_message(reader: &mut Reader) -> Result<Message, DecodeError> {
    let transactional = reader.flags(1)? == 1;
    let (lsn, prefix) = (reader.lsn()?, reader.name()?);
    let length = reader.count32(1)?;
    Ok(Message::Message { transactional, lsn, prefix, content: reader.bytes(length)? })
}

/// PostgreSQL writes its own schema as an empty name.
fn schema(reader: &mut Reader) -> Result<Arc<str>, DecodeError> {
    let name = reader.name()?;
    Ok(if name.is_empty() { "pg_catalog".into() } else { name })
}

fn old_image(reader: &mut Reader, tag: u8) -> Result<Option<OldImage>, DecodeError> {
    match tag {
        b'K' => Ok(Some(OldImage::Key(row(reader)?))),
        b'O' => Ok(Some(OldImage::Full(row(reader)?))),
        _ => Ok(None),
    }
}

fn row(reader: &mut Reader) -> Result<Row, DecodeError> {
    let count = reader.count16(1)?;
    Ok(Row((0..count).map(|_| cell(reader)).collect::<Result<_, _>>()?))
}

fn cell(reader: &mut Reader) -> Result<Cell, DecodeError> {
    match reader.u8()? {
        b'n' => Ok(Cell::Null),
        b'u' => Ok(Cell::Unchanged),
        b't' => {
            let length = reader.count32(1)?;
            Ok(Cell::Value(reader.bytes(length)?))
        }
        b'b' => Err(reader.fault_behind(Fault::Binary)),
        other => Err(reader.fault_behind(Fault::CellTag(other))),
    }
}

fn time(reader: &mut Reader) -> Result<i64, DecodeError> {
    let since_2000 = reader.u64()?.cast_signed();
    since_2000.checked_add(POSTGRES_EPOCH_US).ok_or_else(|| reader.fault_behind(Fault::Time(since_2000)))
}
