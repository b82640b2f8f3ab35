//! The logical messages that Walcast itself writes into the WAL, with prefix `walcast`, as one JSON object each.
//!
//! Anyone may emit a logical message, so a message can only invalidate; it never broadcasts and never authorises.
//! A heartbeat counts only with the nonce of the process that wrote it.
//!
//! ```json
//! {"heartbeat": {"nonce": "…", "at_ms": 1}}
//! {"invalidate": {"tags": ["patients:id=7", "~key:reports:ward-3", "~ns:reports", "~all"], "id": "…"}}
//! {"invalidate": {"selection": {"namespace": "reports", "pattern": "ward-*", "all_of": ["a", "b"], "any_of": ["c"], "soft": true}}}
//! ```
//!
//! `tags` are raised in the tag clock: whoever carries one of them ends. A `selection` ends (or, `soft`, marks as old) the
//! entries that fulfil all that it names. Every member may be left out. The forms are stable: SQL functions write them too.

use serde::{Deserialize, Serialize, de::IgnoredAny};

pub const PREFIX: &str = "walcast";

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Heartbeat {
        nonce: String,
        /// Milliseconds since the writing process started: its own clock, which no one sets back.
        at_ms: u64,
    },
    /// As one commit.
    Invalidate(Invalidate),
}

#[derive(Debug, Default, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Invalidate {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<Selected>,
    /// Of whoever waits for it to come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// Entries that fulfil all of it. With nothing named: every entry.
#[derive(Debug, Default, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Selected {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Over keys: `*` is any text, `?` any one character.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub all_of: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub any_of: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub soft: bool,
}

/// Why a message is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// It wanted to invalidate: it may have meant anything.
    Invalidates,
    /// None of ours.
    Foreign,
}

impl Message {
    /// Longer ones are not looked into.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Tags that one invalidation may name.
    pub const MAX_TAGS: usize = 4_000;

    pub fn parse(content: &[u8]) -> Result<Message, Unreadable> {
        if content.len() > Message::MAX_BYTES {
            return Err(Unreadable::Invalidates);
        }
        match serde_json::from_slice(content) {
            Ok(Message::Invalidate(asked)) if asked.names() > Message::MAX_TAGS => Err(Unreadable::Invalidates),
            Ok(message) => Ok(message),
            Err(_) => Err(unreadable(content)),
        }
    }

    pub fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl Invalidate {
    pub fn names(&self) -> usize {
        self.tags.len() + self.selection.as_ref().map_or(0, |selected| selected.all_of.len() + selected.any_of.len())
    }
}

fn unreadable(content: &[u8]) -> Unreadable {
    let members: Option<std::collections::BTreeMap<String, IgnoredAny>> = serde_json::from_slice(content).ok();
    match members {
        Some(members) if members.contains_key("invalidate") => Unreadable::Invalidates,
        _ => Unreadable::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let selected = Selected { pattern: Some("a*".into()), soft: true, ..Selected::default() };
        for asked in [
            Invalidate { tags: vec!["patients:id=7".into()], id: Some("a".into()), ..Invalidate::default() },
            Invalidate { selection: Some(selected), ..Invalidate::default() },
            Invalidate::default(),
        ] {
            let message = Message::Invalidate(asked);
            assert_eq!(Message::parse(message.text().as_bytes()), Ok(message));
        }
        let heartbeat = Message::Heartbeat { nonce: "x".into(), at_ms: 3 };
        assert_eq!(Message::parse(heartbeat.text().as_bytes()), Ok(heartbeat));
    }

    #[test]
    fn the_forms_that_others_write_are_stable() {
        let check = |text: &str| assert_eq!(Message::parse(text.as_bytes()).unwrap().text(), text);
        check(r#"{"invalidate":{"tags":["patients:id=7","~key:reports:ward-3"],"id":"x"}}"#);
        check(r#"{"invalidate":{"selection":{"namespace":"n","pattern":"a*","all_of":["a","b"],"any_of":["c"],"soft":true}}}"#);
        assert!(Message::parse(br#"{"invalidate":{"tags":["a"],"id":null}}"#).is_ok());
    }

    #[test]
    fn an_invalidation_that_cannot_be_read_is_told_from_what_is_none() {
        for meant in [
            r#"{"invalidate":{"tag":["a"]}}"#,
            r#"{"invalidate":{"tags":"a"}}"#,
            r#"{"invalidate":null}"#,
            r#"{"invalidate":{"selection":{"namespaces":["n"]}}}"#,
            r#"{"invalidate":{"tags":[]},"more":1}"#,
        ] {
            assert_eq!(Message::parse(meant.as_bytes()), Err(Unreadable::Invalidates), "{meant}");
        }
        for foreign in [&b"{\"broadcast\":{}}"[..], b"\xff", b"", b"[]", b"\"invalidate\"", b"line"] {
            assert_eq!(Message::parse(foreign), Err(Unreadable::Foreign), "{foreign:?}");
        }
        let many = Invalidate { tags: vec!["a".into(); Message::MAX_TAGS + 1], ..Invalidate::default() };
        assert_eq!(Message::parse(Message::Invalidate(many).text().as_bytes()), Err(Unreadable::Invalidates), "too much");
        assert_eq!(Message::parse(&vec![b'x'; Message::MAX_BYTES + 1]), Err(Unreadable::Invalidates), "not looked into");
    }
}
