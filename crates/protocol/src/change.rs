//! `data` of a `postgres_changes` event, the same bytes on WebSocket and SSE.

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::Value;
use walcast_model::{Operation, Row, Table};

use crate::value::{write_columns, write_record};

/// What one group of subscribers may see of a change.
pub struct VisibleChange<'a> {
    pub table: &'a Table,
    pub operation: Operation,
    /// None: the event only says that it cannot be shown.
    pub committed_at_us: Option<i64>,
    /// Columns that the group's role may read, in the table's order.
    pub columns: &'a [bool],
    pub new: Option<&'a Row>,
    /// What the old image permits: all of it, the key only, or nothing.
    pub old: Option<&'a Row>,
    pub errors: Option<&'a str>,
}

/// Encoded once per (change, shape); shared by everybody who gets it.
pub fn encode_change(change: &VisibleChange<'_>) -> Bytes {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(b"{\"schema\":");
    put_string(&mut out, change.table.name.schema());
    out.extend_from_slice(b",\"table\":");
    put_string(&mut out, change.table.name.table());
    out.extend_from_slice(b",\"commit_timestamp\":");
    match change.committed_at_us {
        Some(at) => put_string(&mut out, &timestamp(at)),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b",\"type\":\"");
    out.extend_from_slice(change.operation.name().as_bytes());
    out.extend_from_slice(b"\",\"columns\":");
    write_columns(change.table, change.columns, &mut out);
    if change.operation != Operation::Delete {
        out.extend_from_slice(b",\"record\":");
        record(change, change.new, &mut out);
    }
    if change.operation != Operation::Insert {
        out.extend_from_slice(b",\"old_record\":");
        record(change, change.old, &mut out);
    }
    out.extend_from_slice(b",\"errors\":");
    match change.errors {
        Some(error) => {
            out.push(b'[');
            put_string(&mut out, error);
            out.push(b']');
        }
        None => out.extend_from_slice(b"null"),
    }
    out.push(b'}');
    out.into()
}

fn record(change: &VisibleChange<'_>, row: Option<&Row>, out: &mut Vec<u8>) {
    match row {
        Some(row) => write_record(change.table, row, change.columns, out),
        None => out.extend_from_slice(b"{}"),
    }
}

/// UTC with exactly three decimals, as clients expect it.
pub fn timestamp(us: i64) -> String {
    match Timestamp::from_microsecond(us) {
        Ok(at) => at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string(),
        Err(_) => "1970-01-01T00:00:00.000Z".to_owned(),
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(Value::from(text).to_string().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_has_three_decimals() {
        assert_eq!(timestamp(1_787_307_072_345_678), "2026-08-21T10:11:12.345Z");
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
    }
}
