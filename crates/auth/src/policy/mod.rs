//! A table's policies for one role, where they are simple enough to be decided on the row image in memory.
//!
//! [`Policy::compile`] reads what PostgreSQL prints of an expression; whatever it does not know for certain makes the whole
//! not compilable, and PostgreSQL is asked for each row instead. What depends on the caller alone (`auth.uid()`, a claim, a
//! constant) is never interpreted here: PostgreSQL evaluates it, once for each set of claims ([`Binder`]).
//! [`SetForm`]: the same idea for any policy, so that one statement asks it for many callers.

mod bind;
mod caller;
mod compile;
mod decide;
mod set_form;
mod text;

use std::sync::Arc;

pub use bind::{Binder, Bound, Given, Values};
pub use decide::Answer;
pub use set_form::SetForm;
pub(crate) use set_form::{CALLER, column};
pub(crate) use text::{Hangs, hangs, parse};

use crate::rules::ColumnRule;

#[derive(Debug)]
pub struct Policy {
    root: Arc<Node>,
    pub binder: Binder,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    And(Vec<Node>),
    Or(Vec<Node>),
    Not(Box<Node>),
    /// True or false, never null: `IS TRUE`, `IS FALSE`.
    Is(Box<Node>, bool),
    IsNull(Operand),
    Compare(Operand, Relation, Operand),
    /// `= ANY`, `<> ALL`: equal to one of the list, or to none.
    Among {
        operand: Operand,
        list: Vec<Operand>,
        negated: bool,
    },
    /// A boolean column, or a boolean that the claims give.
    Bool(Operand),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Distinct,
    NotDistinct,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    /// A column by its name, and the family in which it is compared.
    Column(String, walcast_model::Family),
    /// One of what the binder asks for.
    Asked(usize),
}

/// A policy with everything that one caller's claims say of it.
#[derive(Debug, Clone)]
pub struct BoundPolicy {
    root: Arc<Node>,
    values: Arc<Values>,
}

impl Policy {
    /// `permissive` are alternatives, `restrictive` must all hold; each as PostgreSQL prints it with an empty search path.
    /// None: at least one of them is beyond what can be decided here.
    pub fn compile(permissive: &[String], restrictive: &[String], columns: &[ColumnRule]) -> Option<Policy> {
        let mut compiler = compile::Compiler::new(columns);
        let holds = |node| Node::Is(Box::new(node), true);
        let mut all = Vec::new();
        if !permissive.is_empty() {
            let any: Option<Vec<Node>> = permissive.iter().map(|text| compiler.expression(text).map(holds)).collect();
            all.push(Node::Or(any?));
        }
        for text in restrictive {
            all.push(holds(compiler.expression(text)?));
        }
        Some(Policy { root: Arc::new(Node::And(all)), binder: Binder::new(compiler.asked) })
    }

    pub fn with(&self, values: Arc<Values>) -> BoundPolicy {
        BoundPolicy { root: self.root.clone(), values }
    }
}
