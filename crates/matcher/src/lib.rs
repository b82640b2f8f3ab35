//! A pure index with two doors: the tags of a commit ([`tags()`], and by the config's rules [`TagRules`]), and the
//! subscriptions of a change ([`Index`]).
//! No I/O, no claims, no time.

mod binding;
mod compare;
mod filter;
mod index;
mod rules;
mod tags;
mod template;

pub use binding::{Binding, BindingError, EventMask, Filter, Wants};
pub use filter::{Comparison, Condition, FilterError, Is, Pattern, Test};
pub use index::{Index, SubscriptionId};
pub use rules::{Key, Raised, TagRule, TagRules};
pub use tags::{of_table as tags_of_table, tags};
pub use template::{Filled, Image, Reference, Template, TemplateError};
