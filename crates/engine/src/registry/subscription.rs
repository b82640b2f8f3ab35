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
    pub(super) written: AtomicU64,
    pub(super) written_ms: AtomicU64,
}

impl Listed {
    pub(super) fn new(
        id: u64,
        connection: &Connection,
        topic: Arc<str>,
        owner: Arc<Owner>,
        asked: &[Asked],
        now_ms: u64,
    ) -> Listed {
        let bindings = bindings(asked);
        let mut hasher = DefaultHasher::new();
        bindings.hash(&mut hasher);
        Listed {
            id,
            connection: connection.id,
            topic,
            owner,
            sameness: if asked.is_empty() { 0 } else { hasher.finish().max(1) },
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

    pub(super) fn set_mirrored(&self, mirrored: bool) {
        self.mirrored.store(mirrored, Relaxed);
    }
}

/// In an order of its own, so that the same bindings are the same text.
fn bindings(asked: &[Asked]) -> Box<str> {
    let mut texts: Vec<String> = asked
        .iter()
        .map(|asked| {
            let mut shown = json!({ "event": asked.event });
            let parts = [
                ("schema", asked.schema.clone().map(Value::from)),
                ("table", asked.table.clone().map(Value::from)),
                ("filter", asked.filter.clone().map(Value::from)),
                ("select", asked.select.clone().map(Value::from)),
            ];
            for (name, value) in parts {
                if let Some(value) = value {
                    shown[name] = value;
                }
            }
            shown.to_string()
        })
        .collect();
    texts.sort_unstable();
    format!("[{}]", texts.join(",")).into()
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
