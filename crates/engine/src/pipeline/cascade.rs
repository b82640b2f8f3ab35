//! Raises the tags that rules look up in the database: between settling and announcing, so that the lookup sees the commit
//! and nobody is told of it before.
//!
//! One statement per rule and batch. Never hangs and never guesses: what cannot be looked up in time raises the rule's
//! coarse form. Until a commit's cascades are raised, [`Holds`] keeps every mark that promises its invalidation below it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tokio_postgres::types::{ToSql, Type};
use walcast_matcher::{Filled, Image, Key, Reference};
use walcast_model::{Lsn, Snapshot, Stamp, TagHash};
use walcast_pg::{Envelope, PgError};

use crate::{
    Core,
    pipeline::{Announcement, InFlight},
    tag_rules::{Lookup, Resolved},
    visibility::heard_of,
};

/// All lookups of a batch together.
const PATIENCE: Duration = Duration::from_secs(2);
/// Keys of one statement, and rows that one may answer.
const KEYS: usize = 10_000;
pub(crate) const ROWS: usize = 100_000;
const DOING: &str = "looking up what a tag rule cascades to";

/// What a commit has still to raise.
pub struct Cascades {
    pub(crate) hold: u64,
    /// By rule.
    pub(crate) lookups: Vec<(usize, HashSet<Key>)>,
    pub(crate) resolved: Arc<Resolved>,
}

/// Commits that have still something to raise: cascades, or tables in doubt. Entered by the intake, in LSN order; left by
/// whoever raised it.
pub struct Holds {
    waiting: Mutex<VecDeque<(u64, Lsn)>>,
    next: std::sync::atomic::AtomicU64,
    /// [`Lsn::MAX`] while there is none.
    oldest: watch::Sender<Lsn>,
}

impl Default for Holds {
    fn default() -> Holds {
        Holds { waiting: Mutex::default(), next: Default::default(), oldest: watch::Sender::new(Lsn::MAX) }
    }
}

impl Holds {
    pub(crate) fn hold(&self, lsn: Lsn) -> u64 {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut waiting = self.waiting.lock();
        waiting.push_back((id, lsn));
        self.note_oldest(&waiting);
        id
    }

    /// A new epoch: what is still under way belongs to the one before, and moves no mark of this one.
    pub(crate) fn forget(&self) {
        let mut waiting = self.waiting.lock();
        waiting.clear();
        self.note_oldest(&waiting);
    }

    /// The last LSN that can be promised, given how far things went otherwise.
    pub(crate) fn at_most(&self, lsn: Lsn) -> Lsn {
        let oldest = *self.oldest.borrow();
        if oldest == Lsn::MAX { lsn } else { lsn.min(oldest.before()) }
    }

    /// Waits until no commit up to `lsn` is held. False if that takes longer than `at_most`.
    pub(crate) async fn passed(&self, lsn: Lsn, at_most: Duration) -> bool {
        let mut oldest = self.oldest.subscribe();
        tokio::time::timeout(at_most, oldest.wait_for(|oldest| *oldest > lsn)).await.is_ok_and(|waited| waited.is_ok())
    }

    /// Under the lock, so that a mark of the epoch before cannot be noted after [`Holds::forget`].
    pub(super) fn release(&self, ids: &HashSet<u64>, then: impl FnOnce()) {
        let mut waiting = self.waiting.lock();
        let before = waiting.len();
        waiting.retain(|(id, _)| !ids.contains(id));
        if waiting.len() < before {
            self.note_oldest(&waiting);
            then();
        }
    }

    fn note_oldest(&self, waiting: &VecDeque<(u64, Lsn)>) {
        self.oldest.send_replace(waiting.front().map_or(Lsn::MAX, |(_, lsn)| *lsn));
    }
}

impl Core {
    /// The commit's rows have raised their tags. What it has still to look up holds the other mark back.
    pub(crate) fn note_raised(&self, lsn: Lsn) {
        self.progress.note_raised(lsn);
        self.cache.note_raised(lsn);
        self.note_invalidated();
    }

    pub(super) fn note_invalidated(&self) {
        let whole = self.held_below(self.progress.raised());
        self.progress.note_invalidated(whole);
        self.cache.note_invalidated(whole);
    }

    /// What was read and has raised everything. Reading first: what is held was held before it counted as read.
    pub(crate) fn invalidated_whole(&self) -> Lsn {
        let read_to = self.progress.read_to();
        self.held_below(read_to)
    }

    fn held_below(&self, lsn: Lsn) -> Lsn {
        self.suspected.at_most(self.cascades.at_most(lsn))
    }

    /// Nobody will look it up: everything that it could have raised falls.
    pub(crate) fn give_up_cascades(&self, commit: &InFlight) {
        let Some(cascades) = &commit.cascades else { return };
        for (rule, _) in &cascades.lookups {
            self.raise_rule_tags(cascades.resolved.rules.companions(*rule), stamp(commit));
        }
        self.metrics.cascades_failed.increment(cascades.lookups.len() as u64);
        self.cascades.release(&HashSet::from([cascades.hold]), || self.note_invalidated());
    }
}

fn stamp(commit: &InFlight) -> Stamp {
    Stamp { lsn: commit.commit.lsn, xid: commit.xid }
}

pub async fn run(core: Arc<Core>, mut inbox: mpsc::Receiver<Announcement>, announce: mpsc::Sender<Announcement>) {
    // Where the stream did not come to in time: until it does, waiting again would only make it later.
    let mut behind = Lsn::ZERO;
    while let Some(announcement) = inbox.recv().await {
        if let Announcement::Commits(commits) = &announcement {
            raise(&core, commits, &mut behind).await;
        }
        if let Announcement::NewEpoch { .. } = &announcement {
            behind = Lsn::ZERO;
        }
        // The receiver ends only at shutdown.
        let _ = announce.send(announcement).await;
    }
}

/// What of a key its lookup takes.
type KeyPart = [Option<Box<str>>];
/// A lookup's columns, as PostgreSQL prints them.
type FoundRow = Box<[Option<String>]>;

/// One rule's keys of a whole batch.
struct Question<'a> {
    lookup: &'a Lookup,
    keys: HashSet<&'a KeyPart>,
}

/// What the keys lead to, as of a snapshot.
struct Answer<'a> {
    rows: HashMap<&'a KeyPart, Vec<FoundRow>>,
    snapshot: Snapshot,
    wal_insert: Lsn,
}

/// A rule, also across the moment in which the rules were read anew: where they stand in memory, and its index.
type RuleId = (usize, usize);

fn rule_id(resolved: &Arc<Resolved>, rule: usize) -> RuleId {
    (Arc::as_ptr(resolved) as usize, rule)
}

async fn raise(core: &Core, commits: &[InFlight], behind: &mut Lsn) {
    let mut questions: HashMap<RuleId, Question<'_>> = HashMap::new();
    for cascades in commits.iter().filter_map(|commit| commit.cascades.as_deref()) {
        for (rule, keys) in &cascades.lookups {
            let Some(lookup) = cascades.resolved.lookups.get(rule) else { continue };
            let question =
                questions.entry(rule_id(&cascades.resolved, *rule)).or_insert_with(|| Question { lookup, keys: HashSet::new() });
            question.keys.extend(keys.iter().map(|key| &key[..lookup.params]));
        }
    }
    if questions.is_empty() {
        return;
    }
    let answers = answer(core, &questions, behind).await;
    let mut raised = HashSet::new();
    for commit in commits {
        let Some(cascades) = commit.cascades.as_deref() else { continue };
        for (rule, keys) in &cascades.lookups {
            let known = cascades.resolved.lookups.get(rule).zip(answers.get(&rule_id(&cascades.resolved, *rule)));
            let tags = known.and_then(|(lookup, answer)| tags(core, commit, lookup, answer, keys));
            match tags {
                Some(tags) => core.raise_rule_tags(tags, stamp(commit)),
                None => core.raise_rule_tags(cascades.resolved.rules.companions(*rule), stamp(commit)),
            }
        }
        raised.insert(cascades.hold);
    }
    core.cascades.release(&raised, || core.note_invalidated());
}

/// The questions that could be answered. Returns only when the stream has brought, and so invalidated, everything that
/// the answers can have seen: what a lookup no longer finds because a later commit moved it, that commit has raised.
async fn answer<'a>(core: &Core, questions: &HashMap<RuleId, Question<'a>>, behind: &mut Lsn) -> HashMap<RuleId, Answer<'a>> {
    let deadline = Instant::now() + PATIENCE;
    let mut answers: HashMap<RuleId, Answer<'a>> = HashMap::new();
    if core.progress.read_to() < *behind {
        questions.values().for_each(|question| failed(core, question, "the stream is behind"));
        return answers;
    }
    for (id, question) in questions {
        core.metrics.cascades.increment(1);
        match timeout_at(deadline, ask(core, question)).await {
            Ok(Ok(answer)) => drop(answers.insert(*id, answer)),
            Ok(Err(error)) => failed(core, question, &error.to_string()),
            Err(_) => failed(core, question, "it took longer than 2 s"),
        }
    }
    let seen_to = answers.values().map(|answer| answer.wal_insert).max().unwrap_or(Lsn::ZERO);
    if seen_to > Lsn::ZERO && !timeout_at(deadline, heard_of(core, seen_to)).await.unwrap_or(false) {
        *behind = seen_to;
        for (id, _) in answers.drain() {
            failed(core, &questions[&id], "the stream did not come to what the lookup saw");
        }
    }
    answers
}

fn failed(core: &Core, question: &Question<'_>, why: &str) {
    core.metrics.cascades_failed.increment(1);
    let place = &question.lookup.place;
    tracing::warn!(rule = %place, why, "a cascade could not be looked up: every entry that it could concern falls");
}

async fn ask<'a>(core: &Core, question: &Question<'a>) -> Result<Answer<'a>, PgError> {
    let lookup = question.lookup;
    let timeout = PATIENCE.min(core.config.statement_timeout);
    // Row security off: what a policy would hide is an error, not a lookup that finds nothing.
    let envelope = Envelope::new(&lookup.claims, timeout).setting("row_security", "off");
    let mut scope = envelope.open(&core.pool, DOING).await?;
    let keys: Vec<&KeyPart> = question.keys.iter().copied().collect();
    let mut rows: HashMap<_, Vec<FoundRow>> = HashMap::new();
    for chunk in keys.chunks(KEYS) {
        let column = |index: usize| chunk.iter().map(|key| key.get(index).and_then(|cell| cell.as_deref())).collect::<Vec<_>>();
        let columns: Vec<Vec<Option<&str>>> = (0..lookup.params).map(column).collect();
        let params: Vec<(&(dyn ToSql + Sync), Type)> =
            columns.iter().map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY)).collect();
        let found = scope.client().query_typed(&lookup.sql, &params).await.map_err(PgError::when(DOING))?;
        if found.len() > ROWS {
            return Err(PgError::Unexpected { doing: DOING, what: format!("more than {ROWS} rows") });
        }
        for row in &found {
            let key = usize::try_from(row.get::<_, i64>(0) - 1).ok().and_then(|index| chunk.get(index).copied());
            let key = key.ok_or_else(|| PgError::Unexpected { doing: DOING, what: "a key that was not asked".into() })?;
            rows.entry(key).or_default().push((1..=lookup.columns.len()).map(|index| row.get(index)).collect());
        }
    }
    // After the lookups: the transaction has one snapshot, and every commit that it sees lies before this place.
    let place = "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text";
    let last = scope.client().query_typed(place, &[]).await.map_err(PgError::when(DOING))?;
    scope.end(DOING).await?;
    let unexpected = || PgError::Unexpected { doing: DOING, what: "no snapshot".into() };
    let last = last.first().ok_or_else(unexpected)?;
    let snapshot = last.get::<_, &str>(0).parse().map_err(|_| unexpected())?;
    let wal_insert = last.get::<_, &str>(1).parse().map_err(|_| unexpected())?;
    Ok(Answer { rows, snapshot, wal_insert })
}

/// None: what the lookup found may not be what this commit found.
fn tags(core: &Core, commit: &InFlight, lookup: &Lookup, answer: &Answer<'_>, keys: &HashSet<Key>) -> Option<HashSet<TagHash>> {
    let moved = |table: &TagHash| core.clock.seen_after(*table, commit.commit.lsn, &answer.snapshot);
    if lookup.unsure_after.iter().any(moved) {
        return None;
    }
    let mut tags = HashSet::new();
    for key in keys {
        for row in answer.rows.get(&key[..lookup.params]).into_iter().flatten() {
            let value = |reference: &Reference| filled(lookup, row, key, reference);
            tags.extend(lookup.raise.iter().filter_map(|template| template.fill(value)));
        }
    }
    Some(tags)
}

/// From the lookup's row, else from the changed one's.
fn filled<'a>(lookup: &Lookup, row: &'a [Option<String>], key: &'a Key, reference: &Reference) -> Filled<'a> {
    let known = |cell: Option<&'a str>| cell.map_or(Filled::Nothing, Filled::Value);
    let column = lookup.columns.iter().position(|column| reference.image == Image::Either && **column == *reference.column);
    if let Some(index) = column {
        return known(row.get(index).and_then(|cell| cell.as_deref()));
    }
    match lookup.of_row.iter().position(|of_row| of_row == reference) {
        Some(index) => known(key.get(lookup.params + index).and_then(|cell| cell.as_deref())),
        None => Filled::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p4_nothing_is_promised_at_or_above_the_oldest_commit_that_has_still_to_raise() {
        let holds = Holds::default();
        assert_eq!(holds.at_most(Lsn(500)), Lsn(500));
        let (first, second) = (holds.hold(Lsn(100)), holds.hold(Lsn(200)));
        assert_eq!((holds.at_most(Lsn(500)), holds.at_most(Lsn(50))), (Lsn(99), Lsn(50)));
        let mut moved = false;
        holds.release(&HashSet::from([second]), || moved = true);
        assert!(moved && holds.at_most(Lsn(500)) == Lsn(99), "a younger one that is done promises nothing");
        holds.release(&HashSet::from([first]), || {});
        assert_eq!(holds.at_most(Lsn(500)), Lsn(500));
    }

    #[test]
    fn what_is_under_way_when_a_new_epoch_begins_moves_no_mark_of_it() {
        let holds = Holds::default();
        let old = holds.hold(Lsn(900));
        holds.forget();
        let new = holds.hold(Lsn(10));
        holds.release(&HashSet::from([old]), || panic!("the old one has no say"));
        assert_eq!(holds.at_most(Lsn(900)), Lsn(9));
        holds.release(&HashSet::from([new]), || {});
        assert_eq!(holds.at_most(Lsn(900)), Lsn(900));
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Step {
        Hold,
        Read,
        Raise,
        Release,
    }

    /// Two commits go through these steps, the first read before the second, in every other order of their steps. Is ever
    /// something promised of which a commit has not raised everything?
    fn promises_too_much(steps: [Step; 4]) -> bool {
        let mut orders = (0_u32..1 << 8).filter(|picks| picks.count_ones() == 4);
        orders.any(|picks| {
            let (holds, lsns) = (Holds::default(), [Lsn(100), Lsn(200)]);
            let (mut at, mut ids, mut raised, mut read_to) = ([0; 2], [None; 2], [false; 2], Lsn(50));
            (0..8).any(|turn| {
                let which = usize::from(picks & (1 << turn) == 0);
                let intake_is_first = |step| matches!(step, Step::Hold | Step::Read);
                let step = steps[at[which]];
                let first_is_read = steps[at[0]..].iter().all(|step| !intake_is_first(*step));
                if which == 1 && intake_is_first(step) && !first_is_read {
                    // The intake is one task: this order cannot be.
                    return false;
                }
                at[which] += 1;
                match step {
                    Step::Hold => ids[which] = Some(holds.hold(lsns[which])),
                    Step::Read => read_to = lsns[which],
                    Step::Raise => raised[which] = true,
                    Step::Release => holds.release(&ids[which].into_iter().collect(), || {}),
                }
                let promised = holds.at_most(read_to);
                (0..2).any(|commit| promised >= lsns[commit] && !raised[commit])
            })
        })
    }

    #[test]
    fn p4_only_this_order_of_steps_promises_nothing_too_early() {
        use Step::*;
        assert!(!promises_too_much([Hold, Read, Raise, Release]), "as it is built");
        assert!(promises_too_much([Hold, Read, Release, Raise]), "control: released before it is raised");
        assert!(promises_too_much([Read, Hold, Raise, Release]), "control: counted as read before it is held");
    }
}
