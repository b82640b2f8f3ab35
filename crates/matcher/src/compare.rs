//! Does a condition hold for a value? As PostgreSQL itself would say it, on PostgreSQL's own text forms.
//!
//! Called by [`crate::index`] for each candidate. What the model's [`Family`] cannot tell, and every pattern that is
//! PostgreSQL's own, is [`Truth::Ask`], and PostgreSQL decides.

use std::cmp::Ordering;

use walcast_model::{Cell, Family};

use crate::filter::{Comparison, Condition, Is, Pattern, Test};

/// SQL's three values, and that it cannot be told here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    True,
    False,
    Null,
    /// PostgreSQL knows.
    Ask,
    /// The image does not hold the value: a large one that the change left as it was.
    Unchanged,
    /// The image does not hold the value, and never will: only the key was logged.
    Absent,
}

impl Truth {
    fn of(answer: Option<bool>) -> Truth {
        match answer {
            Some(true) => Truth::True,
            Some(false) => Truth::False,
            None => Truth::Ask,
        }
    }

    fn not(self) -> Truth {
        match self {
            Truth::True => Truth::False,
            Truth::False => Truth::True,
            other => other,
        }
    }
}

pub fn judge(condition: &Condition, family: Family, cell: &Cell) -> Truth {
    let value = match cell {
        Cell::Unchanged => return Truth::Unchanged,
        Cell::Absent => return Truth::Absent,
        Cell::Null => None,
        Cell::Value(_) => match cell.text() {
            Some(text) => Some(text),
            None => return Truth::Ask,
        },
    };
    let truth = match &condition.test {
        Test::Compare(comparison, wanted) => compare(*comparison, family, value, wanted),
        Test::In(wanted) => match value {
            None => Truth::Null,
            Some(value) => any(wanted.iter().map(|wanted| family.equal(value, wanted))),
        },
        Test::Pattern(pattern, wanted) => match value {
            None => Truth::Null,
            Some(value) => matches_pattern(*pattern, family, value, wanted),
        },
        Test::Is(is) => match (is, value, family) {
            (Is::Null, value, _) => Truth::of(Some(value.is_none())),
            (Is::Unknown, value, Family::Bool) => Truth::of(Some(value.is_none())),
            (Is::True, value, Family::Bool) => Truth::of(Some(value == Some("t"))),
            (Is::False, value, Family::Bool) => Truth::of(Some(value == Some("f"))),
            _ => Truth::Ask,
        },
    };
    if condition.negated { truth.not() } else { truth }
}

fn any(answers: impl Iterator<Item = Option<bool>>) -> Truth {
    let mut told = Truth::False;
    for answer in answers {
        match answer {
            Some(true) => return Truth::True,
            Some(false) => {}
            None => told = Truth::Ask,
        }
    }
    told
}

fn compare(comparison: Comparison, family: Family, value: Option<&str>, wanted: &str) -> Truth {
    let Some(value) = value else {
        // The wanted value is never null, so null is distinct from it.
        return if comparison == Comparison::Distinct { Truth::True } else { Truth::Null };
    };
    let ordered = |test: fn(Ordering) -> bool| Truth::of(family.order(value, wanted).map(test));
    match comparison {
        Comparison::Equal => Truth::of(family.equal(value, wanted)),
        Comparison::NotEqual | Comparison::Distinct => Truth::of(family.equal(value, wanted)).not(),
        Comparison::Less => ordered(Ordering::is_lt),
        Comparison::LessOrEqual => ordered(Ordering::is_le),
        Comparison::Greater => ordered(Ordering::is_gt),
        Comparison::GreaterOrEqual => ordered(Ordering::is_ge),
    }
}

fn matches_pattern(pattern: Pattern, family: Family, value: &str, wanted: &str) -> Truth {
    match (pattern, family) {
        (Pattern::Like, Family::Text(_)) => Truth::of(like(value, wanted)),
        (Pattern::Ilike, Family::Text(collation)) if collation.folds_ascii && value.is_ascii() && wanted.is_ascii() => {
            Truth::of(like(&value.to_ascii_lowercase(), &wanted.to_ascii_lowercase()))
        }
        // PostgreSQL's regular expressions are its own.
        _ => Truth::Ask,
    }
}

/// `%` any run, `_` any one character, `\` takes the next one as it is. None: the pattern ends in a lone `\`, which
/// PostgreSQL answers with an error.
fn like(value: &str, pattern: &str) -> Option<bool> {
    let mut parts: Vec<Part> = Vec::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        parts.push(match c {
            '%' if parts.last() == Some(&Part::Run) => continue,
            '%' => Part::Run,
            '_' => Part::One,
            '\\' => Part::Char(chars.next()?),
            c => Part::Char(c),
        });
    }
    let value: Vec<char> = value.chars().collect();
    // The last run is the only one that need ever be tried again: linear in practice, never exponential.
    let (mut v, mut p) = (0, 0);
    let mut again: Option<(usize, usize)> = None;
    while v < value.len() {
        match parts.get(p) {
            Some(Part::Run) => {
                again = Some((p + 1, v));
                p += 1;
                continue;
            }
            Some(Part::One) => {}
            Some(Part::Char(c)) if *c == value[v] => {}
            _ => match again {
                Some((after, from)) => {
                    (p, v) = (after, from + 1);
                    again = Some((after, v));
                    continue;
                }
                None => return Some(false),
            },
        }
        (p, v) = (p + 1, v + 1);
    }
    Some(parts[p..].iter().all(|part| *part == Part::Run))
}

#[derive(Debug, PartialEq)]
enum Part {
    Run,
    One,
    Char(char),
}

#[cfg(test)]
mod tests {
    use walcast_model::Collation;

    use super::*;

    const C: Family = Family::Text(Collation { by_bytes: true, folds_ascii: true });
    const EN: Family = Family::Text(Collation { by_bytes: false, folds_ascii: true });
    const TR: Family = Family::Text(Collation { by_bytes: false, folds_ascii: false });

    fn check(family: Family, value: Option<&str>, filter: &str, expected: Truth) {
        let condition = &Condition::parse_all(&format!("c={filter}")).unwrap()[0];
        let cell = value.map_or(Cell::Null, |value| Cell::Value(value.to_owned().into()));
        assert_eq!(judge(condition, family, &cell), expected, "{value:?} {filter} as {family:?}");
    }

    #[test]
    fn numbers_compare_by_value() {
        for (a, filter) in [
            ("9", "lt.10"),
            ("-10", "lt.-9"),
            ("10", "gte.10"),
            ("7", "in.(1,7)"),
            ("7", "not.in.(1,8)"),
            ("7", "neq.8"),
            ("7", "not.eq.8"),
        ] {
            check(Family::Integer, Some(a), filter, Truth::True);
            check(Family::Numeric, Some(a), filter, Truth::True);
            check(Family::Float, Some(a), filter, Truth::True);
        }
        for (a, filter) in [
            ("1.50", "eq.1.5"),
            ("0.00", "eq.0"),
            ("-0.5", "lt.0"),
            ("0.5", "gt.0"),
            ("10.01", "gt.10.001"),
            ("-1.2", "lt.-1.1"),
            ("NaN", "gt.Infinity"),
            ("NaN", "eq.NaN"),
            ("1000000000000000000000", "gt.999999999999999999999.9"),
        ] {
            check(Family::Numeric, Some(a), filter, Truth::True);
        }
        check(Family::Float, Some("NaN"), "gt.Infinity", Truth::True);
        check(Family::Float, Some("-0"), "eq.0", Truth::True);
        check(Family::Float, Some("1e-05"), "lt.0.001", Truth::True);
    }

    #[test]
    fn texts_compare_by_bytes_only_where_the_collation_does() {
        check(C, Some("B"), "lt.a", Truth::True);
        check(EN, Some("B"), "lt.a", Truth::Ask);
        check(EN, Some("B"), "eq.B", Truth::True);
        check(EN, Some("B"), "in.(a,b)", Truth::False);
        check(Family::Blank, Some("x  "), "eq.x", Truth::True);
        check(Family::Opaque, Some("x"), "eq.x", Truth::Ask);
        check(Family::Label, Some("x"), "lt.y", Truth::Ask);
    }

    #[test]
    fn patterns() {
        for (value, filter) in [
            ("smith", "like.s%"),
            ("smith", "like.%"),
            ("smith", "like._mit_"),
            ("", "like.%"),
            ("a%b", "like.a\\%b"),
            ("smith", "not.like.S%"),
            ("aXbXc", "like.a%X%c"),
            ("é日", "like.__"),
            ("Smith", "ilike.sM%"),
            ("aaaaab", "like.%aab"),
        ] {
            check(EN, Some(value), filter, Truth::True);
        }
        for (value, filter) in [("smith", "like.s"), ("", "like._"), ("axb", "like.a\\%b"), ("aXbX", "like.a%X%c")] {
            check(EN, Some(value), filter, Truth::False);
        }
        check(EN, Some("É"), "ilike.é", Truth::Ask);
        check(TR, Some("I"), "ilike.i", Truth::Ask);
        check(EN, Some("x"), "match.^x", Truth::Ask);
        // Would take for ever if every run were tried again.
        check(EN, Some(&"a".repeat(2_000)), &format!("like.{}b", "%a".repeat(400)), Truth::False);
    }

    #[test]
    fn null_is_no_value_but_for_is_and_isdistinct() {
        for filter in ["eq.1", "neq.1", "not.eq.1", "in.(1)", "not.in.(1)", "lt.1", "like.x"] {
            check(C, None, filter, Truth::Null);
        }
        check(C, None, "is.null", Truth::True);
        check(C, Some("x"), "not.is.null", Truth::True);
        check(C, None, "isdistinct.1", Truth::True);
        check(C, None, "not.isdistinct.1", Truth::False);
        check(Family::Bool, None, "is.unknown", Truth::True);
        check(Family::Bool, Some("t"), "is.true", Truth::True);
        check(Family::Bool, Some("f"), "not.is.true", Truth::True);
        check(Family::Bool, None, "not.is.true", Truth::True);
    }

    #[test]
    fn moments_compare_as_time_goes() {
        for (a, b) in [
            ("2026-01-01 00:00:00+00", "2026-01-01 00:00:00.5+00"),
            ("2026-01-01 00:00:00.45+00", "2026-01-01 00:00:00.5+00"),
            ("2026-12-31 23:59:59+00", "10000-01-01 00:00:00+00"),
            ("-infinity", "2026-01-01 00:00:00"),
            ("2026-01-01 00:00:00", "infinity"),
        ] {
            check(Family::Timestamp, Some(a), &format!("lt.{b}"), Truth::True);
            check(Family::Timestamp, Some(b), &format!("gte.{a}"), Truth::True);
        }
        check(Family::Date, Some("0044-03-15 BC"), "lt.2026-01-01", Truth::Ask);
    }

    #[test]
    fn what_the_image_lacks_is_not_guessed() {
        let condition = &Condition::parse_all("c=not.is.null").unwrap()[0];
        assert_eq!(judge(condition, C, &Cell::Unchanged), Truth::Unchanged);
        assert_eq!(judge(condition, C, &Cell::Absent), Truth::Absent);
    }
}
