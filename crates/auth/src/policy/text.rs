//! The text of a policy as PostgreSQL prints it: parsed as a whole, and what its parts can do.

use std::ops::ControlFlow;

use sqlparser::{
    ast::{BinaryOperator, DataType, Expr, FunctionArguments, TableFactor, Value, Visit, Visitor},
    dialect::PostgreSqlDialect,
    parser::Parser,
    tokenizer::Token,
};

use super::caller::{is_callers, is_plain};

const LONGEST: usize = 4_000;

/// None: it was not understood as a whole.
pub fn parse(text: &str) -> Option<Expr> {
    // A list of thousands of conditions is a tree as deep: whoever wrote it must not end the process.
    if text.len() > LONGEST {
        return None;
    }
    let mut parser = Parser::new(&PostgreSqlDialect {}).with_recursion_limit(60).try_with_sql(text).ok()?;
    let expr = parser.parse_expr().ok()?;
    parser.expect_token(&Token::EOF).ok()?;
    Some(expr)
}

/// What an expression hangs on, beside the row, the caller and the tables that it names. In doubt, anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hangs {
    NothingElse,
    TheClock,
    Anything,
}

pub fn hangs(expr: &Expr) -> Hangs {
    let mut look = Look(Hangs::NothingElse);
    match expr.visit(&mut look) {
        ControlFlow::Continue(()) => look.0,
        ControlFlow::Break(()) => Hangs::Anything,
    }
}

/// Of `pg_catalog`, where names stand alone: the same for the same arguments, whoever asks and when.
const PLAIN: [&str; 34] = [
    "abs",
    "array_length",
    "array_position",
    "array_remove",
    "array_to_string",
    "btrim",
    "cardinality",
    "ceil",
    "char_length",
    "coalesce",
    "concat",
    "floor",
    "greatest",
    "jsonb_array_length",
    "least",
    "left",
    "length",
    "lower",
    "ltrim",
    "md5",
    "mod",
    "nullif",
    "octet_length",
    "repeat",
    "replace",
    "right",
    "round",
    "rtrim",
    "split_part",
    "starts_with",
    "string_to_array",
    "strpos",
    "substr",
    "upper",
];
const CLOCK: [&str; 8] = [
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "current_date",
    "current_timestamp",
    "localtimestamp",
    "date_trunc",
    "age",
];

struct Look(Hangs);

impl Visitor for Look {
    type Break = ();

    /// Plain tables: a function in FROM, or a sample, is anything.
    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { args: None, sample: None, .. }
            | TableFactor::Derived { sample: None, .. }
            | TableFactor::NestedJoin { .. } => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        let on = match expr {
            _ if is_callers(expr) => Hangs::NothingElse,
            // Unquoted capitals are a keyword, as CURRENT_ROLE is.
            Expr::Identifier(name) if name.quote_style.is_none() && name.value.bytes().any(|b| b.is_ascii_uppercase()) => {
                Hangs::Anything
            }
            Expr::Function(function) => {
                let name = match function.name.0.as_slice() {
                    [name] => name.as_ident().map(|name| name.value.to_ascii_lowercase()).unwrap_or_default(),
                    _ => String::new(),
                };
                let listed = !matches!(function.args, FunctionArguments::Subquery(_));
                if listed && function.over.is_none() && PLAIN.contains(&name.as_str()) {
                    Hangs::NothingElse
                } else if listed && CLOCK.contains(&name.as_str()) {
                    Hangs::TheClock
                } else {
                    Hangs::Anything
                }
            }
            // A constant as it was stored, or one that its type's input reads anew: 'today' is one of a date's.
            Expr::Cast { data_type: DataType::Custom(..), .. } => Hangs::Anything,
            Expr::Cast { expr, data_type, .. } if is_plain(data_type) || is_constant(expr) => Hangs::NothingElse,
            Expr::Cast { .. } => Hangs::TheClock,
            Expr::BinaryOp { op: BinaryOperator::PGCustomBinaryOperator(_), .. } => Hangs::Anything,
            Expr::Identifier(_)
            | Expr::CompoundIdentifier(_)
            | Expr::Value(_)
            | Expr::Nested(_)
            | Expr::BinaryOp { .. }
            | Expr::UnaryOp { .. }
            | Expr::IsNull(_)
            | Expr::IsNotNull(_)
            | Expr::IsTrue(_)
            | Expr::IsNotTrue(_)
            | Expr::IsFalse(_)
            | Expr::IsNotFalse(_)
            | Expr::IsUnknown(_)
            | Expr::IsNotUnknown(_)
            | Expr::IsDistinctFrom(..)
            | Expr::IsNotDistinctFrom(..)
            | Expr::Between { .. }
            | Expr::InList { .. }
            | Expr::InSubquery { .. }
            | Expr::Subquery(_)
            | Expr::Exists { .. }
            | Expr::AnyOp { .. }
            | Expr::AllOp { .. }
            | Expr::Like { .. }
            | Expr::ILike { .. }
            | Expr::Case { .. }
            | Expr::Array(_)
            | Expr::Tuple(_) => Hangs::NothingElse,
            _ => Hangs::Anything,
        };
        self.0 = self.0.max(on);
        if on == Hangs::Anything { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn is_constant(expr: &Expr) -> bool {
    matches!(expr, Expr::Value(value) if !matches!(value.value, Value::Placeholder(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_policy_hangs_on_is_known_or_it_is_anything() {
        use Hangs::{Anything, NothingElse, TheClock};
        for (text, on) in [
            (
                "(EXISTS ( SELECT 1\n   FROM public.members m\n  WHERE ((m.tenant = t.tenant) AND (m.who = auth.uid()))))",
                NothingElse,
            ),
            ("(tenant IN ( SELECT m.tenant FROM public.members m WHERE (m.who = ( SELECT auth.uid() AS uid))))", NothingElse),
            ("(day < now())", TheClock),
            ("(day < CURRENT_DATE)", TheClock),
            ("(day = '2026-01-01'::date)", NothingElse),
            ("(day = (tenant)::date)", TheClock),
            ("(random() < 0.5)", Anything),
            ("(tenant = current_setting('walcast.x'::text))", Anything),
            ("(tenant = current_setting('request.jwt.claims'::text))", NothingElse),
            ("public.may(id)", Anything),
            ("(EXISTS ( SELECT 1 FROM generate_series(1, n) g(g)))", Anything),
            ("(EXISTS ( SELECT 1 FROM public.members m TABLESAMPLE system (10)))", Anything),
            ("(mood = 'happy'::public.mood)", Anything),
            ("(a OPERATOR(public.===) b)", Anything),
            ("pg_has_role('x'::name, 'member'::text)", Anything),
            ("(owner = CURRENT_ROLE)", Anything),
        ] {
            let parsed = parse(text);
            assert_eq!(parsed.as_ref().map_or(Anything, hangs), on, "{text}: {parsed:?}");
        }
    }
}
