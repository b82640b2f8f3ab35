//! Who may see which change: rules per (table, role), one decision for all whose claims are the same to the policy.
//!
//! Called by the announcer with a batch, by a join with its replay, and by whoever wants a decision explained. In this order:
//! [`judge`] decides in memory what row and claims alone decide; [`ask`] looks for a remembered answer, and asks PostgreSQL for the
//! rest. Whatever is in doubt is withheld and said, but only to those who could see it now.

mod ask;
mod confirm;
mod explain;
mod judge;
mod remembered;
mod rule_book;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::join_all};
use walcast_auth::{RowRule, Rules};
use walcast_model::{Change, Claims, TableId};
use walcast_pg::PgError;

use crate::{
    Core,
    pipeline::Remembered,
    subscriptions::{Audience, Wanting},
};

pub(crate) use ask::heard_of;
pub use explain::{ExplainError, RowAsked};
pub use rule_book::RuleBook;

/// A change and one subscriber whose bindings match it.
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

/// A change at its place in the stream.
#[derive(Clone, Copy)]
struct Placed<'a> {
    commit: &'a Remembered,
    index: u32,
    change: &'a Change,
}

/// Who of one role wants to see which changes of one table.
struct OfRole<'a> {
    changes: Vec<Placed<'a>>,
    callers: Vec<Caller>,
}

/// One set of claims, and what it wants: which change, for which candidate.
struct Caller {
    claims: Claims,
    wants: Vec<(usize, usize)>,
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
    let claims: Vec<Claims> = candidates.iter().map(|candidate| candidate.audience.claims.clone()).collect();
    let mut verdicts = vec![Verdict::Hide; candidates.len()];
    let of_roles = by_role(candidates, &claims);
    for side_by_side in of_roles.chunks(AT_ONCE) {
        let mut judging = Vec::with_capacity(side_by_side.len());
        for of_role in side_by_side {
            judging.push(judge::judge(core, of_role).boxed());
        }
        for (at, verdict) in join_all(judging).await.into_iter().flatten() {
            verdicts[at] = verdict;
        }
    }
    verdicts
}

fn by_role<'a>(candidates: &[Candidate<'a>], claims: &[Claims]) -> Vec<OfRole<'a>> {
    let mut of_roles: Vec<OfRole<'a>> = Vec::new();
    let mut roles: HashMap<(TableId, &str), usize> = HashMap::new();
    let mut callers: HashMap<(usize, u128), usize> = HashMap::new();
    for (at, (candidate, claims)) in candidates.iter().zip(claims).enumerate() {
        let role = *roles.entry((candidate.change.table.id, claims.role())).or_insert_with(|| {
            of_roles.push(OfRole { changes: Vec::new(), callers: Vec::new() });
            of_roles.len() - 1
        });
        let OfRole { changes, callers: of_role } = &mut of_roles[role];
        // Candidates come in the order of their changes.
        let place = |placed: &Placed<'_>| (placed.commit.commit.lsn, placed.index);
        if changes.last().is_none_or(|last| place(last) != (candidate.commit.commit.lsn, candidate.index)) {
            changes.push(Placed { commit: candidate.commit, index: candidate.index, change: candidate.change });
        }
        let caller = *callers.entry((role, claims.exact())).or_insert_with(|| {
            of_role.push(Caller { claims: claims.clone(), wants: Vec::new() });
            of_role.len() - 1
        });
        of_role[caller].wants.push((changes.len() - 1, at));
    }
    of_roles
}

/// Asks what a table's policies make of these claims before the first change does. Those who come together are asked for
/// together, and whoever is known costs nothing. It decides nothing, so a failure is only said.
pub async fn prepare(core: &Core, claims: &Claims, rules: &Rules) {
    let RowRule::Ask(question) = &rules.rows else { return };
    let binders = [question.policy.as_ref().map(|policy| &policy.binder), question.set.as_ref().map(|form| &form.binder)];
    // The one that decides first; the other is asked for when it is needed.
    let Some(binder) = binders.into_iter().flatten().next() else { return };
    if let Err(error) = binder.prepare(&core.pool, claims, ASK_TIMEOUT).await {
        tracing::debug!(table = %rules.name, role = claims.role(), %error, "claims will be asked for with the first change");
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
