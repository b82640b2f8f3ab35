//! PostgreSQL's text form of a value as the JSON that `to_jsonb` would give: compact, on one line.
//!
//! Called for every row that clients see. The texts must come from a session with `TimeZone` UTC, `DateStyle` ISO and
//! `IntervalStyle` postgres. The one deliberate difference: a `bytea` is its bare hex, as Supabase's clients expect it
//! (within an array it is as in `to_jsonb`, theirs too). Never guesses: a text that is not of its kind stays a string,
//! and a row leaves out what its image does not tell.

use serde::de::IgnoredAny;
use walcast_model::{Cell, Row, Table, ValueKind};

/// Appends one value. For [`ValueKind::ReadBack`] `text` is not PostgreSQL's text form, from which nobody but PostgreSQL
/// can tell the value, but the answer of its `to_jsonb`, for which the caller has asked.
pub fn write_value(kind: &ValueKind, text: &str, out: &mut Vec<u8>) {
    match kind {
        ValueKind::Bool => write_bool(text, out),
        ValueKind::Number => write_number(text, out),
        ValueKind::Json | ValueKind::ReadBack => write_json(text, out),
        ValueKind::Timestamp => write_timestamp(text, false, out),
        ValueKind::Timestamptz => write_timestamp(text, true, out),
        ValueKind::Bytea => write_bytea(text, out),
        ValueKind::Date | ValueKind::Text => write_text(text, out),
        ValueKind::Array { element, delimiter } => write_array(element, *delimiter, text, out),
    }
}

/// `{"id":1,…}` in column order. Left out: columns that `visible` does not allow, unchanged and absent values, and what
/// cannot be read (not UTF-8; a value to be read back whose cell holds no JSON).
pub fn write_record(table: &Table, row: &Row, visible: &[bool], out: &mut Vec<u8>) {
    let mut before = b'{';
    for (index, column) in table.columns.iter().enumerate().filter(|(index, _)| allowed(visible, *index)) {
        let value = match row.cell(index) {
            Cell::Null => None,
            cell => match cell.text() {
                Some(text) if is_readable(&column.kind, text) => Some(text),
                _ => continue,
            },
        };
        out.push(before);
        before = b',';
        write_text(&column.name, out);
        out.push(b':');
        match value {
            Some(text) => write_value(&column.kind, text, out),
            None => out.extend_from_slice(b"null"),
        }
    }
    if before == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
}

/// `[{"name":"id","type":"int8"},…]`, the columns that `visible` allows.
pub fn write_columns(table: &Table, visible: &[bool], out: &mut Vec<u8>) {
    out.push(b'[');
    let mut first = true;
    for (_, column) in table.columns.iter().enumerate().filter(|(index, _)| allowed(visible, *index)) {
        out.extend_from_slice(if first { b"{\"name\":" } else { b",{\"name\":" });
        first = false;
        write_text(&column.name, out);
        out.extend_from_slice(b",\"type\":");
        write_text(&column.type_name, out);
        out.push(b'}');
    }
    out.push(b']');
}

/// A column of which nothing was said is not shown.
fn allowed(visible: &[bool], index: usize) -> bool {
    visible.get(index).copied().unwrap_or(false)
}

/// The text form of a composite is no JSON: a cell that nobody has read back would break the whole record.
fn is_readable(kind: &ValueKind, text: &str) -> bool {
    *kind != ValueKind::ReadBack || serde_json::from_str::<IgnoredAny>(text).is_ok()
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    // Writing a string into memory cannot fail.
    let _ = serde_json::to_writer(out, text);
}

fn write_bool(text: &str, out: &mut Vec<u8>) {
    match text {
        "t" => out.extend_from_slice(b"true"),
        "f" => out.extend_from_slice(b"false"),
        other => write_text(other, out),
    }
}

/// NaN and the infinities are no JSON numbers; `to_jsonb` shows them as strings.
fn write_number(text: &str, out: &mut Vec<u8>) {
    if is_json_number(text.as_bytes()) {
        out.extend_from_slice(text.as_bytes());
    } else {
        write_text(text, out);
    }
}

fn is_json_number(text: &[u8]) -> bool {
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut rest = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits(rest);
    if whole == 0 || (whole > 1 && rest[0] == b'0') {
        return false;
    }
    rest = &rest[whole..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = &fraction[length..];
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let unsigned = exponent.strip_prefix(b"+").or(exponent.strip_prefix(b"-")).unwrap_or(exponent);
        let length = digits(unsigned);
        return length > 0 && length == unsigned.len();
    }
    rest.is_empty()
}

/// Keeps the text, also the order of members and the digits of numbers, and drops white space outside of strings.
fn write_json(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let (mut kept, mut in_string, mut escaped) = (0, false, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b' ' | b'\t' | b'\n' | b'\r' if !in_string => {
                out.extend_from_slice(&bytes[kept..at]);
                kept = at + 1;
            }
            _ => {}
        }
    }
    out.extend_from_slice(&bytes[kept..]);
}

/// `2024-05-06 07:08:09.5+00 BC` becomes `2024-05-06T07:08:09.5+00:00 BC`; `infinity` stays.
fn write_timestamp(text: &str, zoned: bool, out: &mut Vec<u8>) {
    let plain = |part: &str, more: &[u8]| part.bytes().all(|byte| byte.is_ascii_digit() || more.contains(&byte));
    let parts = text.split_once(' ').map(|(date, rest)| match rest.split_once(' ') {
        Some((time, "BC")) => (date, time, " BC"),
        _ => (date, rest, ""),
    });
    match parts {
        Some((date, time, era)) if plain(date, b"-") && plain(time, b":.+-") => {
            out.push(b'"');
            out.extend_from_slice(date.as_bytes());
            out.push(b'T');
            out.extend_from_slice(time.as_bytes());
            // PostgreSQL shortens the zone to hours where it can.
            if zoned && time.rfind(['+', '-']).is_some_and(|sign| time.len() - sign == 3) {
                out.extend_from_slice(b":00");
            }
            out.extend_from_slice(era.as_bytes());
            out.push(b'"');
        }
        _ => write_text(text, out),
    }
}

/// Hex without its `\x`. A database may be set to `bytea_output = escape`; that is the same bytes written otherwise.
fn write_bytea(text: &str, out: &mut Vec<u8>) {
    if let Some(hex) = text.strip_prefix("\\x") {
        return write_text(hex, out);
    }
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut rest = text.as_bytes();
    out.push(b'"');
    while let Some((first, tail)) = rest.split_first() {
        let (byte, tail) = match (first, tail) {
            (b'\\', [b'\\', tail @ ..]) => (b'\\', tail),
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), tail)
            }
            _ => (*first, tail),
        };
        out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        rest = tail;
    }
    out.push(b'"');
}

fn write_array(element: &ValueKind, delimiter: char, text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    // `[0:1][2:3]={…}`: the bounds are no part of the value.
    let body = match text.strip_prefix('[') {
        Some(bounds) => bounds.split_once('=').map_or(text, |(_, body)| body),
        None => text,
    };
    if body.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b' ' | b'-')) {
        return write_vector(element, body, out);
    }
    let mut array = ArrayText { rest: body, element, delimiter, scratch: String::new() };
    if array.dimension(1, out).is_none() || !array.rest.is_empty() {
        out.truncate(start);
        write_text(text, out);
    }
}

/// `int2vector` and `oidvector` are arrays to `to_jsonb`, but print as `1 2 3`.
fn write_vector(element: &ValueKind, text: &str, out: &mut Vec<u8>) {
    out.push(b'[');
    for (index, item) in text.split_ascii_whitespace().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_value(element, item, out);
    }
    out.push(b']');
}

struct ArrayText<'a> {
    rest: &'a str,
    element: &'a ValueKind,
    delimiter: char,
    scratch: String,
}

/// PostgreSQL's own limit.
const MAX_DIMENSIONS: u32 = 6;

impl ArrayText<'_> {
    /// None if this is not the text of an array.
    fn dimension(&mut self, depth: u32, out: &mut Vec<u8>) -> Option<()> {
        if depth > MAX_DIMENSIONS {
            return None;
        }
        self.take('{')?;
        out.push(b'[');
        if self.take('}').is_none() {
            loop {
                if self.rest.starts_with('{') {
                    self.dimension(depth + 1, out)?
                } else {
                    self.item(out)?
                }
                if self.take('}').is_some() {
                    break;
                }
                self.take(self.delimiter)?;
                out.push(b',');
            }
        }
        out.push(b']');
        Some(())
    }

    fn item(&mut self, out: &mut Vec<u8>) -> Option<()> {
        if self.take('"').is_some() {
            self.quoted()?;
            write_element(self.element, &self.scratch, out);
            return Some(());
        }
        let end = self.rest.find([self.delimiter, '}'])?;
        let (item, rest) = self.rest.split_at(end);
        self.rest = rest;
        match item {
            "" => return None,
            _ if item.eq_ignore_ascii_case("null") => out.extend_from_slice(b"null"),
            _ => write_element(self.element, item, out),
        }
        Some(())
    }

    /// Takes what is before the closing quote into `scratch`, and the quote.
    fn quoted(&mut self) -> Option<()> {
        self.scratch.clear();
        loop {
            let (plain, rest) = self.rest.split_at(self.rest.find(['"', '\\'])?);
            self.scratch.push_str(plain);
            self.rest = &rest[1..];
            if rest.starts_with('"') {
                return Some(());
            }
            let escaped = self.rest.chars().next()?;
            self.scratch.push(escaped);
            self.rest = &self.rest[escaped.len_utf8()..];
        }
    }

    fn take(&mut self, wanted: char) -> Option<()> {
        self.rest = self.rest.strip_prefix(wanted)?;
        Some(())
    }
}

fn write_element(kind: &ValueKind, text: &str, out: &mut Vec<u8>) {
    match kind {
        ValueKind::Bytea => write_text(text, out),
        _ => write_value(kind, text, out),
    }
}

#[cfg(test)]
mod tests;
