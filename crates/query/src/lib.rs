//! Named SQL queries: SQL files become cached answers with exact dependencies.
//!
//! [`load_dir`] reads the files, [`Queries`] holds them with a [`Plan`] per role, and running one gives an [`Answer`]
//! with its snapshot and its tags. Knows nothing of sockets or of how answers are kept.
//!
//! | where is … | file |
//! |---|---|
//! | what a query file may say | `file` |
//! | how a table is narrowed to rows | `analyse`, `conjunct`, `select`, `from`, `policy`, `scope`, `constant` |
//! | what the catalog is asked | `gather`, `functions` |
//! | dependencies per role, and why an answer is not kept | `plan`, `error` |
//! | the one statement that answers | `run` |
//! | one statement that looks up many keys | `lookup` |

mod analyse;
mod conjunct;
mod constant;
mod dependency;
mod error;
mod explain;
mod file;
mod from;
mod functions;
mod gather;
mod key;
mod known;
mod lex;
mod lookup;
mod names;
mod plan;
mod policy;
mod queries;
mod run;
mod scope;
mod select;

pub use dependency::{Dependency, Operand};
pub use error::{QueryError, Uncacheable};
pub use file::{MAX_FILE_BYTES, NamedQuery, Param, QueryFileError, load_dir};
pub use key::{NAMESPACE_PREFIX, key, namespace};
pub use lookup::lookup_of_many;
pub use plan::{Plan, plan};
pub use queries::Queries;
pub use run::{Answer, run};
