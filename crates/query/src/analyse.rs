//! Finds every relation that a query reads and narrows it by equality where that is proven.
//!
//! The rule: a table is narrowed by column c to values V only if no row with c outside V can influence the result.
//! Called by the planner, which adds whatever the plan reads besides. Whatever is not understood here narrows nothing:
//! [`GivenUp`] means that every table counts whole.
//!
//! How: each occurrence of a table is looked at in a context, the equalities that hold for every combination of rows
//! that matters at that place. WHERE and inner joins add to the context of all, ON of an outer join only to its
//! nullable side, an AND to the sub-queries beside it, a branch of an OR to those inside it, a NOT to nobody.

use std::{rc::Rc, sync::Arc};

use sqlparser::ast::Query;
use walcast_model::TableName;

use crate::{
    constant::Constant,
    dependency::{Dependency, Operand, OperandKind, condense},
    known::{Family, Known, KnownRelation},
    scope::{Context, Equality, Item, Scope, ScopeId, Var, values_of, widen},
};

/// Nothing is narrowed; the reason is for `explain`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GivenUp(pub String);

/// A query that names more than this is not narrowed, so that nested CTEs cannot multiply without end.
const MAX_OCCURRENCES: usize = 2_000;
const MAX_DEPTH: usize = 48;
/// More values than this are not worth a tag each.
const MAX_VALUES: usize = 64;

#[derive(Debug, Default)]
pub struct Analysis {
    pub dependencies: Vec<Dependency>,
    /// Columns of tables that count whole, whose value is known: each would narrow its table if its values were tags.
    pub untagged: Vec<(TableName, String)>,
}

/// `param_types` are those of $1, $2, … as the header declares them.
pub fn analyse(query: &Query, param_types: &[String], known: &Known) -> Result<Analysis, GivenUp> {
    let mut analyser = Analyser::new(param_types, known);
    analyser.query(query, None, None, Rc::new(Vec::new()), Reader::Caller)?;
    let dependencies = condense(analyser.found);
    let mut untagged = analyser.untagged;
    untagged.retain(|(table, _)| dependencies.iter().any(|found| found.table == *table && found.narrow.is_none()));
    untagged.sort();
    untagged.dedup();
    Ok(Analysis { dependencies, untagged })
}

/// Whose rights decide which policies apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Caller,
    /// A view's owner: any policy may apply, none certainly does.
    Owner,
}

pub(crate) type EnvId = usize;

/// A CTE's name, visible to what follows it.
pub(crate) struct Env {
    pub name: String,
    /// None inside a recursive CTE's own body: whatever it yields is unknown.
    pub query: Option<Rc<Query>>,
    pub aliases: Vec<String>,
    /// What the body itself sees.
    pub inside: Option<EnvId>,
    pub recursive: bool,
    /// Around the query that the WITH belongs to, wherever the name is used.
    pub scope: Option<ScopeId>,
    pub parent: Option<EnvId>,
}

pub(crate) struct Occurrence {
    pub relation: Arc<KnownRelation>,
    pub first: Var,
    pub reader: Reader,
    /// Where its policies find its columns.
    pub policy_scope: ScopeId,
    /// What its policies certainly leave of it: nothing else reaches the query.
    pub left: Vec<Equality>,
}

pub(crate) struct Analyser<'k> {
    pub params: &'k [String],
    pub known: &'k Known,
    pub scopes: Vec<Scope>,
    pub families: Vec<Option<Family>>,
    pub envs: Vec<Env>,
    pub occurrences: usize,
    pub depth: usize,
    pub found: Vec<Dependency>,
    pub untagged: Vec<(TableName, String)>,
}

impl<'k> Analyser<'k> {
    fn new(params: &'k [String], known: &'k Known) -> Analyser<'k> {
        Analyser {
            params,
            known,
            scopes: Vec::new(),
            families: Vec::new(),
            envs: Vec::new(),
            occurrences: 0,
            depth: 0,
            found: Vec::new(),
            untagged: Vec::new(),
        }
    }

    pub fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, GivenUp>) -> Result<T, GivenUp> {
        if self.depth >= MAX_DEPTH {
            return Err(GivenUp("the query, its views or its policies are nested too deeply".into()));
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }

    pub fn scope(&mut self, scope: Scope) -> ScopeId {
        self.scopes.push(scope);
        self.scopes.len() - 1
    }

    /// A value that is no column of a table.
    pub fn fresh(&mut self, family: Option<Family>) -> Var {
        self.families.push(family);
        self.families.len() - 1
    }

    pub fn occurrence(&mut self, relation: Arc<KnownRelation>, reader: Reader) -> Result<Occurrence, GivenUp> {
        self.occurrences += 1;
        if self.occurrences > MAX_OCCURRENCES {
            return Err(GivenUp("the query names too many relations, counting each use of a CTE".into()));
        }
        let first = self.families.len();
        self.families.extend(relation.columns.iter().map(|column| column.family));
        let mut occurrence = Occurrence { relation, first, reader, policy_scope: 0, left: Vec::new() };
        self.apply_policies(&mut occurrence);
        Ok(occurrence)
    }

    /// The occurrence in its final context: its own narrowing, then what its policies read.
    pub fn settle(&mut self, occurrence: &Occurrence, context: &Context) -> Result<(), GivenUp> {
        let context = &widen(context, occurrence.left.iter().cloned());
        let narrow = self.narrow(occurrence, context);
        if narrow.is_none() {
            self.note_untagged(occurrence, context);
        }
        self.found.push(Dependency { table: occurrence.relation.streamed.clone(), narrow });
        self.policies(occurrence, context)
    }

    fn narrow(&self, occurrence: &Occurrence, context: &Context) -> Option<(String, Vec<Operand>)> {
        let mut best: Option<(usize, String, Vec<Operand>)> = None;
        for (index, column) in occurrence.relation.columns.iter().enumerate() {
            let (Some(family), true) = (column.family, column.tagged) else { continue };
            for set in values_of(occurrence.first + index, context, &self.families) {
                let Some(operands) = operands(&set, family) else { continue };
                // One value before a few, a few before an array of unknown length; then the first column.
                let cost = match operands.as_slice() {
                    [one] if one.kind != OperandKind::Array => 1,
                    many if many.iter().all(|operand| operand.kind != OperandKind::Array) => many.len(),
                    _ => MAX_VALUES + 1,
                };
                if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                    best = Some((cost, column.name.clone(), operands));
                }
            }
        }
        best.map(|(_, column, operands)| (column, operands))
    }

    fn note_untagged(&mut self, occurrence: &Occurrence, context: &Context) {
        for (index, column) in occurrence.relation.columns.iter().enumerate() {
            let Some(family) = column.family.filter(|_| !column.tagged) else { continue };
            let sets = values_of(occurrence.first + index, context, &self.families);
            if sets.iter().any(|set| operands(set, family).is_some()) {
                self.untagged.push((occurrence.relation.streamed.clone(), column.name.clone()));
            }
        }
    }

    pub fn item(&self, occurrence: &Occurrence, alias: &str, schema: Option<&str>) -> Item {
        let columns = occurrence.relation.columns.iter().enumerate();
        Item {
            alias: Some(alias.to_owned()),
            schema: schema.map(str::to_owned),
            columns: columns.map(|(index, column)| (column.name.clone(), Some(occurrence.first + index))).collect(),
            open: false,
        }
    }
}

fn operands(set: &[Constant], family: Family) -> Option<Vec<Operand>> {
    if set.is_empty() || set.len() > MAX_VALUES {
        return None;
    }
    let operand = |constant: &Constant| {
        let fits = match constant.kind {
            OperandKind::Untyped => true,
            OperandKind::Scalar | OperandKind::Array => constant.family == Some(family),
        };
        fits.then(|| Operand { sql: constant.sql.clone(), kind: constant.kind, family })
    };
    set.iter().map(operand).collect()
}

#[cfg(test)]
#[path = "analyse_tests.rs"]
mod tests;
