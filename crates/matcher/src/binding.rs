//! What a subscription wants to hear: operations, tables, conditions on columns, and which columns to show.

use walcast_model::{Cell, Change, Family, Operation, Row};

use crate::{
    compare::{Truth, judge},
    filter::{Condition, FilterError},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

/// A condition, and how its column compares.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Filter {
    pub condition: Condition,
    pub family: Family,
    /// The type for which this was checked. A column of another type, or one that was never checked, is left to PostgreSQL.
    pub type_oid: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Binding {
    pub events: EventMask,
    /// None: every schema.
    pub schema: Option<String>,
    /// None: every table of the schema.
    pub table: Option<String>,
    /// All must hold.
    pub filters: Vec<Filter>,
    /// None: every column that the role may read.
    pub select: Option<Vec<String>>,
}

/// What a binding says of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wants {
    Yes,
    /// PostgreSQL has to compare.
    Ask,
    /// A large value that the change left as it was decides, and the image does not hold it.
    Unchanged,
    /// The column was dropped or renamed since it was checked: nobody can tell any more what is wanted.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindingError {
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("No subscription params provided. Please provide at least a `schema` or `table` to subscribe to")]
    Nothing,
    #[error("Error parsing `select` params: columns can be selected of a named table only, not with a wildcard")]
    SelectOfWildcard,
}

impl Binding {
    /// Only `schema`: all its tables. Only `table`: schema `public`. Neither: an error.
    pub fn parse(
        event: &str,
        schema: Option<&str>,
        table: Option<&str>,
        filter: Option<&str>,
        select: Option<&[String]>,
    ) -> Result<Binding, BindingError> {
        let star = |part: Option<&str>| part.filter(|part| *part != "*").map(str::to_owned);
        let (schema, table) = match (schema, table) {
            (None, None) => return Err(BindingError::Nothing),
            (None, Some(table)) => (Some("public".to_owned()), star(Some(table))),
            (schema, table) => (star(schema), star(table)),
        };
        let select = select.filter(|columns| !columns.is_empty()).map(<[String]>::to_vec);
        if select.is_some() && (schema.is_none() || table.is_none()) {
            return Err(BindingError::SelectOfWildcard);
        }
        let conditions = Condition::parse_all(filter.unwrap_or_default())?;
        let unchecked = |condition| Filter { condition, family: Family::Opaque, type_oid: None };
        Ok(Binding {
            events: EventMask::parse(event),
            schema,
            table,
            filters: conditions.into_iter().map(unchecked).collect(),
            select,
        })
    }

    /// None: it does not want the change.
    pub fn wants(&self, change: &Change) -> Option<Wants> {
        if !self.events.has(change.operation) {
            return None;
        }
        let mut wants = Wants::Yes;
        for filter in &self.filters {
            wants = wants.max(filter.holds(change)?);
        }
        Some(wants)
    }
}

impl Filter {
    fn holds(&self, change: &Change) -> Option<Wants> {
        let Some((index, column)) = change.table.column(&self.condition.column) else {
            // Where it was never checked, with a wildcard, this is a table that does not have it.
            return self.type_oid.map(|_| Wants::Gone);
        };
        let cell = filtered_row(change)?.cell(index);
        let family = if self.type_oid == Some(column.type_oid) { self.family } else { Family::Opaque };
        match judge(&self.condition, family, cell) {
            Truth::True => Some(Wants::Yes),
            Truth::Ask => Some(Wants::Ask),
            Truth::Unchanged => Some(Wants::Unchanged),
            // Only what is not part of the key is absent, from the old image of a DELETE: what upstream calls no match.
            Truth::False | Truth::Null | Truth::Absent => None,
        }
    }
}

/// Filters look at the new row, for DELETE at the old one.
pub(crate) fn filtered_row(change: &Change) -> Option<&Row> {
    match change.operation {
        Operation::Insert | Operation::Update => change.new.as_ref(),
        Operation::Delete => change.old.as_ref(),
        Operation::Truncate => None,
    }
}

/// The cell that a filter on the column looks at.
pub(crate) fn filtered_cell<'a>(change: &'a Change, column: &str) -> Option<(&'a Cell, u32)> {
    let (index, column) = change.table.column(column)?;
    Some((filtered_row(change)?.cell(index), column.type_oid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_and_table_have_defaults_and_stars() {
        let b = |schema, table| Binding::parse("insert", schema, table, None, None).map(|b| (b.schema, b.table));
        assert_eq!(b(None, Some("t")).unwrap(), (Some("public".into()), Some("t".into())));
        assert_eq!(b(Some("public"), None).unwrap(), (Some("public".into()), None));
        assert_eq!(b(Some("*"), Some("*")).unwrap(), (None, None));
        assert_eq!(b(None, None).unwrap_err(), BindingError::Nothing);
    }

    #[test]
    fn columns_are_selected_of_a_named_table_only() {
        let select = ["id".to_owned()];
        let b = |table, select| Binding::parse("*", Some("public"), table, None, Some(select)).map(|b| b.select);
        assert_eq!(b(Some("t"), &select).unwrap(), Some(vec!["id".into()]));
        assert_eq!(b(Some("*"), &select).unwrap_err(), BindingError::SelectOfWildcard);
        assert_eq!(b(None, &[]).unwrap(), None);
    }
}
