//! Named SQL queries: SQL files become cached answers with exact dependencies.
//!
//! [`load_dir`] reads the files, [`Queries`] holds them with a [`Plan`] per role, and running one gives an [`Answer`]
//! with its snapshot and its tags. Knows nothing of sockets or of how answers are kept.
//!
//! | where is … | file |
//! |---|---|
//! | what a query file may say, and is it sound | `file`, `header`, `template`, `check` |
//! | how a table is narrowed to rows | `analyse`, `conjunct`, `select`, `from`, `policy`, `scope`, `constant` |
//! | what the catalog is asked | `gather`, `functions` |
//! | dependencies per role, and why an answer is not kept | `plan`, `error` |
//! | one question, its key, its page | `question`, `key`, `page`, `order` |
//! | the one statement that answers, one or many | `statement`, `run` |
//! | rows of any number | `stream` |
//! | which index or replica identity would help | `advice` |
//! | one statement that looks up many keys | `lookup` |

mod advice;
mod analyse;
mod check;
mod conjunct;
mod constant;
mod dependency;
mod error;
mod explain;
mod file;
mod from;
mod functions;
mod gather;
mod header;
mod key;
mod known;
mod lex;
mod lookup;
mod names;
mod order;
mod page;
mod plan;
mod policy;
mod queries;
mod question;
mod run;
mod scope;
mod select;
mod statement;
mod stream;
mod template;

pub use advice::{Advice, advise};
pub use check::check;
pub use dependency::{Dependency, Operand};
pub use error::{QueryError, Uncacheable};
pub use file::{MAX_FILE_BYTES, NamedQuery, Param, QueryFileError, load_dir};
pub use key::{NAMESPACE_PREFIX, key, namespace};
pub use lookup::lookup_of_many;
pub use page::{Order, PageBy};
pub use plan::{Plan, plan};
pub use queries::Queries;
pub use question::Question;
pub use run::Answer;
pub use stream::RowLines;
pub use template::TagTemplate;
