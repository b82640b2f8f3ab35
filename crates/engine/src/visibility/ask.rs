//! Asks PostgreSQL about row images, unless it has answered and nothing has moved since.
//!
//! Called by the judge for what memory cannot decide. Callers who are the same to the policy are one; many go with one statement
//! where the policy has a set form, else each with its own in one round trip. An answer is used only where the stream has told
//! everything that its snapshot can have seen.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::join_all};
use walcast_auth::{
    Question, Rules,
    row_visibility::{self, Asking, AskingSet, Image, Verdicts},
};
use walcast_model::{Claims, Fence, Lsn, Tag, TagHash};
use walcast_pg::PgError;

use super::{
    ASK_TIMEOUT, AT_ONCE, Caller, IMAGES, Placed,
    judge::{Outlook, Sight, Told},
    patiently,
    remembered::{Answer, Cells, Key, Who, cells, holds, same_types},
};
use crate::{Core, pipeline::intake::any_change};

/// Decisions in one statement of the set form.
const PAIRS: usize = 10_000;
/// Callers whose statements go together, each with its own claims.
pub(super) const CALLERS: usize = 200;
/// Statements that fail for a value are tried again in halves, this often for a batch.
const HALVINGS: usize = 1_000;
/// A caller for whom the policy failed so often in one batch is shown nothing more of it: each row would cost a question.
const FAILURES: usize = 16;

/// Callers who are the same to the policy.
struct Group<'c> {
    who: Who,
    claims: &'c Claims,
    callers: Vec<&'c Caller>,
}

/// Images that are the same to the policy.
struct Subject<'a> {
    image: Image<'a>,
    /// None: answers about it are not remembered.
    cells: Option<Cells>,
}

type Pair = (usize, usize);
type ByChange = HashMap<usize, Told>;

/// What each group of callers is told of the changes that it wants, or why nothing can be told.
pub(super) async fn ask<'c>(
    core: &Core,
    rules: &Rules,
    question: &Question,
    changes: &[Placed<'_>],
    outlooks: &[Option<Outlook>],
    callers: Vec<&'c Caller>,
) -> Vec<(Vec<&'c Caller>, Result<ByChange, &'static str>)> {
    if callers.is_empty() {
        return Vec::new();
    }
    let groups = grouped(core, question, callers).await;
    let subjects = Subjects::of(rules, question, changes, outlooks);
    let mut desk = Desk {
        core,
        rules,
        question,
        decides: question.reads.iter().map(|table| Tag::table(table).hash()).collect(),
        groups: &groups,
        subjects: &subjects.list,
        answers: HashMap::new(),
        failed: HashMap::new(),
        halvings: HALVINGS,
        failures: HashMap::new(),
    };
    if question.reads_anything {
        desk.decides.push(any_change());
    }
    let wanted: Vec<HashSet<usize>> =
        groups.iter().map(|group| group.callers.iter().flat_map(|c| &c.wants).map(|(change, _)| *change).collect()).collect();
    let mut unanswered: Vec<Pair> = Vec::new();
    for (group, wanted) in wanted.iter().enumerate() {
        let mut of_subject: BTreeMap<usize, Vec<Lsn>> = BTreeMap::new();
        for change in wanted {
            for subject in subjects.of_change[*change].iter().flatten().filter_map(|subject| *subject) {
                of_subject.entry(subject).or_default().push(changes[*change].commit.commit.lsn);
            }
        }
        let pairs = of_subject.into_iter().filter(|(subject, commits)| !desk.remembers((group, *subject), commits));
        unanswered.extend(pairs.map(|(subject, _)| (group, subject)));
    }
    desk.ask(unanswered).await;
    let Desk { answers, failed, decides, .. } = desk;

    let mut told = Vec::with_capacity(groups.len());
    for (at, (group, wanted)) in groups.into_iter().zip(wanted).enumerate() {
        if let Some(reason) = failed.get(&at) {
            told.push((group.callers, Err(*reason)));
            continue;
        }
        let of_change = |change: usize| {
            let lsn = changes[change].commit.commit.lsn;
            let mut moved = false;
            let mut sight = |image: &Option<Option<usize>>| match image {
                None => Sight::Denied,
                Some(None) => Sight::Lacking,
                Some(Some(subject)) => {
                    let Some(given) = answers.get(&(at, *subject)) else { return Sight::Denied };
                    // An answer of a later snapshot serves this commit only if nothing that decides was touched in between.
                    moved |= decides.iter().any(|tag| core.clock.seen_after(*tag, lsn, &given.answer.as_of.snapshot));
                    match (given.told, given.answer.allowed) {
                        (false, _) => Sight::Lacking,
                        (true, true) => Sight::Allowed,
                        (true, false) => Sight::Denied,
                    }
                }
            };
            let [new, old] = &subjects.of_change[change];
            let (new, old) = (sight(new), sight(old));
            Told { new, old, moved }
        };
        let of_wanted = wanted.into_iter().filter(|change| outlooks[*change].is_some());
        told.push((group.callers, Ok(of_wanted.map(|change| (change, of_change(change))).collect())));
    }
    told
}

async fn grouped<'c>(core: &Core, question: &Question, callers: Vec<&'c Caller>) -> Vec<Group<'c>> {
    let claims: Vec<Claims> = callers.iter().map(|caller| caller.claims.clone()).collect();
    let bound = match &question.set {
        Some(form) => patiently(|| form.binder.bound(&core.pool, &claims, ASK_TIMEOUT)).await.ok(),
        None => None,
    };
    let bound = bound.unwrap_or_else(|| vec![None; callers.len()]);
    let mut groups: Vec<Group<'c>> = Vec::new();
    let mut known: HashMap<Who, usize> = HashMap::new();
    for (caller, bound) in callers.into_iter().zip(bound) {
        let who = bound.map_or(Who::Exact(caller.claims.exact()), Who::Values);
        let at = *known.entry(who.clone()).or_insert_with(|| {
            groups.push(Group { who, claims: &caller.claims, callers: Vec::new() });
            groups.len() - 1
        });
        groups[at].callers.push(caller);
    }
    groups
}

struct Subjects<'a> {
    list: Vec<Subject<'a>>,
    /// The new and the old image of each change: none if there is no such image, and none in it if it lacks a value that decides.
    of_change: Vec<[Option<Option<usize>>; 2]>,
}

impl<'a> Subjects<'a> {
    fn of(rules: &Rules, question: &Question, changes: &[Placed<'a>], outlooks: &[Option<Outlook>]) -> Subjects<'a> {
        let mut list: Vec<Subject<'a>> = Vec::new();
        let mut known: HashMap<Cells, usize> = HashMap::new();
        let mut of_image = |change: &'a walcast_model::Change, row: &'a walcast_model::Row| {
            let cells = cells(&question.needs, &change.table, row)?;
            let remembered = question.rememberable && same_types(&question.needs, rules, &change.table);
            if let Some(at) = known.get(&cells).filter(|_| remembered) {
                return Some(*at);
            }
            if remembered {
                known.insert(cells.clone(), list.len());
            }
            list.push(Subject { image: (&change.table, row), cells: remembered.then_some(cells) });
            Some(list.len() - 1)
        };
        let of_change = changes.iter().zip(outlooks).map(|(placed, outlook)| {
            let change = placed.change;
            if outlook.is_none() {
                return [None, None];
            }
            [&change.new, &change.old].map(|row| row.as_ref().map(|row| of_image(change, row)))
        });
        let of_change = of_change.collect();
        Subjects { list, of_change }
    }
}

struct Given {
    answer: Answer,
    told: bool,
}

/// Some of the pairs, to go in one transaction.
struct Part {
    in_set: bool,
    pairs: Vec<Pair>,
}

struct Desk<'a, 'c> {
    core: &'a Core,
    rules: &'a Rules,
    question: &'a Question,
    decides: Vec<TagHash>,
    groups: &'a [Group<'c>],
    subjects: &'a [Subject<'a>],
    answers: HashMap<Pair, Given>,
    failed: HashMap<usize, &'static str>,
    halvings: usize,
    /// By group, how many questions failed for reasons of its own.
    failures: HashMap<usize, usize>,
}

impl Desk<'_, '_> {
    fn key(&self, (group, subject): Pair) -> Option<Key> {
        let cells = self.subjects[subject].cells.clone()?;
        Some(Key { rules: self.rules.number, who: self.groups[group].who.clone(), cells })
    }

    /// Is there an answer that serves all these commits?
    fn remembers(&mut self, pair: Pair, commits: &[Lsn]) -> bool {
        let Some(answer) = self.key(pair).and_then(|key| self.core.rules.answers.get(&key)) else { return false };
        let serves = commits.iter().all(|lsn| holds(&self.core.clock, &self.decides, &answer.as_of, *lsn));
        if serves {
            self.core.metrics.remembered.increment(commits.len() as u64);
            self.answers.insert(pair, Given { answer, told: true });
        }
        serves
    }

    async fn ask(&mut self, pairs: Vec<Pair>) {
        let in_set = |pair: &Pair| self.question.set.is_some() && matches!(self.groups[pair.0].who, Who::Values(_));
        let (set, each): (Vec<Pair>, Vec<Pair>) = pairs.into_iter().partition(in_set);
        let mut parts: Vec<Part> = set.chunks(PAIRS).map(|pairs| Part { in_set: true, pairs: pairs.to_vec() }).collect();
        parts.extend(one_by_one(&each));
        // The first of a batch stand at its front; taken from the end.
        parts.reverse();
        while !parts.is_empty() {
            let now = parts.split_off(parts.len().saturating_sub(AT_ONCE));
            let this = &*self;
            let mut asking = Vec::with_capacity(now.len());
            for part in &now {
                asking.push(this.ask_part(part).boxed());
            }
            let answers = join_all(asking).await;
            for (part, answer) in now.into_iter().zip(answers) {
                match answer {
                    Ok((verdicts, as_of)) => self.note(&part, verdicts, &as_of).await,
                    Err(error) => parts.extend(self.refused(part, &error)),
                }
            }
        }
    }

    /// The verdicts of each of the part's pairs, in order.
    async fn ask_part(&self, part: &Part) -> Result<(Vec<Verdicts>, Fence), PgError> {
        let core = self.core;
        core.metrics.asked.increment(part.pairs.len() as u64);
        // Read before the snapshot is taken, or it would promise too much.
        let (settled, floor) = (core.progress.settled(), core.clock.floor());
        let verdicts = match (&self.question.set, part.in_set) {
            (Some(form), true) => {
                let asking = self.set_of(&part.pairs);
                vec![
                    patiently(|| row_visibility::ask_set(&core.pool, self.rules, self.question, form, &asking, ASK_TIMEOUT))
                        .await?,
                ]
            }
            _ => {
                let asking = self.each_of(&part.pairs);
                patiently(|| row_visibility::ask_each(&core.pool, self.rules, self.question, &asking, ASK_TIMEOUT)).await?
            }
        };
        let snapshot = verdicts.first().map(|first| first.snapshot.clone());
        let snapshot =
            snapshot.ok_or_else(|| PgError::Unexpected { doing: "asking for row visibility", what: "no answer".into() })?;
        Ok((verdicts, Fence { snapshot, settled, floor }))
    }

    fn set_of(&self, pairs: &[Pair]) -> AskingSet<'_> {
        let (mut callers, mut images) = (Numbered::default(), Numbered::default());
        let pairs: Vec<Pair> = pairs.iter().map(|(group, subject)| (callers.number(*group), images.number(*subject))).collect();
        let values = |group: &usize| match &self.groups[*group].who {
            Who::Values(values) => Some((values.clone(), self.core.next_nonce())),
            Who::Exact(_) => None,
        };
        AskingSet {
            role_of: self.groups[callers.list[0]].claims,
            callers: callers.list.iter().filter_map(values).collect(),
            images: images.list.iter().map(|subject| self.subjects[*subject].image).collect(),
            pairs,
        }
    }

    fn each_of(&self, pairs: &[Pair]) -> Vec<Asking<'_>> {
        let of_group = |same: &[Pair]| Asking {
            claims: self.groups[same[0].0].claims,
            images: same.iter().map(|(_, subject)| self.subjects[*subject].image).collect(),
            nonce: self.core.next_nonce(),
        };
        pairs.chunk_by(|a, b| a.0 == b.0).map(of_group).collect()
    }

    async fn note(&mut self, part: &Part, verdicts: Vec<Verdicts>, as_of: &Fence) {
        let wal_insert = verdicts.iter().map(|verdicts| verdicts.wal_insert).max().unwrap_or_default();
        // Where tables decide, their clock must know all that the snapshot saw.
        if !self.decides.is_empty() && !heard_of(self.core, wal_insert).await {
            self.failed.extend(part.pairs.iter().map(|(group, _)| (*group, "authorisation unsure")));
            return;
        }
        let as_of = Arc::new(as_of.clone());
        let answers = verdicts.into_iter().flat_map(|verdicts| verdicts.allowed.into_iter().zip(verdicts.told));
        for (pair, (allowed, told)) in part.pairs.iter().zip(answers) {
            let answer = Answer { allowed, as_of: as_of.clone() };
            if let Some(key) = self.key(*pair).filter(|_| told) {
                self.core.rules.answers.put(key, answer.clone());
            }
            self.answers.insert(*pair, Given { answer, told });
        }
    }

    /// What is asked instead, if anything can be.
    fn refused(&mut self, part: Part, error: &PgError) -> Vec<Part> {
        let (table, role) = (&self.rules.name, self.groups[part.pairs[0].0].claims.role());
        let of_data = is_of_data(error);
        if part.in_set && !of_data && error.sqlstate().is_some_and(|code| code.starts_with("42")) {
            tracing::warn!(%table, role, %error, "the policy cannot be asked for many at once: asked for each");
            return one_by_one(&part.pairs);
        }
        // One caller's claims make the statement fail for all: each by himself, so that he alone hears nothing.
        if of_data && part.in_set {
            return one_by_one(&part.pairs);
        }
        let group = part.pairs[0].0;
        let of_one = part.pairs.iter().all(|pair| pair.0 == group);
        let failed_often = of_one && self.failures.get(&group).is_some_and(|failures| *failures >= FAILURES);
        let several = part.pairs.len() > 1 && !failed_often;
        if of_data && several && self.halvings > 0 {
            self.halvings -= 1;
            return halves(part);
        }
        // A value that the policy cannot cast: a query would fail at this row, so its reader never sees it. Saying more
        // would tell whoever brings such a claim which of the rows that he may not see match his filter.
        if of_data && !several {
            self.core.metrics.withheld_errors.increment(1);
            tracing::debug!(%table, role, code = error.sqlstate().unwrap_or("none"), "the policy fails for a row: hidden");
            *self.failures.entry(group).or_default() += 1;
            let as_of = Arc::new(Fence {
                snapshot: walcast_model::Snapshot::blind(),
                settled: Lsn::ZERO,
                floor: self.core.clock.floor(),
            });
            for pair in part.pairs {
                let answer = Answer { allowed: false, as_of: as_of.clone() };
                self.answers.insert(pair, Given { answer, told: true });
            }
            return Vec::new();
        }
        // By its code: PostgreSQL's words may hold a row's values.
        tracing::warn!(%table, role, code = error.sqlstate().unwrap_or("none"), "row visibility cannot be asked: withheld");
        self.failed.extend(part.pairs.iter().map(|(group, _)| (*group, "authorisation failed")));
        Vec::new()
    }
}

/// Would an answer about this image be found without asking?
pub(super) fn remembers_now(core: &Core, rules: &Rules, question: &Question, who: Who, image: Image<'_>, lsn: Lsn) -> bool {
    let Some(cells) = cells(&question.needs, image.0, image.1).filter(|_| question.rememberable) else { return false };
    let decides: Vec<TagHash> = question.reads.iter().map(|table| Tag::table(table).hash()).collect();
    let answer = core.rules.answers.get(&Key { rules: rules.number, who, cells });
    answer.is_some_and(|answer| holds(&core.clock, &decides, &answer.as_of, lsn))
}

/// Each its place among those that came so far.
#[derive(Default)]
struct Numbered {
    list: Vec<usize>,
    places: HashMap<usize, usize>,
}

impl Numbered {
    fn number(&mut self, one: usize) -> usize {
        *self.places.entry(one).or_insert_with(|| {
            self.list.push(one);
            self.list.len() - 1
        })
    }
}

/// For callers with their own claims: some hundred of them, or a thousand images, in one round trip.
fn one_by_one(pairs: &[Pair]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut callers = 0;
    for of_group in pairs.chunk_by(|a, b| a.0 == b.0) {
        for some in of_group.chunks(IMAGES) {
            match parts.last_mut().filter(|last| callers < CALLERS && last.pairs.len() + some.len() <= IMAGES) {
                Some(last) => {
                    last.pairs.extend_from_slice(some);
                    callers += 1;
                }
                None => {
                    parts.push(Part { in_set: false, pairs: some.to_vec() });
                    callers = 1;
                }
            }
        }
    }
    parts
}

/// By images first: what cannot be cast is more often in a row than in what was cast already.
fn halves(part: Part) -> Vec<Part> {
    let of = |pair: &Pair, by_image: bool| if by_image { pair.1 } else { pair.0 };
    let by_image = part.in_set && part.pairs.iter().any(|pair| pair.1 != part.pairs[0].1);
    let by_image = by_image || part.pairs.iter().all(|pair| pair.0 == part.pairs[0].0);
    let mut values: Vec<usize> = part.pairs.iter().map(|pair| of(pair, by_image)).collect();
    values.sort_unstable();
    values.dedup();
    let middle = values[values.len() / 2];
    let (first, second) = part.pairs.into_iter().partition(|pair| of(pair, by_image) < middle);
    [first, second].into_iter().map(|pairs| Part { in_set: part.in_set, pairs }).collect()
}

/// The row, the claims or the policy are at fault, not the database: whoever asks by a query would be told an error, too.
/// Values that cannot be cast, checks of a domain, what a function raises, what the role may not read.
pub(super) fn is_of_data(error: &PgError) -> bool {
    error.sqlstate().is_some_and(|code| ["22", "23", "P0"].iter().any(|class| code.starts_with(class)) || code == "42501")
}

/// Waits until the stream has brought everything that the answer's snapshot can have seen.
pub(crate) async fn heard_of(core: &Core, wal_insert: Lsn) -> bool {
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
