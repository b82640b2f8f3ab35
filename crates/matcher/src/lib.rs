//! A pure index with two doors: [`tags()`] of a commit, and the subscriptions of a change ([`Index`]).
//! No I/O, no claims, no time.

mod binding;
mod index;
mod tags;

pub use binding::{Binding, BindingError, Equal, EventMask};
pub use index::{Index, SubscriptionId};
pub use tags::{of_table as tags_of_table, tags};
