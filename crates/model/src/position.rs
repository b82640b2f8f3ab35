//! A place in the stream that clients keep: (epoch, commit LSN, index in the transaction).
//!
//! It is the SSE event id, the resume cursor and the freshness that a read can ask for.
//! The index counts all changes and messages of the transaction before any filter, from 0;
//! the position of a whole commit has the index one past its last item.

use std::{fmt, str::FromStr};

use crate::Lsn;

/// Positions compare only within one epoch: a new slot, a rewound or a promoted database begins a new one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub u32);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl FromStr for Epoch {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, PositionError> {
        if text.len() != 8 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(PositionError(text.chars().take(60).collect()));
        }
        u32::from_str_radix(text, 16).map(Epoch).map_err(|_| PositionError(text.to_owned()))
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    pub epoch: Epoch,
    pub lsn: Lsn,
    pub index: u32,
}

impl Position {
    /// The order within an epoch; the caller has compared epochs.
    pub fn place(&self) -> (Lsn, u32) {
        (self.lsn, self.index)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.epoch, self.lsn, self.index)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a position; one looks like 5f3a09c1/16/B374D848/3")]
pub struct PositionError(String);

impl FromStr for Position {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, PositionError> {
        let wrong = || PositionError(text.chars().take(60).collect());
        let (epoch, rest) = text.split_once('/').ok_or_else(wrong)?;
        let (lsn, index) = rest.rsplit_once('/').ok_or_else(wrong)?;
        if index.starts_with('+') {
            return Err(wrong());
        }
        Ok(Position {
            epoch: epoch.parse().map_err(|_| wrong())?,
            lsn: lsn.parse().map_err(|_| wrong())?,
            index: index.parse().map_err(|_| wrong())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let text = "5f3a09c1/16/B374D848/3";
        let position: Position = text.parse().unwrap();
        assert_eq!(position.index, 3);
        assert_eq!(position.to_string(), text);
    }

    #[test]
    fn refuses_what_it_would_not_write() {
        for text in ["", "1/2/3", "5f3a09c1/16/B374D848", "5f3a09c1/16/B374D848/-1", "5f3a09c1/16/B374D848/+3", "zzzzzzzz/1/2/3"]
        {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
