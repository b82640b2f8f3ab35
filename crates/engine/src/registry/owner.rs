//! Whose a connection is: the app and component that it names, and who its token says it is. Shared by all that say the same.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

/// Of each name that a client gives itself.
pub const OWNER_CHARACTERS: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    pub app: Option<Box<str>>,
    pub component: Option<Box<str>>,
}

/// Who a token says its bearer is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    pub tenant: Option<Box<str>>,
    pub role: Box<str>,
    pub subject: Option<Box<str>>,
}

/// One `Arc` for all connections of the same app and component.
#[derive(Default)]
pub(super) struct Owners(Mutex<Known>);

#[derive(Default)]
struct Known {
    by_name: HashMap<Owner, Weak<Owner>>,
    /// The dead ones are swept out when the map has grown to this.
    sweep_at: usize,
}

const SWEEP_LEAST: usize = 256;

impl Owners {
    pub fn named(&self, app: Option<&str>, component: Option<&str>) -> Arc<Owner> {
        let owner = Owner { app: app.and_then(cleaned), component: component.and_then(cleaned) };
        let mut known = self.0.lock();
        if let Some(shared) = known.by_name.get(&owner).and_then(Weak::upgrade) {
            return shared;
        }
        // Clients choose these names: no more are kept than twice what is alive.
        if known.by_name.len() >= known.sweep_at.max(SWEEP_LEAST) {
            known.by_name.retain(|_, shared| shared.strong_count() > 0);
            known.by_name.shrink_to_fit();
            known.sweep_at = known.by_name.len() * 2;
        }
        let shared = Arc::new(owner.clone());
        known.by_name.insert(owner, Arc::downgrade(&shared));
        shared
    }
}

/// Letters that can be shown and logged, at most [`OWNER_CHARACTERS`]; None if nothing is left.
fn cleaned(name: &str) -> Option<Box<str>> {
    let shown = name.trim().chars().filter(|letter| !letter.is_control() && !is_invisible(*letter)).take(OWNER_CHARACTERS);
    let cleaned: String = shown.collect();
    (!cleaned.is_empty()).then(|| cleaned.into())
}

/// Marks that turn a line around or hide in it.
fn is_invisible(letter: char) -> bool {
    matches!(letter, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_name_itself_into_our_lines_or_our_memory() {
        assert_eq!(cleaned("ward\n{\"level\":\"error\"}\u{202E}").as_deref(), Some("ward{\"level\":\"error\"}"));
        assert_eq!(cleaned(&"ü".repeat(1_000)).map(|name| name.chars().count()), Some(OWNER_CHARACTERS));
        assert_eq!(cleaned(" \u{0}\u{200B} "), None);
        let owners = Owners::default();
        let kept = owners.named(Some("app"), Some("kept"));
        (0..10_000).for_each(|n| drop(owners.named(Some("app"), Some(&n.to_string()))));
        assert!(owners.0.lock().by_name.len() <= SWEEP_LEAST, "{}", owners.0.lock().by_name.len());
        assert!(Arc::ptr_eq(&kept, &owners.named(Some("app"), Some("kept"))));
    }
}
