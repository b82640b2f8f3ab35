//! The filter of a binding: `column=operator.value`, conditions joined by commas, all of which must hold.
//!
//! The words of unmodified clients, with PostgREST's quoting. Reads text and never guesses: whatever has another form is
//! an error that says where. What a condition means for a row is told by [`crate::compare`].

use std::fmt;

/// More values than this in one `in` list are refused, as upstream has it.
pub const MAX_LIST: usize = 100;

/// One condition. Values are as the client wrote them until PostgreSQL has cast them to the column's type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Condition {
    pub column: String,
    /// Written with `not.` before the operator.
    pub negated: bool,
    pub test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Test {
    Compare(Comparison, String),
    In(Vec<String>),
    Pattern(Pattern, String),
    Is(Is),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// Null counts as a value.
    Distinct,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pattern {
    Like,
    Ilike,
    Match,
    Imatch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Is {
    Null,
    True,
    False,
    Unknown,
}

/// A pattern is tried on every row: a longer one is refused.
pub const MAX_PATTERN_CHARS: usize = 1_000;
/// Of a whole filter.
pub const MAX_FILTER_BYTES: usize = 32 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("Error parsing `filter` params: it has {0} bytes, at most {MAX_FILTER_BYTES} are read")]
    Long(usize),
    #[error("Error parsing `filter` params: a pattern has at most {MAX_PATTERN_CHARS} characters, this has {0}")]
    LongPattern(usize),
    #[error("Error parsing `filter` params: the pattern `{0}` ends in a lone `\\`, which escapes nothing")]
    LoneEscape(String),
    #[error("Error parsing `filter` params: `{0}` is not column=operator.value")]
    Form(String),
    #[error(
        "Error parsing `filter` params: there is no operator `{0}`; use eq, neq, lt, lte, gt, gte, in, like, ilike, match, imatch, is or isdistinct, each with `not.` before it if need be"
    )]
    Operator(String),
    #[error("Error parsing `filter` params: `{0}` is not a list; write in.(a,b), a value with a comma in double quotes")]
    List(String),
    #[error("Error parsing `filter` params: `in` takes at most {MAX_LIST} values, these are {0}")]
    LongList(usize),
    #[error("Error parsing `filter` params: `is` takes null, true, false or unknown, not `{0}`")]
    Word(String),
}

impl Comparison {
    /// In SQL.
    pub fn sql(self) -> &'static str {
        match self {
            Comparison::Equal => "=",
            Comparison::NotEqual => "<>",
            Comparison::Less => "<",
            Comparison::LessOrEqual => "<=",
            Comparison::Greater => ">",
            Comparison::GreaterOrEqual => ">=",
            Comparison::Distinct => "is distinct from",
        }
    }
}

impl Pattern {
    pub fn sql(self) -> &'static str {
        match self {
            Pattern::Like => "like",
            Pattern::Ilike => "ilike",
            Pattern::Match => "~",
            Pattern::Imatch => "~*",
        }
    }
}

impl Is {
    pub fn sql(self) -> &'static str {
        match self {
            Is::Null => "is null",
            Is::True => "is true",
            Is::False => "is false",
            Is::Unknown => "is unknown",
        }
    }
}

impl Condition {
    /// Every condition of a filter; a blank filter has none.
    pub fn parse_all(filter: &str) -> Result<Vec<Condition>, FilterError> {
        if filter.trim().is_empty() {
            return Ok(Vec::new());
        }
        if filter.len() > MAX_FILTER_BYTES {
            return Err(FilterError::Long(filter.len()));
        }
        split(filter).into_iter().map(Condition::parse).collect()
    }

    fn parse(text: &str) -> Result<Condition, FilterError> {
        let wrong = || FilterError::Form(short(text));
        let (column, rest) = text.split_once('=').ok_or_else(wrong)?;
        let column = column.trim();
        if column.is_empty() {
            return Err(wrong());
        }
        let (negated, rest) = match rest.strip_prefix("not.") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let (operator, value) = rest.split_once('.').ok_or_else(wrong)?;
        let one = |value: &str| unquote(value).ok_or_else(wrong);
        let test = match operator {
            "eq" => Test::Compare(Comparison::Equal, one(value)?),
            "neq" => Test::Compare(Comparison::NotEqual, one(value)?),
            "lt" => Test::Compare(Comparison::Less, one(value)?),
            "lte" => Test::Compare(Comparison::LessOrEqual, one(value)?),
            "gt" => Test::Compare(Comparison::Greater, one(value)?),
            "gte" => Test::Compare(Comparison::GreaterOrEqual, one(value)?),
            "isdistinct" => Test::Compare(Comparison::Distinct, one(value)?),
            "in" => Test::In(list(value)?),
            "like" => Test::Pattern(Pattern::Like, like(one(value)?)?),
            "ilike" => Test::Pattern(Pattern::Ilike, like(one(value)?)?),
            "match" => Test::Pattern(Pattern::Match, pattern(one(value)?)?),
            "imatch" => Test::Pattern(Pattern::Imatch, pattern(one(value)?)?),
            "is" => Test::Is(match value.to_ascii_lowercase().as_str() {
                "null" => Is::Null,
                "true" => Is::True,
                "false" => Is::False,
                "unknown" => Is::Unknown,
                _ => return Err(FilterError::Word(short(value))),
            }),
            _ => return Err(FilterError::Operator(short(operator))),
        };
        Ok(Condition { column: column.to_owned(), negated, test })
    }

    /// The values that PostgreSQL casts to the column's type when the client subscribes.
    pub fn values_mut(&mut self) -> &mut [String] {
        match &mut self.test {
            Test::Compare(_, value) => std::slice::from_mut(value),
            Test::In(values) => values,
            // Patterns are text whatever the column is.
            Test::Pattern(..) | Test::Is(_) => &mut [],
        }
    }
}

/// As a client would write it.
impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.column, if self.negated { "not." } else { "" })?;
        match &self.test {
            Test::Compare(comparison, value) => {
                let word = match comparison {
                    Comparison::Equal => "eq",
                    Comparison::NotEqual => "neq",
                    Comparison::Less => "lt",
                    Comparison::LessOrEqual => "lte",
                    Comparison::Greater => "gt",
                    Comparison::GreaterOrEqual => "gte",
                    Comparison::Distinct => "isdistinct",
                };
                write!(f, "{word}.{}", Quoted(value))
            }
            // It would else look like an empty list, which is refused.
            Test::In(values) if *values == [""] => f.write_str("in.(\"\")"),
            Test::In(values) => {
                f.write_str("in.(")?;
                for (at, value) in values.iter().enumerate() {
                    write!(f, "{}{}", if at > 0 { "," } else { "" }, Quoted(value))?;
                }
                f.write_str(")")
            }
            Test::Pattern(pattern, value) => {
                let word = match pattern {
                    Pattern::Like => "like",
                    Pattern::Ilike => "ilike",
                    Pattern::Match => "match",
                    Pattern::Imatch => "imatch",
                };
                write!(f, "{word}.{}", Quoted(value))
            }
            Test::Is(is) => f.write_str(&is.sql().replacen(' ', ".", 1)),
        }
    }
}

struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let special = self.0.contains([',', '(', ')', '"', '\\']) || self.0.trim() != self.0;
        match special {
            true => write!(f, "\"{}\"", self.0.replace('\\', "\\\\").replace('"', "\\\"")),
            false => f.write_str(self.0),
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

fn pattern(text: String) -> Result<String, FilterError> {
    match text.chars().count() {
        0..=MAX_PATTERN_CHARS => Ok(text),
        length => Err(FilterError::LongPattern(length)),
    }
}

fn like(text: String) -> Result<String, FilterError> {
    let escapes = text.bytes().rev().take_while(|b| *b == b'\\').count();
    if escapes % 2 == 1 { Err(FilterError::LoneEscape(short(&text))) } else { pattern(text) }
}

/// Commas separate, but not inside quotes or parentheses. A quote opens only where a value begins.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut from) = (Vec::new(), 0);
    let (mut quoted, mut depth, mut escaped, mut before) = (false, 0_u32, false, ',');
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' if quoted => quoted = false,
            '"' if matches!(before, '.' | '(' | ',') => quoted = true,
            _ if quoted => {}
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
        before = c;
    }
    parts.push(&text[from..]);
    parts
}

fn list(value: &str) -> Result<Vec<String>, FilterError> {
    let wrong = || FilterError::List(short(value));
    let inner = value.trim_end().strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).ok_or_else(wrong)?;
    let items = split(inner);
    if items.len() > MAX_LIST {
        return Err(FilterError::LongList(items.len()));
    }
    if inner.trim().is_empty() {
        return Err(wrong());
    }
    items.into_iter().map(|item| unquote(item).ok_or_else(wrong)).collect()
}

/// None: a quote that does not close, or does so too early.
fn unquote(value: &str) -> Option<String> {
    let Some(inner) = value.strip_prefix('"') else { return Some(value.to_owned()) };
    let (mut out, mut chars) = (String::with_capacity(inner.len()), inner.chars());
    loop {
        match chars.next()? {
            '\\' => out.push(chars.next()?),
            '"' => return chars.as_str().is_empty().then_some(out),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(filter: &str) -> Vec<String> {
        Condition::parse_all(filter).unwrap().iter().map(Condition::to_string).collect()
    }

    fn error(filter: &str) -> FilterError {
        Condition::parse_all(filter).unwrap_err()
    }

    #[test]
    fn every_operator_is_read_and_written_back() {
        for filter in [
            "id=eq.1",
            "id=neq.1",
            "id=lt.1",
            "id=lte.1",
            "id=gt.1",
            "id=gte.1",
            "id=in.(1,2)",
            "a=like.%x_",
            "a=ilike.X",
            "a=match.^x",
            "a=imatch.x$",
            "a=is.null",
            "a=is.true",
            "a=is.false",
            "a=is.unknown",
            "a=isdistinct.1",
            "a=eq.",
            "a=in.(\"\")",
            "a=eq.x.y=z",
        ] {
            assert_eq!(shown(filter), [filter]);
            let negated = filter.replacen('=', "=not.", 1);
            assert_eq!(shown(&negated), [negated]);
        }
    }

    #[test]
    fn the_recorded_filter_of_the_filter_builder_is_read() {
        let filter = r#"a=eq.x,b=in.(1,"q,r"),c=not.is.null,d=like."%z\"%",e=gte.5"#;
        assert_eq!(shown(filter), ["a=eq.x", "b=in.(1,\"q,r\")", "c=not.is.null", "d=like.\"%z\\\"%\"", "e=gte.5"]);
        let conditions = Condition::parse_all(filter).unwrap();
        assert_eq!(conditions[1].test, Test::In(vec!["1".into(), "q,r".into()]));
        assert_eq!(conditions[3].test, Test::Pattern(Pattern::Like, "%z\"%".into()));
        assert_eq!(shown(" "), Vec::<String>::new());
        assert_eq!(
            shown("a=eq.it's \"so\",b=eq.1"),
            ["a=eq.\"it's \\\"so\\\"\"", "b=eq.1"],
            "a quote in a value's middle is a quote"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for wrong in ["id", "id=1", "=eq.1", "a=eq.1,,b=eq.2", "a=eq.\"x", "a=eq.\"x\"y", "a=eq.1,"] {
            assert!(matches!(error(wrong), FilterError::Form(_)), "{wrong}");
        }
        assert_eq!(error("id=like2.1"), FilterError::Operator("like2".into()));
        assert_eq!(error("id=not.not.eq.1"), FilterError::Operator("not".into()));
        assert_eq!(error("id=in.1"), FilterError::List("1".into()));
        assert_eq!(error("id=in.()"), FilterError::List("()".into()));
        assert_eq!(error("id=like.x\\"), FilterError::LoneEscape("x\\".into()));
        assert_eq!(error(&format!("id=match.{}", "x".repeat(1_001))), FilterError::LongPattern(1_001));
        assert!(matches!(error(&"x".repeat(40_000)), FilterError::Long(40_000)));
        assert_eq!(error("id=is.maybe"), FilterError::Word("maybe".into()));
        assert_eq!(error(&format!("id=in.({})", vec!["1"; 101].join(","))), FilterError::LongList(101));
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_written_is_read_back(value in "\\PC*", list in proptest::collection::vec("\\PC+", 1..5), negated: bool) {
            let conditions = vec![
                Condition { column: "a".into(), negated, test: Test::Compare(Comparison::Equal, value) },
                Condition { column: "b".into(), negated: !negated, test: Test::In(list) },
            ];
            let text = format!("{},{}", conditions[0], conditions[1]);
            proptest::prop_assert_eq!(Condition::parse_all(&text).unwrap(), conditions);
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC*") {
            let _ = Condition::parse_all(&text);
        }
    }
}
