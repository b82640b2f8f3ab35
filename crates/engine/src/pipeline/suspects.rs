//! Judges tables that the stream has described again, before anybody is told of the commit that did.
//!
//! PostgreSQL describes a table again when somebody redefined it, and as well after each VACUUM and ANALYZE. Which of the
//! two it was is asked of the catalog once the commit has settled, called by that stage. Whoever writes to a redefined
//! table has waited for whoever redefined it, or is the same transaction: so a look that sees the commit sees the other, too.
//!
//! Until then the commit is held like one with cascades. The hold keeps back what would let somebody rely on an entry that
//! may have to fall: the position of an answer, "at least this fresh", the answer to an invalidation, the announcement, the
//! checkpoint and with it the acknowledgement. It need not keep back W: whoever was answered at or above the commit has
//! seen it. Never guesses: no answer in time, or none that acquits, retires the table.

use std::{collections::HashSet, time::Duration};

use tokio::time::timeout;
use walcast_model::{Lsn, Stamp};

use crate::{Core, pipeline::InFlight, table_marks::Suspect};

const PATIENCE: Duration = Duration::from_secs(2);
const DOING: &str = "comparing tables";

/// What a commit has described.
pub struct Suspects {
    hold: u64,
    tables: Vec<Suspect>,
}

impl Core {
    /// Before the commit counts as raised.
    pub(crate) fn suspect(&self, lsn: Lsn, tables: Vec<Suspect>) -> Option<Box<Suspects>> {
        (!tables.is_empty()).then(|| Box::new(Suspects { hold: self.suspected.hold(lsn), tables }))
    }

    /// Returns when nothing of them is in doubt.
    pub(crate) async fn judge(&self, commits: &mut [InFlight]) {
        let suspects: Vec<(Lsn, Suspects)> =
            commits.iter_mut().filter_map(|commit| Some((commit.commit.lsn, *commit.suspects.take()?))).collect();
        if suspects.is_empty() {
            return;
        }
        let tables: Vec<(Lsn, Suspect)> =
            suspects.iter().flat_map(|(lsn, suspects)| suspects.tables.iter().map(|suspect| (*lsn, suspect.clone()))).collect();
        let judged = timeout(PATIENCE, async {
            let lease = self.pool.lease(DOING).await?;
            self.judge_tables(&lease, &tables).await
        });
        let failed = match judged.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("it took longer than {PATIENCE:?}")),
        };
        if let Some(why) = failed {
            tracing::warn!(why, "tables that the stream described again could not be compared: their cached entries retire");
            tables.iter().for_each(|(lsn, suspect)| self.retire_suspect(*lsn, suspect));
        }
        let held: HashSet<u64> = suspects.iter().map(|(_, suspects)| suspects.hold).collect();
        self.suspected.release(&held, || self.note_invalidated());
    }

    /// Nobody will judge them in time.
    pub(crate) fn give_up_suspects(&self, commit: &mut InFlight) {
        let Some(suspects) = commit.suspects.take() else { return };
        suspects.tables.iter().for_each(|suspect| self.retire_suspect(commit.commit.lsn, suspect));
        self.suspected.release(&HashSet::from([suspects.hold]), || self.note_invalidated());
    }

    fn retire_suspect(&self, lsn: Lsn, suspect: &Suspect) {
        self.retire_table(&suspect.table, [lsn, Lsn(self.progress.read_to().0 + 1)].map(Stamp::unseen));
    }
}
