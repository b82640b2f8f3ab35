//! A policy that one statement evaluates for many callers: every part that reads the claims became a column of the caller's.
//!
//! The text stays PostgreSQL's own but for those parts, and is only used if it then reads as the same tree. A sub-select
//! over the claims is evaluated once for a statement, and would give every caller the first one's answer; a column is not.

use std::ops::ControlFlow;

use sqlparser::{
    ast::{Expr, Ident, VisitMut, VisitorMut, visit_expressions},
    dialect::PostgreSqlDialect,
    tokenizer::{Location, Token, TokenWithSpan, Tokenizer},
};

use super::{
    bind::{Asked, Binder},
    caller::is_callers,
    text::{Hangs, hangs, parse},
};
use crate::claims_functions::KNOWN;

/// How the callers' relation is called in the statement.
pub const CALLER: &str = "walcast_caller";

#[derive(Debug)]
pub struct SetForm {
    /// A condition over the row's columns and the caller's.
    pub condition: String,
    pub binder: Binder,
}

/// The column of the caller's relation that takes a part's place.
pub fn column(at: usize) -> String {
    format!("v{at}")
}

impl SetForm {
    /// None where it is not proven that nothing but the columns tells callers apart.
    pub fn of(permissive: &[String], restrictive: &[String]) -> Option<SetForm> {
        let mut asked = Vec::new();
        let mut replaced = |text: &String| replace(text, &mut asked).map(|text| format!("({text})"));
        let any: Option<Vec<String>> = permissive.iter().map(&mut replaced).collect();
        let all: Option<Vec<String>> = restrictive.iter().map(&mut replaced).collect();
        let (any, mut all) = (any?, all?);
        if !any.is_empty() {
            all.insert(0, format!("({})", any.join(" or ")));
        }
        Some(SetForm { condition: all.join(" and "), binder: Binder::new(asked) })
    }
}

fn replace(text: &str, asked: &mut Vec<Asked>) -> Option<String> {
    let mut tree = parse(text)?;
    let mut parts = Parts { asked, needles: Vec::new() };
    let _ = tree.visit(&mut parts);
    let mut needles = parts.needles;
    // What is left reads the row, tables, the clock; nothing that could be of the caller.
    if hangs(&tree) == Hangs::Anything || reads_claims(&tree) {
        return None;
    }
    needles.sort_by_key(|(printed, _)| std::cmp::Reverse(printed.len()));
    let needles: Option<Vec<(Vec<Token>, usize)>> = needles
        .into_iter()
        .map(|(printed, at)| Some((tokens(&printed)?.into_iter().map(|(token, ..)| token).collect(), at)))
        .collect();
    let spliced = splice(text, &needles?)?;
    (parse(&spliced)? == tree).then_some(spliced)
}

/// Puts the caller's columns into the tree, and notes what they stand for.
struct Parts<'a> {
    asked: &'a mut Vec<Asked>,
    needles: Vec<(String, usize)>,
}

impl VisitorMut for Parts<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        // The parentheses stay; what they hold is looked at next.
        if matches!(expr, Expr::Nested(_)) || !is_callers(expr) || !calls(expr) {
            return ControlFlow::Continue(());
        }
        let at = Asked::add(self.asked, expr, false);
        let printed = expr.to_string();
        if !self.needles.iter().any(|(known, _)| *known == printed) {
            self.needles.push((printed, at));
        }
        *expr = Expr::CompoundIdentifier(vec![Ident::new(CALLER), Ident::new(column(at))]);
        ControlFlow::Continue(())
    }
}

/// Is there a function in it? Else it is made of constants, which are the same for everybody.
fn calls(expr: &Expr) -> bool {
    any(expr, |part| matches!(part, Expr::Function(_)))
}

fn reads_claims(tree: &Expr) -> bool {
    any(tree, |part| {
        let Expr::Function(function) = part else { return false };
        let name: Vec<&str> = function.name.0.iter().filter_map(|part| part.as_ident().map(|i| i.value.as_str())).collect();
        match name.as_slice() {
            [name] => ["current_setting", "current_user", "session_user", "user"].contains(&name.to_ascii_lowercase().as_str()),
            [schema, name] => KNOWN.contains(&(*schema, *name)),
            _ => true,
        }
    })
}

fn any(tree: &Expr, test: impl Fn(&Expr) -> bool) -> bool {
    visit_expressions(tree, |part| if test(part) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }).is_break()
}

/// With the place of each in the text, blanks left out.
fn tokens(text: &str) -> Option<Vec<(Token, usize, usize)>> {
    let spanned = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize_with_location().ok()?;
    let place = |at: &Location| {
        let line_start = match at.line {
            0 => return None,
            1 => 0,
            line => text.match_indices('\n').nth(line as usize - 2)?.0 + 1,
        };
        let column = usize::try_from(at.column).ok()?.checked_sub(1)?;
        let line = &text[line_start..];
        Some(line_start + line.char_indices().nth(column).map_or(line.len(), |(at, _)| at))
    };
    let each = |TokenWithSpan { token, span }: TokenWithSpan| match token {
        Token::Whitespace(_) => None,
        token => Some(place(&span.start).zip(place(&span.end)).map(|(start, end)| (token, start, end))),
    };
    spanned.into_iter().filter_map(each).collect()
}

/// Keywords and types are printed in capitals here, and in small letters by PostgreSQL. The tree tells in the end.
fn same(a: &Token, b: &Token) -> bool {
    match (a, b) {
        (Token::Word(a), Token::Word(b)) if a.quote_style.is_none() && b.quote_style.is_none() => {
            a.value.eq_ignore_ascii_case(&b.value)
        }
        (a, b) => a == b,
    }
}

fn splice(text: &str, needles: &[(Vec<Token>, usize)]) -> Option<String> {
    let tokens = tokens(text)?;
    let (mut spliced, mut copied, mut at) = (String::with_capacity(text.len()), 0, 0);
    while at < tokens.len() {
        let here = &tokens[at..];
        let fits = |needle: &&(Vec<Token>, usize)| {
            needle.0.len() <= here.len() && needle.0.iter().zip(here).all(|(wanted, (token, ..))| same(wanted, token))
        };
        let Some((needle, column_at)) = needles.iter().find(fits) else {
            at += 1;
            continue;
        };
        let (start, end) = (here[0].1, here[needle.len() - 1].2);
        spliced.push_str(&text[copied..start]);
        spliced.push_str(&format!("{CALLER}.{}", column(*column_at)));
        copied = end;
        at += needle.len();
    }
    spliced.push_str(&text[copied..]);
    Some(spliced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(text: &str) -> Option<String> {
        replace(text, &mut Vec::new())
    }

    #[test]
    fn what_reads_the_claims_becomes_a_column_and_the_rest_stays_as_it_is_written() {
        for (text, expected) in [
            (
                "(EXISTS ( SELECT 1\n   FROM public.members m\n  WHERE ((m.tenant = t.tenant) AND (m.who = auth.uid()))))",
                "(EXISTS ( SELECT 1\n   FROM public.members m\n  WHERE ((m.tenant = t.tenant) AND (m.who = walcast_caller.v0))))",
            ),
            (
                "(tenant IN ( SELECT m.tenant\n   FROM public.members m\n  WHERE (m.who = ( SELECT auth.uid() AS uid))))",
                "(tenant IN ( SELECT m.tenant\n   FROM public.members m\n  WHERE (m.who = walcast_caller.v0)))",
            ),
            (
                "((\"Ödd\" = (auth.jwt() ->> 'té'::text)) AND (tenant ~~ 'it''s%'::text) AND (owner = auth.uid()))",
                "((\"Ödd\" = (walcast_caller.v0)) AND (tenant ~~ 'it''s%'::text) AND (owner = walcast_caller.v1))",
            ),
            ("(tenant ~~ 'a%'::text)", "(tenant ~~ 'a%'::text)"),
            ("(day < now())", "(day < now())"),
            ("(tenant = (auth.jwt() ->> code))", "(tenant = (walcast_caller.v0 ->> code))"),
        ] {
            assert_eq!(replaced(text).as_deref(), Some(expected), "{:?}", parse(text));
        }
    }

    #[test]
    fn p3_what_may_read_the_caller_in_another_way_has_no_set_form() {
        for text in [
            "(owner = public.who(auth.uid()))",
            "(tenant = CURRENT_ROLE)",
            "(tenant = current_setting('walcast.other'::text))",
            "(owner = (query_to_xml('select auth.uid()'::text, true, true, ''::text))::text)",
            "(tenant = current_setting(tenant))",
        ] {
            assert_eq!(replaced(text), None, "{text}");
        }
    }
}
