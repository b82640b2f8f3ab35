//! What the analyser may know about the database: relations, their columns, views and policies.
//!
//! Filled by the planner from the catalog, or by a test by hand. Pure data: asks nobody.

use std::{collections::HashMap, sync::Arc};

use sqlparser::ast::{Expr, Query};
use walcast_model::TableName;

/// Values of one family compare equal exactly when their texts are equal, whichever members of it meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Int,
    Uuid,
    Bool,
    Text,
}

impl Family {
    /// By a type's name, as the catalog or a person spells it.
    pub fn of(type_name: &str) -> Option<Family> {
        let folded = type_name.trim().to_ascii_lowercase();
        let plain = folded.strip_prefix("pg_catalog.").unwrap_or(&folded);
        let base = plain.split_once('(').map_or(plain, |(base, _)| base).trim();
        Some(match base {
            "int2" | "int4" | "int8" | "smallint" | "int" | "integer" | "bigint" => Family::Int,
            "uuid" => Family::Uuid,
            "bool" | "boolean" => Family::Bool,
            "text" | "varchar" | "character varying" => Family::Text,
            _ => return None,
        })
    }
}

#[derive(Debug, Clone)]
pub struct KnownColumn {
    pub name: String,
    /// None: equality on it says nothing about other columns (floats, domains, case-insensitive text).
    pub family: Option<Family>,
    /// The stream raises `table:column=value` for it.
    pub tagged: bool,
}

#[derive(Debug, Clone)]
pub struct KnownPolicy {
    pub permissive: bool,
    /// For the role that we plan for; others matter behind views that read as their owner.
    pub applies: bool,
    /// None: `using (true)` and its like are Some; None means there is no expression to read.
    pub using: Option<Arc<Expr>>,
}

#[derive(Debug, Clone)]
pub enum Nature {
    Table,
    /// `invoker`: reads its tables as the caller, else as its owner.
    View {
        query: Arc<Query>,
        invoker: bool,
    },
}

#[derive(Debug, Clone)]
pub struct KnownRelation {
    /// As the query names it.
    pub name: TableName,
    /// As the stream names it: a partition goes by its root.
    pub streamed: TableName,
    pub nature: Nature,
    pub columns: Vec<KnownColumn>,
    /// Row security is active for the role that we plan for.
    pub secured: bool,
    pub policies: Vec<KnownPolicy>,
}

/// A name as SQL has it: schema if given, relation.
pub type Reference = (Option<String>, String);

#[derive(Debug, Default)]
pub struct Known {
    pub relations: HashMap<Reference, Arc<KnownRelation>>,
}
