//! Tokens to claims; what these claims may join, see and run. Knows nothing of sockets or cache tiers.
//!
//! [`Tokens`]: a signed token becomes [`walcast_model::Claims`]. [`Rules`]: what a role may read of a table.
//! [`policy`]: may these claims see this row image, told in memory; [`row_visibility`]: asked of PostgreSQL. [`binding_check`]: is this subscription possible at all?

pub mod binding_check;
mod claims_functions;
pub mod policy;
pub mod row_visibility;
mod rules;
mod tokens;

pub use rules::{ColumnRule, PolicyText, Publications, Question, RowRule, Rules, rules_fingerprint};
pub use tokens::{TokenError, Tokens, install_crypto};

/// What this room puts into the database, in order.
pub const MIGRATIONS: &[(&str, &str)] = &[
    ("auth/0001_roles", include_str!("../sql/0001_roles.sql")),
    ("auth/0002_functions", include_str!("../sql/0002_functions.sql")),
];
