//! Pages: which order a query is read in, and the cursor that says where a page ended.
//!
//! A page is a keyset, never an offset: "what comes after these values". So pages stay where they are while rows are
//! inserted before them, and a deep page costs what the first one costs. The cursor holds values of the last row; a
//! client that makes one up has only chosen a place in rows that it may see anyway.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sqlparser::{
    ast::{OrderByExpr, OrderByKind, OrderBySort, Query, Statement},
    dialect::PostgreSqlDialect,
    parser::Parser,
};
use walcast_pg::quote_ident;

use crate::constant::column_parts;

/// `50`, `50 by created_at desc, id desc`, with ` unique` at its end where only the author knows that no two rows are equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBy {
    pub size: usize,
    pub order: Vec<Order>,
    /// The author says that no two rows are equal in all of these columns. Looked at on each page.
    pub declared_unique: bool,
}

/// An output column of the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub column: String,
    pub descending: bool,
    pub nulls_first: bool,
}

/// Which page of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageAsk {
    pub limit: usize,
    /// The values of the last row of the page before, as PostgreSQL printed them.
    pub after: Option<Vec<Option<String>>>,
}

const MAX_COLUMNS: usize = 8;
pub(crate) const RESERVED: [&str; 2] = ["limit", "after"];

impl PageBy {
    /// What is wrong, and its mend.
    pub(crate) fn parse(text: &str) -> Result<PageBy, (String, String)> {
        let form = || "write `-- page: 50`, or `-- page: 50 by created_at desc, id desc`".to_owned();
        let (size, by) = text.split_once(char::is_whitespace).map_or((text, ""), |(size, by)| (size, by.trim()));
        let size = size.parse().ok().filter(|size| (1..=10_000).contains(size));
        let size = size.ok_or_else(|| (format!("`{text}` does not begin with a page's number of rows"), form()))?;
        if by.is_empty() {
            return Ok(PageBy { size, order: Vec::new(), declared_unique: false });
        }
        let by = by.strip_prefix("by ").ok_or_else(|| (format!("`{by}` is not an order"), form()))?.trim();
        let (by, declared_unique) = by.strip_suffix(" unique").map_or((by, false), |by| (by, true));
        let by = by.trim().strip_prefix('(').and_then(|by| by.strip_suffix(')')).unwrap_or(by);
        let parsed = Parser::parse_sql(&PostgreSqlDialect {}, &format!("select 1 order by {by}")).ok();
        let order = match parsed.as_deref() {
            Some([Statement::Query(query)]) if is_unlimited(query) => order_of(query),
            _ => None,
        };
        let order = order.ok_or_else(|| (format!("`{by}` is not a list of the query's columns"), form()))?;
        Ok(PageBy { size, order, declared_unique })
    }

    /// For this query, whose own ORDER BY counts where the header names none.
    pub(crate) fn of<'a>(
        mut self,
        query: Option<&Query>,
        mut params: impl Iterator<Item = &'a str>,
        max_rows: usize,
    ) -> Result<PageBy, (String, String)> {
        if let Some(name) = params.find(|name| RESERVED.contains(name)) {
            let hint = "give the parameter another name: pages are asked for with `limit` and `after`".to_owned();
            return Err((format!("a query with pages cannot have a parameter `{name}`"), hint));
        }
        if query.is_some_and(|query| !is_unlimited(query)) {
            return Err((
                "a query with pages has a LIMIT of its own".into(),
                "delete the LIMIT, OFFSET or FETCH at its end".into(),
            ));
        }
        if self.size > max_rows {
            return Err((format!("a page of {} rows is larger than max_rows", self.size), "raise `-- max_rows:`".into()));
        }
        if self.order.is_empty() {
            self.order = query.and_then(order_of).unwrap_or_default();
        }
        if self.order.is_empty() || self.order.len() > MAX_COLUMNS {
            let hint = "name the columns: `-- page: 50 by created_at desc, id desc`";
            return Err((format!("the order of the pages is not known, or has more than {MAX_COLUMNS} columns"), hint.into()));
        }
        Ok(self)
    }

    pub(crate) fn order_sql(&self) -> String {
        let one = |order: &Order| {
            let (direction, nulls) =
                (if order.descending { "desc" } else { "asc" }, if order.nulls_first { "first" } else { "last" });
            format!("{} {direction} nulls {nulls}", order.column_sql())
        };
        self.order.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// What comes after these values, with parameters from `$first` on; and the parameters.
    pub(crate) fn after_sql(&self, after: &[Option<String>], not_null: &[bool], first: usize) -> (String, Vec<String>) {
        let mut values = Vec::new();
        let mut places = Vec::new();
        for value in after {
            places.push(value.as_ref().map(|value| {
                values.push(value.clone());
                format!("${}", first + values.len() - 1)
            }));
        }
        let mut equal = String::new();
        let mut ways = Vec::new();
        for (order, place) in self.order.iter().zip(&places) {
            let column = order.column_sql();
            let beyond = match (place, order.nulls_first) {
                (Some(place), true) => Some(format!("{column} {} {place}", order.beyond())),
                (Some(place), false) => Some(format!("({column} {} {place} or {column} is null)", order.beyond())),
                (None, true) => Some(format!("{column} is not null")),
                // Nothing comes after the last of nulls.
                (None, false) => None,
            };
            ways.extend(beyond.map(|beyond| format!("({equal}{beyond})")));
            equal.push_str(&match place {
                Some(place) => format!("{column} = {place} and "),
                None => format!("{column} is null and "),
            });
        }
        let mut sql = if ways.is_empty() { "false".to_owned() } else { format!("({})", ways.join(" or ")) };
        // Said once more for the first column alone, in a form that an index can begin at.
        if let (Some(order), Some(Some(place))) = (self.order.first(), places.first())
            && (order.nulls_first || not_null.first() == Some(&true))
        {
            sql = format!("{} {}= {place} and {sql}", order.column_sql(), order.beyond());
        }
        (sql, values)
    }

    /// The cursor's values, one text each.
    pub(crate) fn values_sql(&self, row: &str) -> String {
        let one = |order: &Order| format!("({row}.{})::text", order.column_sql());
        format!("array[{}]", self.order.iter().map(one).collect::<Vec<_>>().join(", "))
    }

    pub(crate) fn columns_sql(&self) -> String {
        self.order.iter().map(Order::column_sql).collect::<Vec<_>>().join(", ")
    }
}

impl Order {
    pub(crate) fn column_sql(&self) -> String {
        quote_ident(&self.column)
    }

    fn beyond(&self) -> char {
        if self.descending { '<' } else { '>' }
    }
}

fn is_unlimited(query: &Query) -> bool {
    query.limit_clause.is_none() && query.fetch.is_none()
}

fn order_of(query: &Query) -> Option<Vec<Order>> {
    match &query.order_by.as_ref()?.kind {
        OrderByKind::Expressions(list) => list.iter().map(order).collect(),
        OrderByKind::All(_) => None,
    }
}

fn order(by: &OrderByExpr) -> Option<Order> {
    let descending = match &by.options.sort {
        None | Some(OrderBySort::Asc) => false,
        Some(OrderBySort::Desc) => true,
        Some(OrderBySort::Using(_)) => return None,
    };
    let column = column_parts(&by.expr)?.pop()?;
    Some(Order { column, descending, nulls_first: by.options.nulls_first.unwrap_or(descending) })
}

/// Opaque to clients: which file it belongs to, and the values.
pub(crate) fn cursor(meaning: &str, values: &[Option<String>]) -> String {
    URL_SAFE_NO_PAD.encode(json!([meaning, values]).to_string())
}

/// None: not one of ours, or of the file as it was before.
pub(crate) fn read_cursor(meaning: &str, columns: usize, text: &str) -> Option<Vec<Option<String>>> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let Ok(Value::Array(parts)) = serde_json::from_slice(&bytes) else { return None };
    let [Value::String(of), Value::Array(values)] = parts.as_slice() else { return None };
    let value = |value: &Value| match value {
        Value::Null => Some(None),
        Value::String(text) if !text.contains('\0') => Some(Some(text.clone())),
        _ => None,
    };
    (of == meaning && values.len() == columns).then(|| values.iter().map(value).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(text: &str) -> PageBy {
        PageBy::parse(text).unwrap()
    }

    #[test]
    fn an_order_is_read_as_postgresql_reads_it() {
        let page = by("50 by created_at desc, \"Id\" nulls first");
        assert_eq!(page.order_sql(), "\"created_at\" desc nulls first, \"Id\" asc nulls first");
        assert_eq!((page.size, page.declared_unique), (50, false));
        assert!(by("5 by (a, b) unique").declared_unique);
        for bad in ["", "0", "x by a", "5 a", "5 by a + 1", "5 by a limit 3", "5 by a; drop table t"] {
            assert!(PageBy::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_comes_after_a_row_with_and_without_nulls() {
        let page = by("5 by a desc, b");
        let (sql, values) = page.after_sql(&[Some("x".into()), Some("7".into())], &[false, false], 3);
        assert_eq!(
            sql, "\"a\" <= $3 and ((\"a\" < $3) or (\"a\" = $3 and (\"b\" > $4 or \"b\" is null)))",
            "a descending column has its nulls first, so an index can begin at the value"
        );
        assert_eq!(values, ["x", "7"]);
        let (sql, values) = page.after_sql(&[None, None], &[false, false], 1);
        assert_eq!((sql.as_str(), values.len()), ("((\"a\" is not null))", 0));
        let (sql, _) = by("5 by b").after_sql(&[None], &[false], 1);
        assert_eq!(sql, "false");
    }

    #[test]
    fn a_cursor_of_another_file_or_of_nobody_is_refused() {
        let text = cursor("m", &[Some("a".into()), None]);
        assert_eq!(read_cursor("m", 2, &text), Some(vec![Some("a".into()), None]));
        for (meaning, columns, text) in [("n", 2, text.as_str()), ("m", 1, &text), ("m", 2, "!"), ("m", 2, "W10")] {
            assert_eq!(read_cursor(meaning, columns, text), None);
        }
    }
}
