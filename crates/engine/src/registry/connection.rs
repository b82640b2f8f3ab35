//! One connection as the registry knows it. Its own task and the pipeline count in it; nobody waits for it.

use std::{
    net::IpAddr,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use walcast_hub::Outbox;
use walcast_model::Claims;

use super::{Identity, NewConnection, Owner, Registry, STALE, subscription::Listed};
use crate::{Asked, Vital, registry::Listing, trace::Happened};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    WebSocketV1,
    WebSocketV2,
    Sse,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::WebSocketV1 => "websocket_v1",
            Kind::WebSocketV2 => "websocket_v2",
            Kind::Sse => "sse",
        }
    }
}

/// How a connection or a subscription fares, the worst that is true of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Healthy,
    Leaking,
    Slow,
    Stale,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Healthy => "healthy",
            State::Leaking => "leaking",
            State::Slow => "slow",
            State::Stale => "stale",
        }
    }
}

pub struct Connection {
    pub id: u64,
    pub kind: Kind,
    pub peer: IpAddr,
    pub owner: Arc<Owner>,
    pub identity: Arc<Identity>,
    pub(super) outbox: Outbox,
    pub(super) since_ms: u64,
    heard_ms: AtomicU64,
    /// 0: no ping was answered yet.
    round_trip_us: AtomicU32,
    errors: AtomicU32,
    topics: Mutex<Topics>,
}

#[derive(Default)]
struct Topics {
    listed: Vec<Arc<Listed>>,
    /// Nothing is listed any more: the connection was taken out.
    ended: bool,
}

impl Connection {
    pub(super) fn new(id: u64, new: &NewConnection<'_>, owner: Arc<Owner>, identity: Arc<Identity>, now_ms: u64) -> Connection {
        Connection {
            id,
            kind: new.kind,
            peer: new.peer,
            owner,
            identity,
            outbox: new.outbox.clone(),
            since_ms: now_ms,
            heard_ms: AtomicU64::new(now_ms),
            round_trip_us: AtomicU32::new(0),
            errors: AtomicU32::new(0),
            topics: Mutex::default(),
        }
    }

    /// A ping was answered: smoothed as TCP does, an eighth of the new.
    pub fn pong(&self, took: Duration) {
        let took = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).max(1);
        let before = self.round_trip_us.load(Relaxed);
        let smoothed = if before == 0 { took } else { before - before / 8 + took / 8 };
        self.round_trip_us.store(smoothed.max(1), Relaxed);
    }

    pub fn round_trip(&self) -> Option<Duration> {
        let micros = self.round_trip_us.load(Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros.into()))
    }

    pub fn errors(&self) -> u32 {
        self.errors.load(Relaxed)
    }

    /// Frames and bytes that wait for the socket.
    pub fn queued(&self) -> (usize, usize) {
        self.outbox.queued()
    }

    pub fn listed(&self) -> Vec<Arc<Listed>> {
        self.topics.lock().listed.clone()
    }

    /// Under the lock that ending takes, too: what is seen here has not ended.
    pub(super) fn with_listed<T>(&self, look: impl FnOnce(&[Arc<Listed>]) -> T) -> T {
        look(&self.topics.lock().listed)
    }

    pub(super) fn heard_ms(&self) -> u64 {
        self.heard_ms.load(Relaxed)
    }

    pub(super) fn hear(&self, now_ms: u64) {
        self.heard_ms.store(now_ms, Relaxed);
    }

    pub(super) fn quiet(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms.saturating_sub(self.heard_ms()))
    }

    pub(super) fn state(&self, now_ms: u64) -> State {
        if self.quiet(now_ms) >= STALE {
            State::Stale
        } else if self.outbox.is_full() {
            State::Slow
        } else if self.with_listed(|listed| listed.iter().any(|entry| entry.leak().is_some())) {
            State::Leaking
        } else {
            State::Healthy
        }
    }

    /// False if the connection was taken out meanwhile.
    pub(super) fn add(&self, entry: Arc<Listed>) -> bool {
        let mut topics = self.topics.lock();
        if !topics.ended {
            topics.listed.push(entry);
        }
        !topics.ended
    }

    /// False if it was taken out before, with its connection.
    pub(super) fn take(&self, entry: &Arc<Listed>) -> bool {
        let listed = &mut self.topics.lock().listed;
        let Some(at) = listed.iter().position(|other| Arc::ptr_eq(other, entry)) else { return false };
        listed.swap_remove(at);
        if listed.capacity() > 8 && listed.len() < listed.capacity() / 4 {
            listed.shrink_to_fit();
        }
        true
    }

    pub(super) fn take_all(&self) -> Vec<Arc<Listed>> {
        let mut topics = self.topics.lock();
        topics.ended = true;
        std::mem::take(&mut topics.listed)
    }
}

/// The door's hold on a connection. Dropping it takes the connection out, with all that was listed under it.
pub struct ConnectionHandle {
    pub(super) connection: Arc<Connection>,
    pub(super) registry: Arc<Registry>,
}

impl ConnectionHandle {
    /// Any frame of the client, or for an event stream: its socket took what was sent.
    pub fn heard(&self) {
        self.connection.hear(self.registry.now_ms());
    }

    /// A ping came back with what it carried: when it was sent. Whoever makes one up spoils only his own figure.
    pub fn pong(&self, payload: &[u8]) {
        let Ok(sent_us) = payload.try_into().map(u64::from_be_bytes) else { return };
        self.connection.pong(Duration::from_micros(self.registry.now_us().saturating_sub(sent_us)));
    }

    /// What the client did wrong: a frame that cannot be read, a join that was refused.
    pub fn error(&self, what: Vital) {
        self.connection.errors.fetch_add(1, Relaxed);
        self.registry.vitals.count(what);
        self.registry.trace(Happened { detail: what.error(), ..Happened::of("error", self.connection.id, "") });
    }

    /// A topic or stream was joined, and its client told so.
    pub fn joined(&self, topic: &str) {
        self.registry.vitals.count(Vital::Joined);
        self.registry.trace(Happened::of("join", self.connection.id, topic));
    }

    /// Since the client was last heard.
    pub fn quiet(&self) -> Duration {
        self.connection.quiet(self.registry.now_ms())
    }

    pub fn entry(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    /// Lists a topic or stream, until the listing is dropped. `component`: as the join names itself, else the connection's.
    pub fn list(&self, topic: Arc<str>, component: Option<&str>, claims: &Claims, asked: &[Asked]) -> Listing {
        let registry = &self.registry;
        let connection = &self.connection;
        let owner = match component {
            Some(_) => registry.owners.named(connection.owner.app.as_deref(), component),
            None => connection.owner.clone(),
        };
        let entry = Arc::new(Listed::new(registry.next_id(), connection, topic, owner, asked, registry.now_ms()));
        let listing = Listing { entry, connection: connection.clone(), registry: registry.clone() };
        listing.set_claims(claims);
        registry.enter(connection, listing.entry.clone());
        listing
    }
}

impl Deref for ConnectionHandle {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for ConnectionHandle {
    fn drop(&mut self) {
        self.registry.forget(&self.connection);
    }
}
