//! Which expressions are known before a row is read: parameters, literals, claims.
//!
//! Used by the analyser. An expression that is not certainly such a constant is none.

use sqlparser::ast::{
    BinaryOperator, CastKind, DataType, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, Query,
    SelectItem, SetExpr, UnaryOperator, Value,
};

use crate::{
    dependency::OperandKind,
    known::{Family, Reference},
    names::{fold, reference},
};

/// A constant's text and what its comparison means; the family of an untyped literal comes from its column.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Constant {
    pub sql: String,
    pub family: Option<Family>,
    pub kind: OperandKind,
}

/// The type of a parameter by its number from 1, as the header declares it.
pub(crate) type ParamTypes<'a> = &'a [String];

pub(crate) fn constant(expr: &Expr, params: ParamTypes) -> Option<Constant> {
    let typed = |family| Some(Constant { sql: expr.to_string(), family, kind: OperandKind::Scalar });
    match expr {
        Expr::Nested(inner) => constant(inner, params),
        Expr::Value(value) => match &value.value {
            Value::SingleQuotedString(_) | Value::EscapedStringLiteral(_) => {
                Some(Constant { sql: expr.to_string(), family: None, kind: OperandKind::Untyped })
            }
            Value::Number(digits, _) if digits.chars().all(|c| c.is_ascii_digit()) => typed(Some(Family::Int)),
            Value::Boolean(_) => typed(Some(Family::Bool)),
            Value::Placeholder(name) => {
                let number: usize = name.strip_prefix('$')?.parse().ok()?;
                let type_name = params.get(number.checked_sub(1)?)?;
                match type_name.strip_suffix("[]") {
                    Some(element) => array(expr, Family::of(element)?),
                    None => typed(Some(Family::of(type_name)?)),
                }
            }
            _ => None,
        },
        Expr::UnaryOp { op: UnaryOperator::Minus, expr: inner } => match &**inner {
            Expr::Value(_) => {
                constant(inner, params).filter(|c| c.family == Some(Family::Int)).and_then(|_| typed(Some(Family::Int)))
            }
            _ => None,
        },
        Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr: inner, data_type, format: None } => {
            fixed(inner, params).then_some(())?;
            match data_type {
                DataType::Array(_) => array(expr, Family::of(data_type.to_string().strip_suffix("[]")?)?),
                _ => typed(Some(Family::of(&data_type.to_string())?)),
            }
        }
        Expr::BinaryOp { op: BinaryOperator::LongArrow | BinaryOperator::HashLongArrow, .. } => {
            fixed(expr, params).then(|| typed(Some(Family::Text)))?
        }
        Expr::Function(function) => typed(Some(claim_function(function)??)),
        Expr::Subquery(query) => {
            let inner = constant(only_expression(query)?, params)?;
            (inner.kind == OperandKind::Scalar).then(|| typed(inner.family))?
        }
        _ => None,
    }
}

fn array(expr: &Expr, family: Family) -> Option<Constant> {
    Some(Constant { sql: expr.to_string(), family: Some(family), kind: OperandKind::Array })
}

/// Does the expression read no row, whatever its type?
fn fixed(expr: &Expr, params: ParamTypes) -> bool {
    match expr {
        Expr::Nested(inner) | Expr::Cast { expr: inner, kind: CastKind::Cast | CastKind::DoubleColon, format: None, .. } => {
            fixed(inner, params)
        }
        Expr::Value(value) => {
            use Value::{Boolean, EscapedStringLiteral, Null, Number, Placeholder, SingleQuotedString};
            matches!(
                &value.value,
                Placeholder(_) | SingleQuotedString(_) | EscapedStringLiteral(_) | Number(..) | Boolean(_) | Null
            )
        }
        Expr::BinaryOp { left, op, right } => {
            use BinaryOperator::{Arrow, HashArrow, HashLongArrow, LongArrow};
            matches!(op, Arrow | LongArrow | HashArrow | HashLongArrow) && fixed(left, params) && fixed(right, params)
        }
        Expr::Function(function) => {
            claim_function(function).is_some() || is_plain(function, "coalesce", params) || is_plain(function, "nullif", params)
        }
        Expr::Subquery(query) => only_expression(query).is_some_and(|inner| fixed(inner, params)),
        _ => constant(expr, params).is_some(),
    }
}

/// `auth.uid()` and its kin, `current_setting('request.…')`, with the family of the answer if it has one.
fn claim_function(function: &Function) -> Option<Option<Family>> {
    if !is_bare(function) {
        return None;
    }
    let (schema, name) = reference(&function.name)?;
    let args = arguments(function)?;
    match (schema.as_deref(), name.as_str()) {
        (Some("auth"), "uid") if args.is_empty() => Some(Some(Family::Uuid)),
        (Some("auth"), "role" | "email") if args.is_empty() => Some(Some(Family::Text)),
        (Some("realtime"), "topic") if args.is_empty() => Some(Some(Family::Text)),
        (Some("auth"), "jwt") if args.is_empty() => Some(None),
        (None | Some("pg_catalog"), "current_setting") => reads_request(args.first()?).then_some(Some(Family::Text)),
        _ => None,
    }
}

fn reads_request(expr: &Expr) -> bool {
    match expr {
        Expr::Cast { expr, .. } | Expr::Nested(expr) => reads_request(expr),
        Expr::Value(value) => {
            matches!(&value.value, Value::SingleQuotedString(name) if name.to_ascii_lowercase().starts_with("request."))
        }
        _ => false,
    }
}

fn is_plain(function: &Function, name: &str, params: ParamTypes) -> bool {
    is_bare(function)
        && reference(&function.name).is_some_and(|(schema, called): Reference| schema.is_none() && called == name)
        && arguments(function).is_some_and(|args| args.iter().all(|arg| fixed(arg, params)))
}

fn is_bare(function: &Function) -> bool {
    function.over.is_none()
        && function.filter.is_none()
        && function.within_group.is_empty()
        && function.null_treatment.is_none()
        && matches!(function.parameters, FunctionArguments::None)
}

fn arguments(function: &Function) -> Option<Vec<&Expr>> {
    match &function.args {
        FunctionArguments::List(list) if list.clauses.is_empty() && list.duplicate_treatment.is_none() => list
            .args
            .iter()
            .map(|arg| match arg {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

/// The `x` of `(select x)`: a sub-select that reads no table.
pub(crate) fn only_expression(query: &Query) -> Option<&Expr> {
    let SetExpr::Select(select) = &*query.body else { return None };
    let plain_query = query.with.is_none() && query.limit_clause.is_none() && query.fetch.is_none() && query.order_by.is_none();
    let ungrouped = matches!(&select.group_by, GroupByExpr::Expressions(by, with) if by.is_empty() && with.is_empty());
    let plain_select =
        select.from.is_empty() && select.selection.is_none() && select.having.is_none() && select.distinct.is_none();
    match select.projection.as_slice() {
        [SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. }] if plain_query && plain_select && ungrouped => {
            Some(expr)
        }
        _ => None,
    }
}

/// A column behind casts that change nothing about which values are equal, as PostgreSQL prints them.
pub(crate) fn without_idle_casts(expr: &Expr, family: impl Fn(&Expr) -> Option<Family>) -> &Expr {
    match expr {
        Expr::Nested(inner) => without_idle_casts(inner, family),
        Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr: inner, data_type, format: None } => {
            let column = strip_parentheses(inner);
            let idle = match (family(column), data_type) {
                (Some(Family::Text), DataType::Text | DataType::Varchar(None) | DataType::CharacterVarying(None)) => true,
                // Widening only: narrowing fails or, where it does not, keeps the value.
                (Some(Family::Int), DataType::BigInt(None) | DataType::Int8(None)) => true,
                (Some(Family::Uuid), DataType::Uuid) => true,
                _ => false,
            };
            if idle { column } else { expr }
        }
        other => other,
    }
}

fn strip_parentheses(expr: &Expr) -> &Expr {
    match expr {
        Expr::Nested(inner) => strip_parentheses(inner),
        other => other,
    }
}

/// A name that is a column: its parts, folded.
pub(crate) fn column_parts(expr: &Expr) -> Option<Vec<String>> {
    match expr {
        Expr::Identifier(ident) => Some(vec![fold(ident)]),
        Expr::CompoundIdentifier(idents) => Some(idents.iter().map(fold).collect()),
        _ => None,
    }
}
