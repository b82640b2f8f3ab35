//! One topic or stream of a connection as the registry knows it. The pipeline counts in it what it delivers.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use walcast_model::Claims;

use super::{Connection, Identity, LeakKind, Owner, Registry};
use crate::Asked;

pub struct Listed {
    pub id: u64,
    pub connection: u64,
    pub topic: Arc<str>,
    pub owner: Arc<Owner>,
    /// What it listens to, as JSON text: a list of event, schema, table, filter, select.
    pub bindings: Box<str>,
    /// Equal for those that listen to the same; 0 without bindings.
    pub(super) sameness: u64,
    pub(super) since_ms: u64,
    identity: Mutex<Arc<Identity>>,
    delivered: AtomicU64,
    dropped: AtomicU64,
    /// A [`LeakKind`], or 0.
    leak: AtomicU8,
    mirrored: AtomicBool,
    /// What the mirror wrote last, and when: its own.
    written: AtomicU64,
    written_ms: AtomicU64,
}

/// Of one string of a binding, and of all bindings of a topic together, as they are shown.
const SHOWN_CHARACTERS: usize = 1_000;
const SHOWN_BYTES: usize = 16 << 10;

impl Listed {
    pub(super) fn new(
        id: u64,
        connection: &Connection,
        topic: Arc<str>,
        owner: Arc<Owner>,
        asked: &[Asked],
        now_ms: u64,
    ) -> Listed {
        let (bindings, sameness) = bindings(asked);
        Listed {
            id,
            connection: connection.id,
            topic,
            owner,
            sameness,
            bindings,
            since_ms: now_ms,
            identity: Mutex::new(connection.identity.clone()),
            delivered: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            leak: AtomicU8::new(0),
            mirrored: AtomicBool::new(false),
            written: AtomicU64::new(0),
            written_ms: AtomicU64::new(0),
        }
    }

    /// Frames that went into the connection's outbox.
    pub fn delivered(&self, frames: u64) {
        self.delivered.fetch_add(frames, Relaxed);
    }

    /// Frames that it should have been sent and was not: the outbox was full, the token had expired.
    pub fn dropped(&self, frames: u64) {
        self.dropped.fetch_add(frames, Relaxed);
    }

    /// Delivered, dropped.
    pub fn counts(&self) -> (u64, u64) {
        (self.delivered.load(Relaxed), self.dropped.load(Relaxed))
    }

    pub fn identity(&self) -> Arc<Identity> {
        self.identity.lock().clone()
    }

    pub fn leak(&self) -> Option<LeakKind> {
        LeakKind::from_code(self.leak.load(Relaxed))
    }

    pub(super) fn set_leak(&self, kind: Option<LeakKind>) {
        self.leak.store(kind.map_or(0, LeakKind::code), Relaxed);
    }

    /// The mirror has a row of it, or is writing one.
    pub(super) fn is_mirrored(&self) -> bool {
        self.mirrored.load(Relaxed)
    }

    /// The figures that the mirror wrote last, and when.
    pub(super) fn written(&self) -> (u64, u64) {
        (self.written.load(Relaxed), self.written_ms.load(Relaxed))
    }

    pub(super) fn note_written(&self, figures: u64, now_ms: u64) {
        self.written.store(figures, Relaxed);
        self.written_ms.store(now_ms, Relaxed);
    }

    pub(super) fn set_mirrored(&self, mirrored: bool) {
        self.mirrored.store(mirrored, Relaxed);
    }
}

/// In an order of its own, so that the same bindings are the same text; and equal for the same bindings, a number.
fn bindings(asked: &[Asked]) -> (Box<str>, u64) {
    let mut texts: Vec<String> = asked.iter().map(binding).collect();
    texts.sort_unstable();
    let mut hasher = DefaultHasher::new();
    texts.hash(&mut hasher);
    let sameness = if asked.is_empty() { 0 } else { hasher.finish().max(1) };
    let (mut shown, all) = (String::from("["), texts.len());
    for (at, text) in texts.iter().enumerate() {
        if shown.len() + text.len() > SHOWN_BYTES {
            shown.push_str(&json!({ "more": all - at }).to_string());
            break;
        }
        shown.push_str(text);
        shown.push(if at + 1 < all { ',' } else { ' ' });
    }
    shown = shown.trim_end().to_owned();
    shown.push(']');
    (shown.into(), sameness)
}

fn binding(asked: &Asked) -> String {
    let text = |text: &str| Value::from(text.chars().filter(|letter| *letter != '\0').take(SHOWN_CHARACTERS).collect::<String>());
    let mut shown = json!({ "event": text(&asked.event) });
    let parts = [("schema", &asked.schema), ("table", &asked.table), ("filter", &asked.filter)];
    for (name, value) in parts.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))) {
        shown[name] = text(value);
    }
    if let Some(select) = &asked.select {
        shown["select"] = select.iter().map(|column| text(column)).collect();
    }
    shown.to_string()
}

/// The door's hold on a listed topic. Dropping it takes the topic out at once.
pub struct Listing {
    pub(super) entry: Arc<Listed>,
    pub(super) connection: Arc<Connection>,
    pub(super) registry: Arc<Registry>,
}

impl Listing {
    pub fn entry(&self) -> Arc<Listed> {
        self.entry.clone()
    }

    /// A topic goes by the token that it was given last.
    pub fn set_claims(&self, claims: &Claims) {
        let identity = self.registry.identity(claims);
        let shared = &self.connection.identity;
        let identity = if identity == **shared { shared.clone() } else { Arc::new(identity) };
        *self.entry.identity.lock() = identity;
    }
}

impl Deref for Listing {
    type Target = Listed;

    fn deref(&self) -> &Listed {
        &self.entry
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.registry.leave(&self.connection, &self.entry);
    }
}
