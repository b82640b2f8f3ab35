//! What looks like a leak in an application: subscriptions that are opened and never closed.

use std::sync::Arc;

use super::Owner;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LeakKind {
    /// A component whose subscriptions only become more.
    Growing,
    /// The same subscription several times in one connection.
    Duplicate,
    /// A topic without bindings that was never sent anything.
    Unheard,
}

impl LeakKind {
    pub const ALL: [LeakKind; 3] = [LeakKind::Growing, LeakKind::Duplicate, LeakKind::Unheard];

    pub fn as_str(self) -> &'static str {
        match self {
            LeakKind::Growing => "growing",
            LeakKind::Duplicate => "duplicate",
            LeakKind::Unheard => "unheard",
        }
    }

    pub(super) fn code(self) -> u8 {
        self as u8 + 1
    }

    pub(super) fn from_code(code: u8) -> Option<LeakKind> {
        LeakKind::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// One finding, in words.
#[derive(Debug, Clone)]
pub struct Leak {
    pub kind: LeakKind,
    pub owner: Arc<Owner>,
    /// None for what is true of a component as a whole.
    pub connection: Option<u64>,
    pub topic: Option<Arc<str>>,
    pub subscriptions: usize,
    pub text: String,
}

/// Of the last look.
#[derive(Default)]
pub(super) struct Found {
    pub leaks: Vec<Leak>,
}
