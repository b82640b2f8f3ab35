//! Which column a name means, and which columns are certainly equal.
//!
//! Used by the analyser. A variable stands for one column of one occurrence of a relation; columns that a sub-select
//! merely hands through keep their variable. A name that could mean two things means nothing.

use std::{collections::HashMap, rc::Rc};

use crate::{constant::Constant, known::Family};

pub(crate) type Var = usize;
pub(crate) type ScopeId = usize;

/// One thing in a FROM list, as names see it.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub alias: Option<String>,
    /// Of a table without an alias, so that `schema.table.column` finds it.
    pub schema: Option<String>,
    pub columns: Vec<(String, Option<Var>)>,
    /// There may be columns that we do not know of: an unknown name may be one of them.
    pub open: bool,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    pub parent: Option<ScopeId>,
    pub items: Vec<Item>,
    /// Columns merged by USING and NATURAL, and which side their bare name means; None: no single one.
    pub merged: HashMap<String, Option<Var>>,
}

const SYSTEM_COLUMNS: [&str; 6] = ["tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"];

pub(crate) fn resolve(scopes: &[Scope], from: ScopeId, parts: &[String]) -> Option<Var> {
    let mut next = Some(from);
    while let Some(id) = next {
        let scope = &scopes[id];
        match parts {
            [column] => {
                if let Some(merged) = scope.merged.get(column) {
                    return *merged;
                }
                if SYSTEM_COLUMNS.contains(&column.as_str()) || scope.items.iter().any(|item| item.open) {
                    return None;
                }
                let mut found = scope.items.iter().flat_map(|item| &item.columns).filter(|(name, _)| name == column);
                match (found.next(), found.next()) {
                    (Some((_, var)), None) => return *var,
                    (Some(_), Some(_)) => return None,
                    (None, _) => {}
                }
            }
            [qualifiers @ .., table, column] if qualifiers.len() <= 1 => {
                let named = |item: &&Item| {
                    item.alias.as_ref() == Some(table)
                        && qualifiers.first().is_none_or(|schema| item.schema.as_ref() == Some(schema))
                };
                let mut found = scope.items.iter().filter(named);
                match (found.next(), found.next()) {
                    (Some(item), None) => {
                        let mut columns = item.columns.iter().filter(|(name, _)| name == column);
                        return match (columns.next(), columns.next()) {
                            (Some((_, var)), None) => *var,
                            _ => None,
                        };
                    }
                    (Some(_), Some(_)) => return None,
                    (None, _) => {}
                }
            }
            _ => return None,
        }
        next = scope.parent;
    }
    None
}

/// `column = column` or `column = one of these constants`.
#[derive(Debug, Clone)]
pub(crate) enum Equality {
    Columns(Var, Var),
    Values(Var, Rc<[Constant]>),
}

/// What holds for every combination of rows that can influence the result. Shared, never changed.
pub(crate) type Context = Rc<Vec<Equality>>;

pub(crate) fn widen(context: &Context, more: impl IntoIterator<Item = Equality>) -> Context {
    let mut all = (**context).clone();
    all.extend(more);
    Rc::new(all)
}

/// Every set of constants that a column is bound to, directly or through equal columns.
pub(crate) fn values_of(var: Var, context: &[Equality], families: &[Option<Family>]) -> Vec<Rc<[Constant]>> {
    let (mut seen, mut sets) = (vec![var], Vec::new());
    let mut at = 0;
    while let Some(current) = seen.get(at).copied() {
        at += 1;
        for equality in context {
            match equality {
                Equality::Values(column, values) if *column == current => sets.push(values.clone()),
                Equality::Columns(a, b) if *a == current || *b == current => {
                    let other = if *a == current { *b } else { *a };
                    // Equal across families says nothing about texts (1 = 1.0).
                    if families[other].is_some() && families[other] == families[var] && !seen.contains(&other) {
                        seen.push(other);
                    }
                }
                _ => {}
            }
        }
    }
    sets
}
