//! From PostgreSQL's own print of an expression to a [`Node`]. Knows a proven few forms, and refuses every other.

use sqlparser::ast::{BinaryOperator, CastKind, DataType, Expr, Ident, UnaryOperator};
use walcast_model::{Collation, Family};

use super::{Node, Operand, Relation, bind::Asked, caller::is_callers, text::parse};
use crate::rules::ColumnRule;

pub struct Compiler<'a> {
    columns: &'a [ColumnRule],
    pub asked: Vec<Asked>,
}

impl<'a> Compiler<'a> {
    pub fn new(columns: &'a [ColumnRule]) -> Compiler<'a> {
        Compiler { columns, asked: Vec::new() }
    }

    pub fn expression(&mut self, text: &str) -> Option<Node> {
        self.node(&parse(text)?)
    }

    fn node(&mut self, expr: &Expr) -> Option<Node> {
        // The claims alone decide: whatever it is, PostgreSQL says once what it comes to.
        if is_callers(expr) {
            return Some(Node::Bool(self.ask(expr, false)));
        }
        match expr {
            Expr::Nested(inner) => self.node(inner),
            Expr::BinaryOp { left, op: BinaryOperator::And, right } => Some(Node::And(vec![self.node(left)?, self.node(right)?])),
            Expr::BinaryOp { left, op: BinaryOperator::Or, right } => Some(Node::Or(vec![self.node(left)?, self.node(right)?])),
            Expr::BinaryOp { left, op, right } => {
                let relation = match op {
                    BinaryOperator::Eq => Relation::Equal,
                    BinaryOperator::NotEq => Relation::NotEqual,
                    BinaryOperator::Lt => Relation::Less,
                    BinaryOperator::LtEq => Relation::LessOrEqual,
                    BinaryOperator::Gt => Relation::Greater,
                    BinaryOperator::GtEq => Relation::GreaterOrEqual,
                    _ => return None,
                };
                Some(Node::Compare(self.operand(left)?, relation, self.operand(right)?))
            }
            Expr::IsDistinctFrom(left, right) => {
                Some(Node::Compare(self.operand(left)?, Relation::Distinct, self.operand(right)?))
            }
            Expr::IsNotDistinctFrom(left, right) => {
                Some(Node::Compare(self.operand(left)?, Relation::NotDistinct, self.operand(right)?))
            }
            Expr::UnaryOp { op: UnaryOperator::Not, expr } => Some(Node::Not(Box::new(self.node(expr)?))),
            Expr::IsNull(inner) => Some(Node::IsNull(self.operand(inner)?)),
            Expr::IsNotNull(inner) => Some(Node::Not(Box::new(Node::IsNull(self.operand(inner)?)))),
            Expr::IsTrue(inner) => Some(Node::Is(Box::new(self.node(inner)?), true)),
            Expr::IsFalse(inner) => Some(Node::Is(Box::new(self.node(inner)?), false)),
            Expr::IsNotTrue(inner) => Some(Node::Not(Box::new(Node::Is(Box::new(self.node(inner)?), true)))),
            Expr::IsNotFalse(inner) => Some(Node::Not(Box::new(Node::Is(Box::new(self.node(inner)?), false)))),
            Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => self.among(left, right, false),
            Expr::AllOp { left, compare_op: BinaryOperator::NotEq, right } => self.among(left, right, true),
            Expr::Identifier(_) => match self.operand(expr)? {
                operand @ Operand::Column(_, Family::Bool) => Some(Node::Bool(operand)),
                _ => None,
            },
            _ => None,
        }
    }

    /// The elements of an array that PostgreSQL prints, or one array that the claims give.
    fn among(&mut self, left: &Expr, right: &Expr, negated: bool) -> Option<Node> {
        let operand = self.operand(left)?;
        if !is_callers(right) {
            return None;
        }
        let list = vec![self.ask(right, true)];
        Some(Node::Among { operand, list, negated })
    }

    fn operand(&mut self, expr: &Expr) -> Option<Operand> {
        if is_callers(expr) {
            return Some(self.ask(expr, false));
        }
        match expr {
            Expr::Nested(inner) => self.operand(inner),
            Expr::Identifier(name) => {
                let column = self.column(name)?;
                is_comparable(column.family).then(|| Operand::Column(column.name.clone(), column.family))
            }
            Expr::Cast { kind: CastKind::DoubleColon | CastKind::Cast, expr: inner, data_type, format: None, .. } => {
                let Operand::Column(name, family) = self.operand(inner)? else { return None };
                Some(Operand::Column(name, cast(family, data_type)?))
            }
            _ => None,
        }
    }

    fn column(&self, name: &Ident) -> Option<&'a ColumnRule> {
        // PostgreSQL quotes what is not plain lower case: without quotes that is a keyword, as CURRENT_ROLE is.
        if name.quote_style.is_none() && name.value.bytes().any(|b| b.is_ascii_uppercase()) {
            return None;
        }
        self.columns.iter().find(|column| column.name == name.value && !column.is_domain)
    }

    fn ask(&mut self, expr: &Expr, list: bool) -> Operand {
        Operand::Asked(Asked::add(&mut self.asked, expr, list))
    }
}

/// Text, uuid, integer and boolean: what is held against PostgreSQL by a differential test.
fn is_comparable(family: Family) -> bool {
    matches!(family, Family::Text(_) | Family::Uuid | Family::Integer | Family::Bool)
}

/// A cast of a column that leaves its text as it is.
fn cast(family: Family, to: &DataType) -> Option<Family> {
    // Of the database's own collation: equality is of bytes, the order is not known.
    let plain = Family::Text(Collation { by_bytes: false, folds_ascii: false });
    match (family, to) {
        (Family::Text(_), DataType::Text | DataType::Varchar(None) | DataType::CharacterVarying(None)) => Some(family),
        (Family::Uuid | Family::Integer, DataType::Text) => Some(plain),
        (Family::Integer, DataType::BigInt(None)) => Some(family),
        _ => None,
    }
}
