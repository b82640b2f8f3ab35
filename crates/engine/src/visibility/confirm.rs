//! Who still sees a row of which a deciding value is not in the stream.
//!
//! Called by the judge before it concludes.

use walcast_auth::{
    ColumnRule, Question, Rules,
    row_visibility::{self, Asking},
};
use walcast_pg::quote_ident;

use super::{
    ASK_TIMEOUT, Placed,
    ask::{CALLERS, is_of_data},
    judge::{Answered, Sight},
    patiently,
};
use crate::Core;

/// A value that decides is not in the stream: who cannot see the row as it stands now is told nothing of it. The others are told to
/// read again, which shows them no more.
pub(super) async fn confirm(core: &Core, rules: &Rules, changes: &[Placed<'_>], answered: &mut [Answered<'_>]) {
    let keys: Vec<&ColumnRule> = rules.columns.iter().filter(|column| column.primary).collect();
    if keys.is_empty() || keys.iter().any(|key| !key.visible) {
        // Nobody could be shown it anyway, and who sees it cannot be asked.
        let lacking = answered.iter_mut().flat_map(|one| one.told.values_mut()).filter(|told| told.new == Sight::Lacking);
        lacking.for_each(|told| told.new = Sight::Denied);
        return;
    }
    let lacks = |(at, one): (usize, &Answered<'_>)| {
        let of_one =
            one.told.iter().filter(|(change, told)| told.new == Sight::Lacking && changes[**change].change.new.is_some());
        let of_one: Vec<usize> = of_one.map(|(change, _)| *change).collect();
        (!of_one.is_empty()).then_some((at, of_one))
    };
    let lacking: Vec<(usize, Vec<usize>)> = answered.iter().enumerate().filter_map(lacks).collect();
    if lacking.is_empty() {
        return;
    }
    let (schema, table) = (quote_ident(rules.name.schema()), quote_ident(rules.name.table()));
    let same: Vec<String> =
        keys.iter().map(|key| quote_ident(&key.name)).map(|key| format!("walcast_now.{key} = {table}.{key}")).collect();
    let expression = format!("exists (select from {schema}.{table} as walcast_now where {})", same.join(" and "));
    let question = Question::of_row(expression, keys.iter().map(|key| key.name.clone()).collect());
    for some in lacking.chunks(CALLERS) {
        let of_one = |(at, wanted): &(usize, Vec<usize>)| {
            let images =
                wanted.iter().filter_map(|change| Some((&*changes[*change].change.table, changes[*change].change.new.as_ref()?)));
            Asking { claims: &answered[*at].callers[0].claims, images: images.collect(), nonce: core.next_nonce() }
        };
        let asking: Vec<Asking<'_>> = some.iter().map(of_one).collect();
        core.metrics.asked.increment(asking.iter().map(|one| one.images.len() as u64).sum());
        match patiently(|| row_visibility::ask_each(&core.pool, rules, &question, &asking, ASK_TIMEOUT)).await {
            Ok(verdicts) => {
                for ((at, wanted), verdicts) in some.iter().zip(verdicts) {
                    let gone = wanted
                        .iter()
                        .zip(verdicts.allowed.iter().zip(&verdicts.told))
                        .filter(|(_, (sees, told))| **told && !**sees);
                    for (change, _) in gone {
                        answered[*at].told.entry(*change).and_modify(|told| told.new = Sight::Denied);
                    }
                }
            }
            Err(error) => {
                let code = error.sqlstate().unwrap_or("none");
                tracing::warn!(table = %rules.name, code, "who still sees a row cannot be asked");
                // A query of theirs would fail as well: nothing is told. Where the database is away, they read again.
                for (at, wanted) in some.iter().filter(|_| is_of_data(&error)) {
                    for change in wanted {
                        answered[*at].told.entry(*change).and_modify(|told| told.new = Sight::Denied);
                    }
                }
            }
        }
    }
}
