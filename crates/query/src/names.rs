//! SQL names as PostgreSQL folds them, and every relation that a query names anywhere.

use std::ops::ControlFlow;

use sqlparser::ast::{Ident, ObjectName, ObjectNamePart, Query, SetExpr, TableFactor, Visit, Visitor};

use crate::known::Reference;

pub(crate) fn fold(ident: &Ident) -> String {
    if ident.quote_style.is_some() { ident.value.clone() } else { ident.value.to_ascii_lowercase() }
}

/// Schema and name; a database before them is dropped.
pub(crate) fn reference(name: &ObjectName) -> Option<Reference> {
    let parts: Option<Vec<String>> = name
        .0
        .iter()
        .map(|part| match part {
            ObjectNamePart::Identifier(ident) => Some(fold(ident)),
            ObjectNamePart::Function(_) => None,
        })
        .collect();
    match parts?.as_slice() {
        [table] => Some((None, table.clone())),
        [schema, table] | [_, schema, table] => Some((Some(schema.clone()), table.clone())),
        _ => None,
    }
}

/// The table of `TABLE name`, whose case the parser has kept but whose quotes it has dropped.
pub(crate) fn table_command(table: &sqlparser::ast::Table) -> Option<Reference> {
    let name = table.table_name.clone()?;
    let plain = |part: &str| part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let schema = table.schema_name.clone();
    (plain(&name) && schema.as_deref().is_none_or(plain)).then_some((schema, name))
}

struct Names(Vec<Reference>, bool);

impl Visitor for Names {
    type Break = ();

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<()> {
        match reference(relation) {
            Some(reference) => self.0.push(reference),
            None => self.1 = false,
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.body(&query.body);
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        if let TableFactor::Table { name, .. } = factor
            && let Some(reference) = reference(name)
        {
            self.0.push(reference);
        }
        ControlFlow::Continue(())
    }
}

impl Names {
    fn body(&mut self, body: &SetExpr) {
        match body {
            SetExpr::Table(table) => match table_command(table) {
                Some(reference) => self.0.push(reference),
                None => self.1 = false,
            },
            SetExpr::SetOperation { left, right, .. } => {
                self.body(left);
                self.body(right);
            }
            _ => {}
        }
    }
}

/// Every relation, CTEs and functions in FROM included; None if a name could not be read.
pub(crate) fn relations(node: &impl Visit) -> Option<Vec<Reference>> {
    let mut names = Names(Vec::new(), true);
    let _ = node.visit(&mut names);
    names.1.then_some(names.0)
}
