//! Which transactions a reader can see, as `pg_current_snapshot()` tells it: `xmin:xmax:running,…`.

use std::{fmt, str::FromStr, sync::Arc};

use crate::Xid;

/// Only top-level transaction ids count: a subtransaction commits with its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub xmin: Xid,
    pub xmax: Xid,
    running: Arc<[Xid]>,
}

impl Snapshot {
    pub fn new(xmin: Xid, xmax: Xid, mut running: Vec<Xid>) -> Snapshot {
        running.sort_unstable();
        running.dedup();
        Snapshot { xmin, xmax, running: running.into() }
    }

    /// Sees nothing: a fence with this snapshot admits no commit above its settled LSN.
    pub fn blind() -> Snapshot {
        Snapshot::new(Xid(0), Xid(0), Vec::new())
    }

    /// True if the effects of committed transaction `xid` are in this snapshot.
    pub fn sees(&self, xid: Xid) -> bool {
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }

    /// Ids between xmin and xmax that were still running.
    pub fn running(&self) -> &[Xid] {
        &self.running
    }

    /// Counts `xid` as running: what the source itself goes on to write must not pass as seen.
    pub fn with_running(&self, xid: Xid) -> Snapshot {
        if !self.sees(xid) {
            return self.clone();
        }
        let mut running = self.running.to_vec();
        running.push(xid);
        Snapshot::new(self.xmin.min(xid), self.xmax.max(Xid(xid.0 + 1)), running)
    }

    /// On a hot standby a snapshot's list may be incomplete: every id at or above xmin is invisible.
    pub fn on_standby(&self) -> Snapshot {
        Snapshot::new(self.xmin, self.xmin, Vec::new())
    }

    /// Keeps at most `limit` running ids; with more, all at or above xmin count as invisible.
    pub fn bounded(&self, limit: usize) -> Snapshot {
        if self.running.len() <= limit { self.clone() } else { self.on_standby() }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, xid) in self.running.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{xid}")?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a snapshot; one looks like 10:20:10,14")]
pub struct SnapshotError(String);

impl FromStr for Snapshot {
    type Err = SnapshotError;

    fn from_str(text: &str) -> Result<Self, SnapshotError> {
        let wrong = || SnapshotError(text.chars().take(60).collect());
        let xid = |part: &str| part.parse::<u64>().map(Xid).map_err(|_| wrong());
        let mut parts = text.splitn(3, ':');
        let (Some(xmin), Some(xmax), Some(list)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let running = list.split(',').filter(|part| !part.is_empty()).map(xid).collect::<Result<_, _>>()?;
        Ok(Snapshot::new(xid(xmin)?, xid(xmax)?, running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().unwrap()
    }

    #[test]
    fn sees_what_postgresql_would() {
        let s = snapshot("10:20:12,15");
        assert!(s.sees(Xid(9)) && s.sees(Xid(10)) && s.sees(Xid(19)));
        assert!(!s.sees(Xid(12)) && !s.sees(Xid(15)) && !s.sees(Xid(20)) && !s.sees(Xid::NEVER));
        assert_eq!(s.to_string(), "10:20:12,15");
        assert_eq!(snapshot("7:7:").to_string(), "7:7:");
    }

    #[test]
    fn own_transaction_counts_as_running() {
        let s = snapshot("10:20:12").with_running(Xid(17));
        assert!(!s.sees(Xid(17)) && !s.sees(Xid(12)) && s.sees(Xid(18)));
        assert_eq!(snapshot("10:20:12").with_running(Xid(25)).to_string(), "10:20:12");
    }

    #[test]
    fn a_standby_or_a_long_list_sees_only_below_xmin() {
        for s in [snapshot("10:20:12").on_standby(), snapshot("10:20:11,12,13").bounded(2)] {
            assert!(s.sees(Xid(9)) && !s.sees(Xid(10)) && !s.sees(Xid(19)));
        }
    }

    #[test]
    fn refuses_garbage() {
        for text in ["", "1", "1:2", "a:b:", "1:2:x", "-1:2:"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }
}
