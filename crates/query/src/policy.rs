//! Row security: what a table's policies read, and what they leave of it.
//!
//! Part of the analyser. Permissive policies are branches of an OR, restrictive ones are ANDed. Behind a view that
//! reads as its owner any policy may apply and none certainly does.

use std::sync::Arc;

use sqlparser::ast::Expr;

use crate::{
    analyse::{Analyser, GivenUp, Occurrence, Reader},
    conjunct::Place,
    known::KnownPolicy,
    scope::{Context, Scope, widen},
};

impl Analyser<'_> {
    /// Gives the policies their scope and finds what they certainly leave.
    pub fn apply_policies(&mut self, occurrence: &mut Occurrence) {
        let relation = Arc::clone(&occurrence.relation);
        // PostgreSQL prints a policy with the table's own name, whatever the query calls it.
        let item = self.item(occurrence, relation.name.table(), Some(relation.name.schema()));
        occurrence.policy_scope = self.scope(Scope { items: vec![item], ..Scope::default() });
        if occurrence.reader == Reader::Caller && relation.secured {
            let left = certain(&relation.policies).flat_map(|expr| self.equalities(expr, occurrence.policy_scope)).collect();
            occurrence.left = left;
        }
    }

    pub fn policies(&mut self, occurrence: &Occurrence, context: &Context) -> Result<(), GivenUp> {
        let relation = Arc::clone(&occurrence.relation);
        let certainly = occurrence.reader == Reader::Caller;
        if relation.policies.is_empty() || (certainly && !relation.secured) {
            return Ok(());
        }
        let place = Place { scope: occurrence.policy_scope, env: None, reader: occurrence.reader };
        for policy in relation.policies.iter().filter(|policy| policy.applies || !certainly) {
            let Some(expr) = &policy.using else { continue };
            let inside = widen(context, self.equalities(expr, place.scope));
            self.deeper(|this| this.filter(expr, &place, &inside))?;
        }
        Ok(())
    }
}

/// The expressions that every visible row satisfies: the restrictive ones, and a permissive one that is alone.
fn certain(policies: &[KnownPolicy]) -> impl Iterator<Item = &Arc<Expr>> {
    let alone = policies.iter().filter(|policy| policy.applies && policy.permissive).count() == 1;
    policies
        .iter()
        .filter(move |policy| policy.applies && (alone || !policy.permissive))
        .filter_map(|policy| policy.using.as_ref())
}
