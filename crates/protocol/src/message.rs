//! The logical messages that Walcast itself writes into the WAL, with prefix `walcast`.
//!
//! Anyone may emit a logical message, so a message can only invalidate; it never broadcasts and never authorises.
//! A heartbeat counts only with the nonce of the process that wrote it.

use serde::{Deserialize, Serialize};

pub const PREFIX: &str = "walcast";

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Heartbeat {
        nonce: String,
        /// Milliseconds since the writing process started: its own clock, which no one sets back.
        at_ms: u64,
    },
    /// Raises these tags as one commit.
    Invalidate { tags: Vec<String>, id: Option<String> },
}

impl Message {
    pub fn parse(content: &[u8]) -> Option<Message> {
        serde_json::from_slice(content).ok()
    }

    pub fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let message = Message::Invalidate { tags: vec!["patients:id=7".into()], id: Some("a".into()) };
        assert_eq!(Message::parse(message.text().as_bytes()), Some(message));
        assert_eq!(Message::parse(b"{\"broadcast\":{}}"), None);
        assert_eq!(Message::parse(b"\xff"), None);
    }
}
