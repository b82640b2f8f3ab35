//! A byte position in the write-ahead log, written as PostgreSQL writes it: `16/B374D848`.

use std::{fmt, str::FromStr};

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const ZERO: Lsn = Lsn(0);
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The last place before this one: where a record ends, the next may begin.
    pub fn before(self) -> Lsn {
        Lsn(self.0.saturating_sub(1))
    }

    /// Bytes of WAL from `earlier` to here; 0 if `earlier` is ahead.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an LSN; write it like 16/B374D848")]
pub struct LsnError(String);

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Self, LsnError> {
        let wrong = || LsnError(text.chars().take(40).collect());
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        if high.len() > 8 || low.len() > 8 || high.starts_with('+') || low.starts_with('+') {
            return Err(wrong());
        }
        let high = u64::from_str_radix(high, 16).map_err(|_| wrong())?;
        let low = u64::from_str_radix(low, 16).map_err(|_| wrong())?;
        Ok(Lsn(high << 32 | low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for text in ["", "16", "16/", "/1", "16/B374D848/3", "x/1", "+1/1", "123456789/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }
}
