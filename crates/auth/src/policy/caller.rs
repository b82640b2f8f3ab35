//! Which parts of a policy's text read nothing but who is asking: no column, no table, no clock.

use sqlparser::ast::{
    BinaryOperator, CastKind, DataType, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, Query,
    SelectItem, SetExpr, UnaryOperator, Value, visit_expressions_mut,
};
use std::ops::ControlFlow;

use crate::claims_functions::KNOWN;

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

/// Reads no column, no table and no clock: the same for every row that one caller asks for.
pub fn is_callers(expr: &Expr) -> bool {
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
pub fn is_plain(data_type: &DataType) -> bool {
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

/// The same without its sub-selects: PostgreSQL evaluates those once for a statement, and a statement may serve many callers.
pub fn bare(expr: &Expr) -> Expr {
    let mut expr = expr.clone();
    let _ = visit_expressions_mut(&mut expr, |part| {
        if let Expr::Subquery(query) = part
            && let Some(only) = only_expression(query)
        {
            *part = Expr::Nested(Box::new(only.clone()));
        }
        ControlFlow::<()>::Continue(())
    });
    expr
}
