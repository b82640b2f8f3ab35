//! From PostgreSQL's own print of an expression to a [`Node`]. Knows a proven few forms, and refuses every other.

use sqlparser::{
    ast::{
        BinaryOperator, CastKind, DataType, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, Ident,
        Query, SelectItem, SetExpr, UnaryOperator, Value,
    },
    dialect::PostgreSqlDialect,
    parser::Parser,
};
use walcast_model::{Collation, Family};

use super::{Asked, Node, Operand, Relation};
use crate::{claims_functions::KNOWN, rules::ColumnRule};

/// Functions of PostgreSQL that read nothing but their arguments and the settings of the transaction.
const PURE: [&str; 14] = [
    "current_setting",
    "coalesce",
    "nullif",
    "lower",
    "upper",
    "split_part",
    "btrim",
    "string_to_array",
    "replace",
    "left",
    "right",
    "concat",
    "jsonb_build_array",
    "to_jsonb",
];
const LONGEST: usize = 4_000;

pub struct Compiler<'a> {
    columns: &'a [ColumnRule],
    pub asked: Vec<Asked>,
}

impl<'a> Compiler<'a> {
    pub fn new(columns: &'a [ColumnRule]) -> Compiler<'a> {
        Compiler { columns, asked: Vec::new() }
    }

    pub fn expression(&mut self, text: &str) -> Option<Node> {
        // A list of thousands of conditions is a tree as deep: whoever wrote it must not end the process.
        if text.len() > LONGEST {
            return None;
        }
        let mut parser = Parser::new(&PostgreSqlDialect {}).with_recursion_limit(60).try_with_sql(text).ok()?;
        let expr = parser.parse_expr().ok()?;
        // Something behind it: the text was not understood as a whole.
        parser.expect_token(&sqlparser::tokenizer::Token::EOF).ok()?;
        self.node(&expr)
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
        let asked = Asked { sql: format!("({expr})"), list };
        let at = self.asked.iter().position(|known| *known == asked).unwrap_or_else(|| {
            self.asked.push(asked);
            self.asked.len() - 1
        });
        Operand::Asked(at)
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

/// Reads no column, no table and no clock: the same for every row that one caller asks for.
fn is_callers(expr: &Expr) -> bool {
    match expr {
        Expr::Nested(inner) | Expr::IsNull(inner) | Expr::IsNotNull(inner) | Expr::IsTrue(inner) | Expr::IsFalse(inner) => {
            is_callers(inner)
        }
        Expr::UnaryOp { op: UnaryOperator::Not | UnaryOperator::Minus, expr } => is_callers(expr),
        Expr::Cast { kind: CastKind::DoubleColon | CastKind::Cast, expr, data_type, format: None, .. } => {
            is_plain(data_type) && is_callers(expr)
        }
        Expr::Value(value) => match &value.value {
            Value::Number(..) | Value::Boolean(_) | Value::Null => true,
            // The question prints it again, which is certain only where nothing in it has to be doubled.
            Value::SingleQuotedString(text) => !text.contains(['\'', '\\']),
            _ => false,
        },
        Expr::Array(array) => array.elem.iter().all(is_callers),
        Expr::BinaryOp { left, op, right } => {
            let known = matches!(
                op,
                BinaryOperator::LongArrow
                    | BinaryOperator::Arrow
                    | BinaryOperator::HashArrow
                    | BinaryOperator::HashLongArrow
                    | BinaryOperator::StringConcat
                    | BinaryOperator::And
                    | BinaryOperator::Or
                    | BinaryOperator::Eq
                    | BinaryOperator::NotEq
            );
            known && is_callers(left) && is_callers(right)
        }
        Expr::Function(function) => is_callers_function(function),
        Expr::Subquery(query) => only_expression(query).is_some_and(is_callers),
        _ => false,
    }
}

fn is_callers_function(function: &Function) -> bool {
    let name: Vec<&str> = function.name.0.iter().filter_map(|part| part.as_ident().map(|ident| ident.value.as_str())).collect();
    let plain = function.over.is_none()
        && function.filter.is_none()
        && function.within_group.is_empty()
        && function.null_treatment.is_none();
    let arguments: Option<Vec<&Expr>> = match &function.args {
        // CURRENT_USER and SESSION_USER are written without: who the caller is, is part of the group anyway.
        FunctionArguments::None => Some(Vec::new()),
        FunctionArguments::List(list) if list.clauses.is_empty() && list.duplicate_treatment.is_none() => list
            .args
            .iter()
            .map(|argument| match argument {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr),
                _ => None,
            })
            .collect(),
        _ => None,
    };
    let known = match name.as_slice() {
        [name] => {
            let name = name.to_ascii_lowercase();
            PURE.contains(&name.as_str()) || (name == "current_user" && matches!(function.args, FunctionArguments::None))
        }
        // Whoever compiles has looked into their bodies.
        [schema, name] => KNOWN.contains(&(*schema, *name)),
        _ => false,
    };
    let Some(arguments) = arguments else { return false };
    // Other settings may differ between the transaction that asks this and the one that would evaluate the policy.
    if name.last().is_some_and(|name| name.eq_ignore_ascii_case("current_setting"))
        && !arguments.first().is_some_and(|name| is_request(name))
    {
        return false;
    }
    known && plain && arguments.into_iter().all(is_callers)
}

/// `'request.jwt.…'`: what every question carries.
fn is_request(name: &Expr) -> bool {
    match name {
        Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => is_request(inner),
        Expr::Value(value) => matches!(&value.value, Value::SingleQuotedString(text) if text.starts_with("request.jwt.")),
        _ => false,
    }
}

/// Types whose input reads no clock, no setting and no catalog.
fn is_plain(data_type: &DataType) -> bool {
    match data_type {
        DataType::Text
        | DataType::Varchar(None)
        | DataType::CharacterVarying(None)
        | DataType::Uuid
        | DataType::Boolean
        | DataType::Bool
        | DataType::SmallInt(None)
        | DataType::Integer(None)
        | DataType::Int(None)
        | DataType::BigInt(None)
        | DataType::JSON
        | DataType::JSONB => true,
        DataType::Array(sqlparser::ast::ArrayElemTypeDef::SquareBracket(element, None)) => is_plain(element),
        _ => false,
    }
}

/// `(select expression)`: how a policy has its claims read once for a statement.
fn only_expression(query: &Query) -> Option<&Expr> {
    let Query { with: None, body, order_by: None, limit_clause: None, fetch: None, .. } = query else { return None };
    let SetExpr::Select(select) = &**body else { return None };
    let ungrouped = matches!(&select.group_by, GroupByExpr::Expressions(by, with) if by.is_empty() && with.is_empty());
    let bare = select.from.is_empty()
        && select.selection.is_none()
        && select.having.is_none()
        && select.distinct.is_none()
        && select.into.is_none()
        && ungrouped;
    match select.projection.as_slice() {
        [SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. }] if bare => Some(expr),
        _ => None,
    }
}
