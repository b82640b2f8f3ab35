//! What a binding's filters mean, where PostgreSQL has to say it: when a client subscribes, and for a change in doubt.
//!
//! Called by a join, and by the announcer for those who may see a change. Whatever cannot be told is said, never guessed.

use std::{collections::HashMap, sync::Arc};

use futures_util::future::join_all;
use walcast_auth::{Question, Rules, binding_check, row_visibility};
use walcast_matcher::{Binding, Comparison, Condition, Filter, Is, Pattern, Test, Wants};
use walcast_model::{Claims, Family, Row, Table, TableId};
use walcast_pg::{quote_ident, quote_literal};

use crate::{
    Core,
    subscribe::SubscribeError,
    subscriptions::Wanted,
    visibility::{ASK_TIMEOUT, AT_ONCE, Candidate, IMAGES, Verdict, patiently},
};

/// Casts the values of checked filters, says how their columns compare, and has PostgreSQL try what it alone can tell.
pub async fn prepare(core: &Core, claims: &Claims, rules: &Rules, binding: &mut Binding) -> Result<(), SubscribeError> {
    for filter in &mut binding.filters {
        let Some(column) = rules.column(&filter.condition.column) else { continue };
        filter.family = column.family;
        filter.type_oid = Some(column.type_oid);
        let values = filter.condition.values_mut();
        if !values.is_empty() {
            let cast = binding_check::cast(&core.pool, claims, column, values).await?;
            values.iter_mut().zip(cast).for_each(|(value, cast)| *value = cast);
        }
        if let Some((expression, value)) = probe(filter, &column.sql_type) {
            binding_check::probe(&core.pool, claims, &column.name, &expression, &[value]).await?;
        }
    }
    Ok(())
}

/// What PostgreSQL must know of: the operator for the type, the pattern. None where nothing can be wrong.
fn probe(filter: &Filter, sql_type: &str) -> Option<(String, String)> {
    let null = format!("null::{sql_type}");
    match (&filter.condition.test, filter.family) {
        (Test::Pattern(Pattern::Like | Pattern::Ilike, _), Family::Text(_)) => None,
        (Test::Pattern(pattern @ (Pattern::Like | Pattern::Ilike), value), _) => {
            Some((format!("{null} {} ($1::text[])[1]", pattern.sql()), value.clone()))
        }
        // A strict operator is not tried on null: the pattern is tried on a text, too.
        (Test::Pattern(pattern, value), _) => {
            let sql = pattern.sql();
            Some((format!("{null} {sql} ($1::text[])[1], '' {sql} ($1::text[])[1]"), value.clone()))
        }
        (Test::Is(Is::Null), _) | (Test::Is(_), Family::Bool) => None,
        (Test::Is(is), _) => Some((format!("{null} {}", is.sql()), String::new())),
        (Test::Compare(comparison, value), Family::Opaque | Family::Label) => {
            Some((format!("{null} {} ($1::text[])[1]::{sql_type}", comparison.sql()), value.clone()))
        }
        (Test::In(values), Family::Opaque) => {
            Some((format!("{null} = ($1::text[])[1]::{sql_type}"), values.first().cloned().unwrap_or_default()))
        }
        (Test::Compare(..) | Test::In(_), _) => None,
    }
}

/// The filters over a row's columns. `rules` gives the types; without, a value takes its column's.
pub fn expression(filters: &[Filter], rules: Option<&Rules>) -> String {
    let parts: Vec<String> = filters.iter().map(|filter| condition(&filter.condition, rules)).collect();
    parts.join(" and ")
}

fn condition(condition: &Condition, rules: Option<&Rules>) -> String {
    let column = quote_ident(&condition.column);
    let sql_type = rules.and_then(|rules| rules.column(&condition.column)).map(|column| column.sql_type.as_str());
    let value = |value: &str| match sql_type {
        Some(sql_type) => format!("cast({} as {sql_type})", quote_literal(value)),
        None => quote_literal(value),
    };
    let test = match &condition.test {
        Test::Compare(comparison @ Comparison::Distinct, wanted) => format!("({column} {} {})", comparison.sql(), value(wanted)),
        Test::Compare(comparison, wanted) => format!("{column} {} {}", comparison.sql(), value(wanted)),
        Test::In(wanted) => {
            let wanted: Vec<String> = wanted.iter().map(|wanted| value(wanted)).collect();
            format!("{column} in ({})", wanted.join(", "))
        }
        Test::Pattern(pattern, wanted) => format!("{column} {} {}", pattern.sql(), quote_literal(wanted)),
        Test::Is(is) => format!("({column} {})", is.sql()),
    };
    if condition.negated { format!("(not ({test}))") } else { format!("({test})") }
}

/// Same table, same role, same expression: one statement for all the rows.
type Asked = (TableId, String, Arc<str>);

/// Leaves each candidate with the bindings that really want the change. A binding whose filter reads a column that the role
/// may not read would tell its value by what arrives: it hears nothing.
pub async fn settle_doubts(core: &Core, candidates: &mut [Candidate<'_>], verdicts: &mut [Verdict]) {
    let mut asked: HashMap<Asked, (Arc<Wanted>, Vec<usize>)> = HashMap::new();
    for (at, (candidate, verdict)) in candidates.iter_mut().zip(verdicts.iter_mut()).enumerate() {
        let (Verdict::Show { columns, .. } | Verdict::Error { columns, .. }) = verdict else { continue };
        let table = &candidate.change.table;
        let readable = |name: &str| table.column(name).is_some_and(|(index, _)| columns.get(index).copied().unwrap_or(false));
        if candidate.wanting.iter().any(|(_, wants)| *wants == Wants::Gone) {
            *verdict = Verdict::Unsure("a column of the filter is gone: subscribe again");
            continue;
        }
        if candidate.wanting.iter().any(|(wanted, wants)| *wants == Wants::Ask && retyped(&wanted.binding.filters, table)) {
            *verdict = Verdict::Unsure("a column of the filter has another type now: subscribe again");
            continue;
        }
        candidate.wanting.retain(|(wanted, _)| wanted.binding.filters.iter().all(|f| readable(&f.condition.column)));
        if candidate.wanting.is_empty() {
            *verdict = Verdict::Hide;
        } else if candidate.wanting.iter().any(|(_, wants)| *wants == Wants::Unchanged) {
            *verdict = Verdict::Unsure("a value that the filter needs is not in the stream: REPLICA IDENTITY FULL sends it");
        } else if candidate.wanting.iter().any(|(_, wants)| *wants == Wants::Ask) {
            let role = candidate.audience.claims.clone().role().to_owned();
            for (wanted, _) in candidate.wanting.iter().filter(|(_, wants)| *wants == Wants::Ask) {
                let key = (table.id, role.clone(), wanted.expression.clone());
                asked.entry(key).or_insert_with(|| (wanted.clone(), Vec::new())).1.push(at);
            }
        }
    }
    let mut answers: HashMap<(usize, Arc<str>), Option<bool>> = HashMap::new();
    let mut batches: Vec<(Asked, Arc<Wanted>, Vec<usize>)> = Vec::new();
    for (key, (wanted, of)) in asked {
        batches.extend(of.chunks(IMAGES).map(|of| (key.clone(), wanted.clone(), of.to_vec())));
    }
    // The announcer waits for this: what is not answered in time is told as such.
    let deadline = tokio::time::Instant::now() + ASK_TIMEOUT * 2;
    for side_by_side in batches.chunks(AT_ONCE) {
        let asking =
            side_by_side.iter().map(|(_, wanted, of)| tokio::time::timeout_at(deadline, ask(core, wanted, of, candidates)));
        for (((_, role, expression), wanted, of), told) in side_by_side.iter().zip(join_all(asking).await) {
            let told = told.ok().flatten();
            if told.is_none() {
                core.metrics.withheld_errors.increment(of.len() as u64);
                // By its columns: what is compared with is somebody's data.
                let columns: Vec<&str> = wanted.binding.filters.iter().map(|f| f.condition.column.as_str()).collect();
                tracing::warn!(%role, ?columns, "a filter cannot be asked: withheld");
            }
            let told = told.map_or_else(|| vec![None; of.len()], |told| told.into_iter().map(Some).collect());
            answers.extend(of.iter().zip(told).map(|(at, told)| ((*at, expression.clone()), told)));
        }
    }
    if answers.is_empty() {
        return;
    }
    for (at, (candidate, verdict)) in candidates.iter_mut().zip(verdicts).enumerate() {
        let mut failed = false;
        candidate.wanting.retain(|(wanted, wants)| {
            if *wants != Wants::Ask {
                return true;
            }
            match answers.get(&(at, wanted.expression.clone())) {
                Some(Some(true)) => true,
                Some(None) => {
                    failed = true;
                    false
                }
                Some(Some(false)) | None => false,
            }
        });
        if !matches!(verdict, Verdict::Show { .. } | Verdict::Error { .. }) {
            continue;
        }
        if failed {
            *verdict = Verdict::Unsure("the filter could not be evaluated");
        } else if candidate.wanting.is_empty() {
            *verdict = Verdict::Hide;
        }
    }
}

/// The values were cast to what the column was when the client subscribed: now they may mean something else.
fn retyped(filters: &[Filter], table: &Table) -> bool {
    let other = |filter: &Filter| match (filter.type_oid, table.column(&filter.condition.column)) {
        (Some(then), Some((_, now))) => then != now.type_oid,
        _ => false,
    };
    filters.iter().any(other)
}

/// None: no answer.
async fn ask(core: &Core, wanted: &Wanted, of: &[usize], candidates: &[Candidate<'_>]) -> Option<Vec<bool>> {
    let first = &candidates[*of.first()?];
    let claims = first.audience.claims.clone();
    let rules = core.rules.get(core, first.change.table.id, &claims).await.ok()??;
    let needs = wanted.binding.filters.iter().map(|filter| filter.condition.column.clone()).collect();
    let question = Question::of_row(wanted.expression.to_string(), needs);
    let images: Vec<(&Table, &Row)> = of
        .iter()
        .filter_map(|at| {
            let change = candidates[*at].change;
            Some((&*change.table, change.new.as_ref().or(change.old.as_ref())?))
        })
        .collect();
    core.metrics.asked.increment(images.len() as u64);
    let asking = row_visibility::Asking { claims: &claims, images, nonce: core.next_nonce() };
    let asked = patiently(|| row_visibility::ask(&core.pool, &rules, &question, &asking, ASK_TIMEOUT)).await;
    match asked {
        Ok(answer) if answer.allowed.len() == of.len() => Some(answer.allowed),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(table = %rules.name, code = error.sqlstate().unwrap_or("none"), "asking for a filter failed");
            None
        }
    }
}
