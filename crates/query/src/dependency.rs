//! What a query's answer hangs on: a table, or those of its rows whose column has one of a few values.

use walcast_model::TableName;

use crate::known::Family;

/// A value known before the query reads a row: from a parameter, a literal or a claim.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Operand {
    /// The expression as the query has it.
    pub sql: String,
    pub(crate) kind: OperandKind,
    pub(crate) family: Family,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum OperandKind {
    Scalar,
    /// A literal that takes the type of the column.
    Untyped,
    Array,
}

impl Operand {
    /// An expression of type text[]: the values as PostgreSQL prints the column.
    pub(crate) fn values_sql(&self) -> String {
        let sql = &self.sql;
        // Integers are not coerced to the column's width: where that would fail the query itself only finds nothing.
        let text = |value: &str| match self.family {
            Family::Bool => format!("case when ({value})::bool then 't' when not ({value})::bool then 'f' end"),
            Family::Int => format!("({value})::text"),
            Family::Uuid => format!("({value})::uuid::text"),
            Family::Text => format!("({value})::text"),
        };
        match self.kind {
            OperandKind::Scalar => format!("array[{}]::text[]", text(sql)),
            OperandKind::Untyped if self.family == Family::Int => format!("array[({sql})::int8::text]::text[]"),
            OperandKind::Untyped => format!("array[{}]::text[]", text(sql)),
            OperandKind::Array => format!("array(select {} from unnest({sql}) as walcast_v(v))::text[]", text("walcast_v.v")),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Dependency {
    pub table: TableName,
    /// The column and the values it may have; none: every row.
    pub narrow: Option<(String, Vec<Operand>)>,
}

impl Dependency {
    pub fn whole(table: TableName) -> Dependency {
        Dependency { table, narrow: None }
    }
}

/// Drops repetitions, and what a whole-table dependency covers.
pub(crate) fn condense(all: Vec<Dependency>) -> Vec<Dependency> {
    let mut kept: Vec<Dependency> = Vec::new();
    for dependency in &all {
        let covered = dependency.narrow.is_some() && all.iter().any(|d| d.table == dependency.table && d.narrow.is_none());
        if !covered && !kept.contains(dependency) {
            kept.push(dependency.clone());
        }
    }
    kept
}
