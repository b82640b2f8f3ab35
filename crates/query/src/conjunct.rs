//! Reads conditions: which equalities certainly hold, and which sub-queries are inside them.
//!
//! Part of the analyser. `Positive` means that false and null have the same effect here (WHERE, ON, a policy):
//! only there may a branch's own equalities be believed.

use std::{ops::ControlFlow, rc::Rc};

use sqlparser::ast::{BinaryOperator, Expr, Query, Visit, Visitor};

use crate::{
    analyse::{Analyser, EnvId, GivenUp, Reader},
    constant::{Constant, column_parts, constant, without_idle_casts},
    dependency::OperandKind,
    known::Family,
    scope::{Context, Equality, ScopeId, Var, resolve, widen},
};

/// Where an expression stands.
#[derive(Clone)]
pub(crate) struct Place {
    pub scope: ScopeId,
    pub env: Option<EnvId>,
    pub reader: Reader,
}

impl Analyser<'_> {
    fn column(&self, expr: &Expr, scope: ScopeId) -> Option<Var> {
        let var = |expr: &Expr| column_parts(expr).and_then(|parts| resolve(&self.scopes, scope, &parts));
        let family = |expr: &Expr| var(expr).and_then(|var| self.families[var]);
        var(without_idle_casts(expr, family))
    }

    pub fn output_var(&self, expr: &Expr, scope: ScopeId) -> Option<Var> {
        // A cast changes the output's type, so only the bare column keeps its variable.
        column_parts(expr).and_then(|parts| resolve(&self.scopes, scope, &parts))
    }

    fn constant(&self, expr: &Expr) -> Option<Constant> {
        constant(expr, self.params)
    }

    /// The equalities that hold whenever the condition is true.
    pub fn equalities(&self, expr: &Expr, scope: ScopeId) -> Vec<Equality> {
        let mut found = Vec::new();
        self.gather(expr, scope, &mut found);
        found
    }

    fn gather(&self, expr: &Expr, scope: ScopeId, found: &mut Vec<Equality>) {
        match expr {
            Expr::Nested(inner) => self.gather(inner, scope, found),
            Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
                self.gather(left, scope, found);
                self.gather(right, scope, found);
            }
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => match (self.column(left, scope), self.column(right, scope))
            {
                (Some(a), Some(b)) => found.push(Equality::Columns(a, b)),
                (Some(column), None) => self.bind(column, &[&**right], found),
                (None, Some(column)) => self.bind(column, &[&**left], found),
                (None, None) => {}
            },
            Expr::InList { expr, list, negated: false } => {
                if let Some(column) = self.column(expr, scope) {
                    self.bind(column, &list.iter().collect::<Vec<_>>(), found);
                }
            }
            Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => {
                let Some(column) = self.column(left, scope) else { return };
                let mut array = &**right;
                while let Expr::Nested(inner) = array {
                    array = inner;
                }
                match array {
                    Expr::Array(array) => self.bind(column, &array.elem.iter().collect::<Vec<_>>(), found),
                    other => {
                        if let Some(values) = self.constant(other).filter(|c| c.kind == OperandKind::Array)
                            && self.comparable(column, &values)
                        {
                            found.push(Equality::Values(column, Rc::new([values])));
                        }
                    }
                }
            }
            _ => {}
        }
    }

    fn bind(&self, column: Var, list: &[&Expr], found: &mut Vec<Equality>) {
        // A name that is a column somewhere is never taken for a constant.
        let value = |expr: &&Expr| {
            let scalar = self.constant(expr).filter(|c| c.kind != OperandKind::Array)?;
            (column_parts(expr).is_none() && self.comparable(column, &scalar)).then_some(scalar)
        };
        if let Some(values) = list.iter().map(value).collect::<Option<Vec<_>>>() {
            found.push(Equality::Values(column, values.into()));
        }
    }

    fn comparable(&self, column: Var, constant: &Constant) -> bool {
        let family: Option<Family> = self.families[column];
        family.is_some() && (constant.kind == OperandKind::Untyped || constant.family == family)
    }

    /// Looks into the sub-queries of a condition that filters. `context` already holds its own equalities.
    pub fn filter(&mut self, expr: &Expr, place: &Place, context: &Context) -> Result<(), GivenUp> {
        match expr {
            Expr::Nested(inner) => self.filter(inner, place, context),
            Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
                self.filter(left, place, context)?;
                self.filter(right, place, context)
            }
            Expr::BinaryOp { left, op: BinaryOperator::Or, right } => {
                for branch in [left, right] {
                    let inside = widen(context, self.equalities(branch, place.scope));
                    self.filter(branch, place, &inside)?;
                }
                Ok(())
            }
            Expr::InSubquery { expr, subquery, negated: false } => {
                self.subqueries(&**expr, place, context)?;
                let column = self.column(expr, place.scope);
                self.subquery(subquery, place, context, column)
            }
            Expr::Exists { subquery, .. } => self.subquery(subquery, place, context, None),
            other => self.subqueries(other, place, context),
        }
    }

    /// Looks into the sub-queries of anything, trusting nothing but the context.
    pub fn subqueries(&mut self, node: &impl Visit, place: &Place, context: &Context) -> Result<(), GivenUp> {
        let mut outermost = Outermost::default();
        let _ = node.visit(&mut outermost);
        for query in outermost.queries {
            self.subquery(&query, place, context, None)?;
        }
        Ok(())
    }

    /// With `equals`: the sub-query matters only where its one output has this column's value.
    fn subquery(&mut self, query: &Query, place: &Place, context: &Context, equals: Option<Var>) -> Result<(), GivenUp> {
        self.deeper(|this| {
            let bound = this.bind_query(query, Some(place.scope), place.env, place.reader)?;
            let link = match (equals, bound.outputs()) {
                (Some(column), Some([(_, Some(output))])) => Some(Equality::Columns(column, *output)),
                _ => None,
            };
            this.settle_query(&bound, &widen(context, link))
        })
    }
}

/// The sub-queries of an expression that are in no other.
#[derive(Default)]
struct Outermost {
    depth: usize,
    queries: Vec<Query>,
}

impl Visitor for Outermost {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        if self.depth == 0 {
            self.queries.push(query.clone());
        }
        self.depth += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }
}
