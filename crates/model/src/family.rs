//! How PostgreSQL compares the values of a type, told from their text forms.
//!
//! For filters and for policies that are decided in memory. Knows the types whose text tells equality and order beyond
//! doubt; for every other type or collation nothing is told, and PostgreSQL has to be asked.

use std::{borrow::Cow, cmp::Ordering};

/// How the values of a column compare, as the catalog tells when a client subscribes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Bool,
    Integer,
    Numeric,
    Float,
    Text(Collation),
    /// `char(n)`: trailing blanks do not count.
    Blank,
    Uuid,
    Bytes,
    Date,
    /// With and without zone: the stream speaks ISO in UTC.
    Timestamp,
    /// Equal if and only if the texts are; how they are ordered is not known here: enum, inet, macaddr, time.
    Label,
    /// Nothing is known but null.
    Opaque,
}

/// Of a deterministic collation: equality is equality of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Collation {
    /// Ordered by bytes: C, POSIX, and other orders of code points in UTF-8.
    pub by_bytes: bool,
    /// A to Z fold to a to z, unlike in Turkish.
    pub folds_ascii: bool,
}

impl Family {
    /// Of a base type by its name in `pg_catalog`; `collation` where the type has a deterministic one.
    pub fn of(type_name: &str, is_enum: bool, collation: Option<Collation>) -> Family {
        match (type_name, collation) {
            ("bool", _) => Family::Bool,
            ("int2" | "int4" | "int8" | "oid", _) => Family::Integer,
            ("numeric", _) => Family::Numeric,
            ("float4" | "float8", _) => Family::Float,
            ("text" | "varchar", Some(collation)) => Family::Text(collation),
            ("bpchar", Some(_)) => Family::Blank,
            ("uuid", _) => Family::Uuid,
            ("bytea", _) => Family::Bytes,
            ("date", _) => Family::Date,
            ("timestamp" | "timestamptz", _) => Family::Timestamp,
            ("time" | "inet" | "cidr" | "macaddr" | "macaddr8", _) => Family::Label,
            ("name", Some(_)) => Family::Label,
            _ if is_enum => Family::Label,
            _ => Family::Opaque,
        }
    }

    /// Equal values have equal keys, others have others; none where the text does not tell.
    pub fn key(self, text: &str) -> Option<Cow<'_, str>> {
        Some(match self {
            Family::Opaque => return None,
            // 1.0 and 1.00 are one number.
            Family::Numeric if text.contains('.') => text.trim_end_matches('0').trim_end_matches('.').into(),
            Family::Float if text == "-0" => "0".into(),
            Family::Blank => text.trim_end_matches(' ').into(),
            _ => text.into(),
        })
    }

    /// None: the texts do not tell.
    pub fn equal(self, a: &str, b: &str) -> Option<bool> {
        Some(self.key(a)? == self.key(b)?)
    }

    /// None: the texts do not tell.
    pub fn order(self, a: &str, b: &str) -> Option<Ordering> {
        match self {
            Family::Bool | Family::Uuid | Family::Bytes => Some(a.cmp(b)),
            Family::Integer => Some(a.parse::<i64>().ok()?.cmp(&b.parse().ok()?)),
            Family::Float => {
                let (a, b): (f64, f64) = (a.parse().ok()?, b.parse().ok()?);
                // NaN is equal to itself and above everything.
                Some(a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan())))
            }
            Family::Numeric => numeric(a, b),
            Family::Date | Family::Timestamp => moment(a, b),
            Family::Text(collation) if collation.by_bytes => Some(a.as_bytes().cmp(b.as_bytes())),
            Family::Text(_) | Family::Blank | Family::Label | Family::Opaque => None,
        }
    }
}

/// PostgreSQL writes numerics plainly: sign, digits, point, digits; or NaN (above everything) and infinities.
fn numeric(a: &str, b: &str) -> Option<Ordering> {
    let rank = |text: &str| match text {
        "-Infinity" => -1,
        "Infinity" => 1,
        "NaN" => 2,
        _ => 0,
    };
    if rank(a) != 0 || rank(b) != 0 {
        return Some(rank(a).cmp(&rank(b)));
    }
    let (a_negative, a) = unsigned(a)?;
    let (b_negative, b) = unsigned(b)?;
    let magnitude = |(whole, fraction): (&str, &str), (other, rest): (&str, &str)| {
        let digits = whole.len().cmp(&other.len()).then_with(|| whole.cmp(other));
        digits.then_with(|| fraction.trim_end_matches('0').cmp(rest.trim_end_matches('0')))
    };
    let is_zero = |(whole, fraction): (&str, &str)| whole.is_empty() && fraction.bytes().all(|b| b == b'0');
    Some(match (a_negative && !is_zero(a), b_negative && !is_zero(b)) {
        (false, false) => magnitude(a, b),
        (true, true) => magnitude(b, a),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    })
}

/// Sign, and the digits before (without leading zeros) and behind the point.
fn unsigned(text: &str) -> Option<(bool, (&str, &str))> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let plain = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    (plain(whole) && plain(fraction)).then_some((negative, (whole.trim_start_matches('0'), fraction)))
}

/// ISO texts of one type, and infinities. Years before Christ are left to PostgreSQL.
fn moment(a: &str, b: &str) -> Option<Ordering> {
    let rank = |text: &str| match text {
        "-infinity" => -1,
        "infinity" => 1,
        _ => 0,
    };
    if rank(a) != 0 || rank(b) != 0 {
        return Some(rank(a).cmp(&rank(b)));
    }
    if a.ends_with("BC") || b.ends_with("BC") {
        return None;
    }
    let year = |text: &str| text.find('-');
    // `+` stands before `.` and the digits in ASCII, so `12+00` < `12.5+00` < `12.55+00`. A shorter text is the earlier.
    Some(year(a)?.cmp(&year(b)?).then_with(|| a.cmp(b)))
}
