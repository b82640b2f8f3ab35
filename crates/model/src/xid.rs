//! A full (64-bit) transaction id. The stream names the low 32 bits only; LSNs order the stream, xids decide visibility.

use std::fmt;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xid(pub u64);

impl Xid {
    /// No snapshot sees it: stamps what must count as touched for everyone who read before.
    pub const NEVER: Xid = Xid(u64::MAX);

    /// Widens the stream's 32 bits to the value nearest to a snapshot's `xmax`. Transactions in flight are
    /// never further than 2^31 from it, PostgreSQL's own rule for comparing them.
    pub fn widen(low: u32, xmax: Xid) -> Xid {
        let distance = low.wrapping_sub(xmax.0 as u32) as i32;
        Xid(xmax.0.saturating_add_signed(i64::from(distance)))
    }
}

impl fmt::Display for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widens_across_the_wrap() {
        let wrap = 1u64 << 32;
        // The snapshot is just after the wrap, the commit just before it, and the other way round.
        assert_eq!(Xid::widen(u32::MAX, Xid(wrap + 5)), Xid(wrap - 1));
        assert_eq!(Xid::widen(3, Xid(wrap - 2)), Xid(wrap + 3));
        assert_eq!(Xid::widen(3, Xid(3 * wrap + 4)), Xid(3 * wrap + 3));
        assert_eq!(Xid::widen(700, Xid(700)), Xid(700));
        assert_eq!(Xid::widen(650, Xid(700)), Xid(650));
    }
}
