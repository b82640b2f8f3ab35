//! What a subscription wants to hear: operations, tables, and equality on columns.

use walcast_model::{Column, Operation, ValueKind};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventMask(u8);

impl EventMask {
    pub const ALL: EventMask = EventMask(0b111);

    /// `INSERT`, `UPDATE`, `DELETE` in any case; anything else means all, as upstream has it.
    pub fn parse(text: &str) -> EventMask {
        match text.to_ascii_uppercase().as_str() {
            "INSERT" => EventMask(1),
            "UPDATE" => EventMask(2),
            "DELETE" => EventMask(4),
            _ => EventMask::ALL,
        }
    }

    /// Both masks' operations.
    pub fn and(self, other: EventMask) -> EventMask {
        EventMask(self.0 | other.0)
    }

    /// TRUNCATE is in no mask: it is never delivered as a row change.
    pub fn has(self, operation: Operation) -> bool {
        let bit = match operation {
            Operation::Insert => 1,
            Operation::Update => 2,
            Operation::Delete => 4,
            Operation::Truncate => 0,
        };
        self.0 & bit != 0
    }
}

/// `column = value`, the value in PostgreSQL's own text form of the column's type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Equal {
    pub column: String,
    pub value: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub events: EventMask,
    /// None: every schema.
    pub schema: Option<String>,
    /// None: every table of the schema.
    pub table: Option<String>,
    /// All must hold.
    pub filters: Vec<Equal>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindingError {
    #[error("Error parsing `filter` params: `{0}` is not column=operator.value")]
    Form(String),
    #[error("Error parsing `filter` params: operator `{0}` is not supported; use eq")]
    Operator(String),
    #[error("No subscription params provided. Please provide at least a `schema` or `table` to subscribe to")]
    Nothing,
}

impl Binding {
    /// Only `schema`: all its tables. Only `table`: schema `public`. Neither: an error.
    pub fn parse(event: &str, schema: Option<&str>, table: Option<&str>, filter: Option<&str>) -> Result<Binding, BindingError> {
        let star = |part: Option<&str>| part.filter(|part| *part != "*").map(str::to_owned);
        let (schema, table) = match (schema, table) {
            (None, None) => return Err(BindingError::Nothing),
            (None, Some(table)) => (Some("public".to_owned()), star(Some(table))),
            (schema, table) => (star(schema), star(table)),
        };
        let filters = filter.map_or(Ok(Vec::new()), parse_filter)?;
        Ok(Binding { events: EventMask::parse(event), schema, table, filters })
    }
}

fn parse_filter(filter: &str) -> Result<Vec<Equal>, BindingError> {
    if filter.trim().is_empty() {
        return Ok(Vec::new());
    }
    split_conditions(filter).into_iter().map(|condition| parse_condition(&condition)).collect()
}

/// Commas separate conditions, but not inside quotes or parentheses.
fn split_conditions(filter: &str) -> Vec<String> {
    let (mut parts, mut part) = (Vec::new(), String::new());
    let (mut quoted, mut depth, mut escaped) = (false, 0_u32, false);
    for c in filter.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' if quoted || part.ends_with(['.', '(', ',']) => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth = depth.saturating_sub(1),
            ',' if !quoted && depth == 0 => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            _ => {}
        }
        part.push(c);
    }
    parts.push(part);
    parts
}

fn parse_condition(condition: &str) -> Result<Equal, BindingError> {
    let wrong = || BindingError::Form(condition.chars().take(80).collect());
    let (column, rest) = condition.split_once('=').ok_or_else(wrong)?;
    let (operator, value) = rest.split_once('.').ok_or_else(wrong)?;
    let column = column.trim();
    if column.is_empty() {
        return Err(wrong());
    }
    if operator != "eq" {
        let shown = if operator == "not" { rest.chars().take(20).collect() } else { operator.chars().take(20).collect() };
        return Err(BindingError::Operator(shown));
    }
    Ok(Equal { column: column.to_owned(), value: unquote(value).ok_or_else(wrong)? })
}

fn unquote(value: &str) -> Option<String> {
    let Some(inner) = value.strip_prefix('"') else { return Some(value.to_owned()) };
    let inner = inner.strip_suffix('"')?;
    let (mut out, mut escaped) = (String::new(), false);
    for c in inner.chars() {
        match c {
            '\\' if !escaped => escaped = true,
            c => {
                escaped = false;
                out.push(c);
            }
        }
    }
    Some(out)
}

/// Can equality of this column be decided on PostgreSQL's text forms?
pub(crate) fn canonical<'a>(column: &Column, text: &'a str) -> std::borrow::Cow<'a, str> {
    match (&column.kind, &*column.type_name) {
        // 1.0 and 1.00 are one number.
        (ValueKind::Number, "numeric") if text.contains('.') => text.trim_end_matches('0').trim_end_matches('.').into(),
        (ValueKind::Number, "float4" | "float8") if text == "-0" => "0".into(),
        // Trailing blanks of char(n) do not count.
        (_, "bpchar") => text.trim_end_matches(' ').into(),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(text: &str) -> Result<Vec<(String, String)>, BindingError> {
        let binding = Binding::parse("*", None, Some("t"), Some(text))?;
        Ok(binding.filters.into_iter().map(|f| (f.column, f.value)).collect())
    }

    fn pair(column: &str, value: &str) -> (String, String) {
        (column.into(), value.into())
    }

    #[test]
    fn filters_are_split_and_unquoted() {
        assert_eq!(filters("id=eq.1").unwrap(), [pair("id", "1")]);
        assert_eq!(filters("a=eq.x.y=z,b=eq.\"q,\\\"r\"").unwrap(), [pair("a", "x.y=z"), pair("b", "q,\"r")]);
        assert_eq!(filters("a=eq.").unwrap(), [pair("a", "")]);
        assert_eq!(filters(" ").unwrap(), []);
    }

    #[test]
    fn wrong_filters_are_named() {
        for wrong in ["id", "id=1", "=eq.1", "a=eq.1,,b=eq.2", "a=eq.\"x"] {
            assert!(matches!(filters(wrong), Err(BindingError::Form(_))), "{wrong}");
        }
        assert_eq!(filters("id=gt.1").unwrap_err(), BindingError::Operator("gt".into()));
        assert_eq!(filters("id=not.eq.1").unwrap_err(), BindingError::Operator("not.eq.1".into()));
    }

    #[test]
    fn schema_and_table_have_defaults_and_stars() {
        let b = |schema, table| Binding::parse("insert", schema, table, None).map(|b| (b.schema, b.table));
        assert_eq!(b(None, Some("t")).unwrap(), (Some("public".into()), Some("t".into())));
        assert_eq!(b(Some("public"), None).unwrap(), (Some("public".into()), None));
        assert_eq!(b(Some("*"), Some("*")).unwrap(), (None, None));
        assert_eq!(b(None, None).unwrap_err(), BindingError::Nothing);
    }
}
