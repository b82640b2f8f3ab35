//! A relation as the stream describes it, with what the catalog knows about its columns.

use std::{fmt, sync::Arc};

/// The relation's oid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId(pub u32);

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableName {
    schema: Arc<str>,
    table: Arc<str>,
}

impl TableName {
    pub fn new(schema: &str, table: &str) -> TableName {
        TableName { schema: schema.into(), table: table.into() }
    }

    /// `table` means `public.table`; both parts exactly as the catalog spells them.
    pub fn parse(text: &str) -> TableName {
        match text.split_once('.') {
            Some((schema, table)) => TableName::new(schema, table),
            None => TableName::new("public", text),
        }
    }

    pub fn schema(&self) -> &str {
        &self.schema
    }

    pub fn table(&self) -> &str {
        &self.table
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaIdentity {
    /// The primary key.
    Default,
    Nothing,
    /// The whole old row comes with every UPDATE and DELETE.
    Full,
    Index,
}

/// How PostgreSQL's text form of a type becomes the JSON of `to_jsonb`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueKind {
    Bool,
    /// Integers, floats, numeric: a JSON number, but NaN and infinities are strings.
    Number,
    /// json and jsonb: the value itself.
    Json,
    Date,
    /// `T` between date and time; timestamptz also gets a full `+hh:mm`.
    Timestamp,
    Timestamptz,
    /// Bare hex on the wire.
    Bytea,
    /// Text and everything that `to_jsonb` shows as its text: uuid, enum, range, interval, inet…
    Text,
    /// Elements separated by the delimiter (`,`, and `;` for box).
    Array {
        element: Box<ValueKind>,
        delimiter: char,
    },
    /// Composite types and types with a cast to json: only PostgreSQL's own `to_jsonb` knows. Never guessed.
    ReadBack,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: Arc<str>,
    pub type_oid: u32,
    /// `pg_type.typname`, as clients expect it in `columns[].type`.
    pub type_name: Arc<str>,
    pub kind: ValueKind,
    /// Part of the replica identity.
    pub key: bool,
    /// Changes raise `table:column=value`: the column is in a key, an index or a foreign key, and its type's text is its value.
    pub tagged: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub id: TableId,
    pub name: TableName,
    pub identity: ReplicaIdentity,
    /// In the order of the stream's tuples.
    pub columns: Vec<Column>,
}

impl Table {
    pub fn column(&self, name: &str) -> Option<(usize, &Column)> {
        self.columns.iter().enumerate().find(|(_, column)| &*column.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_public() {
        assert_eq!(TableName::parse("patients"), TableName::new("public", "patients"));
        assert_eq!(TableName::parse("audit.log").to_string(), "audit.log");
    }
}
