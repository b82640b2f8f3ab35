//! From a table's rules to one verdict for each change and caller of a role.
//!
//! Called by [`super::decide`]. What is the same for all callers is found once; what row and claims alone decide, in memory and
//! once for all who are the same to the policy. The rest goes to [`ask`].

use std::{collections::HashMap, sync::Arc};

use walcast_auth::{
    Question, RowRule, Rules,
    policy::{Answer, Policy, Values},
};
use walcast_model::{Cell, Change, Claims, Item, Operation, ReplicaIdentity, Row, Scope};

use super::{ASK_TIMEOUT, Caller, OfRole, OldView, Placed, Verdict, ask, confirm::confirm, patiently};
use crate::{Core, pipeline::Remembered};

/// What all callers of the role have in common for a change; none if nobody sees it.
pub(super) struct Outlook {
    columns: Arc<[bool]>,
    /// Why it is not known who could see it at its commit.
    moved: Option<&'static str>,
}

/// What an image is to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sight {
    Allowed,
    Denied,
    /// The image lacks a value that decides.
    Lacking,
}

/// What a change is to a caller.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    pub new: Sight,
    pub old: Sight,
    /// What decides was touched between the commit and the answer.
    pub moved: bool,
}

/// What callers who are the same to the policy are told, by change.
pub(super) struct Answered<'c> {
    pub callers: Vec<&'c Caller>,
    pub told: HashMap<usize, Told>,
    /// After the commit, of PostgreSQL.
    asked: bool,
}

const MOVED: &str = "authorisation moved";
const LACKING: &str = "a value that the policy reads is not in the stream: REPLICA IDENTITY FULL sends it";
const UNHEARD: &str = "a policy reads a table that is not published";

/// A verdict for each candidate, by its place.
pub(super) async fn judge(core: &Core, of_role: &OfRole<'_>) -> Vec<(usize, Verdict)> {
    let (Some(placed), Some(first)) = (of_role.changes.first(), of_role.callers.first()) else { return Vec::new() };
    let table = &placed.change.table;
    let rules = match patiently(|| core.rules.get(core, table.id, &first.claims)).await {
        Ok(Some(rules)) => rules,
        Ok(None) => return Vec::new(),
        Err(error) => {
            core.metrics.withheld_errors.increment(of_role.changes.len() as u64);
            tracing::warn!(table = %table.name, role = first.claims.role(), %error, "rules cannot be read: withheld");
            return of_role.callers.iter().flat_map(|caller| all(caller, &Verdict::Unsure("authorisation failed"))).collect();
        }
    };
    let outlooks = outlooks(&rules, &of_role.changes);
    let judged = Judged { of_role, outlooks: &outlooks, error: unshowable(&rules) };
    match &rules.rows {
        RowRule::Nobody => Vec::new(),
        RowRule::All => {
            let everything = Told { new: Sight::Allowed, old: Sight::Allowed, moved: false };
            let of_change = |at: usize| match &outlooks[at] {
                // Without row security the old row is as open as the new one, whatever its key says.
                Some(Outlook { columns, moved: None }) => {
                    judged.unshown(at, Verdict::Show { columns: columns.clone(), old: OldView::Whole })
                }
                _ => judged.verdict(at, everything, Doubt::None),
            };
            let verdicts: Vec<Verdict> = (0..of_role.changes.len()).map(of_change).collect();
            of_role
                .callers
                .iter()
                .flat_map(|caller| caller.wants.iter().map(|(change, at)| (*at, verdicts[*change].clone())))
                .collect()
        }
        RowRule::Ask(question) => {
            let mut verdicts = Vec::new();
            let (mut answered, left) = match &question.policy {
                Some(policy) => decide_here(core, &judged, policy).await,
                None => (Vec::new(), of_role.callers.iter().collect()),
            };
            for (callers, answer) in ask::ask(core, &rules, question, &of_role.changes, &outlooks, left).await {
                match answer {
                    Ok(told) => answered.push(Answered { callers, told, asked: true }),
                    Err(reason) => {
                        core.metrics.withheld_errors.increment(callers.iter().map(|caller| caller.wants.len() as u64).sum());
                        verdicts.extend(callers.iter().flat_map(|caller| judged.unsure(caller, reason)));
                    }
                }
            }
            confirm(core, &rules, &of_role.changes, &mut answered).await;
            let doubts: Vec<Doubt> =
                of_role.changes.iter().map(|placed| moved_with(question, placed.commit, placed.change)).collect();
            for Answered { callers, told, asked } in &answered {
                let doubt = |at: usize| if *asked { doubts[at] } else { Doubt::None };
                judged.conclude(callers, |change| told.get(&change).copied(), doubt, &mut verdicts);
            }
            verdicts
        }
    }
}

fn all(caller: &Caller, verdict: &Verdict) -> Vec<(usize, Verdict)> {
    caller.wants.iter().map(|(_, at)| (*at, verdict.clone())).collect()
}

fn outlooks(rules: &Rules, changes: &[Placed<'_>]) -> Vec<Option<Outlook>> {
    // By the table's address: one table may be described twice in a batch, with other columns.
    let mut columns_of: HashMap<usize, Arc<[bool]>> = HashMap::new();
    let unheard = matches!(&rules.rows, RowRule::Ask(question) if question.unheard.is_some());
    let outlook = |placed: &Placed<'_>| {
        let [inserts, updates, deletes] = rules.published?;
        let published = match placed.change.operation {
            Operation::Insert => inserts,
            Operation::Update => updates,
            Operation::Delete => deletes,
            Operation::Truncate => false,
        };
        let table = &placed.change.table;
        let columns = columns_of.entry(Arc::as_ptr(table) as usize).or_insert_with(|| rules.visible(table).into()).clone();
        let moved = if placed.commit.xid < rules.changed_by {
            // The rules are younger than the change: what they were at its commit is not known.
            Some(MOVED)
        } else {
            // Whether what decides moved since the commit cannot be told.
            unheard.then_some(UNHEARD)
        };
        (published && columns.contains(&true)).then_some(Outlook { columns, moved })
    };
    changes.iter().map(outlook).collect()
}

/// Clients tell rows apart by their key.
pub(super) fn unshowable(rules: &Rules) -> Option<&'static str> {
    let mut keys = rules.columns.iter().filter(|column| column.primary).peekable();
    if keys.peek().is_none() {
        return Some("Error 400: Bad Request, no primary key");
    }
    keys.any(|key| !key.visible).then_some("Error 401: Unauthorized")
}

struct Judged<'a> {
    of_role: &'a OfRole<'a>,
    outlooks: &'a [Option<Outlook>],
    /// Why no change of this table can be shown.
    error: Option<&'static str>,
}

impl Judged<'_> {
    /// One verdict for a change and all who are told the same of it.
    fn verdict(&self, at: usize, told: Told, doubt: Doubt) -> Verdict {
        let (Some(outlook), change) = (&self.outlooks[at], self.of_role.changes[at].change) else { return Verdict::Hide };
        let deleted = change.operation == Operation::Delete;
        let image = if deleted { told.old } else { told.new };
        // PostgreSQL was asked after the commit. Where the commit itself moved what the policy reads, its answer says
        // nothing of who could see the old row.
        if deleted && doubt == Doubt::Moved {
            return Verdict::Unsure(MOVED);
        }
        match image {
            // Whatever they could see at the commit, now they may not: nothing is said of it.
            Sight::Denied => return Verdict::Hide,
            Sight::Lacking if deleted => return Verdict::Hide,
            Sight::Lacking => return Verdict::Unsure(LACKING),
            Sight::Allowed => {}
        }
        if let Some(reason) = outlook.moved.or(told.moved.then_some(MOVED)) {
            return Verdict::Unsure(reason);
        }
        let old = if told.old == Sight::Allowed && doubt == Doubt::None {
            OldView::Whole
        } else if same_key(change) {
            OldView::Key
        } else {
            OldView::Nothing
        };
        self.unshown(at, Verdict::Show { columns: outlook.columns.clone(), old })
    }

    /// Only to those who may see the row is it told that it cannot be shown: upstream tells everybody who asked.
    fn unshown(&self, at: usize, verdict: Verdict) -> Verdict {
        match (verdict, self.error) {
            (Verdict::Show { columns, .. }, Some(error)) if self.of_role.changes[at].change.operation != Operation::Delete => {
                Verdict::Error { columns, error }
            }
            (verdict, _) => verdict,
        }
    }

    /// Each change once for all these callers.
    fn conclude(
        &self,
        callers: &[&Caller],
        told: impl Fn(usize) -> Option<Told>,
        doubt: impl Fn(usize) -> Doubt,
        verdicts: &mut Vec<(usize, Verdict)>,
    ) {
        let mut of_change: HashMap<usize, Verdict> = HashMap::new();
        for (change, at) in callers.iter().flat_map(|caller| &caller.wants) {
            let verdict = of_change
                .entry(*change)
                .or_insert_with(|| told(*change).map_or(Verdict::Hide, |told| self.verdict(*change, told, doubt(*change))));
            verdicts.push((*at, verdict.clone()));
        }
    }

    /// Nobody can be told of what is not for the role at all.
    fn unsure(&self, caller: &Caller, reason: &'static str) -> Vec<(usize, Verdict)> {
        let verdict = |change: usize| if self.outlooks[change].is_some() { Verdict::Unsure(reason) } else { Verdict::Hide };
        caller.wants.iter().map(|(change, at)| (*at, verdict(*change))).collect()
    }
}

/// Policies that the row and the claims alone decide. Returns those for whom PostgreSQL has to be asked after all.
async fn decide_here<'a>(core: &Core, judged: &Judged<'a>, policy: &Policy) -> (Vec<Answered<'a>>, Vec<&'a Caller>) {
    let callers = &judged.of_role.callers;
    let claims: Vec<Claims> = callers.iter().map(|caller| caller.claims.clone()).collect();
    let Ok(bound) = patiently(|| policy.binder.bound(&core.pool, &claims, ASK_TIMEOUT)).await else {
        return (Vec::new(), callers.iter().collect());
    };
    let (mut answered, mut left) = (Vec::new(), Vec::new());
    let mut same: HashMap<Arc<Values>, Vec<&Caller>> = HashMap::new();
    for (caller, bound) in callers.iter().zip(bound) {
        match bound {
            Some(values) => same.entry(values).or_default().push(caller),
            None => left.push(caller),
        }
    }
    for (values, callers) in same {
        let bound = policy.with(values);
        let mut told: HashMap<usize, Option<Told>> = HashMap::new();
        for (change, _) in callers.iter().flat_map(|caller| &caller.wants) {
            told.entry(*change).or_insert_with(|| {
                let change = judged.of_role.changes[*change].change;
                let sight = |row: &Option<Row>| match row.as_ref().map(|row| bound.decide(&change.table, row)) {
                    Some(Answer::Allow) => Some(Sight::Allowed),
                    Some(Answer::Deny) | None => Some(Sight::Denied),
                    Some(Answer::Lacking) => Some(Sight::Lacking),
                    Some(Answer::Ask) => None,
                };
                Some(Told { new: sight(&change.new)?, old: sight(&change.old)?, moved: false })
            });
        }
        let wanted = told.len();
        let told: HashMap<usize, Told> = told.into_iter().filter_map(|(change, told)| Some((change, told?))).collect();
        if told.len() < wanted {
            left.extend(callers);
            continue;
        }
        core.metrics.decided.increment(told.len() as u64);
        answered.push(Answered { callers, told, asked: false });
    }
    (answered, left)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    None,
    /// Only this table was written, but the policy may read it by way of a function.
    Perhaps,
    Moved,
}

/// Did the commit of this change also write what its policy reads?
fn moved_with(question: &Question, commit: &Remembered, change: &Change) -> Doubt {
    if question.reads.is_empty() && !question.reads_anything {
        return Doubt::None;
    }
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
