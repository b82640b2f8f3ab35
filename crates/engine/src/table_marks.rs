//! Whether a table was redefined: its mark in the catalog now, against the one that is remembered.
//!
//! Asked by the keeper every second for all tables, and by `pipeline/suspects` for those that the stream has described
//! again. Tags are raised before a mark is remembered, so that whoever finds the newer mark finds what it raised.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;
use tokio_postgres::Client;
use walcast_matcher::tags_of_table;
use walcast_model::{Lsn, Stamp, Table, TableId, Tag, TagHash, Xid};
use walcast_pg::{PgError, TableMark, table_marks};

use crate::Core;

/// One VACUUM may make the stream describe a table twice: as the walsender is told of it, and at its place in the log.
const EXPLAINS: Duration = Duration::from_secs(10);

/// None until the first look.
#[derive(Default)]
pub struct TableMarks(Mutex<Option<HashMap<TableId, Known>>>);

struct Known {
    mark: TableMark,
    /// Maintenance up to here has been taken as the reason of a description.
    explained: i64,
    explained_at: Option<Instant>,
    /// The stamp of the last raise.
    raised: Lsn,
}

/// A table that a commit's transaction describes, as it was described before.
#[derive(Debug, Clone)]
pub struct Suspect {
    pub table: Arc<Table>,
    /// Not the first time in this connection: there must have been a reason.
    pub repeated: bool,
}

impl Known {
    fn new(mark: TableMark) -> Known {
        Known { explained: mark.maintained, mark, explained_at: None, raised: Lsn::ZERO }
    }

    /// A description at `lsn` means nothing if the catalog's rows are as they were **and** somebody maintained the table.
    /// Rows alone are no proof: an index or a policy that was made and dropped since the last look leaves none behind.
    /// What was raised above `lsn` may be just what this description is about, and is raised here for those who hear of
    /// this commit and share a flight.
    fn acquits(&self, now: &TableMark, repeated: bool, lsn: Lsn, at: Instant) -> bool {
        let lately = self.explained_at.is_some_and(|then| at.saturating_duration_since(then) < EXPLAINS);
        let has_reason = !repeated || now.maintained > self.explained || lately;
        self.mark.is_of_the_same(now) && self.raised <= lsn && has_reason
    }

    fn look(&mut self, now: TableMark, raised: Option<Lsn>) {
        self.mark = now;
        self.raised = raised.unwrap_or(self.raised);
    }
}

fn tags(mark: &TableMark) -> impl Iterator<Item = TagHash> {
    let columns = mark.columns.iter().map(|column| Tag::any_row(&mark.name, column).hash());
    std::iter::once(Tag::table(&mark.name).hash()).chain(columns)
}

impl Core {
    /// All of them. `written`: where the log is known to have come to beside what was read of it.
    pub(crate) async fn look_at_tables(&self, client: &Client, written: Lsn) -> Result<(), PgError> {
        let mut remembered = self.table_marks.0.lock().await;
        let mut now = table_marks(client, &self.marked_publications(), None).await?;
        let Some(remembered) = remembered.as_mut() else {
            *remembered = Some(now.into_iter().map(|(id, mark)| (id, Known::new(mark))).collect());
            return Ok(());
        };
        let same = |id: &TableId| {
            let (before, now) = (remembered.get(id).map(|known| &known.mark), now.get(id));
            before.zip(now).is_some_and(|(before, now)| before.is_of_the_same(now))
        };
        let all: HashSet<TableId> = remembered.keys().copied().chain(now.keys().copied()).collect();
        let moved: Vec<TableId> = all.into_iter().filter(|id| !same(id)).collect();
        if moved.is_empty() {
            return Ok(());
        }
        let stamp = self.stamp_after_look(client, written).await;
        for id in moved {
            let (before, now) = (remembered.get_mut(&id), now.remove(&id));
            let marks = [before.as_ref().map(|known| &known.mark), now.as_ref()];
            self.table_moved(id, marks.into_iter().flatten(), stamp);
            match (before, now) {
                (Some(before), Some(now)) => before.look(now, Some(stamp.lsn)),
                // Whether it stays away or comes back, what was streamed in between is not known.
                (_, None) => drop(remembered.remove(&id)),
                (None, Some(now)) => drop(remembered.insert(id, Known { raised: stamp.lsn, ..Known::new(now) })),
            }
        }
        Ok(())
    }

    /// Of what was described by commits that have settled: what cannot be acquitted has its tags raised. Suspects of one
    /// table by their commits, whose places are given.
    pub(crate) async fn judge_tables(&self, client: &Client, suspects: &[(Lsn, Suspect)]) -> Result<(), PgError> {
        let ids: HashSet<TableId> = suspects.iter().map(|(_, suspect)| suspect.table.id).collect();
        let ids: Vec<TableId> = ids.into_iter().collect();
        let mut remembered = self.table_marks.0.lock().await;
        let mut now = table_marks(client, &self.marked_publications(), Some(&ids)).await?;
        let remembered = remembered.get_or_insert_default();
        let at = Instant::now();
        let acquitted = |id: &TableId| {
            let mut of_table = suspects.iter().filter(|(_, suspect)| suspect.table.id == *id);
            let marks = remembered.get(id).zip(now.get(id));
            marks.is_some_and(|(known, now)| of_table.all(|(lsn, suspect)| known.acquits(now, suspect.repeated, *lsn, at)))
        };
        let (ids, moved): (Vec<TableId>, Vec<TableId>) = ids.into_iter().partition(acquitted);
        let stamp = if moved.is_empty() { None } else { Some(self.stamp_after_look(client, Lsn::ZERO).await) };
        let judged = ids.into_iter().map(|id| (id, None)).chain(moved.into_iter().map(|id| (id, stamp)));
        for (id, stamp) in judged {
            let (known, now) = (remembered.get_mut(&id), now.remove(&id));
            if let Some(stamp) = stamp {
                let marks = [known.as_ref().map(|known| &known.mark), now.as_ref()];
                self.table_moved(id, marks.into_iter().flatten(), stamp);
                for (lsn, suspect) in suspects.iter().filter(|(_, suspect)| suspect.table.id == id) {
                    self.retire_table(&suspect.table, [Stamp::unseen(*lsn), stamp]);
                }
            }
            let raised = stamp.map(|stamp| stamp.lsn);
            match (known, now) {
                (Some(known), Some(now)) => {
                    if now.maintained > known.explained {
                        (known.explained, known.explained_at) = (now.maintained, Some(at));
                    }
                    // A reset of the statistics.
                    known.explained = known.explained.min(now.maintained);
                    known.look(now, raised);
                }
                (None, Some(now)) => drop(remembered.insert(id, Known { raised: raised.unwrap_or_default(), ..Known::new(now) })),
                (_, None) => drop(remembered.remove(&id)),
            }
        }
        Ok(())
    }

    /// Touches whoever was answered before a look that is over. By a transaction that begins only now: a snapshot that sees
    /// it has seen what the look saw. Without it only W could clear the raise, and nothing of the table would be stored
    /// until the next commit has settled. It writes nothing, so it waits for no standby.
    async fn stamp_after_look(&self, client: &Client, written: Lsn) -> Stamp {
        let asked = client.query_typed("select pg_current_xact_id()::text", &[]).await;
        let xid = asked.ok().and_then(|rows| rows.first()?.get::<_, &str>(0).parse().ok()).map_or(Xid::NEVER, Xid);
        // After the look: what was settled up to more than this was settled after it.
        Stamp { lsn: Lsn(self.progress.read_to().max(written).0 + 1), xid }
    }

    /// Everything that is known to hang on a table, whatever it is called now.
    fn table_moved<'a>(&self, id: TableId, marks: impl Iterator<Item = &'a TableMark>, stamp: Stamp) {
        for mark in marks {
            tracing::info!(table = %mark.name, "the table was redefined: its cached entries and rules retire");
            let of_rules = self.tag_rules.resolved().rules.of_named(id, &mark.name);
            tags(mark).for_each(|tag| self.clock.raise(tag, stamp));
            self.raise_rule_tags(of_rules, stamp);
            self.queries.forget_plans_of(&mark.name);
            self.tracked.lock().forget(&mark.name);
        }
        self.rules.retire(id);
    }

    /// As the stream describes it.
    pub(crate) fn retire_table(&self, table: &Arc<Table>, stamps: [Stamp; 2]) {
        for stamp in stamps {
            tags_of_table(table).into_iter().for_each(|tag| self.clock.raise(tag, stamp));
            self.raise_rules_of(std::iter::once(table), stamp);
        }
    }

    /// What a checkpoint is held against: entries made under other rules, or of tables that are others now.
    pub(crate) async fn checkpoint_rules(&self, fingerprint: &str) -> String {
        let rules = self.tag_rules.with_fingerprint(fingerprint);
        let remembered = self.table_marks.0.lock().await;
        let mut marks: Vec<String> =
            remembered.iter().flatten().map(|(id, known)| format!("{} {}", id.0, known.mark.digest)).collect();
        marks.sort_unstable();
        format!("{rules} {:016x}", Tag::stored(&marks.join("\n")).hash().0)
    }

    fn marked_publications(&self) -> [&str; 2] {
        [&self.config.publication_cache, &self.config.publication_realtime]
    }
}

#[cfg(test)]
mod tests {
    use walcast_model::TableName;

    use super::*;

    fn mark(digest: i64, maintained: i64) -> TableMark {
        TableMark { name: TableName::new("public", "t"), columns: vec!["id".into()], digest, maintained }
    }

    fn known() -> Known {
        Known { raised: Lsn(100), ..Known::new(mark(7, 3)) }
    }

    fn acquits(now: TableMark, repeated: bool, lsn: u64) -> bool {
        known().acquits(&now, repeated, Lsn(lsn), Instant::now())
    }

    #[test]
    fn a_first_description_of_the_same_table_means_nothing() {
        assert!(acquits(mark(7, 3), false, 200));
    }

    #[test]
    fn a_repeated_one_means_nothing_after_maintenance_and_for_a_while() {
        assert!(acquits(mark(7, 4), true, 200));
        let at = Instant::now();
        let mut known = known();
        known.explained_at = Some(at);
        assert!(known.acquits(&mark(7, 3), true, Lsn(200), at + EXPLAINS / 2));
        assert!(!known.acquits(&mark(7, 3), true, Lsn(200), at + EXPLAINS));
    }

    #[test]
    fn p4_a_repeated_one_without_maintenance_retires_the_table_though_its_rows_are_the_same() {
        assert!(!acquits(mark(7, 3), true, 200));
        assert!(!acquits(mark(7, 0), true, 200), "the statistics were reset");
    }

    #[test]
    fn p4_another_mark_or_name_retires_the_table_whatever_was_maintained() {
        assert!(!acquits(mark(8, 4), true, 200) && !acquits(mark(8, 3), false, 200));
        assert!(!acquits(TableMark { name: TableName::new("public", "u"), ..mark(7, 4) }, true, 200));
    }

    #[test]
    fn p4_what_a_look_has_raised_is_raised_again_for_an_older_commit() {
        assert!(acquits(mark(7, 4), true, 100) && !acquits(mark(7, 4), true, 99));
    }
}
