//! Who may see which change: rules per (table, role), one question per (table, same claims), one answer for all of a group.
//!
//! Called by the announcer with a batch and by a join with its replay. Whatever is in doubt is withheld and said.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::join_all};
use parking_lot::Mutex;
use walcast_auth::{
    Publications, RowRule, Rules,
    policy::{Answer, Policy},
    row_visibility,
};
use walcast_model::{Cell, Change, Claims, Item, Operation, ReplicaIdentity, Row, Scope, TableId, TableName, Tag, TagHash};
use walcast_pg::PgError;

use crate::{
    Core,
    pipeline::{Remembered, intake::any_change},
    subscriptions::{Audience, Wanting},
};

/// A change and one audience whose bindings match it.
pub struct Candidate<'a> {
    pub commit: &'a Remembered,
    pub index: u32,
    pub change: &'a Change,
    pub audience: Arc<Audience>,
    pub wanting: Wanting,
}

#[derive(Debug, Clone)]
pub enum Verdict {
    Show {
        columns: Arc<[bool]>,
        old: OldView,
    },
    Hide,
    /// They may see it, and it cannot be shown: upstream's own words why.
    Error {
        columns: Arc<[bool]>,
        error: &'static str,
    },
    /// It cannot be told whether they may see it: they must read again.
    Unsure(&'static str),
}

/// What of the old image may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OldView {
    Whole,
    Key,
    Nothing,
}

type ByTableAndRole = (TableId, String);

/// Rules by table and role; retired as the tables are redefined.
#[derive(Default)]
pub struct RuleBook {
    rules: Mutex<HashMap<ByTableAndRole, Arc<Rules>>>,
    by_name: Mutex<HashMap<TableName, TableId>>,
    generation: AtomicU64,
    turns: [Turn; 16],
    hasher: RandomState,
}

/// One reads for all who come at once: a herd of clients costs one look at the catalog, not one each.
#[derive(Default)]
struct Turn {
    lock: tokio::sync::Mutex<()>,
    failures: AtomicU64,
}

impl RuleBook {
    pub fn retire(&self, table: TableId) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.rules.lock().retain(|(id, _), _| *id != table);
        self.by_name.lock().retain(|_, id| *id != table);
    }

    pub fn retire_all(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.rules.lock().clear();
        self.by_name.lock().clear();
    }

    /// By name, for a client that subscribes.
    pub async fn find(&self, core: &Core, table: &TableName, claims: &Claims) -> Result<Option<Arc<Rules>>, PgError> {
        let known = self.by_name.lock().get(table).copied();
        if let Some(id) = known {
            return self.get(core, id, claims).await;
        }
        let known = || {
            let id = self.by_name.lock().get(table).copied()?;
            self.rules.lock().get(&(id, claims.role().to_owned())).cloned()
        };
        self.read(claims, (table, claims.role()), known, || Rules::find(&core.pool, table, claims, core.publications_of_rules()))
            .await
    }

    pub fn forget(&self, table: &TableName) {
        let known = self.by_name.lock().remove(table);
        if let Some(id) = known {
            self.retire(id);
        }
    }

    pub async fn get(&self, core: &Core, table: TableId, claims: &Claims) -> Result<Option<Arc<Rules>>, PgError> {
        let key = (table, claims.role().to_owned());
        let known = || self.rules.lock().get(&key).cloned();
        if let Some(rules) = known() {
            return Ok(Some(rules));
        }
        self.read(claims, &key, known, || Rules::load(&core.pool, table, claims, core.publications_of_rules())).await
    }

    /// Whoever waited for another's look takes what that one found. Where it failed, all ask for themselves: side by side,
    /// or those who wait would fail one after the other.
    async fn read<R: Future<Output = Result<Option<Rules>, PgError>>>(
        &self,
        claims: &Claims,
        whose: impl Hash,
        known: impl Fn() -> Option<Arc<Rules>>,
        ask: impl FnOnce() -> R,
    ) -> Result<Option<Arc<Rules>>, PgError> {
        let turn = &self.turns[(self.hasher.hash_one(whose) % self.turns.len() as u64) as usize];
        let failures = turn.failures.load(Ordering::Acquire);
        let mut held = Some(turn.lock.lock().await);
        if let Some(rules) = known() {
            return Ok(Some(rules));
        }
        if turn.failures.load(Ordering::Acquire) != failures {
            held = None;
        }
        let generation = self.generation.load(Ordering::Acquire);
        let rules = ask().await.inspect_err(|_| {
            turn.failures.fetch_add(1, Ordering::AcqRel);
        })?;
        let rules = rules.map(|rules| self.keep(generation, claims, rules));
        drop(held);
        Ok(rules)
    }

    fn keep(&self, generation: u64, claims: &Claims, rules: Rules) -> Arc<Rules> {
        if let RowRule::Ask(question) = &rules.rows
            && let Some(unheard) = &question.unheard
        {
            tracing::warn!(
                table = %rules.name, %unheard,
                "a policy reads a table that is not in the cache's publication: subscribers are told to resync instead of hearing \
                 changes; add it with `walcast migrate`"
            );
        }
        let rules = Arc::new(rules);
        let mut book = self.rules.lock();
        // Retired while we read: what we read serves this batch, which the newer rules judge, but is not kept.
        if self.generation.load(Ordering::Acquire) == generation {
            book.insert((rules.table, claims.role().to_owned()), rules.clone());
            self.by_name.lock().insert(rules.name.clone(), rules.table);
        }
        rules
    }
}

impl Core {
    fn publications_of_rules(&self) -> Publications<'_> {
        Publications { realtime: &self.config.publication_realtime, cache: &self.config.publication_cache }
    }
}

struct Group<'a> {
    claims: Claims,
    changes: Vec<(&'a Remembered, u32, &'a Change)>,
    candidates: Vec<usize>,
}

/// Questions that run at once; the pool bounds them anyway.
pub(crate) const AT_ONCE: usize = 4;
/// Images in one statement.
pub(crate) const IMAGES: usize = 1_000;
pub(crate) const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// For a database that restarts; who waits longer is told to read again.
const PATIENCE: Duration = Duration::from_secs(20);

/// One verdict for each candidate, in order.
pub async fn decide(core: &Core, candidates: &[Candidate<'_>]) -> Vec<Verdict> {
    let mut groups: HashMap<(TableId, u128), Group<'_>> = HashMap::new();
    for (at, candidate) in candidates.iter().enumerate() {
        let claims = candidate.audience.claims.clone();
        let key = (candidate.change.table.id, claims.exact());
        let group = groups.entry(key).or_insert_with(|| Group { claims, changes: Vec::new(), candidates: Vec::new() });
        let place = (candidate.commit.commit.lsn, candidate.index);
        if group.changes.last().is_none_or(|(commit, index, _)| (commit.commit.lsn, *index) != place) {
            group.changes.push((candidate.commit, candidate.index, candidate.change));
        }
        group.candidates.push(at);
    }
    // Rules once per role, before the groups ask for them side by side.
    let mut first_of_role: HashMap<(TableId, &str), &Claims> = HashMap::new();
    for ((table, _), group) in &groups {
        first_of_role.entry((*table, group.claims.role())).or_insert(&group.claims);
    }
    for ((table, _), claims) in first_of_role {
        let _ = core.rules.get(core, table, claims).await;
    }
    let mut verdicts = vec![Verdict::Hide; candidates.len()];
    let groups: Vec<Group<'_>> = groups.into_values().collect();
    for side_by_side in groups.chunks(AT_ONCE) {
        let mut judging = Vec::with_capacity(side_by_side.len());
        for group in side_by_side {
            judging.push(judge(core, group).boxed());
        }
        for (group, answer) in side_by_side.iter().zip(join_all(judging).await) {
            let by_place: HashMap<_, _> =
                group.changes.iter().map(|(commit, index, _)| (commit.commit.lsn, *index)).zip(answer).collect();
            for at in &group.candidates {
                let candidate = &candidates[*at];
                let verdict = by_place.get(&(candidate.commit.commit.lsn, candidate.index)).cloned().unwrap_or(Verdict::Hide);
                verdicts[*at] = verdict;
            }
        }
    }
    verdicts
}

/// One verdict for each of the group's changes.
async fn judge(core: &Core, group: &Group<'_>) -> Vec<Verdict> {
    let all = |verdict: Verdict| vec![verdict; group.changes.len()];
    let Some((_, _, first)) = group.changes.first() else { return Vec::new() };
    let rules = match patiently(|| core.rules.get(core, first.table.id, &group.claims)).await {
        Ok(Some(rules)) => rules,
        Ok(None) => return all(Verdict::Hide),
        Err(error) => {
            core.metrics.withheld_errors.increment(group.changes.len() as u64);
            tracing::warn!(table = %first.table.name, role = group.claims.role(), %error, "rules cannot be read: withheld");
            return all(Verdict::Unsure("authorisation failed"));
        }
    };
    let Some([inserts, updates, deletes]) = rules.published else { return all(Verdict::Hide) };
    let mut verdicts: Vec<Verdict> = Vec::with_capacity(group.changes.len());
    // By the table's address: one table may be described twice in a batch, with other columns.
    let mut columns_of: HashMap<usize, Arc<[bool]>> = HashMap::new();
    for (commit, _, change) in &group.changes {
        let published = match change.operation {
            Operation::Insert => inserts,
            Operation::Update => updates,
            Operation::Delete => deletes,
            Operation::Truncate => false,
        };
        let columns =
            columns_of.entry(Arc::as_ptr(&change.table) as usize).or_insert_with(|| rules.visible(&change.table).into()).clone();
        verdicts.push(if !published || !columns.contains(&true) {
            Verdict::Hide
        } else if commit.xid < rules.changed_by {
            // The rules are younger than the change: what they were at its commit is not known.
            Verdict::Unsure("authorisation moved")
        } else {
            Verdict::Show { columns, old: OldView::Whole }
        });
    }
    let verdicts = match &rules.rows {
        RowRule::All => verdicts,
        RowRule::Nobody => all(Verdict::Hide),
        // Whether what decides moved since the commit cannot be told: nobody is shown anything.
        RowRule::Ask(question) if question.unheard.is_some() => {
            all(Verdict::Unsure("a policy reads a table that is not published"))
        }
        RowRule::Ask(question) => {
            if let Some(policy) = &question.policy
                && let Some(allowed) = decide_here(core, group, policy, &mut verdicts).await
            {
                conclude(group, &allowed, |_| Doubt::None, &mut verdicts);
                return unshown(&rules, group, verdicts);
            }
            if let Err(reason) = ask(core, group, &rules, question, &mut verdicts).await {
                core.metrics.withheld_errors.increment(group.changes.len() as u64);
                return all(Verdict::Unsure(reason));
            }
            verdicts
        }
    };
    unshown(&rules, group, verdicts)
}

/// Only to those who may see the row is it told that it cannot be shown: upstream tells everybody who asked.
fn unshown(rules: &Rules, group: &Group<'_>, verdicts: Vec<Verdict>) -> Vec<Verdict> {
    let Some(error) = unshowable(rules) else { return verdicts };
    let told = |(verdict, (_, _, change)): (Verdict, &(_, _, &Change))| match verdict {
        Verdict::Show { columns, .. } if change.operation != Operation::Delete => Verdict::Error { columns, error },
        verdict => verdict,
    };
    verdicts.into_iter().zip(&group.changes).map(told).collect()
}

/// Clients tell rows apart by their key.
fn unshowable(rules: &Rules) -> Option<&'static str> {
    let mut keys = rules.columns.iter().filter(|column| column.primary).peekable();
    if keys.peek().is_none() {
        return Some("Error 400: Bad Request, no primary key");
    }
    keys.any(|key| !key.visible).then_some("Error 401: Unauthorized")
}

/// Which images of each change may be seen.
struct Allowed {
    new: Vec<bool>,
    old: Vec<bool>,
}

/// Policies that the row and the claims alone decide. None: PostgreSQL has to be asked after all.
async fn decide_here(core: &Core, group: &Group<'_>, policy: &Policy, verdicts: &mut [Verdict]) -> Option<Allowed> {
    let bound = patiently(|| policy.bound(&core.pool, &group.claims, ASK_TIMEOUT)).await.ok()??;
    let mut allowed = Allowed { new: vec![false; group.changes.len()], old: vec![false; group.changes.len()] };
    let mut lacking = Vec::new();
    for (at, (_, _, change)) in group.changes.iter().enumerate() {
        if !matches!(verdicts[at], Verdict::Show { .. }) {
            continue;
        }
        for (row, allowed) in [(&change.new, &mut allowed.new[at]), (&change.old, &mut allowed.old[at])] {
            match row.as_ref().map(|row| bound.decide(&change.table, row)) {
                Some(Answer::Allow) => *allowed = true,
                Some(Answer::Lacking) if std::ptr::eq(row, &change.new) => lacking.push(at),
                Some(Answer::Deny | Answer::Lacking) | None => {}
                Some(Answer::Ask) => return None,
            }
        }
    }
    for at in lacking {
        verdicts[at] = Verdict::Unsure(LACKING);
    }
    core.metrics.decided.increment(group.changes.len() as u64);
    Some(allowed)
}

const LACKING: &str = "a value that the policy reads is not in the stream: REPLICA IDENTITY FULL sends it";

async fn ask(
    core: &Core,
    group: &Group<'_>,
    rules: &Rules,
    question: &walcast_auth::Question,
    verdicts: &mut [Verdict],
) -> Result<(), &'static str> {
    let mut images: Vec<(usize, bool, &walcast_model::Table, &Row)> = Vec::new();
    for (at, (_, _, change)) in group.changes.iter().enumerate() {
        if !matches!(verdicts[at], Verdict::Show { .. }) {
            continue;
        }
        images.extend(change.new.iter().map(|row| (at, true, &*change.table, row)));
        images.extend(change.old.iter().map(|row| (at, false, &*change.table, row)));
    }
    let mut allowed_images = Allowed { new: vec![false; group.changes.len()], old: vec![false; group.changes.len()] };
    let decides: Vec<TagHash> = question.reads.iter().map(|table| Tag::table(table).hash()).collect();
    let mut batches: Vec<&[_]> = images.chunks(IMAGES).rev().collect();
    while let Some(batch) = batches.pop() {
        let rows: Vec<_> = batch.iter().map(|(_, _, table, row)| (*table, *row)).collect();
        let nonce = core.next_nonce();
        let ask = || row_visibility::ask(&core.pool, rules, question, &group.claims, &rows, nonce, ASK_TIMEOUT);
        let asked = patiently(ask).await;
        let answer = match asked {
            // A value that the policy cannot cast: a query would fail at this row, so its reader never sees it. Saying more
            // would tell whoever brings such a claim which of the rows that he may not see match his filter.
            Err(error) if is_of_data(&error) && decides.is_empty() && !question.reads_anything => {
                if let [_, _, ..] = batch {
                    let (first, second) = batch.split_at(batch.len() / 2);
                    batches.extend([second, first]);
                } else {
                    core.metrics.withheld_errors.increment(1);
                    tracing::debug!(table = %rules.name, role = group.claims.role(), %error, "the policy fails for a row: hidden");
                }
                continue;
            }
            Err(error) => {
                let role = group.claims.role();
                tracing::warn!(table = %rules.name, role, %error, "row visibility cannot be asked: withheld");
                return Err("authorisation failed");
            }
            Ok(answer) => answer,
        };
        core.metrics.asked.increment(rows.len() as u64);
        if (!decides.is_empty() || question.reads_anything) && !heard_of(core, answer.wal_insert).await {
            return Err("authorisation unsure");
        }
        for (((at, is_new, ..), allowed), told) in batch.iter().zip(&answer.allowed).zip(&answer.told) {
            let lsn = group.changes[*at].0.commit.lsn;
            // An allow from a later snapshot serves this commit only if nothing that decides it was touched in between.
            let moved = decides.iter().any(|tag| core.clock.seen_after(*tag, lsn, &answer.snapshot))
                || (question.reads_anything && core.clock.seen_after(any_change(), lsn, &answer.snapshot));
            if moved {
                verdicts[*at] = Verdict::Unsure("authorisation moved");
            }
            if *is_new && !*told {
                verdicts[*at] = Verdict::Unsure(LACKING);
            }
            if *is_new {
                allowed_images.new[*at] = *allowed;
            } else {
                allowed_images.old[*at] = *allowed;
            }
        }
    }
    // PostgreSQL was asked after the commit. Where the commit itself moved what the policy reads, its answer says
    // nothing of who could see the old row.
    conclude(group, &allowed_images, |at| moved_with(question, group.changes[at].0, group.changes[at].2), verdicts);
    Ok(())
}

/// Class 22: the values are at fault, not the database.
fn is_of_data(error: &PgError) -> bool {
    error.sqlstate().is_some_and(|code| code.starts_with("22"))
}

/// From the images that may be seen to what is shown.
fn conclude(group: &Group<'_>, allowed: &Allowed, doubt: impl Fn(usize) -> Doubt, verdicts: &mut [Verdict]) {
    for (at, (_, _, change)) in group.changes.iter().enumerate() {
        let doubt = doubt(at);
        if change.operation == Operation::Delete && doubt == Doubt::Moved {
            verdicts[at] = Verdict::Unsure("authorisation moved");
        }
        let Verdict::Show { old, .. } = &mut verdicts[at] else { continue };
        *old = if allowed.old[at] && doubt == Doubt::None {
            OldView::Whole
        } else if same_key(change) {
            OldView::Key
        } else {
            OldView::Nothing
        };
        let visible = if change.operation == Operation::Delete { allowed.old[at] } else { allowed.new[at] };
        if !visible {
            verdicts[at] = Verdict::Hide;
        }
    }
}

/// Asks again while the database is away: a restart in the middle of an announcement is no reason to lose it.
pub(crate) async fn patiently<T, Fut>(ask: impl Fn() -> Fut) -> Result<T, PgError>
where
    Fut: Future<Output = Result<T, PgError>>,
{
    let until = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Err(error) if error.is_away() && Instant::now() < until => tokio::time::sleep(Duration::from_millis(100)).await,
            answer => return answer,
        }
    }
}

/// Waits until the stream has brought everything that the answer's snapshot can have seen.
pub(crate) async fn heard_of(core: &Core, wal_insert: walcast_model::Lsn) -> bool {
    const AT_ONCE: Duration = Duration::from_millis(3);
    if core.progress.wait_read(wal_insert, AT_ONCE).await {
        return true;
    }
    // WAL of asynchronous commits is flushed, and so streamed, only a while later: ask for it.
    core.nudge.notify_one();
    let until = Instant::now() + ASK_TIMEOUT;
    while Instant::now() < until && !core.progress.intake_waits() {
        if core.progress.wait_read(wal_insert, LOOK_AGAIN).await {
            return true;
        }
    }
    false
}

/// While waiting for the stream: does the intake still go on?
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    None,
    /// Only this table was written, but the policy may read it by way of a function.
    Perhaps,
    Moved,
}

/// Did the commit of this change also write what its policy reads?
fn moved_with(question: &walcast_auth::Question, commit: &Remembered, change: &Change) -> Doubt {
    let Scope::Whole(items) = &commit.commit.scope else { return Doubt::Moved };
    let written = |item: &(u32, Item)| match &item.1 {
        Item::Change(other) => {
            question.reads.contains(&other.table.name) || (question.reads_anything && other.table.id != change.table.id)
        }
        Item::Redefined(_) | Item::Message { .. } => false,
    };
    if items.iter().any(written) {
        Doubt::Moved
    } else if question.reads_anything {
        Doubt::Perhaps
    } else {
        Doubt::None
    }
}

/// The old key is in the new row, which they may see.
fn same_key(change: &Change) -> bool {
    let (Some(new), Some(old)) = (&change.new, &change.old) else { return false };
    // With the full old row every column counts as key: that would tell that nothing has changed.
    if change.table.identity == ReplicaIdentity::Full {
        return false;
    }
    let mut keys = change.table.columns.iter().enumerate().filter(|(_, column)| column.key);
    keys.all(|(index, _)| matches!(old.cell(index), Cell::Value(_)) && old.cell(index) == new.cell(index))
}
